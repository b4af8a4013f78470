"""Samples -> the tensors of one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recipes.data.chat import Encoded

IGNORE = -100
# What begins the names of tensors of answers behind other prompts (KTO).
KL = "KL_"

# What the image and video processors put where there is no patch.
_PAD_VALUES = {"image_position_ids": -1, "video_position_ids": -1}


def batch_tensors(
    rows: Sequence[Sequence[Encoded]],
    *,
    width: int,
    pad_id: int,
    packed: bool,
    with_types: bool,
    document_multiple: int = 1,
    answers: bool = False,
    prompts: bool = False,
) -> dict[str, Tensor]:
    """Lay out rows of samples, right-padded to `width`.

    Returns int64 [b, width]: `input_ids`; `labels`, already shifted (position t holds the token at t + 1 where that one
    is supervised and of the same sample, else -100); `attention_mask`, 1 = real token; `position_ids`, from 0 in every
    sample and in padding; `mm_token_type_ids` if asked. Packed, also `cu_seqlens` int32 [documents + 1]: the bounds of
    the documents in the batch's rows laid end to end, `[b * width]`; a row's padding is a document of its own.

    `answers`: also which answer a label is of (`recipes.losses.objective`): `sequence_ids` int64 [b, width], and of
    every sample `completion_lengths` and `desirable`, int64 [samples]. `prompts`: prompts have labels too, but in every
    second sample, the rejected answers.
    """
    shape = (len(rows), width)
    ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE, np.int64)
    mask, positions, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    bounds = [0]
    numbers = np.full(shape, -1, np.int64)
    count = 0
    for number, row in enumerate(rows):
        at = 0
        for sample in row:
            end = at + len(sample)
            ids[number, at:end] = sample.ids
            learnt = sample.supervised[1:]
            numbers[number, at : end - 1] = np.where(learnt, count, -1)
            if prompts and not count % 2:
                learnt = sample.types[1:] == 0
            labels[number, at : end - 1] = np.where(learnt, sample.ids[1:], IGNORE)
            count += 1
            mask[number, at:end] = 1
            types[number, at:end] = sample.types
            # Padding that a multiple asks for belongs to its sample: the next one starts behind it.
            size = -(-len(sample) // document_multiple) * document_multiple if packed else len(sample)
            positions[number, at : at + size] = np.arange(size)
            at += size
            bounds.append(number * width + at)
        if at < width:
            positions[number, at:] = np.arange(width - at)
            bounds.append((number + 1) * width)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}
    if with_types:
        batch["mm_token_type_ids"] = types
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    if answers:
        tensors["sequence_ids"] = torch.from_numpy(numbers)
        tensors |= _of_answers([sample for row in rows for sample in row])
    if packed:
        tensors["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    return tensors


def source_tensors(
    rows: Sequence[Sequence[Encoded]], sources: Sequence[int], *, count: int, width: int, answers: bool
) -> dict[str, Tensor]:
    """Which of `count` sources each row is of: `source_ids` int64 [b, width], of answers also `answer_sources` int64
    [samples]; `source_counts` int64 [2, count]: rows and tokens of each source."""
    ids = np.asarray(sources, np.int64)
    real = np.asarray([bool(row) for row in rows])
    tokens = np.asarray([sum(map(len, row)) for row in rows])
    counts = np.stack([np.bincount(ids, weights, count) for weights in (real, tokens)]).astype(np.int64)
    found = {"source_ids": np.repeat(ids[:, None], width, axis=1), "source_counts": counts}
    if answers:
        found["answer_sources"] = np.repeat(ids, [len(row) for row in rows])
    return {name: torch.from_numpy(array) for name, array in found.items()}


def _of_answers(samples: Sequence[Encoded]) -> dict[str, Tensor]:
    lengths, wanted = [int(each.supervised[1:].sum()) for each in samples], [int(each.desirable) for each in samples]
    return {
        "completion_lengths": torch.tensor(lengths, dtype=torch.int64),
        "desirable": torch.tensor(wanted, dtype=torch.int64),
    }


def mismatched(asked: Encoded, answered: Encoded, length: int) -> Encoded:
    """The prompt of one sample with the answer of another, at most so many tokens of it."""
    here, there = int(asked.supervised.argmax()), int(answered.supervised.argmax())

    def joined(prompt: np.ndarray, answer: np.ndarray) -> np.ndarray:
        return np.concatenate([prompt[:here], answer[there:]])[:length]

    learnt = joined(np.zeros_like(asked.supervised), answered.supervised)
    return Encoded(joined(asked.ids, answered.ids), learnt, joined(asked.types, answered.types), asked.media)


def join_media(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put the media tensors of samples behind each other along axis 0, in the order of their placeholders.

    Where they differ along axis 1 (sounds of different lengths) the shorter are padded.
    """
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for item in items for name in item):
        tensors = [item[name] for item in items if name in item]
        if tensors[0].ndim > 1:
            longest = max(tensor.shape[1] for tensor in tensors)
            tensors = [_padded(tensor, longest, _PAD_VALUES.get(name, 0)) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def _padded(tensor: Tensor, length: int, value: int) -> Tensor:
    if tensor.shape[1] == length:
        return tensor
    missing = tensor.new_full((tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:]), value)
    return torch.cat([tensor, missing], dim=1)
