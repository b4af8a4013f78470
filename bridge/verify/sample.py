"""The batch that logits and gradients are compared on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.geometry import Geometry

# Ids below are special tokens in every Gemma 4 tokenizer.
_FIRST_ORDINARY_ID = 8
_IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """Token ids, mask (1 = real) and labels (-100 = none), each [b, s]; labels are shifted already."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def counted(self) -> Tensor:
        """[b, s] bool: positions with a label."""
        return self.labels != _IGNORE


def random_sample(geometry: Geometry, seed: int, batch: int = 4, multiple_of: int = 8) -> Sample:
    """Random tokens, longer than two windows, every row but the first padded on the right by another length.

    Placeholder ids of images, video and audio do not occur: `geometry.placeholder_ids` are skipped. The padding id
    stands once at a real position of every row, because its embedding gets no gradient.
    """
    windows = [layer.window for layer in geometry.layers if layer.window is not None]
    length = 2 * max(windows, default=8) + multiple_of
    length += -length % multiple_of
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(
        [i for i in range(_FIRST_ORDINARY_ID, geometry.vocab_size) if i not in geometry.placeholder_ids]
    )
    ids = allowed[torch.randint(len(allowed), (batch, length), generator=generator)]
    ids[:, 2] = geometry.pad_token_id or 0
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - row * 3 :] = 0
    ids = torch.where(mask.bool(), ids, geometry.pad_token_id or 0)
    labels = torch.full_like(ids, _IGNORE)
    labels[:, :-1] = torch.where(mask[:, 1:].bool(), ids[:, 1:], _IGNORE)
    return Sample(ids, mask, labels)
