"""Samples packed into rows: every one once, as few rows as may be, and none sees another."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.chat import Encoded
from recipes.data.collate import IGNORE, batch_tensors
from recipes.data.packing import first_fit_decreasing, plan_epoch


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), max_size=60), capacity=st.integers(50, 90))
def test_first_fit_decreasing(sizes: list[int], capacity: int) -> None:
    bins = first_fit_decreasing(sizes, capacity)
    assert sorted(item for content in bins for item in content) == list(range(len(sizes)))
    assert all(0 < sum(sizes[item] for item in content) <= capacity for content in bins)
    # First fit: what begins a bin fitted into none of those before it as they were then, so two halves never remain.
    assert sum(sum(sizes[item] for item in content) * 2 <= capacity for content in bins) <= 1
    # The textbook, slowly.
    room: list[int] = []
    content: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        place = next((place for place, left in enumerate(room) if left >= sizes[item]), len(room))
        if place == len(room):
            room.append(capacity)
            content.append([])
        room[place] -= sizes[item]
        content[place].append(item)
    assert bins == content


def test_an_item_too_large() -> None:
    with pytest.raises(ValueError, match="item 1 of size 9 does not fit into 8"):
        first_fit_decreasing([1, 9], 8)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60),
    epoch=st.integers(0, 3),
    buffer=st.integers(1, 70),
    multiple=st.sampled_from([1, 4]),
    shuffle=st.booleans(),
)
def test_a_plan_holds_every_sample_once(
    lengths: list[int], epoch: int, buffer: int, multiple: int, shuffle: bool
) -> None:
    options: dict[str, Any] = {"seed": 3, "shuffle": shuffle, "seq_length": 40, "document_multiple": multiple}
    array = np.asarray(lengths)
    for packing in (False, True):
        plan = plan_epoch(array, epoch=epoch, packing=packing, pack_buffer=buffer, **options)
        rows = [plan.row(index) for index in range(len(plan))]
        assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
        again = plan_epoch(array, epoch=epoch, packing=packing, pack_buffer=buffer, **options)
        assert rows == [again.row(index) for index in range(len(again))]
        if packing:
            assert all(sum(-(-lengths[sample] // multiple) * multiple for sample in row) <= 40 for row in rows)
            assert plan.efficiency == pytest.approx(sum(lengths) / (len(rows) * 40))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), multiple=st.sampled_from([1, 2, 4]))
def test_a_packed_batch_leaks_and_loses_nothing(data: st.DataObject, multiple: int) -> None:
    """Cut at cu_seqlens, every document is what it would be alone: tokens, labels, positions."""
    rows: list[list[Encoded]] = []
    next_id = 10
    for _ in range(data.draw(st.integers(1, 3))):
        row: list[Encoded] = []
        used = 0
        for size in data.draw(st.lists(st.integers(2, 12), max_size=5)):
            used += -(-size // multiple) * multiple
            if used > 40:
                break
            mask = np.asarray(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
            row.append(Encoded(np.arange(next_id, next_id + size, dtype=np.int32), mask, np.zeros(size, np.uint8)))
            next_id += size
        rows.append(row)
    batch = batch_tensors(rows, width=40, pad_id=0, packed=True, with_types=True, document_multiple=multiple)
    bounds = batch["cu_seqlens"].tolist()
    assert bounds[0] == 0 and bounds[-1] == 40 * len(rows) and all(a < b for a, b in zip(bounds, bounds[1:]))  # noqa: B905, RUF007
    assert set(range(0, 40 * len(rows), 40)) <= set(bounds)
    flat = {name: batch[name].flatten() for name in ("input_ids", "labels", "attention_mask", "position_ids")}
    expected = [sample for row in rows for sample in row]
    for start, end in pairwise(bounds):
        ids, labels, mask, positions = (flat[name][start:end] for name in flat)
        assert positions.tolist() == list(range(end - start))
        if not mask.any():
            assert (ids == 0).all() and (labels == IGNORE).all()
            continue
        sample = expected.pop(0)
        size = len(sample)
        assert end - start == -(-size // multiple) * multiple
        assert mask.tolist() == [1] * size + [0] * (end - start - size)
        assert ids[:size].tolist() == sample.ids.tolist()
        wanted = [
            int(token) if learnt else IGNORE
            for token, learnt in zip(sample.ids[1:], sample.supervised[1:], strict=True)
        ]
        assert labels.tolist() == wanted + [IGNORE] * (end - start - size + 1)
    assert not expected
    learnt = sum(int(sample.supervised[1:].sum()) for row in rows for sample in row)
    assert int((flat["labels"] != IGNORE).sum()) == learnt
