"""Several sources in a run: the same rows however often it is killed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import ParallelError
from bridge.ranks import RankPool
from tests.functional.conftest import Toy

from .blends_kit import noted, train_watched
from .evaluation_kit import write_chats

LENGTH = 96


def said_of(toy: Toy, folder: Path, output: Path, **train: Any) -> dict[str, Any]:
    """A run on three sources, of which one is small enough to come again."""
    sizes = {"chats": 20, "code": 9, "facts": 3}
    for seed, (name, count) in enumerate(sizes.items()):
        write_chats(folder / f"{name}.jsonl", count, seed)
    weights = zip(sizes, (5, 3, 2), strict=True)
    return {
        "output": str(output),
        "model": {"hf": str(toy("e2b")), "dtype": "float32"},
        "data": {
            "cache": str(folder / "cache"),
            "sources": [{"path": str(folder / f"{name}.jsonl"), "weight": weight} for name, weight in weights],
        },
        "train": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "seq_length": LENGTH, **train},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
    }


def logged(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_killed_twenty_times_the_tokens_come_in_their_order(
    ranks: RankPool, toy: Toy, tmp_path: Path, packing: bool
) -> None:
    """SIGKILL of a rank at random microbatches of a real run on two: what was not saved comes again, and alike."""
    steps, per_step = 44, 2
    said = said_of(toy, tmp_path, tmp_path / "killed", steps=steps)
    said["data"]["packing"], said["checkpoint"] = packing, {"every": 3}
    undisturbed = {**said, "output": str(tmp_path / "whole"), "checkpoint": {}}
    assert ranks.run(train_watched, undisturbed, None, 0, world_size=2) == [steps, steps]
    dice, kills, at = random.Random(1), 20, 0
    for number in range(kills):
        # Never before the last checkpoint, so that every run comes to its end; else anywhere.
        saved = 3 * per_step * (at // (3 * per_step))
        at = dice.randint(saved + 1, max(saved + 1, steps * per_step * (number + 1) // kills - 1))
        victim = dice.randint(0, 1)
        with pytest.raises(ParallelError, match=f"rank {victim} "):
            ranks.run(train_watched, said, at, victim, world_size=2)
    assert ranks.run(train_watched, said, None, 0, world_size=2) == [steps, steps]
    for rank in (0, 1):
        whole = {number: rest for number, *rest in noted(tmp_path / "whole", rank)}
        assert sorted(whole) == list(range(steps * per_step))
        found = noted(tmp_path / "killed", rank)
        assert len(found) > len(whole) and {number for number, *_ in found} == set(whole)
        assert all(rest == whole[number] for number, *rest in found)
    assert [line["loss"] for line in logged(tmp_path / "killed")] == [
        line["loss"] for line in logged(tmp_path / "whole")
    ]
    last = logged(tmp_path / "killed")[-1]
    assert {key: value for key, value in last.items() if key.startswith(("rows/", "tokens/"))} == {
        key: value for key, value in logged(tmp_path / "whole")[-1].items() if key.startswith(("rows/", "tokens/"))
    }
