"""What training at the published sizes holds and computes, counted on a device that computes nothing.

    python -m benchmarks.full_size                                  # train_gpu's cases of text, a minute each
    python -m benchmarks.full_size --cases lora/12b lora/31b/8192   # those whose name holds one of these texts
    python -m benchmarks.full_size --cases lora/12b --json          # a line of JSON for each instead of the table

Ours is the training loop's own step: microbatch to the device, forward and backward pass, norm, clipping, update. Its
recompute is the least with which the project's estimate fits into --gpu-memory. Theirs is transformers + PEFT with
gradient checkpointing, as in `training_sides.py`, twice: as it comes, and without its loss (the sum of the last hidden
states instead: what a fused loss could reach at best). Its attention costs what ours does, its masks nothing. No figure
here was measured on a GPU. The device: `recipes/simulate/fake_device.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.cases import cases as gpu_cases
from benchmarks.cases import ladder
from benchmarks.random_model import RandomBridge
from benchmarks.training_sides import recipe_of, transformers_step
from bridge.flops import decoder_flops, head_flops
from bridge.mapping import table_for
from bridge.megatron.loss import linear_cross_entropy
from bridge.token_ids import IGNORE
from recipes.memory.estimate import estimate
from recipes.memory.recipe import plan_of
from recipes.simulate.fake_device import FakeDevice
from recipes.simulate.stand_ins import DEVICE, attend_as_transformers

_ATTENTION = "counted"


@dataclass(frozen=True)
class Counted:
    """Of one step: bytes between steps, and at most by moment; FLOPs of products; who read from the device, or sent.

    `left`: bytes that are still held behind it, as long as Python does not look for rings of objects.
    """

    persistent: int
    peaks: dict[str, int]
    flops: int
    left: int = 0
    reads: dict[str, dict[str, int]] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    at_peak: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


@dataclass(frozen=True)
class _EmptyBridge(RandomBridge):
    """A model whose weights stay as they are made."""

    def load_hf_weights(self, model: Sequence[torch.nn.Module]) -> None: ...


def count_ours(case: Case, loss: str | None = None, **lora: Any) -> Counted:
    """A step of one microbatch, on one rank. `loss`: of preferences, of which each half of a row is an answer;
    `lora`: changes to the recipe's group of that name."""
    from recipes.check import check_recipe
    from recipes.train.setup import assemble, start_ranks
    from recipes.train.step import clear_gradients, reduce_sums, run_microbatches, update

    recipe = recipe_of(case)
    recipe.train.global_batch_size = 1
    recipe.lora = replace(recipe.lora, **lora)
    recipe.preference.loss = loss
    start_ranks()
    bridge = case.model.bridge()
    with FakeDevice() as device, _without_collector():
        run = assemble(
            recipe,
            check_recipe(recipe, 1),
            load=True,
            bridge=_EmptyBridge(bridge.geometry, bridge.table, model=case.model),
        )
        batches = [batch if loss is None else _as_pair(batch) for batch in islice(case.batches(), 1)]
        # The first update makes the optimizer's state.
        run.scheduler.step(1)
        update(run, float("inf"))
        gc.collect()
        persistent = device.held
        device.restart()
        clear_gradients(run)
        sums = run_microbatches(run, batches, train=True)
        passes = device.snapshot()
        device.restart()
        reduce_sums(sums)
        run.scheduler.step(1)
        update(run, float("inf"))
        after = device.snapshot()
        del sums
        left = device.held - persistent
    return Counted(
        persistent,
        {"passes": passes.peak, "update": after.peak},
        passes.flops,
        left,
        {"passes": passes.reads, "update": after.reads},
        passes.copies,
        passes.at_peak,
    )


def _as_pair(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = batch["labels"]
    half = (torch.arange(labels.shape[1]) >= labels.shape[1] // 2).long().expand_as(labels)
    numbers = torch.where(labels != IGNORE, half, -1)
    lengths = torch.stack([(numbers == answer).sum() for answer in (0, 1)])
    return batch | {"sequence_ids": numbers, "completion_lengths": lengths}


def count_theirs(case: Case, loss: bool) -> Counted:
    """A step of transformers, and PEFT, with gradient checkpointing; `loss` as of `transformers_step`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, attend_as_transformers)
    AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)
    with FakeDevice() as device:
        step = transformers_step(case, DEVICE, _ATTENTION, loss)
        step()
        gc.collect()
        persistent = device.held
        device.restart()
        step()
        found = device.snapshot()
    return Counted(persistent, {"step": found.peak}, found.flops)


def count_loss(case: Case) -> int:
    """Bytes that the loss of a row takes beside its arguments and their gradients, forward and backward pass."""
    geometry, trained = case.model.geometry, case.side == "head trained"
    with FakeDevice() as device:
        hidden, weight = (
            torch.empty(n, geometry.hidden_size, dtype=case.model.dtype, device=DEVICE)
            for n in (case.length, geometry.vocab_size)
        )
        labels = torch.zeros(1, case.length, dtype=torch.int64, device=DEVICE)
        positions = torch.arange(case.length, device=DEVICE)
        device.restart()
        given = device.held
        losses = linear_cross_entropy(
            hidden[:, None].requires_grad_(),
            weight.requires_grad_(trained),
            labels,
            softcap=30.0,
            label_positions=positions,
        )
        losses.sum().backward()
        gradients = hidden.nbytes + weight.nbytes * trained
        return device.peak - given - gradients


@contextmanager
def _without_collector() -> Iterator[None]:
    """What lives on in rings of objects is held in training too, and counts."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


def linear_flops(case: Case) -> int:
    """Of one microbatch, by the formula of `training_flops`, without the products of attention."""
    geometry = case.model.geometry
    return (2 if case.lora else 3) * case.length * (decoder_flops(geometry) + head_flops(geometry))


def estimated(case: Case) -> int:
    """Bytes that the project's own estimate says, without its reserve."""
    table = table_for(case.model.geometry)
    return estimate(table, plan_of(recipe_of(case), 1, table)).total


def cases() -> list[Case]:
    """Those of text that `train_gpu` runs on one GPU, and of the loss."""
    ours = [case for case in gpu_cases() if case.mode == "loss" or (case.side == "ours" and not case.media)]
    return [case for case in ours if case.layer_spec == "local" and case.kernels == "auto" and not case.fp8_experts]


def measure(case: Case, memory: float, theirs: bool) -> dict[str, Any]:
    """A row of the table."""
    if case.mode == "loss":
        return {"case": case.name, "recompute": "", "ours_gb": count_loss(case) / 1e9}
    rungs, _ = ladder(case, memory)
    case = replace(case, recompute=(rungs[0] if rungs else replace(case, recompute="full")).recompute)
    ours, guess = count_ours(case), estimated(case)
    row: dict[str, Any] = {
        "case": case.name,
        "recompute": case.recompute,
        "ours_gb": ours.peak / 1e9,
        "estimate_gb": guess / 1e9,
        "estimate_ratio": guess / ours.peak,
        "flops_ratio": ours.flops / linear_flops(case),
        "ours": asdict(ours),
    }
    if theirs:
        for name, loss in (("theirs", True), ("theirs_without_loss", False)):
            gc.collect()
            other = count_theirs(replace(case, side="transformers"), loss)
            row |= {f"{name}_gb": other.peak / 1e9, f"{name}_ratio": ours.peak / other.peak}
    return row


_COLUMNS = (
    ("ours_gb", "counted GB", ".1f"),
    ("estimate_gb", "estimate GB", ".1f"),
    ("estimate_ratio", "estimate/counted", ".3f"),
    ("theirs_gb", "theirs GB", ".1f"),
    ("theirs_ratio", "ours/theirs", ".2f"),
    ("theirs_without_loss_gb", "theirs without loss GB", ".1f"),
    ("theirs_without_loss_ratio", "ours/theirs without loss", ".2f"),
    ("flops_ratio", "FLOPs counted/formula", ".3f"),
)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| case | recompute | " + " | ".join(title for _, title, _ in _COLUMNS) + " |", "|---" * 10 + "|"]
    for row in rows:
        cells = [format(row[key], shape) if key in row else "" for key, _, shape in _COLUMNS]
        lines.append(f"| {row['case'].removesuffix('/ours')} | {row['recompute']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[""], metavar="TEXT", help="those whose name holds one of these")
    parser.add_argument(
        "--gpu-memory", type=float, default=141.0, metavar="GB", help="what recompute is chosen for [141]"
    )
    parser.add_argument("--ours", action="store_true", help="do not count transformers")
    parser.add_argument("--list", action="store_true", help="only name the cases")
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of a table")
    said = parser.parse_args()
    chosen = [case for case in cases() if any(text in case.name for text in said.cases)]
    if said.list:
        print("\n".join(case.name for case in chosen))
        return 0
    rows = []
    for case in chosen:
        rows.append(measure(case, said.gpu_memory * 1e9, not said.ours))
        print(
            json.dumps(rows[-1]) if said.json else f"{case.name}: done",
            flush=True,
            file=sys.stdout if said.json else sys.stderr,
        )
    if not said.json:
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
