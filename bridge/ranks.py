"""Ranks on this machine: a pool of processes that runs a function in every one of them, torch.distributed set up.

Importing torch, transformers and Megatron takes ten seconds, so it is done once, in one child ("the launcher",
`bridge.rank_process`); without GPUs the ranks are forked from it, which takes milliseconds. A CUDA process cannot be
forked safely, so with GPUs the launcher starts every rank as a process of its own.

Functions travel by name (`module.qualname`) and are looked up in the ranks with the parent's `sys.path`; nothing ever
imports the parent's `__main__` again. No process outlives the parent, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from bridge.close_on_exit import CloseOnExit
from bridge.errors import BridgeError, ParallelError, UsageError
from bridge.rank_process import TIDY

PRELOAD = (
    "torch",
    "megatron.core",
    "megatron.core.models.gpt",
    "megatron.core.dist_checkpointing",
    "transformers.models.gemma4.modeling_gemma4",
    "transformers.models.gemma4_unified.modeling_gemma4_unified",
    "bridge.megatron.cpu_runtime",
)

_START_TIMEOUT_S = 300.0
_GRACE_S = 1.0  # how long, after one rank failed, the others get to report that they failed in the same way
_LOG_TAIL = 4000


class RankPool(CloseOnExit):
    """`size` ranks on this machine, started once and used for many calls.

    What ranks print goes to a file, whose end is shown where a rank dies or hangs. `preload` names the modules that the
    ranks import before anything runs; the CPU runtime is enabled where it is among them. `device="auto"` uses one GPU
    per rank where there are enough, else the CPU. Starting goes on in the background until the first `run`. A context
    manager; a pool that is not closed is closed at exit.
    """

    def __init__(
        self,
        size: int,
        *,
        threads_per_rank: int = 1,
        preload: Sequence[str] = PRELOAD,
        timeout_s: float = 600.0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> None:
        if size < 1:
            raise UsageError(f"a pool of {size} ranks makes no sense")
        self.size = size
        self._timeout_s = timeout_s
        self._options = {"threads": threads_per_rank, "preload": list(preload), "device": device, "size": size}
        self._launcher: _Launcher | None = _Launcher(self._options)
        self._ranks: list[_Rank] = []
        self._calls = 0
        self._closed = False
        self._lock = threading.Lock()

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        world_size: int | None = None,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `fn(*args, **kwargs)` on ranks 0 to `world_size`-1 (default: all); returns their results in rank order.

        Every call finds a new process group of exactly that size (gloo, or nccl on GPUs), the same random seed on every
        rank, and none of Megatron's global state. Raises what a rank raised where that is a BridgeError, else a
        ParallelError with its rank and message (the remote traceback is a note of the exception); a ParallelError also
        when a rank dies, or does not answer in `timeout_s`. The pool can be used again after each of these.
        """
        world = self.size if world_size is None else world_size
        if not 1 <= world <= self.size:
            raise ParallelError(f"{world} ranks were asked of a pool of {self.size}")
        payload = _pickle_call(fn, args, kwargs)
        limit = self._timeout_s if timeout_s is None else timeout_s
        with self._lock:
            if self._closed:
                raise UsageError("the pool of ranks is closed")
            try:
                ranks = self._start(world)
                self._calls += 1
                store = str(self._need_launcher().folder / f"store{self._calls}")
                task = pickle.dumps((payload, world, store, limit))
                for rank in ranks:
                    rank.send(task)
                results = self._collect(ranks, _name(fn), limit)
                for rank in ranks:
                    rank.send(TIDY)
                return results
            except BaseException:
                self._kill_ranks()  # some may hang; new ones cost milliseconds, and owe nothing to this call
                raise

    def close(self) -> None:
        """End every process of the pool. Idempotent."""
        self._closed = True
        if self._launcher is not None:
            for rank in self._ranks:
                rank.connection.close()
            self._launcher.close()
        self._launcher, self._ranks = None, []

    @property
    def pids(self) -> list[int]:
        """Process ids of the launcher and of the ranks that run now."""
        launcher = [] if self._launcher is None else [self._launcher.process.pid]
        return launcher + [rank.pid for rank in self._ranks]

    def _need_launcher(self) -> _Launcher:
        if self._launcher is not None and self._launcher.unanswered:
            # An interrupt came between question and answer: the answer would be taken for that to the next question.
            self._launcher.close()
            self._launcher = None
        if self._launcher is None:
            self._launcher = _Launcher(self._options)
        return self._launcher

    def _start(self, world: int) -> list[_Rank]:
        """Ranks 0 to `world`-1, started where they do not run. A rank that died between two calls is replaced."""
        launcher = self._need_launcher()
        if launcher.process.poll() is not None or any(rank.connection.closed or rank.dead() for rank in self._ranks):
            self._kill_ranks()
            launcher = self._need_launcher()
        while len(self._ranks) < world:
            self._ranks.append(launcher.start_rank(len(self._ranks)))
        return self._ranks[:world]

    def _collect(self, ranks: list[_Rank], name: str, limit: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, BaseException] = {}
        dead: list[_Rank] = []
        pending = {rank.connection: rank for rank in ranks}
        deadline = time.monotonic() + limit
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready and (failures or dead):
                break  # the others hang in a collective with the one that failed
            if not ready:
                late = ", ".join(str(rank.index) for rank in pending.values())
                stacks = self._stacks(list(pending.values()))
                raise _noted(ParallelError(f"{name}: rank {late} did not answer within {limit:g} s"), stacks)
            for connection in ready:
                rank = pending.pop(connection)  # type: ignore[call-overload]
                try:
                    outcome = rank.receive()
                except (EOFError, OSError):
                    dead.append(rank)
                else:
                    (results if outcome[0] else failures)[rank.index] = outcome[1]
            if failures or dead:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if dead:
            logs = {rank.index: self._log(f"rank{rank.index}") for rank in dead}
            statuses = self._kill_ranks()
            how = ", ".join(f"rank {rank.index} {_how_it_ended(statuses.get(rank.pid))}" for rank in dead)
            raise _noted(ParallelError(f"{name}: {how}"), "\n".join(f"rank {i}:\n{log}" for i, log in logs.items()))
        if failures:
            raise failures[min(failures)]
        return [results[rank.index] for rank in ranks]

    def _kill_ranks(self) -> dict[int, int]:
        """Kill every rank; answers how each process ended. A launcher that does not answer is killed as well."""
        launcher, ranks = self._launcher, self._ranks
        self._ranks = []
        for rank in ranks:
            rank.connection.close()
        if launcher is None:
            return {}
        if not launcher.unanswered:
            with contextlib.suppress(OSError, ParallelError):
                return launcher.kill_ranks()
        launcher.close()
        self._launcher = None
        return {}

    def _stacks(self, ranks: list[_Rank]) -> str:
        """Where ranks that do not answer are: faulthandler writes their Python stacks on SIGUSR1, GIL or not."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return "\n".join(f"rank {rank.index}:\n{self._log(f'rank{rank.index}')}" for rank in ranks)

    def _log(self, stem: str) -> str:
        return self._need_launcher().log(stem)


@dataclass
class _Rank:
    index: int
    pid: int
    connection: Connection

    def send(self, task: bytes) -> None:
        # a rank that has died is found by `receive`
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(task)

    def receive(self) -> tuple[bool, Any]:
        """(True, result) or (False, exception). Raises EOFError or OSError where the rank has died."""
        kind, value, text, trace = pickle.loads(self.connection.recv_bytes())
        note = f"rank {self.index}:\n{trace}"
        if kind == "ok":
            try:
                return True, pickle.loads(value)
            except Exception as error:  # a result whose class refuses to be rebuilt here
                return False, ParallelError(f"rank {self.index}: its result cannot be read ({error})")
        if kind == "bridge":
            with contextlib.suppress(Exception):
                original = pickle.loads(value)
                if isinstance(original, BridgeError):
                    return False, _noted(original, note)
        return False, _noted(ParallelError(f"rank {self.index}: {text}"), note)

    def dead(self) -> bool:
        # An idle rank says nothing: what makes its pipe readable is its end.
        return bool(self.connection.poll(0))


class _Launcher:
    """The child that imports everything once and starts the ranks; it dies with the socket that it is steered by."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gemma4-ranks-"))
        self.control, theirs = socket.socketpair()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(options["threads"]),
            # Lets torch.cuda.is_available() answer without a CUDA context, which a fork would break.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        # Gloo looks its address up by the host name, which not every machine can resolve; these ranks are all local.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        path = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = options | {
            "sys_path": sys.path,
            "folder": str(self.folder),
            "parent": os.getpid(),
            "control": theirs.fileno(),
        }
        with theirs, (self.folder / "launcher.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bridge.rank_process", json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env=environment | {"PYTHONPATH": os.pathsep.join(path)},
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        self._ready = False
        self.unanswered = False
        self._finalizer = weakref.finalize(self, _end_launcher, self.process, self.control, self.folder, os.getpid())

    def start_rank(self, index: int) -> _Rank:
        """Start one rank. Raises ParallelError with the log where the launcher failed."""
        mine, theirs = socket.socketpair()
        with theirs:
            answer = self._ask({"start": index}, [theirs.fileno()])
        return _Rank(index, answer["pid"], Connection(mine.detach()))

    def kill_ranks(self) -> dict[int, int]:
        """Kill all ranks and what they started; process id -> wait status."""
        return {int(pid): status for pid, status in self._ask({"kill": True}, [])["ended"].items()}

    def log(self, stem: str) -> str:
        """The end of a rank's output."""
        try:
            return (self.folder / f"{stem}.log").read_bytes()[-_LOG_TAIL:].decode(errors="replace")
        except OSError:
            return ""

    def close(self) -> None:
        self._finalizer()

    def _ask(self, question: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        try:
            # Only the first answer has to wait for the imports.
            self.control.settimeout(30.0 if self._ready else _START_TIMEOUT_S)
            self.unanswered = True
            socket.send_fds(self.control, [json.dumps(question).encode()], descriptors)
            answer = self.control.recv(1 << 20)
        except OSError as error:
            raise _noted(ParallelError(f"the ranks do not start: {error}"), self.log("launcher")) from None
        if not answer:
            log = self.log("launcher").rstrip()
            why = log.rpartition("\n")[2] or "their launcher ended"
            raise _noted(ParallelError(f"the ranks do not start: {why}"), log)
        self._ready, self.unanswered = True, False
        return dict(json.loads(answer))


def _end_launcher(process: subprocess.Popen[bytes], control: socket.socket, folder: Path, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the parent must not end what the parent still uses
    control.close()  # the launcher sees the end of the socket, kills its ranks and goes
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()  # its ranks asked the kernel to be killed with it
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _pickle_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    name = _name(fn)
    if getattr(fn, "__module__", None) == "__main__":
        raise UsageError(f"{name} is defined in __main__, which ranks do not import: move it to a module")
    try:
        call = pickle.dumps((fn, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(f"{name} cannot be sent to the ranks: {error}") from None
    # The path goes first and apart: unpickling the call needs it.
    return pickle.dumps((sys.path, call))


def _name(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__qualname__", fn))


def _noted[E: BaseException](error: E, note: str) -> E:
    error.add_note(note)
    return error


def _how_it_ended(status: int | None) -> str:
    if status is None:
        return "ended"
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with exit code {code}"
