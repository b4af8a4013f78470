"""Runs on rows with pictures and sounds, some steps and some ranks without: the trainer and the plain loop."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bridge.geometry import Geometry
from bridge.megatron.visibility import GENERATE
from bridge.verify.sample import VerificationSample

from .training_kit import CLIP, GLOBAL_BATCH, LR, WEIGHT_DECAY, Trouble, fall_into, rate

MEDIA_LENGTH = 168
# What the four rows of a step are, step after step. One step has no picture at all, and in another only one of two
# data-parallel ranks has any.
PICTURES = (
    ("image", "text", "two images", "text"),
    ("text", "text", "text", "text"),
    ("text", "text", "image", "text"),
)
SOUNDS = (
    ("image, audio, text", "text", "text", "audio"),
    ("text", "text", "text", "text"),
    ("image", "text", "text", "text"),
    ("text", "text", "audio", "text"),
)


@dataclass
class MediaCorpus:
    """This rank's microbatches, as `training_kit.Corpus` gives them: of `kinds`, without end."""

    folder: Path
    geometry: Geometry
    kinds: tuple[tuple[str, ...], ...]
    dp_rank: int = 0
    dp_size: int = 1
    rows: int = GLOBAL_BATCH
    trouble: Trouble = field(default_factory=Trouble)
    taken: int = 0

    def __next__(self) -> dict[str, torch.Tensor]:
        fall_into(self.trouble, self.taken)
        start = self.taken + self.dp_rank * self.rows
        self.taken += self.rows * self.dp_size
        rows = [self._row(index) for index in range(start, start + self.rows)]
        sample = VerificationSample(
            *(torch.cat([getattr(row, name) for row in rows]) for name in ("input_ids", "attention_mask", "labels")),
            torch.cat([row.mm_token_type_ids for row in rows if row.mm_token_type_ids is not None]),
            tuple(media for row in rows for media in row.media),
        )
        return {
            "input_ids": sample.input_ids,
            "attention_mask": sample.attention_mask,
            "labels": sample.labels,
            **sample.features(),
        }

    def _row(self, index: int) -> VerificationSample:
        from bridge.verify.media import media_sample

        step, row = divmod(index, GLOBAL_BATCH)
        kind = self.kinds[step % len(self.kinds)][row]
        return media_sample(self.folder, self.geometry, random.Random(index).randrange(1000), [kind], MEDIA_LENGTH)

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["samples"]


def train_media(
    said: dict[str, Any], overrides: list[str], kinds: tuple[tuple[str, ...], ...], trouble: Trouble | None = None
) -> tuple[bool, int]:
    """Train a recipe on rows of `kinds`; (stopped, last step). Runs on every rank."""
    from recipes.config import Recipe, resolve
    from recipes.train.data import Streams
    from recipes.train.loop import train

    def data(recipe: Recipe, geometry: Geometry, dp_rank: int, dp_size: int) -> Streams:
        folder, rows = Path(str(recipe.model.hf)), recipe.train.micro_batch_size
        return Streams(MediaCorpus(folder, geometry, kinds, dp_rank, dp_size, rows, trouble or Trouble()))

    outcome = train(resolve(said, [f"train.seq_length={MEDIA_LENGTH}", *overrides]), data)
    return outcome.stopped, outcome.step


def plain_media_loop(
    toy: str, steps: int, kinds: tuple[tuple[str, ...], ...], frozen: str, vision_mask: str
) -> list[float]:
    """The same training with transformers and torch alone. `frozen`: what is in the names of frozen parameters.

    `vision_mask`: of which of its two paths, as in `ModelConfig`.
    """
    from bridge.verify.reference import load_hf, with_masks

    geometry = Geometry.from_folder(toy)
    model = load_hf(Path(toy), geometry, torch.float32).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    corpus, losses = MediaCorpus(Path(toy), geometry, kinds), []
    for step in range(1, steps + 1):
        batch = next(corpus)
        labels = batch.pop("labels")
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        optimizer.zero_grad()
        logits = model(**(with_masks(model, batch) if vision_mask == GENERATE else batch), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses
