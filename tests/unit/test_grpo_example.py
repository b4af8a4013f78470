"""The prompts of examples/grpo: what is held out is not trained on, and no answer is right more often than another."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo"


@pytest.fixture(scope="module")
def tasks() -> Any:
    spec = importlib.util.spec_from_file_location("grpo_example_tasks", EXAMPLE / "tasks.py")
    assert spec is not None and spec.loader is not None
    # Dataclasses look their module up.
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_balanced(task: Any, recipe: str) -> None:
    """Every answer is as often right, in every step and in what is held out; answers of the form say nothing of it."""
    said = OmegaConf.load(EXAMPLE / recipe)
    prompts = said.train.global_batch_size // said.grpo.num_generations
    assert said.data.shuffle is False and len(task.asked) >= prompts
    # Steps go on behind the end of the data at its beginning.
    rows = [row["completion"] for row in task.asked * prompts]
    for first in range(0, len(rows) - prompts + 1, prompts):
        assert len(set(Counter(rows[first : first + prompts]).values())) == 1
    assert len(set(Counter(row["completion"] for row in task.held_out).values())) == 1
    answers = {row["completion"] for row in task.asked}
    assert set(rows) == answers == {row["completion"] for row in task.held_out}
    held_out = {(row["prompt"], *row.get("images", ())) for row in task.held_out}
    right = {(row["prompt"], *row.get("images", ())): row["completion"] for row in task.asked}
    assert not held_out & set(right) and len(right) == len(task.asked)
    hits = [right[(row["prompt"], *row.get("images", ()))] == row["completion"] for row in task.form]
    digits = {row["completion"] for row in task.form}
    assert answers <= digits and abs(sum(hits) / len(hits) - 1 / len(digits)) < 0.03


def test_sums(tasks: Any) -> None:
    task = tasks.sums(random.Random(1))
    assert_balanced(task, "sums.yaml")
    for row in task.asked + task.held_out:
        assert sum(int(letter) for letter in row["prompt"] if letter.isdigit()) == int(row["completion"])


def test_colours(tasks: Any, tmp_path: Path) -> None:
    task = tasks.colours(random.Random(1), tmp_path)
    assert_balanced(task, "colours.yaml")
    pictures = [{(tmp_path / row["images"][0]).read_bytes() for row in rows} for rows in (task.asked, task.held_out)]
    assert not pictures[0] & pictures[1] and len(pictures[0]) == len(task.asked)
    assert [row["completion"] for row in task.blank] == [row["completion"] for row in task.held_out]
    assert len({row["images"][0] for row in task.blank}) == 1
