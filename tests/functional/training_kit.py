"""Runs for the training tests: a tiny deterministic corpus, the trainer on it, and the plain loop it is held against.

What ranks call lives here, so that they import nothing but this.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bridge.geometry import Geometry

LENGTH, GLOBAL_BATCH, IGNORE = 40, 4, -100
LR, MIN_LR, WARMUP, WEIGHT_DECAY, CLIP = 2e-3, 2e-4, 3, 0.05, 1.0


def sample(geometry: Geometry, seed: int, index: int, padded: bool = True) -> dict[str, torch.Tensor]:
    """Sample `index` of the corpus, [LENGTH] each: a noisy count, so that there is something to learn, right-padded."""
    generator = torch.Generator().manual_seed(10_000 * seed + index)
    length = LENGTH - int(torch.randint(0, 12, (1,), generator=generator)) * padded
    start, step = (int(v) for v in torch.randint(8, 60, (2,), generator=generator))
    ids = 8 + (start + step * torch.arange(length)) % 120
    ids = torch.where(torch.rand(length, generator=generator) < 0.1, 9, ids)
    assert not set(ids.tolist()) & set(geometry.placeholder_ids)
    pad = LENGTH - length
    labels = torch.cat([ids[1:], torch.tensor([IGNORE])])
    labels[: int(torch.randint(2, 12, (1,), generator=generator))] = IGNORE
    return {
        "input_ids": torch.nn.functional.pad(ids, (0, pad), value=geometry.pad_token_id or 0),
        "labels": torch.nn.functional.pad(labels, (0, pad), value=IGNORE),
        "attention_mask": torch.nn.functional.pad(torch.ones(length, dtype=torch.int64), (0, pad)),
        "position_ids": torch.arange(LENGTH),
    }


def collate(geometry: Geometry, seed: int, indices: range, padded: bool = True) -> dict[str, torch.Tensor]:
    rows = [sample(geometry, seed, index, padded) for index in indices]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def pack(batch: dict[str, torch.Tensor], per_row: int) -> dict[str, torch.Tensor]:
    """Every `per_row` rows of a batch as the documents of one row of their common length, without padding between."""
    kept = batch["attention_mask"].bool()
    width, bounds, rows = per_row * LENGTH, [0], []
    for start in range(0, len(kept), per_row):
        row = {}
        for name, tensor in batch.items():
            parts = [tensor[i][kept[i]] for i in range(start, start + per_row)]
            joined = torch.cat(parts)
            fill = {"labels": IGNORE}.get(name, 0)
            row[name] = torch.nn.functional.pad(joined, (0, width - len(joined)), value=fill)
            if name == "input_ids":
                at = start // per_row * width
                bounds += [at + int(end) for end in torch.tensor([len(part) for part in parts]).cumsum(0)] + [
                    at + width
                ]
        rows.append(row)
    packed = {name: torch.stack([row[name] for row in rows]) for name in batch}
    return packed | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}


@dataclass(frozen=True)
class Trouble:
    """What happens to a rank while it fetches the first microbatch of a step (1-based)."""

    step: int = 0
    rank: int = 0
    signal: int = signal.SIGKILL


def fall_into(trouble: Trouble, taken: int) -> None:
    """Let it happen, if it is time after `taken` samples and this is the rank."""
    if taken == (trouble.step - 1) * GLOBAL_BATCH and torch.distributed.get_rank() == trouble.rank:
        os.kill(os.getpid(), trouble.signal)


@dataclass
class Corpus:
    """This rank's microbatches: rows of every global batch go to the ranks in turn."""

    geometry: Geometry
    seed: int
    dp_rank: int
    dp_size: int
    rows: int
    trouble: Trouble = field(default_factory=Trouble)
    per_row: int = 1  # samples in a row; packed where there are more
    padded: bool = True
    taken: int = 0  # samples, by all ranks together

    def __next__(self) -> dict[str, torch.Tensor]:
        fall_into(self.trouble, self.taken)
        count = self.rows * self.per_row
        start = self.taken + self.dp_rank * count
        self.taken += count * self.dp_size
        batch = collate(self.geometry, self.seed, range(start, start + count), self.padded)
        return batch if self.per_row == 1 else pack(batch, self.per_row)

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["samples"]


def toy_streams(trouble: Trouble | None = None) -> Callable[..., Any]:
    """The corpus as the trainer takes data, `Streams` of a rank; evaluation is of one global batch of other samples."""
    from recipes.config import Recipe
    from recipes.train.data import Streams

    def data(recipe: Recipe, geometry: Geometry, dp_rank: int, dp_size: int) -> Streams:
        rows = recipe.train.micro_batch_size

        def evaluation() -> Iterator[dict[str, torch.Tensor]]:
            held_out = Corpus(geometry, recipe.train.seed + 1, dp_rank, dp_size, rows)
            return (next(held_out) for _ in range(GLOBAL_BATCH // rows // dp_size))

        stream = Corpus(geometry, recipe.train.seed, dp_rank, dp_size, rows, trouble or Trouble())
        # Routers see padding, which is not the same in transformers' masks.
        stream.padded = not recipe.train.aux_loss
        if recipe.data.packing:
            stream.per_row = GLOBAL_BATCH // recipe.train.global_batch_size
        return Streams(stream, {"": evaluation})

    return data


def train_toy(said: dict[str, Any], overrides: list[str], trouble: Trouble | None = None) -> tuple[bool, int]:
    """Train a recipe on the corpus; (stopped, last step). Runs on every rank."""
    from recipes.config import resolve
    from recipes.train.loop import train

    outcome = train(resolve(said, overrides), toy_streams(trouble))
    return outcome.stopped, outcome.step


def recipe(toy: Path, output: Path, steps: int, seed: int = 1) -> dict[str, Any]:
    """The run of all tests."""
    return {
        "output": str(output),
        "model": {"hf": str(toy), "dtype": "float32"},
        "train": {
            "steps": steps,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": 2,
            "seq_length": LENGTH,
            "seed": seed,
        },
        "optimizer": {
            "lr": LR,
            "min_lr": MIN_LR,
            "warmup": min(WARMUP, steps - 1),
            "schedule": "cosine",
            "weight_decay": WEIGHT_DECAY,
            "beta2": 0.95,
            "clip": CLIP,
        },
    }


def losses(output: Path, name: str = "loss") -> list[float]:
    """What a run logged under `name`, a value per step."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return [line[name] for line in steps]


@dataclass(frozen=True)
class Plain:
    """What the plain loop computed, a value per step.

    `margin`: by how much, of the largest router logit, the last expert that was chosen ever led the first that was
    not. Where float32 noise (1e-6) reaches it, another expert is chosen, and no two programs train alike from there.
    `balances`: the auxiliary loss without its factor, mean over layers and microbatches, where it is asked for.
    """

    losses: list[float]
    norms: list[float]
    margin: float
    balances: list[float]


class RouterMargins:
    """The smallest `Plain.margin` that the routers of a transformers model had at `real` tokens (bool, flat)."""

    def __init__(self, model: torch.nn.Module, geometry: Geometry) -> None:
        self.real, self.smallest, self._geometry = torch.zeros(0, dtype=torch.bool), math.inf, geometry
        for name, module in model.named_modules():
            if name.endswith("router.proj"):
                module.register_forward_hook(self._note)

    def _note(self, module: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> None:
        assert self._geometry.moe is not None
        topk = self._geometry.moe.topk
        ordered = logits.detach().flatten(0, -2)[self.real].sort(descending=True).values
        lead = ordered[:, topk - 1] - ordered[:, topk]
        self.smallest = min(self.smallest, float((lead / ordered.abs().amax(-1)).min()))


class Balance:
    """The auxiliary loss of Switch Transformers (arXiv 2101.03961, section 2.2) of transformers' routers, as written
    there: experts times the sum over them of (share of the top-k choices) x (mean probability), of each layer and
    microbatch.
    """

    def __init__(self, model: torch.nn.Module, geometry: Geometry) -> None:
        self.losses: list[torch.Tensor] = []
        assert geometry.moe is not None
        self._moe = geometry.moe
        for name, module in model.named_modules():
            if name.endswith("router.proj"):
                module.register_forward_hook(self._note)

    def _note(self, module: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> None:
        experts, topk = self._moe.num_experts, self._moe.topk
        for part in logits.view(-1, 2 * LENGTH, experts):  # rows of a microbatch
            chosen = torch.nn.functional.one_hot(part.topk(topk).indices, experts).sum(1).float()
            self.losses.append(experts * (chosen.mean(0) / topk * part.softmax(-1).mean(0)).sum())

    def take(self, microbatches: int) -> torch.Tensor:
        """The sum over layers, mean over microbatches."""
        total = torch.stack(self.losses).sum() / microbatches
        self.losses.clear()
        return total


def rate(step: int, steps: int) -> float:
    """A cosine, by the step from 1: behind the warm-up transformers' `cosine_with_min_lr` (unit/test_schedules.py)."""
    if step <= WARMUP:
        return LR * step / (WARMUP + 1)
    return MIN_LR + (LR - MIN_LR) * 0.5 * (math.cos(math.pi * (step - 1 - WARMUP) / (steps - WARMUP)) + 1)


def plain_loop(
    toy: str, steps: int, seed: int = 1, aux_loss: float = 0.0, factors: dict[str, float] | None = None
) -> Plain:
    """The same training with transformers and torch alone. `factors`: of the rates of parameters whose names have the
    keys in them."""
    from bridge.verify.reference import load_hf

    geometry = Geometry.from_folder(toy)
    model = load_hf(Path(toy), geometry, torch.float32).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [parameter],
            "weight_decay": WEIGHT_DECAY if parameter.ndim > 1 else 0.0,
            "factor": next((factor for key, factor in (factors or {}).items() if key in name), 1.0),
        }
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    plain, margins = Plain([], [], math.inf, []), RouterMargins(model, geometry)
    balance = Balance(model, geometry) if aux_loss else None
    for step in range(1, steps + 1):
        batch = collate(geometry, seed, range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH), padded=not aux_loss)
        margins.real = batch["attention_mask"].flatten().bool()
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * rate(step, steps)
        optimizer.zero_grad()
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
        objective = loss
        if balance is not None:
            spread = balance.take(GLOBAL_BATCH // 2)
            plain.balances.append(float(spread) / geometry.num_layers)
            objective = loss + aux_loss * spread
        objective.backward()
        plain.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        plain.losses.append(loss.item())
    return Plain(plain.losses, plain.norms, margins.smallest, plain.balances)
