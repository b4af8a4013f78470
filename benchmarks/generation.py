"""Prefill and decode, tokens a second, against transformers.generate with a dynamic cache: the same random weights.

python -m benchmarks.generation [--variants e2b 12b] [--size toy] [--rows 1 16] [--new 32] [--rounds 3]
python -m benchmarks.generation --positions 2048 16384        # what a token costs far into a row, ours alone

Both run in one process with as many threads, in turns; figures are medians of the rounds, the ratio is of pairs.
"shallow" has the published widths and few layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.random_model import SIZES, RandomModel
from bridge.geometry import Geometry


def random_ids(geometry: Geometry, rows: int, length: int) -> torch.Tensor:
    """[rows, length] int64, ordinary tokens."""
    generator = torch.Generator().manual_seed(rows * length)
    return torch.randint(8, min(400, geometry.vocab_size), (rows, length), generator=generator)


def our_side(model: RandomModel) -> Callable[[torch.Tensor, int], None]:
    """Greedy answers of so many tokens to ids [rows, prompt]."""
    from bridge.generate.loop import Generator
    from bridge.generate.rows import Prompt
    from bridge.generate.sampling import SamplingOptions
    from bridge.megatron.parallel import Parallel, initialize

    bridge = model.bridge()
    groups = initialize(Parallel())
    chunks = bridge.provider(dtype=model.dtype, overrides={"perform_initialization": False}).build(groups)
    bridge.load_hf_weights(chunks)

    def generate(ids: torch.Tensor, tokens: int) -> None:
        prompts = [Prompt(tuple(row)) for row in ids.tolist()]
        generator = Generator(chunks, groups, max_rows=len(ids), prefill_tokens=4096)
        generator.generate(prompts, SamplingOptions(max_new_tokens=tokens))

    return generate


def their_side(model: RandomModel) -> Callable[[torch.Tensor, int], None]:
    """The same of transformers, with sdpa."""
    theirs = model.transformers_model(torch.device("cpu"), attn_implementation="sdpa").eval()

    def generate(ids: torch.Tensor, tokens: int) -> None:
        options: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
        with torch.no_grad():
            theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)

    return generate


def seconds(generate: Callable[[torch.Tensor, int], None], ids: torch.Tensor, tokens: int) -> float:
    """Of the processor where one thread works: on a machine with other work the clock on the wall counts that too."""
    start, cpu = time.perf_counter(), time.process_time()
    generate(ids, tokens)
    return time.process_time() - cpu if torch.get_num_threads() == 1 else time.perf_counter() - start


def compare(model: RandomModel, rows: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of both sides: prefill of [rows, prompt], and each further token of all rows."""
    sides = {"ours": our_side(model), "transformers": their_side(model)}
    ids = random_ids(model.geometry, rows, prompt)
    prefill: dict[str, list[float]] = {name: [] for name in sides}
    decode: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, generate in sides.items():
            first = seconds(generate, ids, 1)
            whole = seconds(generate, ids, new + 1)
            if round_:  # the first one warms up
                prefill[name].append(rows * prompt / first)
                decode[name].append(rows * new / max(1e-9, whole - first))
    result: dict[str, Any] = {"variant": model.variant, "size": model.size, "rows": rows, "prompt": prompt, "new": new}
    for what, rates in (("prefill", prefill), ("decode", decode)):
        pairs = zip(rates["ours"], rates["transformers"], strict=True)
        result[what] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
        result[what]["ratio"] = round(statistics.median(a / b for a, b in pairs), 2)
    return result


def far(model: RandomModel, positions: list[int], new: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds of a token behind prompts of those lengths, ours."""
    generate = our_side(model)
    for position in positions:
        ids = random_ids(model.geometry, 1, position)
        costs = []
        for _ in range(rounds):
            first = seconds(generate, ids, 1)
            costs.append((seconds(generate, ids, new + 1) - first) / new)
        yield {"variant": model.variant, "position": position, "ms a token": round(1e3 * statistics.median(costs), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["e2b"])
    parser.add_argument("--size", choices=SIZES, default="toy")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--positions", nargs="*", type=int, default=[])
    said = parser.parse_args()
    from bridge.megatron import cpu_runtime

    cpu_runtime.enable()
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    base = RandomModel(said.variants[0], getattr(torch, said.dtype), said.size)
    for variant in said.variants:
        model = replace(base, variant=variant)
        if said.positions:
            for line in far(model, said.positions, said.new, said.rounds):
                print(json.dumps(line), flush=True)
            continue
        for rows in said.rows:
            print(json.dumps(compare(model, rows, said.prompt, said.new, said.rounds)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
