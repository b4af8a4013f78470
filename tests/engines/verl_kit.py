"""One actor update on rows that are there: what verl's engine is told, and the same step by this project's trainer.

A row is a dict: `ids` [n] int64, `answer` (how many of the last are the answer), `old_logps` [answer] float32,
`advantage`, and `media`, what a processor made of its pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.geometry import Geometry
from bridge.verify.media import media_sample
from bridge.verify.sample import random_sample

LR, EPS, BETAS, WEIGHT_DECAY, CLIP = 1e-3, 1e-3, (0.9, 0.95), 0.05, 1.0
Row = dict[str, Any]


def make_rows(folder: Path, kinds: tuple[str, ...]) -> list[Row]:
    """Rows of several lengths; of `kinds` (see `media_sample`), or of text."""
    geometry = Geometry.from_folder(folder)
    sample = media_sample(folder, geometry, 0, kinds) if kinds else random_sample(geometry, 0)
    generator, rows = torch.Generator().manual_seed(1), []
    for number, (ids, mask) in enumerate(zip(sample.input_ids, sample.attention_mask, strict=True)):
        real = ids[mask.bool()]
        # Ordinary tokens behind everything that stands for media.
        answer = 4 + 3 * number % 7
        tokens = 8 + torch.randint(0, 100, (answer,), generator=generator)
        rows.append(
            {
                "ids": torch.cat([real, tokens]),
                "answer": answer,
                "old_logps": -5 + 0.5 * torch.randn(answer, generator=generator),
                "advantage": float(torch.randn((), generator=generator)),
                "media": dict(sample.media[number]) if kinds else {},
            }
        )
    return rows


def our_batch(rows: list[Row], geometry: Geometry) -> dict[str, Tensor]:
    """Rows as a microbatch of `recipes.losses.policy`."""
    from recipes.data.collate import join_media

    width = max(len(row["ids"]) for row in rows)
    width += -width % 8
    shape = len(rows), width
    batch = {
        "input_ids": torch.full(shape, geometry.pad_token_id or 0),
        "labels": torch.full(shape, -100),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "sequence_ids": torch.full(shape, -1),
        "sampled_logps": torch.zeros(shape),
        "position_ids": torch.arange(width).expand(shape).contiguous(),
    }
    for number, row in enumerate(rows):
        ids, answer, length = row["ids"], row["answer"], len(row["ids"])
        of_answer = slice(length - answer - 1, length - 1)
        batch["input_ids"][number, :length] = ids
        batch["attention_mask"][number, :length] = 1
        batch["labels"][number, of_answer] = ids[-answer:]
        batch["sequence_ids"][number, of_answer] = number
        batch["sampled_logps"][number, of_answer] = row["old_logps"]
    batch["completion_lengths"] = torch.tensor([row["answer"] for row in rows])
    batch["advantages"] = torch.tensor([row["advantage"] for row in rows], dtype=torch.float64)
    batch["scores"] = torch.zeros(len(rows), 3, dtype=torch.float64)
    if geometry.placeholders is not None:
        types = torch.zeros(shape, dtype=torch.int64)
        for kind, token in geometry.placeholders.by_kind.items():
            types[batch["input_ids"] == token] = {"image": 1, "video": 2, "audio": 3}[kind]
        batch["mm_token_type_ids"] = types * batch["attention_mask"]
    return batch | join_media([row["media"] for row in rows])


def our_step(folder: Path, rows_file: Path, parallel: dict[str, Any], out: Path) -> float:
    """On a rank: one GRPO step of all rows; the loss. The model is saved to `out`."""
    from recipes.config import resolve
    from recipes.losses.grpo import PolicyOptions
    from recipes.losses.policy import PolicyLoss
    from recipes.train.setup import assemble, start_ranks
    from recipes.train.step import clear_gradients, reduce_sums, run_microbatches, update

    rows = torch.load(rows_file, weights_only=True)
    longest = max(len(row["ids"]) for row in rows)
    said = {
        "output": "unused",
        "model": {"hf": str(folder), "dtype": "float32"},
        "parallel": parallel,
        "train": {
            "steps": 1,
            "global_batch_size": len(rows),
            "micro_batch_size": len(rows) // parallel.get("ep", 1),
            "seq_length": longest + -longest % 8,
        },
        "optimizer": {
            "lr": LR,
            "min_lr": LR,
            "schedule": "constant",
            "warmup": 0,
            "weight_decay": WEIGHT_DECAY,
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "eps": EPS,
            "clip": CLIP,
        },
    }
    start_ranks()
    run = assemble(resolve(said), 1, load=True)
    dp = run.groups.dp
    mine = rows[dp.rank() * len(rows) // dp.size() : (dp.rank() + 1) * len(rows) // dp.size()]
    objective = PolicyLoss("grpo", PolicyOptions(max_length=max(row["answer"] for row in rows)), (), on_policy=False)
    clear_gradients(run)
    sums = run_microbatches(run, [our_batch(mine, run.bridge.geometry)], train=True, objective=objective)
    loss, count, *_ = reduce_sums(sums)
    run.scheduler.step(1)
    update(run, float("inf"))
    run.bridge.save_hf(run.models, out)
    return loss / count
