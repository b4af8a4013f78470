"""What ends a run early, or leaves an update out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.errors import TrainingError
from bridge.ranks import RankPool

from .training_kit import losses, recipe, train_toy


def test_a_run_that_gets_no_better_ends(ranks: RankPool, toy: Callable[..., Path], tmp_path: Path) -> None:
    said = recipe(toy("e2b"), tmp_path, 8)
    # Nothing moves: the first evaluation is the best, and two more are waited for.
    overrides = ["optimizer.lr=0", "optimizer.min_lr=0", "train.eval_every=1", "train.patience=2"]
    assert ranks.run(train_toy, said, overrides, world_size=2) == [(False, 3)] * 2
    assert len(losses(tmp_path)) == 3
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    # Started again, it stays ended; with more patience it goes on.
    assert ranks.run(train_toy, said, overrides, world_size=1) == [(False, 3)]
    assert ranks.run(train_toy, said, [*overrides, "train.patience=4"], world_size=1) == [(False, 5)]


def test_a_run_that_gets_better_goes_on(ranks: RankPool, toy: Callable[..., Path], tmp_path: Path) -> None:
    said = recipe(toy("e2b"), tmp_path, 5)
    overrides = ["train.eval_every=1", "train.patience=1"]
    assert ranks.run(train_toy, said, overrides, world_size=1) == [(False, 5)]


def test_a_spike_is_left_out(ranks: RankPool, toy: Callable[..., Path], tmp_path: Path) -> None:
    """Once there is a mean to hold norms against, here one that every norm exceeds, no update is made."""
    said = recipe(toy("e2b"), tmp_path, 30)
    with pytest.raises(TrainingError, match="step 23: 3 updates in a row were left out"):
        ranks.run(train_toy, said, ["train.spike_factor=1e-3"], world_size=1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [21, 22, 23]
    # A spike is a norm, not a number that is none.
    assert all(line["grad_norm"] > 0 for line in lines)
