"""Ranks on this machine: a pool of processes that runs a function in every one of them, torch.distributed set up.

Importing torch, transformers and Megatron takes ten seconds, so it is done once, in one child ("the launcher",
`python -m bridge.ranks`); without GPUs the ranks are forked from it, which takes milliseconds. A CUDA process cannot be
forked safely, so with GPUs the launcher starts every rank as a process of its own.

Functions travel by name (`module.qualname`) and are looked up in the ranks with the parent's `sys.path`; nothing ever
imports the parent's `__main__` again. No process outlives the parent, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
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
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from bridge.errors import BridgeError, ParallelError, UsageError

PRELOAD = (
    "torch",
    "megatron.core",
    "megatron.core.models.gpt",
    "megatron.core.dist_checkpointing",
    "transformers",
    "bridge.megatron.cpu_runtime",
)

_CPU_RUNTIME = "bridge.megatron.cpu_runtime"
_START_TIMEOUT_S = 300.0
_GRACE_S = 1.0  # how long, after one rank failed, the others get to report that they failed in the same way
_LOG_TAIL = 4000
_PR_SET_PDEATHSIG = 1


class RankPool:
    """`size` ranks on this machine, started once and used for many calls.

    `preload` names the modules that the ranks import before anything runs; the CPU runtime is enabled where it is among
    them. `device="auto"` uses one GPU per rank where there are enough, else the CPU. Starting goes on in the background
    until the first `run`. A context manager; a pool that is not closed is closed at exit.
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
                return self._collect(ranks, _name(fn), limit)
            except BaseException:
                if any(rank.busy for rank in self._ranks):
                    self._kill_ranks()
                raise

    def close(self) -> None:
        """End every process of the pool. Idempotent."""
        self._closed = True
        if self._launcher is not None:
            for rank in self._ranks:
                rank.connection.close()
            self._launcher.close()
        self._launcher, self._ranks = None, []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the launcher and of the ranks that run now."""
        launcher = [] if self._launcher is None else [self._launcher.process.pid]
        return launcher + [rank.pid for rank in self._ranks]

    def _need_launcher(self) -> _Launcher:
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
                    rank.busy = False
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
        try:
            return launcher.kill_ranks()
        except (OSError, ParallelError):
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
    busy: bool = False

    def send(self, task: bytes) -> None:
        self.busy = True
        # a rank that has died is found by `receive`
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(task)

    def receive(self) -> tuple[bool, Any]:
        """(True, result) or (False, exception). Raises EOFError or OSError where the rank has died."""
        kind, value, trace = pickle.loads(self.connection.recv_bytes())
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
        return False, _noted(ParallelError(f"rank {self.index}: {_last_line(trace)}"), note)

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
        settings = options | {"sys_path": sys.path, "folder": str(self.folder), "control": theirs.fileno()}
        with theirs, (self.folder / "launcher.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bridge.ranks", json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        self._ready = False
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
            socket.send_fds(self.control, [json.dumps(question).encode()], descriptors)
            answer = self.control.recv(1 << 20)
        except OSError as error:
            raise _noted(ParallelError(f"the ranks do not start ({error})"), self.log("launcher")) from None
        if not answer:
            raise _noted(ParallelError("the ranks do not start (their launcher ended)"), self.log("launcher"))
        self._ready = True
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


def _last_line(trace: str) -> str:
    """The exception's own text: everything after the last indented line of a traceback, on one line."""
    lines = trace.rstrip().splitlines()
    start = max((i + 1 for i, line in enumerate(lines) if line.startswith("  ")), default=0)
    text = " ".join(line.strip() for line in lines[start:]) or lines[-1].strip()
    return text if len(text) <= 1000 else text[:1000] + "…"


def _how_it_ended(status: int | None) -> str:
    if status is None:
        return "ended"
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with exit code {code}"


# ---- the launcher's side ---------------------------------------------------------------------------------------------


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _launch(settings: dict[str, Any]) -> None:
    """The launcher: import, then start and kill ranks as the parent says, until the parent closes the socket."""
    import torch

    control = socket.socket(fileno=settings["control"])
    children: dict[int, None] = {}
    cuda = _use_cuda(settings["device"], settings["size"])
    if not cuda:
        torch.set_num_threads(settings["threads"])
        for module in settings["preload"]:
            importlib.import_module(module)
        if _CPU_RUNTIME in sys.modules:
            sys.modules[_CPU_RUNTIME].enable()
    try:
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 65536, 1)
            if not message:
                return
            question = json.loads(message)
            if "start" in question:
                pid = _start_rank(settings, question["start"], descriptors[0], control, cuda)
                children[pid] = None
                os.close(descriptors[0])
                answer: dict[str, Any] = {"pid": pid}
            else:
                answer = {"ended": _kill(children)}
            control.sendall(json.dumps(answer).encode())
    finally:
        _kill(children)


def _use_cuda(device: str, size: int) -> bool:
    """Whether the ranks run on GPUs; where they do not, hides these, so that everything sees a machine without."""
    import torch

    count = torch.cuda.device_count()
    if device == "cuda" and count < size:
        raise ParallelError(f"{size} ranks need {size} GPUs, but {count} are visible")
    if device != "cpu" and 0 < size <= count:
        return True
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return False


def _start_rank(settings: dict[str, Any], index: int, descriptor: int, control: socket.socket, cuda: bool) -> int:
    log = Path(settings["folder"]) / f"rank{index}.log"
    if cuda:
        options = json.dumps(settings | {"rank": index, "descriptor": descriptor, "launcher": os.getpid()})
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "bridge.ranks", options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[descriptor],
                process_group=0,
            ).pid
    launcher = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setpgid(0, 0)  # so that what the rank starts can be killed with it
        _die_with_parent(launcher)
        control.close()
        output_descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output_descriptor, 1)
        os.dup2(output_descriptor, 2)
        os.close(output_descriptor)
        _serve(index, Connection(descriptor), cuda=False)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the launcher's frames below must not run on in the fork


def _kill(children: dict[int, None]) -> dict[int, int]:
    """Kill and reap; a child that had already died keeps its own status."""
    ended: dict[int, int] = {}
    for pid in children:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended[pid] = status
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL) if kill is os.killpg or pid not in ended else None
        if not done:
            ended[pid] = os.waitpid(pid, 0)[1]
    children.clear()
    return ended


# ---- the rank's side -------------------------------------------------------------------------------------------------


def _serve(index: int, connection: Connection, cuda: bool) -> None:
    """A rank: answer one call after another until the parent hangs up."""
    import faulthandler

    import torch

    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if cuda:
        torch.cuda.set_device(index)
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        payload, world, store, limit = pickle.loads(task)
        connection.send_bytes(_answer(payload, world, store, limit, index, cuda))


def _answer(payload: bytes, world: int, store: str, limit: float, index: int, cuda: bool) -> bytes:
    kind, value, trace = "ok", b"", ""
    try:
        path, call = pickle.loads(payload)
        sys.path.extend(entry for entry in path if entry not in sys.path)
        fn, args, kwargs = pickle.loads(call)
        with _distributed(index, world, store, limit, cuda):
            result = fn(*args, **kwargs)
            value = pickle.dumps(result)
    except (Exception, SystemExit) as error:
        kind, trace = "error", traceback.format_exc()
        if isinstance(error, BridgeError):
            with contextlib.suppress(Exception):
                kind, value = "bridge", pickle.dumps(error)
    sys.stdout.flush()
    sys.stderr.flush()
    return pickle.dumps((kind, value, trace))


@contextlib.contextmanager
def _distributed(index: int, world: int, store: str, limit: float, cuda: bool) -> Iterator[None]:
    """A new default process group, and nothing left of it, or of Megatron's groups, afterwards."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    _seed(0)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=FileStore(store, world),
        rank=index,
        world_size=world,
        # The parent's limit speaks first, and names the rank.
        timeout=timedelta(seconds=limit + 30),
        device_id=torch.device("cuda", index) if cuda else None,
    )
    try:
        yield
    finally:
        _reset_megatron()
        if dist.is_initialized():
            dist.destroy_process_group()


def _seed(seed: int) -> None:
    import random

    import torch

    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _reset_megatron() -> None:
    """Forget Megatron's global state: groups, random-state trackers, buffers, microbatch calculator, streams."""
    if "megatron.core.parallel_state" not in sys.modules:
        return
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel import random

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    random._CUDA_RNG_STATE_TRACKER = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False


def main(argument: str) -> None:
    """`python -m bridge.ranks SETTINGS`: the launcher, or, on GPUs, one rank."""
    settings = json.loads(argument)
    if "rank" not in settings:
        _launch(settings)
        os._exit(0)  # nothing to tidy up, and taking all the modules apart takes a second
    _die_with_parent(settings["launcher"])
    for module in settings["preload"]:
        importlib.import_module(module)
    _serve(settings["rank"], Connection(settings["descriptor"]), cuda=True)


if __name__ == "__main__":
    main(sys.argv[1])
