"""Targets that are complete or absent: kills, interrupts, full disks, second processes; and runs that go on."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.convert import atomic, replace
from bridge.convert.atomic import staged
from bridge.convert.pieces import CopyTensor, Piece, plan_digest
from bridge.convert.stream import CopyResult, copy
from bridge.errors import BridgeError, CheckpointError, UsageError
from bridge.hf.folder import HfFolder
from bridge.hf.tensors import TensorSpec
from bridge.hf.writer import HfWriter
from bridge.torch_dist.writer import DistWriter

ROWS = 64


def make_source(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    specs = [TensorSpec(f"t{i}", "F32", (ROWS, 16)) for i in range(8)]
    with HfWriter(folder, specs) as writer:
        for spec in specs:
            writer.write_rows(spec.name, 0, rng.bytes(spec.nbytes))
        writer.finish()
    return folder


class Slow:
    """A reader that takes its time, so that there are moments to be killed at."""

    def __init__(
        self, reader: HfFolder, delay: float, fail_after: int = 10**9, error: BaseException | None = None
    ) -> None:
        self.reader, self.tensors, self.delay = reader, reader.tensors, delay
        self.left, self.error = fail_after, error

    def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
        time.sleep(self.delay)
        self.left -= 1
        if self.left < 0 and self.error is not None:
            raise self.error
        self.reader.read_rows(name, start, stop, out)


def convert(
    source: Path,
    target: Path,
    kind: str,
    delay: float = 0.0,
    said: list[str] | None = None,
    option: str = "",
    **more: Any,
) -> CopyResult:
    """A small conversion into either format: 8 tensors, 32 chunks, 8 or so files."""
    overwrite = more.pop("overwrite", False)
    with HfFolder(source) as hf:
        plan = [CopyTensor(n, t.dtype, t.shape, (Piece(0, n, 0, ROWS),)) for n, t in hf.tensors.items()]
        lines = said if said is not None else []
        with staged(
            target,
            plan=plan_digest(plan, kind, option),
            sources=hf.files,
            source_folder=source,
            needed_bytes=40_000,
            overwrite=overwrite,
            notify=lines.append,
        ) as stage:
            specs = [tensor.spec for tensor in plan]
            writer = (
                HfWriter(stage.folder, specs, 5000)
                if kind == "hf"
                else DistWriter(stage.folder, specs, chunk_bytes=1024, file_bytes=8000)
            )
            with writer:
                result = copy(plan, Slow(hf, delay, **more), writer, chunk_bytes=1024, journal=stage.journal)
                writer.finish()
            (stage.folder / "config.json").write_text("{}")
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", ["hf", "dist"])
def test_killed_at_any_moment_and_resumed(tmp_path: Path, kind: str) -> None:
    source = make_source(tmp_path / "source")
    before = contents(source)
    convert(source, tmp_path / "reference", kind)
    reference = contents(tmp_path / "reference")
    rng = random.Random(kind)
    code = f"import test_atomic as t, pathlib; t.convert(pathlib.Path({str(source)!r}), "
    code += f"pathlib.Path('out'), {kind!r}, 0.01)"
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        )
        partial = tmp_path / ".out.partial"
        while not partial.exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == reference
            atomic.shutil.rmtree(tmp_path / "out")
    said: list[str] = []
    result = convert(source, tmp_path / "out", kind, said=said)
    assert (result.files_resumed > 0) == any("resuming" in line for line in said)
    assert contents(tmp_path / "out") == reference and contents(source) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "reference", "source"]


@pytest.mark.parametrize("kind", ["hf", "dist"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), CheckpointError("gone"), RuntimeError("bug")])
def test_an_error_leaves_no_target_and_the_next_run_goes_on(tmp_path: Path, kind: str, error: BaseException) -> None:
    source, target = make_source(tmp_path / "source"), tmp_path / "out"
    said: list[str] = []
    with pytest.raises(type(error)):
        convert(source, target, kind, 0.001, said, fail_after=20, error=error)
    assert not target.exists() and "kept" in said[-1]
    said.clear()
    result = convert(source, target, kind, said=said)
    assert result.files_resumed > 0 and 0 < result.bytes_resumed < result.bytes_total
    assert "resuming" in said[0] and not (tmp_path / ".out.partial").exists()
    convert(source, tmp_path / "reference", kind)
    assert contents(target) == contents(tmp_path / "reference")
    with pytest.raises(type(error)):
        convert(source, tmp_path / "early", kind, fail_after=0, error=error)
    assert not (tmp_path / ".early.partial").exists() and not (tmp_path / "early").exists()


@pytest.mark.parametrize("kind", ["hf", "dist"])
def test_damaged_and_foreign_leftovers_are_not_used(tmp_path: Path, kind: str) -> None:
    source, target = make_source(tmp_path / "source"), tmp_path / "out"
    convert(source, tmp_path / "reference", kind)
    reference = contents(tmp_path / "reference")

    def interrupt() -> Path:
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, kind, 0.001, fail_after=24, error=KeyboardInterrupt())
        return tmp_path / ".out.partial"

    partial = interrupt()
    files = sorted(p for p in (partial / "data").iterdir() if p.stat().st_size)
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 1
    files[0].write_bytes(data)
    files[1].unlink()
    with (partial / "journal.jsonl").open("a") as journal:
        journal.write('{"file": "torn')
    result = convert(source, target, kind)
    assert contents(target) == reference and result.files_resumed < 24 // 4
    atomic.shutil.rmtree(target)
    # Other options, then a source that changed: begun afresh.
    interrupt()
    said: list[str] = []
    assert convert(source, target, kind, said=said, option="other").files_resumed == 0 and "afresh" in said[0]
    atomic.shutil.rmtree(target)
    interrupt()
    os.utime(source / "model.safetensors", (1, 1))
    assert convert(source, target, kind).files_resumed == 0
    assert contents(target) == reference


def test_source_that_changes_meanwhile(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    with (
        pytest.raises(CheckpointError, match="source changed"),
        staged(tmp_path / "out", plan="p", sources=[source / "model.safetensors"]) as stage,
    ):
        stage.journal.record("x", [1])
        os.utime(source / "model.safetensors", (1, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_existing_targets(tmp_path: Path) -> None:
    source, target = make_source(tmp_path / "source"), tmp_path / "out"
    convert(source, target, "hf")
    with pytest.raises(UsageError, match=r"out: exists"):
        convert(source, target, "dist")
    (target / "README.md").write_text("old")
    with pytest.raises(RuntimeError):
        convert(source, target, "dist", overwrite=True, fail_after=3, error=RuntimeError())
    assert (target / "README.md").exists() and (target / "model.safetensors.index.json").exists()
    convert(source, target, "dist", overwrite=True)
    assert (target / ".metadata").exists() and not (target / "README.md").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    # Killed right after the swap, before the old target was gone: nothing of it gets into the next one.
    rmtree = atomic.shutil.rmtree
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)
        convert(source, target, "hf", overwrite=True)
    assert (tmp_path / ".out.partial" / "data" / ".metadata").exists()
    rmtree(target)
    convert(source, target, "hf")
    assert not (target / ".metadata").exists() and not (tmp_path / ".out.partial").exists()
    other = tmp_path / "home"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="does not look like a checkpoint"):
        convert(source, other, "hf", overwrite=True)
    (tmp_path / "link").symlink_to(target)
    for name in ("link", "home/letter.txt"):
        with pytest.raises(UsageError, match="not a folder"):
            convert(source, tmp_path / name, "hf", overwrite=True)
    for inner in (source / "inner", source, tmp_path):
        with pytest.raises(UsageError, match=r"source|exists"):
            convert(source, inner, "hf", overwrite=inner != tmp_path)
    with pytest.raises(UsageError, match="lies inside"):
        (tmp_path / "config.json").write_text("{}")
        convert(source, tmp_path, "hf", overwrite=True)


def test_a_target_where_no_folder_can_be_made() -> None:
    """The system says there that the parent does not exist, though it does."""
    with pytest.raises(CheckpointError, match=r"/proc/"), staged("/proc/out", plan="p", sources=[]):
        pass


def test_without_an_exchange_an_interrupted_swap_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = make_source(tmp_path / "source"), tmp_path / "out"
    monkeypatch.setattr(replace, "_exchange", lambda *_: False)
    convert(source, target, "hf")
    convert(source, target, "dist", overwrite=True)
    assert (target / ".metadata").exists()
    # As if it had been killed between the two renames.
    (tmp_path / ".out.partial").mkdir()
    target.rename(tmp_path / ".out.partial" / "old")
    with pytest.raises(UsageError, match="exists"):
        convert(source, target, "hf")
    assert (target / ".metadata").exists()


def test_disk_that_is_too_small_or_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    with (
        pytest.raises(CheckpointError, match=r"needs 4\d+\.\d\d GB of disk, .* are free"),
        staged(tmp_path / "out", plan="p", sources=[], needed_bytes=4 * 10**18),
    ):
        pass
    real, calls = os.pwrite, [0]

    def pwrite(*args: Any) -> int:
        calls[0] += 1
        if calls[0] > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    for kind in ("hf", "dist"):
        calls[0] = 0
        with pytest.raises(CheckpointError, match="disk is full"):
            convert(source, tmp_path / "out", kind)
        assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="disk is full") as caught, staged(tmp_path / "x", plan="p", sources=[]):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(caught.value, BridgeError) and not (tmp_path / ".x.partial").exists()


def test_two_at_once(tmp_path: Path) -> None:
    with (
        staged(tmp_path / "out", plan="p", sources=[]),
        pytest.raises(UsageError, match="another process"),
        staged(tmp_path / "out", plan="p", sources=[]),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_where_nobody_listens_it_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="run the same command again"), pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with staged(tmp_path / "out", plan="p", sources=[]) as stage:
            stage.journal.record("x", [1])
            raise KeyboardInterrupt


def test_a_file_system_that_syncs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all that the machine has not written is brought to its disks: nothing is taken as durable that is not."""
    real, synced = os.fsync, list[int]()

    def fsync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "sync", lambda: synced.append(1))
    with staged(tmp_path / "out", plan="p", sources=[]) as stage:
        (stage.folder / "config.json").write_text("{}")
    assert synced and (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(CheckpointError, match="Input/output error"), staged(tmp_path / "new", plan="p", sources=[]):
        pass
    assert not (tmp_path / "new").exists()
