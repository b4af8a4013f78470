"""Checkpoints of more files than a process may open; files that vanish or change between two uses."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from bridge.convert.pieces import CopyTensor, Piece
from bridge.convert.stream import copy
from bridge.errors import CheckpointError
from bridge.hf.descriptors import Descriptors, RegularFiles
from bridge.hf.folder import HfFolder
from bridge.hf.tensors import RowReader, TensorSpec
from bridge.hf.writer import HfWriter
from bridge.torch_dist.reader import DistReader
from bridge.torch_dist.writer import DistWriter

FILES, ROWS = 100, 4
SPECS = [TensorSpec(f"t{number:03d}", "F32", (ROWS, 8)) for number in range(FILES)]
PLAN = [CopyTensor(s.name, s.dtype, s.shape, (Piece(0, s.name, 0, ROWS),)) for s in SPECS]


def value(number: int) -> np.ndarray:
    return np.full((ROWS, 8), number, dtype=np.float32)


def check(reader: RowReader) -> None:
    for number, spec in enumerate(SPECS):
        out = np.empty((ROWS, 8), dtype=np.float32)
        reader.read_rows(spec.name, 0, ROWS, out)
        assert (out == number).all(), spec.name


def many_files(folder: Path) -> None:
    """Write, copy and read checkpoints of a hundred files each, with 64 descriptors."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    for name in ("dist", "hf", "mixed"):
        (folder / name).mkdir()
    with DistWriter(folder / "dist", SPECS, chunk_bytes=1 << 20, file_bytes=1) as dist:
        # Half of every file, then the other half, as a live model sends its rows.
        for number, spec in enumerate(SPECS):
            dist.write_rows(spec.name, 0, value(number))
        dist.finish()
    with DistReader(folder / "dist") as reader:
        assert len(list((folder / "dist").glob("*.distcp"))) == FILES + 1
        check(reader)
        assert all(ok for _, _, ok in reader.check_items())
        with HfWriter(folder / "hf", SPECS, max_shard_size=1) as hf:
            copy(PLAN, reader, hf, workers=4)
            hf.finish()
    with HfWriter(folder / "mixed", SPECS, max_shard_size=1) as mixed:
        for half in (0, 1):
            for number, spec in enumerate(SPECS):
                mixed.write_rows(spec.name, half * 2, value(number)[:2])
        mixed.finish()
    for name in ("hf", "mixed"):
        with HfFolder(folder / name) as back:
            assert len(back.files) == FILES
            check(back)
    # Several in the same thread, as training opens a model, its carried tensors and an adapter.
    with DistReader(folder / "dist") as one, HfFolder(folder / "hf") as two:
        check(one)
        check(two)


def test_a_hundred_files_with_64_descriptors(tmp_path: Path) -> None:
    code = f"import test_descriptors, pathlib; test_descriptors.many_files(pathlib.Path({str(tmp_path)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["hf", "dist"])
@pytest.mark.parametrize("when", ["unfinished", "finished", "cut", "replaced by a link"])
def test_a_file_that_vanishes_is_no_success(tmp_path: Path, kind: str, when: str) -> None:
    """It was written again, as zeros, and the checkpoint called complete."""
    writer: HfWriter | DistWriter = (
        HfWriter(tmp_path, SPECS, max_shard_size=1) if kind == "hf" else DistWriter(tmp_path, SPECS, file_bytes=1)
    )
    with writer:
        units = writer.units(1 << 20)
        for number, spec in enumerate(SPECS):
            writer.write_rows(spec.name, 0, value(number))
        victim = tmp_path / units[50].file
        if when == "finished":
            writer.finish_unit(units[50])
        if when == "cut":
            os.truncate(victim, 20)
        else:
            victim.unlink()
        if when == "replaced by a link":
            victim.symlink_to(tmp_path / units[51].file)
        with pytest.raises(CheckpointError, match=victim.name):
            writer.finish()
    assert not (tmp_path / "model.safetensors.index.json").exists() and not (tmp_path / ".metadata").exists()
    assert when == "cut" or not victim.is_file() or victim.is_symlink()


def test_files_of_tensors_without_elements_are_made(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "F32", (0, 3)), TensorSpec("b", "F32", (2,)), TensorSpec("c", "F32", (0,))]
    with HfWriter(tmp_path, specs, max_shard_size=1) as writer:
        writer.write_rows("b", 0, np.ones(2, dtype=np.float32))
        writer.finish()
    with HfFolder(tmp_path) as back:
        assert {name: info.shape for name, info in back.tensors.items()} == {"a": (0, 3), "b": (2,), "c": (0,)}


def test_a_file_that_changed_between_two_uses(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.write_bytes(b"12345678")
    with RegularFiles(max_idle=2) as files:
        for path in paths:
            with files.use(path) as fd:
                assert os.pread(fd, 8, 0) == b"12345678" and files.size(path) == 8
        assert len(files._files) == 2
        paths[0].unlink()
        paths[0].write_bytes(b"123456789")
        with pytest.raises(CheckpointError, match=r"/0: changed while it was being read"), files.use(paths[0]):
            pass
    assert not files._files


def test_what_is_in_use_stays_open(tmp_path: Path) -> None:
    """Threads that read more files at once than are kept."""
    paths = [tmp_path / str(number) for number in range(8)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
    files = Descriptors(lambda path: os.open(path, os.O_RDONLY), max_idle=1)
    gate, wrong = threading.Barrier(len(paths)), list[int]()

    def read(number: int) -> None:
        for turn in range(50):
            with files.use(paths[number]) as fd:
                if turn == 0:
                    gate.wait()
                if os.pread(fd, 1, 0) != bytes([number]):
                    wrong.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(paths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(files._files) == 1
    files.close()
