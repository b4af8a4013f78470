"""A folder that takes another's place: an exception or a kill at every line of it, and what may be replaced at all."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from bridge.convert import atomic, lock, replace
from bridge.convert.atomic import staged
from bridge.convert.replace import check_replaceable, recover, replace_folder
from bridge.errors import CheckpointError, UsageError

# Of a process that is as large as the one that runs all tests a fork takes long.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])
OURS = {atomic.__file__, lock.__file__, replace.__file__}
ERRORS = {
    "interrupt": lambda: KeyboardInterrupt(),
    "disk": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    "bug": lambda: RuntimeError("a bug"),
}


class At:
    """Does something when the program comes to the n-th line of `files`; `reached` says whether it did.

    Lines count from the end of a conversion's body, or, with `whole`, of all of it, and those of shutil.
    """

    def __init__(self, number: int, action: Any, whole: bool = False) -> None:
        self.left, self.action, self.whole, self.reached = number, action, whole, False
        self.files = OURS | {shutil.__file__} if whole else OURS

    def __enter__(self) -> At:
        if self.whole:
            self.start()
        return self

    def start(self) -> None:
        caller = sys._getframe()
        while caller is not None:
            # Frames that run already are watched only if they are told to.
            caller.f_trace = self._call(caller, "call", None)
            caller = caller.f_back
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in self.files else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.left -= event == "line"
        if self.left == 0 and not self.reached:
            self.reached = True
            self.action()
        return self._line


def fail(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


def write(target: Path, text: str, said: list[str], journal: bool, at: At | None = None) -> None:
    """One conversion: two files, one of them in the journal where it is kept."""
    with staged(target, plan=text, sources=[], overwrite=True, notify=said.append) as stage:
        (stage.folder / "config.json").write_text(text)
        (stage.folder / "model.safetensors").write_text(text * 3)
        if text == "old":
            (stage.folder / "README.md").write_text(text)
        if journal:
            stage.journal.record("model.safetensors", [1])
        if at is not None and not at.whole:
            at.start()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: every line of a replacement is hundreds of them, each with many fsyncs."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


OLD, NEW = ({"config.json": text, "model.safetensors": text * 3} for text in ("old", "new"))
OLD["README.md"] = "old"


@pytest.fixture(params=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param != "exchange":
        monkeypatch.setattr(replace, "_exchange", lambda *_: False)
    return request.param == "exchange"


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["the end", "all of it"])
@pytest.mark.parametrize("journal", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["journal", "no journal"])
@pytest.mark.parametrize(
    "kind", ["interrupt", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("disk", "bug"))]
)
def test_an_exception_at_every_line(place: Path, exchange: bool, kind: str, journal: bool, whole: bool) -> None:
    target, number, outcomes, told = place / "out", 0, set(), False
    while True:
        number += 1
        shutil.rmtree(target, ignore_errors=True)
        write(target, "old", [], journal)
        said: list[str] = []
        try:
            with At(number, fail(ERRORS[kind]()), whole) as at:
                write(target, "new", said, journal, at)
        except (KeyboardInterrupt, CheckpointError, OSError, RuntimeError):
            pass
        if not at.reached:
            break
        at.action = None
        if (place / ".out.lock").exists():
            gc.collect()  # what was interrupted while it was given back ends with the frames that the error held
        found, left = contents(target), place / ".out.partial"
        assert found in (OLD, NEW), number
        outcomes.add(found == OLD)
        if found == NEW:
            assert not any("run the same command" in line for line in said), (number, said)
            told = told or any("is complete and in its place" in line for line in said)
            # Where removing it fails that is said; an interrupt does not keep it from being removed.
            failed = kind != "interrupt" and any("cannot be removed" in line for line in said)
            assert not left.exists() or failed, (number, list(left.rglob("*")))
        elif left.exists():
            assert not (left / "old").exists() and "old" not in contents(left / "data").values(), number
        write(target, "new", said, journal)
        assert contents(target) == NEW and [path.name for path in place.iterdir()] == ["out"], (number, said)
    assert outcomes == {True, False} and number > 30 and told


def killed(target: Path, number: int, whole: bool, exchange: bool) -> None:
    if not exchange:
        replace._exchange = lambda *_: False
    with At(number, lambda: os.kill(os.getpid(), signal.SIGKILL), whole) as at:
        write(target, "new", [], True, at)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["the end", "all of it"])
def test_a_kill_at_every_line(place: Path, exchange: bool, whole: bool) -> None:
    """Between two renames the target is away, whole, until the next run puts it back."""
    target, number, outcomes = place / "out", 0, set()
    while True:
        number += 1
        shutil.rmtree(target, ignore_errors=True)
        write(target, "old", [], True)
        child = FORKS.Process(target=killed, args=(target, number, whole, exchange))
        child.start()
        child.join()
        if not child.exitcode:
            break
        assert child.exitcode == -signal.SIGKILL, number
        if target.exists():
            assert contents(target) in (OLD, NEW), number
        else:
            assert not exchange and contents(place / ".out.partial" / "old") == OLD, number
        outcomes.add(contents(target) == NEW if target.exists() else None)
        said: list[str] = []
        write(target, "new", said, True)
        assert contents(target) == NEW and [path.name for path in place.iterdir()] == ["out"], (number, said)
    assert outcomes == {True, False} | (set() if exchange else {None})


@pytest.mark.parametrize("kind", ERRORS)
def test_a_bare_replacement_interrupted_at_every_line(place: Path, exchange: bool, kind: str) -> None:
    """As training saves a step that was saved before."""
    target, new, aside = place / "out", place / "new", place / "aside"
    for number in range(1, 1000):
        for folder, text in ((target, "old"), (new, "new")):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name in ("a", "b"):
                (folder / name).write_text(text)
        try:
            with At(number, fail(ERRORS[kind]()), True) as at:
                replace_folder(new, target, aside)
        except (KeyboardInterrupt, CheckpointError, OSError, RuntimeError):
            pass
        recover(target, aside)
        assert contents(target) in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"}), number
        if not at.reached:
            return
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "no journal"])
def test_a_target_that_cannot_be_put_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: bool
) -> None:
    target = tmp_path / "out"
    write(target, "old", [], journal)
    monkeypatch.setattr(replace, "_exchange", lambda *_: False)
    real, calls = Path.rename, []

    def rename(path: Path, other: Path) -> Any:
        if path.name in ("data", "old"):
            calls.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(CheckpointError, match=r"out: stands whole in .*/\.out\.partial/old"):
            write(target, "new", [], journal)
    assert len(calls) == 2 and not target.exists() and contents(tmp_path / ".out.partial" / "old") == OLD
    with pytest.raises(UsageError, match="exists"), staged(target, plan="x", sources=[]):
        pass
    assert contents(target) == OLD


def test_only_a_checkpoint_alone_is_replaced(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for file in ("config.json", "model.safetensors", "README.md", "tokenizer.json"):
        project.mkdir(exist_ok=True)
        (project / file).write_text("{}")
    check_replaceable(project)
    for entry in ("src/main.py", ".git/HEAD", "train.py", "notes.txt", "iter_0000010/.metadata", "data/x.safetensors"):
        path = project / entry
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(UsageError, match=f"it holds {entry}"):
            write(project, "new", [], False)
        assert path.read_text() == "mine"
        path.unlink()
        if path.parent != project:
            with pytest.raises(UsageError, match=f"it holds {path.parent.name}"):
                check_replaceable(project)
            path.parent.rmdir()
    (project / "linked").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="it holds linked"):
        check_replaceable(project)
    (project / "linked").unlink()
    (project / "notes.txt").write_text("an asset of the source, which is written again")
    check_replaceable(project, ["notes.txt"])
    ours = tmp_path / "ours"
    for file in ("release/.metadata", "release/__0_0.distcp", "hf/bridge.json", "hf/docs/any.thing", "adapter.json"):
        (ours / file).parent.mkdir(parents=True, exist_ok=True)
        (ours / file).write_text("{}")
    check_replaceable(ours)
    (ours / "hf" / "bridge.json").unlink()
    with pytest.raises(UsageError, match="it holds hf/docs"):
        check_replaceable(ours)
    readme = tmp_path / "readme"
    readme.mkdir()
    check_replaceable(readme)
    (readme / "README.md").write_text("")
    with pytest.raises(UsageError, match=r"has no config\.json"):
        check_replaceable(readme)
