"""The processes behind `bridge.ranks`: `python -m bridge.rank_process SETTINGS` is the launcher, or, on GPUs, one rank.

The launcher imports what ranks need, then starts and kills them as the parent says, over a socket; a rank answers calls
over another. Messages to the launcher are JSON, calls and answers are pickles. Both end when the parent hangs up.
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
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError, ParallelError

TIDY = b""  # to a rank, after a call: all ranks are through, take the process groups down

_CPU_RUNTIME = "bridge.megatron.cpu_runtime"
_PR_SET_PDEATHSIG = 1


def _die_with_parent(parent: int | None) -> None:
    """Have the kernel kill this process when its parent ends; None takes that back. Linux only, else nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 0 if parent is None else signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def _launch(settings: dict[str, Any]) -> None:
    """The launcher: import, then start and kill ranks as the parent says, until the parent closes the socket."""
    import gc

    _die_with_parent(settings["parent"])
    import torch

    _extend_path(settings["sys_path"])
    control = socket.socket(fileno=settings["control"])
    children: dict[int, None] = {}
    cuda = _use_cuda(settings["device"], settings["size"])
    if not cuda:
        torch.set_num_threads(settings["threads"])
        # The runtime first: it imports Megatron faster.
        if _CPU_RUNTIME in settings["preload"]:
            importlib.import_module(_CPU_RUNTIME).enable()
        for module in settings["preload"]:
            importlib.import_module(module)
        gc.freeze()  # a collection in a rank need not touch, and so copy, what all share
    # From here on the end of the socket says it; the kernel's word would also come when a *thread* that had made the
    # pool ends.
    _die_with_parent(None)
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
        shutil.rmtree(settings["folder"], ignore_errors=True)  # in case the parent could not


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
                [sys.executable, "-m", "bridge.rank_process", options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[descriptor],
                process_group=0,
            ).pid
    launcher = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
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
    """Kill ranks with what they started, and reap them; one that had already died keeps its own wait status."""
    ended: dict[int, int] = {}
    for pid in children:
        done, ended[pid] = os.waitpid(pid, os.WNOHANG)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if not done:
            os.kill(pid, signal.SIGKILL)  # it may not have come to making its process group
            ended[pid] = os.waitpid(pid, 0)[1]
    children.clear()
    return ended


def _serve(index: int, connection: Connection, cuda: bool) -> None:
    """A rank: answer one call after another until the parent hangs up."""
    import faulthandler

    import torch

    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # What the rank forks must not hold the line open: its end tells the parent that the rank has died.
    os.register_at_fork(after_in_child=connection.close)
    if cuda:
        torch.cuda.set_device(index)
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        if task == TIDY:
            _tidy()
        else:
            payload, world, store, limit = pickle.loads(task)
            connection.send_bytes(_answer(payload, world, store, limit, index, cuda))


def _answer(payload: bytes, world: int, store: str, limit: float, index: int, cuda: bool) -> bytes:
    kind, value, text, trace = "ok", b"", "", ""
    try:
        path, call = pickle.loads(payload)
        _extend_path(path)
        fn, args, kwargs = pickle.loads(call)
        _join(index, world, store, limit, cuda)
        value = pickle.dumps(fn(*args, **kwargs))
    except BaseException as error:  # also SystemExit, and what pytest raises to fail a test
        kind, trace = "error", traceback.format_exc()
        text = " ".join("".join(traceback.format_exception_only(error)).split())[:1000]
        if isinstance(error, BridgeError):
            with contextlib.suppress(Exception):
                kind, value = "bridge", pickle.dumps(error)
    sys.stdout.flush()
    sys.stderr.flush()
    return pickle.dumps((kind, value, text, trace))


def _join(index: int, world: int, store: str, limit: float, cuda: bool) -> None:
    """Make a new default process group, and set the same random seeds on every rank."""
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
        timeout=timedelta(seconds=limit + 30),  # the parent's limit speaks first, and names the rank
        device_id=torch.device("cuda", index) if cuda else None,
    )


def _tidy() -> None:
    """Take down the process groups and forget Megatron's global state: trackers, buffers, microbatch calculator."""
    import gc

    import torch.distributed as dist

    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import num_microbatches_calculator, parallel_state
        from megatron.core.tensor_parallel import random

        parallel_state.destroy_model_parallel()
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        random._CUDA_RNG_STATE_TRACKER = None
        random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def _seed(seed: int) -> None:
    import random

    import torch

    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _extend_path(path: list[str]) -> None:
    sys.path.extend(entry for entry in path if entry not in sys.path)


def main(argument: str) -> None:
    """Run the launcher, or, where the settings name one, a rank."""
    settings = json.loads(argument)
    if "rank" not in settings:
        _launch(settings)
        os._exit(0)  # nothing to tidy up, and taking all the modules apart takes a second
    _die_with_parent(settings["launcher"])
    _extend_path(settings["sys_path"])
    for module in settings["preload"]:
        importlib.import_module(module)
    _serve(settings["rank"], Connection(settings["descriptor"]), cuda=True)


if __name__ == "__main__":
    main(sys.argv[1])
