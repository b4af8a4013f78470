"""Prefill and decode, tokens a second, against transformers.generate with a dynamic cache: the same random weights.

python -m benchmarks.generation [--variants e2b 12b] [--size toy] [--rows 1 16] [--new 32] [--rounds 3]
python -m benchmarks.generation --variants e2b --size shallow --rows 1 --prompt 4096 --new 0   # prefill alone
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
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.random_model import SIZES, RandomModel
from bridge.geometry import Geometry
from recipes.simulate.fake_device import flops_formula


def random_ids(geometry: Geometry, rows: int, length: int) -> torch.Tensor:
    """[rows, length] int64, ordinary tokens."""
    generator = torch.Generator().manual_seed(rows * length)
    return torch.randint(8, min(400, geometry.vocab_size), (rows, length), generator=generator)


def our_side(model: RandomModel, clock: LayerClock | None = None) -> Callable[[torch.Tensor, int], None]:
    """Greedy answers of so many tokens to ids [rows, prompt]; `clock` watches the layers."""
    from bridge.generate.loop import Generator
    from bridge.generate.rows import Prompt
    from bridge.generate.sampling import SamplingOptions
    from bridge.megatron.parallel import Parallel, initialize

    bridge = model.bridge()
    groups = initialize(Parallel())
    chunks = bridge.provider(dtype=model.dtype, overrides={"perform_initialization": False}).build(groups)
    bridge.load_hf_weights(chunks)
    on_token = None
    if clock is not None:
        on_token = clock.token
        for layer in chunks[0].decoder.layers:
            clock.watch(layer, layer.layer.kind)

    def generate(ids: torch.Tensor, tokens: int) -> None:
        prompts = [Prompt(tuple(row)) for row in ids.tolist()]
        generator = Generator(chunks, groups, max_rows=len(ids), prefill_tokens=4096, on_token=on_token)
        generator.generate(prompts, SamplingOptions(max_new_tokens=tokens))

    return generate


def their_side(theirs: Any, every_token: bool = False) -> Callable[[torch.Tensor, int], None]:
    """The same of transformers. `every_token`: all of a prompt goes through layers that share keys and values, too."""

    def as_it_is(
        hidden_states: Any, per_layer_inputs: Any, position_embeddings: Any, masks: Any, *_: Any, **__: Any
    ) -> Any:
        return hidden_states, per_layer_inputs, position_embeddings, masks

    def generate(ids: torch.Tensor, tokens: int) -> None:
        options: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
        cut = "_maybe_slice_kv_shared_inputs"
        with torch.no_grad(), mock.patch.object(theirs.model, cut, as_it_is) if every_token else nullcontext():
            theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)

    return generate


# Products of batches of matrices, which attention is made of.
_BATCHES = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


class CountedFlops(TorchDispatchMode):
    """Of the products within. Torch's own FlopCounterMode asks for gradients, and there are none."""

    def __init__(self, weights_only: bool = False) -> None:
        """`weights_only`: without the products of attention."""
        super().__init__()
        self.weights_only = weights_only
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (formula := flops_formula(func.overloadpacket)) is None:
            with self:  # without gradients a linear comes as it is: its products are in what it is made of
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        if formula is not None and not (self.weights_only and func.overloadpacket in _BATCHES):
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def gflops(generate: Callable[[torch.Tensor, int], None], ids: torch.Tensor) -> float:
    """Of a prefill."""
    with CountedFlops() as counter:
        generate(ids, 1)
    return counter.total / 1e9


def seconds(generate: Callable[[torch.Tensor, int], None], ids: torch.Tensor, tokens: int) -> float:
    """Of the processor where one thread works: on a machine with other work the clock on the wall counts that too."""
    start, cpu = time.perf_counter(), time.process_time()
    generate(ids, tokens)
    return time.process_time() - cpu if torch.get_num_threads() == 1 else time.perf_counter() - start


def compare(model: RandomModel, rows: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of both sides: prefill of [rows, prompt], and each further token of all rows."""
    theirs = model.transformers_model(torch.device("cpu"), attn_implementation="sdpa").eval()
    sides = {"ours": our_side(model), "transformers": their_side(theirs)}
    if any(layer.shares_kv for layer in model.geometry.layers):
        sides["transformers, every token"] = their_side(theirs, every_token=True)
    ids = random_ids(model.geometry, rows, prompt)
    prefill: dict[str, list[float]] = {name: [] for name in sides}
    decode: dict[str, list[float]] = {name: [] for name in sides}
    result: dict[str, Any] = {"variant": model.variant, "size": model.size, "rows": rows, "prompt": prompt, "new": new}
    # Products are counted in a prefill that warms up.
    result["prefill GFLOP"] = {name: round(gflops(generate, ids), 1) for name, generate in sides.items()}
    for _ in range(rounds):
        for name, generate in sides.items():
            first = seconds(generate, ids, 1)
            prefill[name].append(rows * prompt / first)
            if new:
                decode[name].append(rows * new / max(1e-9, seconds(generate, ids, new + 1) - first))
    for what, rates in (("prefill", prefill), ("decode", decode)):
        if what == "decode" and not new:
            continue
        result[what] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
        ratios = {name: [a / b for a, b in zip(rates["ours"], rates[name], strict=True)] for name in sides}
        result[what]["ratio"] = {n: round(statistics.median(each), 2) for n, each in ratios.items() if n != "ours"}
    return result


class LayerClock:
    """Seconds of the processor in layers of a kind, for each token that is decoded."""

    def __init__(self) -> None:
        self._now: dict[str, float] = {}
        self._started = 0.0
        self.tokens: list[dict[str, float]] = []

    def watch(self, layer: torch.nn.Module, kind: str) -> None:
        """Add a layer."""

        def start(*_: Any) -> None:
            self._started = time.process_time()

        def stop(*_: Any) -> None:
            self._now[kind] = self._now.get(kind, 0.0) + time.process_time() - self._started

        layer.register_forward_pre_hook(start)
        layer.register_forward_hook(stop)

    def token(self, index: int, sample: int, token: int) -> None:
        """A token is there: what was counted since the last one is its."""
        self.tokens.append(self._now)
        self._now = {}


def far(model: RandomModel, positions: list[int], new: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of a token behind prompts of those lengths in layers of either kind, and what their caches hold.

    The positions take turns, so that what else the machine does meets all of them.
    """
    from bridge.generate.memory import cache_bytes

    clock, geometry = LayerClock(), model.geometry
    generate = our_side(model, clock)
    found: dict[int, list[dict[str, float]]] = {position: [] for position in positions}
    for _ in range(rounds):
        for position in positions:
            clock.tokens.clear()
            generate(random_ids(geometry, 1, position), new + 1)
            found[position] += clock.tokens[1:]  # the first one is of the prefill
    for position, tokens in found.items():
        line: dict[str, Any] = {"variant": model.variant, "size": model.size, "position": position}
        for kind in sorted(tokens[0]):
            line[f"{kind}, ms"] = round(1e3 * statistics.median(token[kind] for token in tokens), 3)
            layers = [layer.index for layer in geometry.layers if layer.kind == kind]
            line[f"{kind}, cache MB"] = round(cache_bytes(geometry, layers, 1, position + new, 4) / 1e6, 3)
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["e2b"])
    parser.add_argument("--size", choices=SIZES, default="toy")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32, help="tokens decoded; 0: prefill alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--positions", nargs="*", type=int, default=[], help="what a token costs there, ours alone")
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
