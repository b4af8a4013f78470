"""Runs that are killed, told to stop, or have no disk left: what was saved stays, and they go on to the bit."""

from __future__ import annotations

import itertools
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import CheckpointError, ParallelError
from bridge.ranks import RankPool

from .test_training import TP2, Toys
from .training_kit import Trouble, losses, train_toy


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"), ranks)


def _killed(ranks: RankPool, said: dict[str, Any], overrides: list[str], world: int, trouble: Trouble) -> None:
    with pytest.raises(ParallelError, match=f"rank {trouble.rank} "):
        ranks.run(train_toy, said, overrides, trouble, world_size=world)


@pytest.mark.parametrize(
    ("variant", "world", "overrides"),
    [
        ("e2b", 1, []),
        ("26b-a4b", 2, ["parallel.ep=2"]),
        ("e2b", 2, TP2),
        ("e2b", 2, ["model.dtype=bfloat16", "parallel.overlap=true"]),
    ],
    ids=["1 rank", "EP2", "TP2+SP", "DP2 bf16, overlap"],
)
def test_killed_and_resumed_is_bit_identical(
    ranks: RankPool, toys: Toys, tmp_path: Path, variant: str, world: int, overrides: list[str]
) -> None:
    steps = 9
    overrides = [*overrides, "checkpoint.every=2"]
    ranks.run(train_toy, toys.recipe(variant, tmp_path / "whole", steps), overrides, world_size=world)
    said = toys.recipe(variant, tmp_path / "killed", steps)
    kill = Trouble(random.Random(str(tmp_path)).randint(3, steps), world - 1)
    _killed(ranks, said, overrides, world, kill)
    stop = Trouble(steps, world - 1, signal.SIGUSR1)
    ranks.run(train_toy, said, overrides, stop, world_size=world)
    ranks.run(train_toy, said, overrides, world_size=world)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), f"killed at step {kill.step}"


def test_a_signal_saves_and_leaves(ranks: RankPool, toys: Toys, tmp_path: Path) -> None:
    said, steps = toys.recipe("e2b", tmp_path / "stopped", 6), 6
    stopped = ranks.run(train_toy, said, [], Trouble(3, 1, signal.SIGTERM), world_size=2)
    assert stopped == [(True, 3), (True, 3)]
    assert (tmp_path / "stopped" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert ranks.run(train_toy, said, [], world_size=2) == [(False, steps)] * 2
    ranks.run(train_toy, toys.recipe("e2b", tmp_path / "whole", steps), [], world_size=2)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def killed_while_saving(said: dict[str, Any], overrides: list[str], which: int) -> None:
    """Train, and die after step number `which` of saving: files durable, renamed, tracker written and renamed."""
    import os

    from recipes.train import checkpoint

    count = itertools.count(1)

    def deadly(function: Any) -> Any:
        def call(*arguments: Any) -> None:
            function(*arguments)
            if next(count) == which:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in ("sync_tree", "replace_folder", "write_text", "fsync_folder"):
        setattr(checkpoint, name, deadly(getattr(checkpoint, name)))
    train_toy(said, overrides)


def test_killed_while_saving(ranks: RankPool, toys: Toys, tmp_path: Path) -> None:
    said = toys.recipe("e2b", tmp_path / "killed", 4)
    overrides = ["checkpoint.every=2", "checkpoint.keep=1"]
    for which in (1, 5):
        with pytest.raises(ParallelError, match="rank 0 "):
            ranks.run(killed_while_saving, said, overrides, which, world_size=1)
    # As if step 2, saved again, had been killed between two renames: it is put back, and saved again once more.
    (tmp_path / "killed" / "iter_0000002").rename(tmp_path / "killed" / ".iter_0000002.replaced")
    ranks.run(train_toy, said, overrides, world_size=1)
    ranks.run(train_toy, toys.recipe("e2b", tmp_path / "whole", 4), overrides, world_size=1)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir() if path.name != "log.jsonl") == [
        "hf",
        "iter_0000004",
        "latest_checkpointed_iteration.txt",
        "recipe.yaml",
        "run.json",
    ]


def signalled_while_saving(said: dict[str, Any], overrides: list[str]) -> tuple[bool, int]:
    """Train, and be told to stop while the first checkpoint is written."""
    import os

    from recipes.train import checkpoint

    sync, told = checkpoint.sync_tree, []

    def tell(path: Path) -> None:
        if not told:
            told.append(path)
            os.kill(os.getpid(), signal.SIGTERM)
        sync(path)

    checkpoint.sync_tree = tell
    try:
        return train_toy(said, overrides)
    finally:
        checkpoint.sync_tree = sync


def test_a_signal_while_saving_is_the_end_of_the_run(ranks: RankPool, toys: Toys, tmp_path: Path) -> None:
    """The checkpoint becomes complete, and no step is begun after it; at the last one too."""
    said = toys.recipe("e2b", tmp_path, 4)
    for saved in (2, 4):
        outcome = ranks.run(signalled_while_saving, said, ["checkpoint.every=2"], world_size=2)
        assert outcome == [(True, saved)] * 2 and len(losses(tmp_path)) == saved
    assert ranks.run(train_toy, said, [], world_size=1) == [(False, 4)]


def full_disk(said: dict[str, Any]) -> None:
    """Train where no file may be larger than a megabyte."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        train_toy(said, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk(ranks: RankPool, toys: Toys, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"iter_0000001: cannot be written \(rank 0: .*GB are free"):
        ranks.run(full_disk, toys.recipe("31b", tmp_path / "full", 1), world_size=1)
    assert not list((tmp_path / "full").glob("*iter_*"))
