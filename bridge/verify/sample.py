"""The batch that logits and gradients are compared on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bridge.geometry import Geometry
from bridge.token_ids import embedding_tables

# Ids below are special tokens in every Gemma 4 tokenizer.
_FIRST_ORDINARY_ID = 8
IGNORE = -100
# Rows have this many lengths, and places of images, in turn.
_ALIKE = 4


@dataclass(frozen=True)
class VerificationSample:
    """Token ids, mask (1 = real) and labels (-100 = none), each [b, s]; labels are shifted already.

    `mm_token_type_ids` [b, s] says which tokens count as image or video tokens (None: none does), and `media` is what
    the processor made of pictures, clips and tones, one mapping a row, where a batch has any; `names` say what is in
    which row. `cu_seqlens` bounds the documents of a packed row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    mm_token_type_ids: Tensor | None = None
    media: tuple[Mapping[str, Tensor], ...] = ()
    names: tuple[str, ...] = ()
    cu_seqlens: Tensor | None = None

    @property
    def counted(self) -> Tensor:
        """[b, s] bool: positions with a label."""
        return self.labels != IGNORE

    def rows(self, rows: slice) -> VerificationSample:
        """Some rows of it."""
        types = None if self.mm_token_type_ids is None else self.mm_token_type_ids[rows]
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            labels=self.labels[rows],
            mm_token_type_ids=types,
            media=self.media[rows],
            names=self.names[rows],
        )

    def pack(self) -> VerificationSample:
        """Its rows as documents of one row, their padding behind them all: what was [b, s] becomes [1, b * s]."""
        order = (1 - self.attention_mask).flatten().argsort(stable=True)
        bounds = torch.nn.functional.pad(self.attention_mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)

        def move(x: Tensor) -> Tensor:
            return x.flatten()[order][None]

        types = None if self.mm_token_type_ids is None else move(self.mm_token_type_ids)
        return VerificationSample(
            move(self.input_ids), move(self.attention_mask), move(self.labels), types, self.media, self.names, bounds
        )

    def inputs(self) -> dict[str, Tensor]:
        """What a transformers model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.features()}

    def features(self) -> dict[str, Tensor]:
        """Token types and media as models take them: those of all rows, one after the other."""
        if self.mm_token_type_ids is None:
            return {}
        batch = {"mm_token_type_ids": self.mm_token_type_ids}
        for name in sorted({name for row in self.media for name in row}):
            parts = [row[name] for row in self.media if name in row]
            if name.startswith("input_features"):  # clips are of different lengths
                longest = max(part.shape[1] for part in parts)
                parts = [pad_frames(part, longest) for part in parts]
            batch[name] = torch.cat(parts)
        return batch


def pad_frames(x: Tensor, length: int) -> Tensor:
    """Zeros behind the frames of [clips, t, ...], up to `length`."""
    return torch.cat((x, x.new_zeros(len(x), length - x.shape[1], *x.shape[2:])), dim=1)


def random_sample(
    geometry: Geometry, seed: int, batch: int = 4, multiple_of: int = 8, *, images: bool = False
) -> VerificationSample:
    """Random tokens, longer than two windows, three of every four rows padded on the right by another length each.

    Placeholder ids of images, video and audio do not occur: `geometry.placeholder_ids` are skipped. The padding id
    stands once at a real position of every row, because its embedding gets no gradient. With `images` every row is
    longer than five windows, and has three runs of tokens that count as images: one longer than the window, one a
    single token behind it, one further back.
    """
    window = max((layer.window for layer in geometry.layers if layer.window is not None), default=8)
    length = (5 if images else 2) * window + multiple_of
    length += -length % multiple_of
    generator = torch.Generator().manual_seed(seed)
    rows = min(table.rows for table in embedding_tables(geometry))
    allowed = torch.tensor([i for i in range(_FIRST_ORDINARY_ID, rows) if i not in geometry.placeholder_ids])
    ids = allowed[torch.randint(len(allowed), (batch, length), generator=generator)]
    ids[:, 2] = geometry.pad_token_id or 0
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, length - row % _ALIKE * 3 :] = 0
    ids = torch.where(mask.bool(), ids, geometry.pad_token_id or 0)
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = torch.where(mask[:, 1:].bool(), ids[:, 1:], IGNORE)
    return VerificationSample(ids, mask, labels, _image_runs(mask, window) if images else None)


def _image_runs(mask: Tensor, window: int) -> Tensor:
    types = torch.zeros_like(mask)
    for row in range(len(mask)):
        shift = row % _ALIKE
        first = 3 + shift
        second = first + window + window // 2 + 1
        third = second + 2 * window
        types[row, first : second - 1] = 1
        types[row, second : second + window // 2] = 2
        types[row, third : third + window // 2 + shift] = 1
    return types * mask
