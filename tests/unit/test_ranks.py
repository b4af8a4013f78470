"""The pool of ranks: results, exceptions, dead and hanging ranks, and that no process is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.errors import CheckpointError, ParallelError, UsageError
from bridge.ranks import RankPool


def who(tag: str, *, suffix: str = "") -> tuple[int, int, str, int]:
    import torch
    import torch.distributed as dist

    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), tag + suffix, int(total)


def process_id() -> int:
    return os.getpid()


def fail(rank: int, kind: str) -> None:
    """One rank fails while the other waits for it."""
    import torch.distributed as dist

    if dist.get_rank() == rank:
        if kind == "bridge":
            raise CheckpointError("model.safetensors: truncated")
        if kind == "own":
            raise Unpicklable(3, 4)
        if kind == "exit":
            sys.exit(3)
        raise ValueError("not a\n   good value")
    dist.barrier()


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def fail_everywhere() -> None:
    raise CheckpointError("config.json: not found")


def die(rank: int, number: int) -> None:
    import torch.distributed as dist

    print("last words", flush=True)
    if dist.get_rank() == rank:
        os.kill(os.getpid(), number)
    dist.barrier()


def sleep_on(rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        time.sleep(600)


def start_grandchild() -> int:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    assert process.pid is not None
    return process.pid


def die_with_grandchild(rank: int) -> None:
    start_grandchild()
    die(rank, signal.SIGKILL)


def lambda_result() -> object:
    return lambda: None


def random_number() -> float:
    import torch

    return float(torch.rand(()))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 15) -> list[int]:
    """Those of `pids` that still run after a while."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, preload=(), device="cpu", timeout_s=60) as pool:
        yield pool


def test_results_come_in_rank_order(pool: RankPool) -> None:
    assert pool.run(who, "a", suffix="b") == [(0, 2, "ab", 3), (1, 2, "ab", 3)]


def test_the_world_is_as_large_as_asked(pool: RankPool) -> None:
    for world in (1, 2, 1, 2):
        assert [result[:2] for result in pool.run(who, "", world_size=world)] == [(i, world) for i in range(world)]
    with pytest.raises(ParallelError, match="3 ranks were asked of a pool of 2"):
        pool.run(who, "", world_size=3)


def test_ranks_are_reused_and_seeded_alike(pool: RankPool) -> None:
    assert pool.run(process_id) == pool.run(process_id)
    first, second = pool.run(random_number)
    assert first == second == pool.run(random_number, world_size=1)[0]


def test_a_bridge_error_keeps_its_type(pool: RankPool) -> None:
    with pytest.raises(CheckpointError) as caught:
        pool.run(fail, 1, "bridge")
    assert str(caught.value) == "model.safetensors: truncated"
    note = caught.value.__notes__[0]
    assert note.startswith("rank 1:") and "in fail" in note
    assert pool.run(who, "")[1][0] == 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("other", "rank 1: ValueError: not a good value"),
        ("own", f"rank 1: {__name__}.Unpicklable: 3 and 4"),
        ("exit", "rank 1: SystemExit: 3"),
    ],
)
def test_another_error_names_its_rank(pool: RankPool, kind: str, message: str) -> None:
    with pytest.raises(ParallelError) as caught:
        pool.run(fail, 1, kind)
    assert str(caught.value) == message


def test_an_error_on_every_rank(pool: RankPool) -> None:
    with pytest.raises(CheckpointError, match="not found"):
        pool.run(fail_everywhere)
    assert len(pool.run(who, "")) == 2


def test_a_killed_rank_is_named(pool: RankPool) -> None:
    with pytest.raises(ParallelError, match=r"die: rank 1 was killed by SIGKILL") as caught:
        pool.run(die, 1, signal.SIGKILL)
    assert "last words" in caught.value.__notes__[0]
    with pytest.raises(ParallelError, match=r"die: rank 0 was killed by SIGSEGV"):
        pool.run(die, 0, signal.SIGSEGV)
    with pytest.raises(ParallelError, match=r"rank 1 was killed by SIGKILL"):
        pool.run(die_with_grandchild, 1, timeout_s=30)
    assert len(pool.run(who, "")) == 2


def test_a_rank_killed_between_calls_is_replaced(pool: RankPool) -> None:
    os.kill(pool.run(process_id)[1], signal.SIGKILL)
    time.sleep(0.2)
    assert len(pool.run(who, "")) == 2


def test_a_hanging_rank_is_named_with_its_stack(pool: RankPool) -> None:
    start = time.monotonic()
    with pytest.raises(ParallelError, match=r"sleep_on: rank 1 did not answer within 1 s") as caught:
        pool.run(sleep_on, 1, timeout_s=1)
    assert time.monotonic() - start < 10
    assert "in sleep_on" in caught.value.__notes__[0]
    assert len(pool.run(who, "")) == 2


def test_what_cannot_be_sent_is_refused(pool: RankPool) -> None:
    with pytest.raises(UsageError, match="cannot be sent"):
        pool.run(lambda: None)
    with pytest.raises(ParallelError, match=r"rank 0: .*lambda"):
        pool.run(lambda_result, world_size=1)


def test_a_launcher_that_fails_says_why() -> None:
    with (
        RankPool(1, preload=("no_such_module",), device="cpu") as pool,
        pytest.raises(ParallelError, match="No module named 'no_such_module'"),
    ):
        pool.run(process_id)


def test_an_interrupt_while_ranks_start() -> None:
    """The answer that was not waited for was taken for that to the next question: KeyError, then and ever after."""
    with RankPool(1, preload=(), device="cpu") as pool:
        # The launcher imports torch first, which takes longer.
        interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            pool.run(process_id)
        interrupt.join()
        first = pool.run(process_id)
        assert first == pool.run(process_id)


def test_close_leaves_no_process() -> None:
    pool = RankPool(2, preload=(), device="cpu")
    grandchildren = pool.run(start_grandchild)
    pids = pool.pids
    assert len(pids) == 3 and all(alive(pid) for pid in pids + grandchildren)
    pool.close()
    assert wait_until_gone(pids + grandchildren) == []
    with pytest.raises(UsageError, match="closed"):
        pool.run(process_id)


@pytest.mark.parametrize("when", ["starting", "running"])
def test_no_process_outlives_a_killed_parent(when: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, threading, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from bridge.ranks import RankPool\n"
        "from test_ranks import process_id, sleep_on\n"
        "pool = RankPool(2, preload=(), device='cpu')\n"
        + ("pool.run(process_id)\n" if when == "running" else "")
        + ("threading.Thread(target=pool.run, args=(sleep_on, 1), daemon=True).start()\n" if when == "running" else "")
        + "time.sleep(0.3)\n"
        "print(*pool.pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    # killed before it can tidy up, it leaves its logs
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == (1 if when == "starting" else 3)
    assert wait_until_gone(pids) == []
