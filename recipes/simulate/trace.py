"""Noting what a rank does in a step, as it does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from recipes.simulate.events import Collective, Event, Group, Mark, Wait, Work

# Kinds of collectives by what torch dispatches, and which argument has the larger buffer.
_KINDS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "broadcast_": ("broadcast", 0),
    "barrier": ("barrier", 0),
}


class _Handle(dist.Work):
    """What an asynchronous collective returns."""

    def __init__(self, trace: Trace, number: int) -> None:
        super().__init__()
        self._trace, self._number = trace, number

    def wait(self, *_: Any) -> bool:
        self._trace.waited(self._number)
        return True

    def is_completed(self) -> bool:
        return True


@dataclass
class Trace:
    """Filled by a `FakeDevice` as a rank runs."""

    events: list[Event] = field(default_factory=list)
    _work: dict[str, int] = field(default_factory=dict)
    _groups: dict[str, Group] = field(default_factory=dict)
    _handles: list[_Handle] = field(default_factory=list)
    _waited: set[int] = field(default_factory=set)

    def restart(self) -> None:
        """Forget what happened."""
        self.events, self._work, self._handles, self._waited = [], {}, [], set()

    def work(self, kind: str, flops: int) -> None:
        """A kernel that is bound by its products."""
        self._work[kind] = self._work.get(kind, 0) + flops
        self._work["kernels"] = self._work.get("kernels", 0) + 1

    def move(self, size: int) -> None:
        """A kernel that is bound by the bytes that it reads and writes."""
        self._work["moved"] = self._work.get("moved", 0) + size
        self._work["kernels"] = self._work.get("kernels", 0) + 1

    def close(self) -> None:
        """Put what was computed since the last event among the events."""
        if self._work:
            self.events.append(Work(**self._work))
            self._work = {}

    def waited(self, number: int) -> None:
        """The device waits for a collective, where it has not yet."""
        if number not in self._waited:
            self._waited.add(number)
            self.close()
            self.events.append(Wait(number))

    @contextmanager
    def marked(self, name: str) -> Iterator[None]:
        """What happens in the block is a part of the step called `name`."""
        self.close()
        self.events.append(Mark(name, begins=True))
        yield
        self.close()
        self.events.append(Mark(name, begins=False))

    def communicate(self, func: Any, args: Sequence[Any]) -> Any:
        """Note a c10d operation, which does nothing; what it returns."""
        self.close()
        kind, buffer = _KINDS[func._schema.name.removeprefix("c10d::")]
        group = self._group(func, args)
        number = len(self.events)
        if kind != "barrier":
            peer = group.ranks[args[2]] if kind in ("send", "recv") else None
            self.events.append(Collective(kind, group, _size(args[buffer]), peer, number))
        # Torch holds on to what is behind a handle no longer than it is used; that it is waited for is known here.
        handle = _Handle(self, number)
        self._handles.append(handle)
        work = handle.boxed()
        return (args[0], work) if len(func._schema.returns) == 2 else work

    def _group(self, func: Any, args: Sequence[Any]) -> Group:
        names = [argument.name for argument in func._schema.arguments]
        group = dist.ProcessGroup.unbox(args[names.index("process_group")])
        name = group.group_name
        if name not in self._groups:
            self._groups[name] = Group(group.group_desc, tuple(dist.get_process_group_ranks(group)))
        return self._groups[name]


def _size(tensors: Any) -> int:
    """Bytes of a tensor, or of lists of them."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(_size, tensors))
