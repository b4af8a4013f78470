"""Tokens a second of the trainer against a plain transformers and torch loop: the same toy, batches and optimizer.

python benchmarks/trainer.py [--variant e2b] [--steps 20] [--rounds 3]

Both run in one process with as many threads, in turns, and the first steps of each turn are not counted. The plain loop
does what a short script does: forward, cross entropy, backward, clipping, AdamW. Figures are the median of the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bridge.geometry import Geometry
from bridge.toy import write_toy

WARM = 3
LR, CLIP = 1e-3, 1.0


def batches(geometry: Geometry, rows: int, length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random text without padding."""
    allowed = torch.tensor([i for i in range(8, geometry.vocab_size) if i not in geometry.placeholder_ids])
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        ids = allowed[torch.randint(len(allowed), (rows, length + 1), generator=generator)]
        yield {
            "input_ids": ids[:, :-1],
            "labels": ids[:, 1:].contiguous(),
            "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        }


def plain(folder: Path, geometry: Geometry, rows: int, length: int) -> Iterator[None]:
    """A step of the plain loop at every turn."""
    import transformers

    model = getattr(transformers, geometry.architecture).from_pretrained(
        folder, dtype=torch.float32, attn_implementation={"text_config": "sdpa"} if geometry.audio else "sdpa"
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for batch in batches(geometry, rows, length):
        optimizer.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        loss.item()
        yield


def trainer(folder: Path, geometry: Geometry, rows: int, length: int) -> Iterator[None]:
    """A step of the training loop, logging and all, at every turn."""
    from recipes.config import resolve
    from recipes.train import loop
    from recipes.train.checkpoint import RunProgress
    from recipes.train.data import Streams
    from recipes.train.log import Log
    from recipes.train.setup import build
    from recipes.train.signals import StopSignal

    class Endless:
        def __init__(self) -> None:
            self.batches = batches(geometry, rows, length)

        def __next__(self) -> dict[str, torch.Tensor]:
            return next(self.batches)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    output = folder.with_name("run")
    said = {
        "output": str(output),
        "model": {"hf": str(folder), "dtype": "float32"},
        "train": {"steps": 1_000_000, "global_batch_size": rows, "micro_batch_size": rows, "seq_length": length},
        "optimizer": {"lr": LR, "schedule": "constant", "clip": CLIP},
    }
    recipe = resolve(said)
    run = build(recipe, load=True)
    one = loop._Loop(run, Streams(Endless()), RunProgress(), Log(recipe, 0), StopSignal())
    while True:
        one._step()
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="e2b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="where a step of the trainer spends its time")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "toy"
        write_toy(said.variant, folder, dtype="float32")
        geometry = Geometry.from_folder(folder)
        # The runtime that stands in for a GPU comes on with the trainer, and slows the plain loop a little as well.
        loops = {}
        loops["transformers"] = plain(folder, geometry, said.rows, said.length)
        next(loops["transformers"])
        loops["trainer"] = trainer(folder, geometry, said.rows, said.length)
        rates: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(said.rounds):
            for name, steps in loops.items():
                for _ in range(WARM):
                    next(steps)
                start, cpu = time.perf_counter(), time.process_time()
                for _ in range(said.steps):
                    next(steps)
                # Of the processor's time: on a machine with other work the clock on the wall counts that too.
                seconds = time.process_time() - cpu if torch.get_num_threads() == 1 else time.perf_counter() - start
                rates[name].append(said.steps * said.rows * said.length / seconds)
        if said.profile:
            with torch.profiler.profile() as profile:
                next(loops["trainer"])
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
        result: dict[str, Any] = {name: round(statistics.median(values)) for name, values in rates.items()}
        pairs = zip(rates["trainer"], rates["transformers"], strict=True)
        result["ratio"] = round(statistics.median(ours / theirs for ours, theirs in pairs), 3)
        print(json.dumps({"variant": said.variant, "rows": said.rows, "length": said.length, **result}))


if __name__ == "__main__":
    main()
