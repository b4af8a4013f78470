"""Checkpoints that are written while training goes on: what they hold, what a kill, a signal and a full disk leave."""

from __future__ import annotations

import filecmp
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.convert.manifest import TRACKER_FILE
from bridge.errors import CheckpointError, ParallelError
from bridge.ranks import RankPool
from recipes.train.checkpoint import checkpoints

from .async_kit import digested, digests, full_disk_beside, killed_writing, places, train_beside
from .training_kit import Trouble, losses, recipe, train_toy

STEPS, EVERY = 6, 2
OVERRIDES = [f"checkpoint.every={EVERY}", "checkpoint.keep=0"]
LAYOUTS: dict[str, tuple[str, int, list[str]]] = {
    "TP2+SP": ("e2b", 2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "PP2": ("e2b", 2, ["parallel.pp=2"]),
    "EP2": ("26b-a4b", 2, ["parallel.ep=2"]),
    "DP2 bf16, overlap": ("e2b", 2, ["model.dtype=bfloat16", "parallel.overlap=true"]),
}


def assert_same(ours: Path, theirs: Path) -> None:
    """Every byte: weights, optimizer, random states, the record of the run; of `.metadata`, which holds a number drawn
    for every save, what is where."""
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names and names.pop(names.index(".metadata"))
    assert filecmp.cmpfiles(ours, theirs, names, shallow=False)[0] == names
    assert places(ours) == places(theirs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_is_of_the_step_it_was_begun_at(
    ranks: RankPool, toy: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """Written behind the next update, it is what a run holds that waits for its checkpoints."""
    variant, world, overrides = LAYOUTS[name]
    overrides = [*overrides, *OVERRIDES]
    folder = toy(variant)
    ranks.run(train_toy, recipe(folder, tmp_path / "waits", STEPS), overrides, world_size=world)
    ranks.run(train_beside, recipe(folder, tmp_path / "beside", STEPS), overrides, STEPS, world_size=world)
    assert losses(tmp_path / "beside") == losses(tmp_path / "waits")
    whole = checkpoints(tmp_path / "waits")
    assert list(checkpoints(tmp_path / "beside")) == list(whole) == [2, 4, 6]
    for step, path in checkpoints(tmp_path / "beside").items():
        assert_same(path, whole[step])


def test_killed_while_one_is_written(ranks: RankPool, toy: Callable[..., Path], tmp_path: Path) -> None:
    """The last whole one is what it would have been, the run goes on from it, and is the same in the end."""
    said = recipe(toy("e2b"), tmp_path / "killed", STEPS)
    with pytest.raises(ParallelError, match="rank 1 "):
        ranks.run(train_beside, said, OVERRIDES, STEPS, kill=(1, 4), world_size=2)
    ranks.run(train_toy, recipe(toy("e2b"), tmp_path / "whole", STEPS), OVERRIDES, world_size=2)
    assert (tmp_path / "killed" / ".iter_0000004.partial").is_dir() and len(losses(tmp_path / "killed")) >= 4
    assert list(checkpoints(tmp_path / "killed")) == [2]
    assert (tmp_path / "killed" / TRACKER_FILE).read_text() == "2"
    assert_same(tmp_path / "killed" / "iter_0000002", tmp_path / "whole" / "iter_0000002")
    ranks.run(train_beside, said, [*OVERRIDES, "checkpoint.keep=2"], STEPS, world_size=2)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "killed").glob("*iter*")) == [
        "iter_0000004",
        "iter_0000006",
        "latest_checkpointed_iteration.txt",
    ]
    assert_same(tmp_path / "killed" / "iter_0000006", tmp_path / "whole" / "iter_0000006")


def test_a_signal_waits_for_what_is_written(ranks: RankPool, toy: Callable[..., Path], tmp_path: Path) -> None:
    """Then it is saved as ever. Where the job's time is up before, both are given up, and it is said."""
    said, stop = recipe(toy("e2b"), tmp_path, STEPS), Trouble(3, 1, signal.SIGUSR1)
    late = time.time() + 19  # less than it takes to end
    outcome = ranks.run(train_beside, said, OVERRIDES, 3, stop, limit=late, world_size=2)
    assert [who[:2] for who in outcome] == [(True, 3)] * 2 and not list(tmp_path.glob("*iter_*"))
    assert outcome[0][2] == [
        "the checkpoint of step 2 was not written before the time limit of the job and is given up: "
        "the run goes on from the beginning"
    ]
    outcome = ranks.run(train_beside, said, OVERRIDES, 3, stop, world_size=2)
    assert [who[:2] for who in outcome] == [(True, 3)] * 2 and list(checkpoints(tmp_path)) == [2, 3]
    assert outcome[0][2] == [f"saved {tmp_path}/iter_0000002", f"saved {tmp_path}/iter_0000003"]


def test_a_full_disk(ranks: RankPool, toy: Callable[..., Path], tmp_path: Path) -> None:
    """Said at the end of a step, and the run fails as it does where it waits."""
    with pytest.raises(CheckpointError, match=r"iter_0000002: cannot be written \(rank 0: .*GB are free"):
        ranks.run(full_disk_beside, recipe(toy("31b"), tmp_path, STEPS), OVERRIDES, world_size=1)
    assert not list(tmp_path.glob("*iter_*"))


KILLS = 20


@pytest.mark.slow
def test_killed_twenty_times_while_a_gigabyte_is_written(ranks: RankPool, tmp_path: Path) -> None:
    """Wherever one of two ranks dies in its part: the checkpoint before has every byte of a run that waits for its
    checkpoints and that nothing disturbs, though it was itself written behind as many kills, and the run goes on."""
    from benchmarks.async_checkpoints import write_model

    write_model(tmp_path / "toy")
    run, moments, overrides = tmp_path / "run", random.Random(5), ["checkpoint.every=2", "checkpoint.keep=1"]
    seen: dict[int, dict[str, str]] = {}
    for number in range(KILLS):
        rank, at = moments.randrange(2), 1
        if seen:
            at = 1 + int(moments.random() * (run / f"iter_{max(seen):07d}" / f"__{rank}_0.distcp").stat().st_size)
        with pytest.raises(ParallelError, match=f"rank {rank} "):
            ranks.run(killed_writing, recipe(tmp_path / "toy", run, 200), overrides, rank, at, world_size=2)
        step, last = 2 * number + 2, checkpoints(run)
        assert list(last) == [step] and (run / f".iter_{step + 2:07d}.partial").is_dir()
        assert (run / TRACKER_FILE).read_text() == str(step)
        seen[step] = digests(last[step])
    assert sum(path.stat().st_size for path in last[step].iterdir()) > 1e9
    stop = Trouble(2 * KILLS, 0, signal.SIGTERM)
    whole = recipe(tmp_path / "toy", tmp_path / "waits", 200)
    assert ranks.run(digested, whole, overrides, stop, world_size=2)[0] == seen
