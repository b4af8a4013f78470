"""One checkpoint on its way to the disk, by Megatron-Core's writer: on the spot, or in a thread while training goes on.

What is written beside training is a copy in host memory of this rank's part, and goes as it is written. The thread
makes it too, while the next step computes gradients: an update waits for it. A thread dies with its process, no signal
reaches it, and nothing of it outlives a rank that is killed, as a helper process would. Python's garbage collector
rests meanwhile: Megatron's writer stops it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async

from recipes.train.host_memory import copy_of, on_its_own, room_for

# How much may wait in memory for the disk: what is given up ends when so much is there. Bytes.
_UNWRITTEN = 256 << 20


class _GivenUp(BaseException):
    """Not an `Exception`, which Megatron's writer would report as a failure."""


@dataclass(frozen=True)
class Live:
    """Tensors of which parts are in a state, and which change: by updates only, or in any pass."""

    updated: Sequence[torch.Tensor]
    passing: Sequence[torch.Tensor]


class Writing:
    """The files of a state in `folder`, an empty one that every rank sees. Collective."""

    def __init__(self, state: dict[str, Any], folder: Path, live: Live | None = None) -> None:
        """Plan it; with `live`, begin it in a thread, else write it.

        Until `copied` has returned nothing of `live.updated` may change. Raises what Megatron and the disk raise, here
        or in `finish`.
        """
        # What the writer reports goes from thread to thread. Megatron would start a process to carry it, which a
        # signal to the job ends, and which outlives a rank that is killed. It asks nobody for another: the strategy
        # that `save` takes makes its writer by a name, and the writer its queue in the midst of what a subclass would
        # have to write again. So the module's queue, which it makes once for the process, is this one.
        filesystem_async._results_queue = queue.Queue()
        self._copies = [] if live is None else _detach(state, live)
        request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, async_strategy="mcore")
        assert request is not None
        self._request, self._thread, self._given_up = request, None, threading.Event()
        self._copied = threading.Event()
        if live is None:
            request.execute_sync()
        elif request.async_fn is not None:
            self._thread = threading.Thread(target=self._write, args=(self._files(),), name="checkpoint")
            self._thread.start()
        self._finished = live is None

    @property
    def going_on(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    def copied(self) -> None:
        """Wait until nothing is read any more of what updates change."""
        if self._thread is not None:
            self._copied.wait()

    def finish(self) -> None:
        """Make it a checkpoint, when every rank has written its part. Collective."""
        if self._finished:
            return
        if self._thread is not None:
            self._thread.join()
        self._finished = True
        for function in self._request.finalize_fns:
            function()

    def give_up(self) -> None:
        """End it where it is, on this rank."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()

    def _files(self) -> list[Any]:
        """The files to write, as Megatron has them, whose tensors are let go of as they are written."""
        files = [
            (path, name, (objects, self._going(path, list(tensors))))
            for path, name, (objects, tensors) in self._request.preload_fn()
        ]
        for _, _, (_, tensors) in self._request.async_fn_args[1]:
            tensors.clear()  # which would hold on to all of it
        return files

    def _write(self, files: list[Any]) -> None:
        # Signals are the main thread's.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        rank, _, results = self._request.async_fn_args
        with contextlib.suppress(_GivenUp):
            try:
                self._copy()
            except Exception as error:
                results.put(error)  # raised by `finish`
                return
            finally:
                self._copied.set()
            self._request.async_fn(rank, files, results)

    def _copy(self) -> None:
        while self._copies:
            if self._given_up.is_set():
                raise _GivenUp
            _fill(*self._copies.pop())

    def _going(self, path: str, tensors: list[tuple[Any, torch.Tensor]]) -> Iterator[tuple[Any, torch.Tensor]]:
        """One after the other, each let go of as the next is asked for."""
        unwritten = 0
        tensors.reverse()
        while tensors:
            if self._given_up.is_set():
                raise _GivenUp
            if unwritten >= _UNWRITTEN:
                unwritten = 0
                _sync(path)
            unwritten += tensors[-1][1].nbytes
            yield tensors.pop()


def _detach(state: dict[str, Any], live: Live) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give a state tensors that nothing changes, in host memory, where this rank writes them; in place.

    Returns the copies that are still to be made, each with what it is of. Megatron would copy parts of larger tensors,
    as weights are of DDP's buffers and layers of a table, and leave the others as they are.
    """
    apply_factories(state)
    updated, passing = _storages(live.updated), _storages(live.passing)
    copies = []
    for item in nested_values(state):
        if isinstance(item, ShardedTensor) and is_main_replica(item.replica_id):
            tensor, storage = item.data.detach(), item.data.untyped_storage().data_ptr()
            if tensor.is_cuda or storage in passing:
                item.data = copy_of(tensor)
            elif storage in updated:
                item.data = room_for(tensor)
                copies.append((item.data, tensor))
            else:
                item.data = on_its_own(tensor)
    torch.cuda.synchronize()
    return copies


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _fill(copy: torch.Tensor, original: torch.Tensor) -> None:
    copy.copy_(original)


def _sync(path: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(file)
    finally:
        os.close(file)
