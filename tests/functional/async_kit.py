"""Training in ranks whose checkpoints are written beside it, with a writer that a test holds back: no race decides.

What ranks call lives here, so that they import nothing but this.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bridge.torch_dist.reader import DistReader

from .training_kit import Trouble, train_toy


class Gate:
    """Lets the writer's thread write on when the run has made an update since the checkpoint was begun, or has made all
    that it will make."""

    def __init__(self, last: int) -> None:
        self.last, self.updates, self.begun, self.awaited = last, 0, 0, False
        self.changed = threading.Condition()

    def count(self) -> None:
        with self.changed:
            self.updates += 1
            self.changed.notify_all()

    def wait(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.updates > self.begun or self.updates >= self.last)

    def ask(self) -> None:
        with self.changed:
            self.awaited = True
            self.changed.notify_all()

    def wait_to_copy(self) -> None:
        """Copies are made when the run waits for them, or, where it does not, behind its next update."""
        with self.changed:
            self.changed.wait_for(lambda: self.awaited or self.updates > self.begun or self.updates >= self.last)

    def open(self) -> None:
        with self.changed:
            self.updates = self.last
            self.changed.notify_all()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def held_back(gate: Gate, kill: tuple[int, int] | None = None, stuck: bool = False) -> Iterator[None]:
    """Writers behind `gate`; `kill`: the rank that dies when it has written one tensor of the step's checkpoint, with
    an update behind it. `stuck`: what is begun goes on only when it is given up."""
    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from recipes.train import checkpoint, loop, saver, writing

    fill, copied = writing._fill, writing.Writing.copied
    write, update, begin = filesystem_async._write_item, loop.update, saver.begin_save
    give_up = checkpoint.Save.give_up

    @functools.wraps(write)
    def writes(*arguments: Any, **options: Any) -> Any:
        gate.wait()
        result = write(*arguments, **options)
        if kill == (torch.distributed.get_rank(), gate.begun):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def updates(*arguments: Any, **options: Any) -> Any:
        result = update(*arguments, **options)
        if not stuck:
            gate.count()
        return result

    def begins(run: Any, progress: Any) -> Any:
        gate.begun = gate.updates = progress.step  # of a run that was resumed too
        gate.awaited = False
        return begin(run, progress)

    def fills(*pair: Any) -> None:
        gate.wait_to_copy()
        fill(*pair)

    def waits(of: Any) -> None:
        gate.ask()
        copied(of)

    def gives_up(save: Any) -> None:
        gate.open()
        give_up(save)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (filesystem_async, "_write_item", writes),
            (loop, "update", updates),
            (saver, "begin_save", begins),
            (checkpoint.Save, "give_up", gives_up),
            (writing, "_fill", fills),
            (writing.Writing, "copied", waits),
        ):
            stack.enter_context(replaced(owner, name, value))
        yield


def train_beside(
    said: dict[str, Any],
    overrides: list[str],
    last: int,
    trouble: Trouble | None = None,
    kill: tuple[int, int] | None = None,
    limit: float | None = None,
) -> tuple[bool, int, list[str]]:
    """`train_toy`, and what it said of checkpoints, which are written no sooner than behind the next update.

    `limit`: of the job; then no writer goes on by itself.
    """
    from recipes.train.log import Log

    if limit is not None:
        os.environ["SLURM_JOB_END_TIME"] = str(int(limit))
    lines: list[str] = []
    try:
        with (
            held_back(Gate(last), kill, stuck=limit is not None),
            replaced(Log, "say", lambda _, text: lines.append(text)),
        ):
            stopped, step = train_toy(said, [*overrides, "checkpoint.async=true"], trouble)
        return stopped, step, [line for line in lines if "checkpoint" in line or "saved" in line]
    finally:
        os.environ.pop("SLURM_JOB_END_TIME", None)


def full_disk_beside(said: dict[str, Any], overrides: list[str]) -> None:
    """Train where no file may be larger than a megabyte."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        train_toy(said, [*overrides, "checkpoint.async=true"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Dying:
    """A file that is written to; its process dies when so many bytes of it are."""

    def __init__(self, file: Any, at: int) -> None:
        self.file, self.at = file, at

    def write(self, data: Any) -> int:
        view, room = memoryview(data).cast("B"), self.at - self.file.tell()
        if len(view) < room:
            return self.file.write(view)
        self.file.write(view[:room])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Dying:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()


def killed_writing(said: dict[str, Any], overrides: list[str], rank: int, at: int) -> None:
    """Train; `rank` dies when it has written so many bytes of its part of the second checkpoint, at the latest before
    the last one."""
    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    opened: list[Any] = []

    def opens(path: str, mode: str) -> Any:
        opened.append(path)
        dies = torch.distributed.get_rank() == rank and len(opened) == 2
        return Dying(Path(path).open(mode), at) if dies else Path(path).open(mode)

    with patch.object(filesystem_async, "open", opens, create=True):
        train_toy(said, [*overrides, "checkpoint.async=true"])


def digested(said: dict[str, Any], overrides: list[str], trouble: Trouble) -> dict[int, dict[str, str]]:
    """Train, and wait for every checkpoint; the digests of each, on rank 0."""
    import torch

    from recipes.train import checkpoint

    finish, found = checkpoint.Save.finish, dict[int, dict[str, str]]()

    def finishes(save: Any) -> Any:
        where = finish(save)
        if torch.distributed.get_rank() == 0:
            found[save.step] = digests(where)
        return where

    with replaced(checkpoint.Save, "finish", finishes):
        train_toy(said, overrides, trouble)
    return found


def places(folder: Path) -> dict[str, Any]:
    """What `.metadata` says is where; the file itself holds a number drawn for every save."""
    with DistReader(folder, lambda key: True) as reader:
        return {
            key: (each.dtype, each.shape, [replace(chunk, file=Path(chunk.file.name)) for chunk in each.chunks])
            for key, each in reader.tensors.items()
        }


def digests(folder: Path) -> dict[str, str]:
    """Of the files of a checkpoint, and of what `.metadata` says."""
    found = {".metadata": hashlib.sha256(repr(sorted(places(folder).items())).encode()).hexdigest()}
    for path in folder.iterdir():
        if path.name != ".metadata":
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
