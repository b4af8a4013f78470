"""One process at a time at a place: threads, processes, killed owners, owners on other machines, odd file systems."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bridge.convert import lock
from bridge.convert.atomic import staged
from bridge.convert.lock import Owner, check_ours, held
from bridge.errors import CheckpointError, UsageError
from recipes.train.sole import check_sole, sole_run

HOLD = (
    "import sys, time; from pathlib import Path; from bridge.convert import lock\n"
    "lock._BEAT_S = 0.05\n"
    "with lock.held(Path(sys.argv[1]), 'busy'): print(flush=True); time.sleep(60)"
)


def hold(path: Path, *before: str) -> subprocess.Popen[bytes]:
    """A process that holds the lock when this returns; `before` is put in front of its command."""
    process = subprocess.Popen([*before, sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_POLL_S", 0.02)
    monkeypatch.setattr(lock, "_STALE_POLLS", 20)


def test_a_live_process_is_named_and_a_killed_one_is_followed(tmp_path: Path) -> None:
    path, said = tmp_path / "lock", list[str]()
    process = hold(path)
    try:
        with pytest.raises(UsageError, match=rf"^out: busy \(process {process.pid} on "), held(path, "out: busy"):
            pass
        assert path.is_dir()
    finally:
        end(process)
    with held(path, "out: busy", notify=said.append) as mine:
        mine.check()
        assert said == [f"{path}: taken over from process {process.pid} on {mine.owner.host}, which is gone"]
        with pytest.raises(UsageError, match=rf"process {os.getpid()} on"), held(path, "out: busy"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_who_waits_does_so_for_a_process_that_is_stopped(tmp_path: Path, hurried: None) -> None:
    """It lives, though its record stands still."""
    process, entered = hold(tmp_path / "lock"), threading.Event()

    def wait() -> None:
        with held(tmp_path / "lock", "busy", wait=True):
            entered.set()

    try:
        process.send_signal(signal.SIGSTOP)
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(1), "longer than a record from elsewhere may stand still here"
    finally:
        end(process)
    assert entered.wait(60)
    thread.join()


def test_what_a_process_left_that_was_killed_while_it_waited(tmp_path: Path) -> None:
    dead = replace(Owner.new(), token="a" * 32, pid=2**22 + 1)
    for name in ("lock.one", "lock.two.old", "lock.empty"):
        (tmp_path / name).mkdir()
        if name != "lock.empty":
            (tmp_path / name / "owner.json").write_text(json.dumps(asdict(dead)))
    with held(tmp_path / "lock", "busy"):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def elsewhere(path: Path) -> Owner:
    """A lock as another machine leaves it."""
    owner = replace(Owner.new(), token="b" * 32, host="node7", space="another boot", pid=1)
    path.mkdir()
    (path / "owner.json").write_text(json.dumps(asdict(owner)))
    return owner


@pytest.mark.parametrize("readable", [True, False])
def test_an_owner_on_another_machine(tmp_path: Path, hurried: None, readable: bool) -> None:
    """It is alive while its record changes, whatever the clocks say, and gone when that stands still."""
    path, said, over = tmp_path / "lock", list[str](), threading.Event()
    owner = elsewhere(path)
    if not readable:
        (path / "owner.json").write_text("{")
    os.utime(path / "owner.json", (2**33, 2**33))

    def beat() -> None:
        while not over.wait(0.05):
            info = (path / "owner.json").stat()
            os.utime(path / "owner.json", ns=(info.st_mtime_ns - 10**9, info.st_mtime_ns - 10**9))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UsageError, match=r"busy \(.*node7" if readable else "busy"), held(path, "busy"):
            pass
    finally:
        over.set()
        thread.join()
    with held(path, "busy", notify=said.append):
        who = str(owner) if readable else "an owner"
        assert said == [
            f"{path}: held by {who}: waiting to see whether it is alive",
            f"{path}: taken over from {who}, which is gone",
        ]


def test_a_lock_that_another_took_over_first_is_left_to_it(tmp_path: Path) -> None:
    elsewhere(tmp_path / "lock")
    seen = lock._read(tmp_path / "lock")
    assert seen is not None
    shutil.rmtree(tmp_path / "lock")
    with held(tmp_path / "lock", "busy") as theirs:
        late = lock.Lock(tmp_path / "lock")
        assert not late._displace(seen)
        theirs.check()
    assert not late._displace(seen) and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="needs root for a PID namespace")
def test_a_container_on_the_same_machine(tmp_path: Path, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ids mean nothing here: a process 1 runs here too, and most others do not."""
    monkeypatch.setattr(lock, "_STALE_POLLS", 100)
    path = tmp_path / "lock"
    process = hold(path, "unshare", "--fork", "--pid", "--kill-child", "--mount-proc", "--uts")
    try:
        with pytest.raises(UsageError, match="busy"), held(path, "busy"):
            pass
    finally:
        end(process)
    with held(path, "busy"):
        pass
    assert not path.exists()


def test_who_lost_the_lock_writes_no_more(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"taken over by process 1 on node7, so nothing more is written"),
        staged(tmp_path / "out", plan="p", sources=[]) as stage,
    ):
        shutil.rmtree(tmp_path / ".out.lock")
        elsewhere(tmp_path / ".out.lock")
        (stage.folder / "theirs").write_text("")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.lock").exists() and (stage.folder / "theirs").exists(), "both are the other's"
    with sole_run(tmp_path / "run", 0):
        check_sole(tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / ".run.lock")
        check_sole(tmp_path / "run")
        elsewhere(tmp_path / "run" / ".run.lock")
        with pytest.raises(CheckpointError, match=r"held by process 1 on node7"):
            check_sole(tmp_path / "run")
    check_ours(tmp_path / "nowhere")


CONTEND = (
    "import os, random, signal, sys; from pathlib import Path; from bridge.convert import lock\n"
    "lock._POLL_S = 0.001\n"
    "folder = Path(sys.argv[1]); random.seed(int(sys.argv[2]))\n"
    "for turn in range(25):\n"
    "    with lock.held(folder / 'lock', 'busy', wait=True):\n"
    "        os.close(os.open(folder / 'inside', os.O_CREAT | os.O_EXCL))\n"
    "        os.unlink(folder / 'inside')\n"
    "        with (folder / 'turns').open('a') as file: file.write('.')\n"
    "        if random.random() < 0.1: os.kill(os.getpid(), signal.SIGKILL)\n"
)


def test_processes_that_contend(tmp_path: Path) -> None:
    """One at a time is inside, and none is kept out for ever, while some are killed that hold it."""
    running = [subprocess.Popen([sys.executable, "-c", CONTEND, str(tmp_path), str(seed)]) for seed in range(6)]
    ends = [process.wait() for process in running]
    assert set(ends) <= {0, -signal.SIGKILL} and -signal.SIGKILL in ends
    assert len((tmp_path / "turns").read_text()) >= len(running)
    with held(tmp_path / "lock", "busy"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["turns"]


def test_a_file_system_that_renames_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with (
            pytest.raises(CheckpointError, match="folders cannot be renamed there"),
            staged(tmp_path / "out", plan="p", sources=[]),
        ):
            raise AssertionError("it is said before the work")
    assert list(tmp_path.iterdir()) == []
    line = "36 35 98:0 / {} rw,noatime master:1 - {} src rw,errors=continue"
    mounts = "\n".join([line.format("/", "ext4"), line.format("/mnt/my\\040bucket", "fuse.s3fs"), "", ""]).strip()
    with pytest.raises(CheckpointError, match=r"lies on fuse\.s3fs \(/mnt/my bucket\)"):
        lock._check_renames(Path("/mnt/my bucket/models/.out.lock"), mounts)
    for path in ("/mnt/.out.lock", "/mnt/my bucketful/.out.lock"):
        lock._check_renames(Path(path), mounts)


def test_something_else_in_the_place_of_a_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "mine.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="is in the way of a lock"), held(tmp_path / "lock", "busy"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["lock", "mine.txt"]


def test_a_record_is_renewed_while_the_lock_is_held(tmp_path: Path) -> None:
    process = hold(tmp_path / "lock")
    try:
        record = tmp_path / "lock" / "owner.json"
        first, deadline = record.stat().st_mtime_ns, time.monotonic() + 30
        while record.stat().st_mtime_ns == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert record.stat().st_mtime_ns > first
    finally:
        end(process)
