"""Filling buckets from a source and handing them to a sink, on the ranks that have one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bridge.sync.buckets import Bucket, SyncTensor
from bridge.together import together


class WeightSource(Protocol):
    """Where weights are: a live model, a checkpoint."""

    def fill(self, bucket: Bucket, views: Mapping[str, Tensor] | None) -> None:
        """Write the tensors of a bucket into `views`, by name, where this rank receives them. Collective."""
        ...


class WeightSink(Protocol):
    """Where weights go. Its methods are called on each rank that has a sink, in this order, one bucket at a time."""

    def begin(self, buckets: Sequence[Bucket]) -> None:
        """What is going to come: every name, shape and dtype."""
        ...

    def room(self, nbytes: int) -> Tensor:
        """A buffer (uint8, that long at least) on the device where the next bucket is put together."""
        ...

    def take(self, bucket: Bucket, views: Mapping[str, Tensor]) -> None:
        """A bucket in the buffer that `room` gave, which is done with when this returns."""
        ...

    def end(self) -> None:
        """All is there."""
        ...

    def abort(self) -> None:
        """Something failed, here or elsewhere: nothing more is going to come. Raises nothing."""
        ...


class CallbackSink:
    """Hands every tensor to `take` in this process: a view of the bucket, good until `take` returns.

    `begin` is given all buckets first. `device`: where buckets are; None: where the model is.
    """

    def __init__(
        self,
        take: Callable[[SyncTensor, Tensor], None],
        begin: Callable[[Sequence[Bucket]], None] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._take, self._begin, self._device = take, begin, device
        self._largest, self._buffer = 0, torch.empty(0, dtype=torch.uint8)

    def begin(self, buckets: Sequence[Bucket]) -> None:
        """See `WeightSink.begin`."""
        self._largest = max((bucket.nbytes for bucket in buckets), default=0)
        if self._begin is not None:
            self._begin(buckets)

    def room(self, nbytes: int) -> Tensor:
        """See `WeightSink.room`. One buffer serves for all buckets."""
        if len(self._buffer) < nbytes:
            device = torch.cuda.current_device() if self._device is None else self._device
            self._buffer = torch.empty(self._largest, dtype=torch.uint8, device=device)
        return self._buffer

    def take(self, bucket: Bucket, views: Mapping[str, Tensor]) -> None:
        """See `WeightSink.take`."""
        for tensor in bucket.tensors:
            self._take(tensor, views[tensor.name])

    def end(self) -> None:
        """See `WeightSink.end`."""
        self._buffer = torch.empty(0, dtype=torch.uint8)

    abort = end


@dataclass(frozen=True)
class Sent:
    """What was sent."""

    tensors: int
    nbytes: int
    buckets: int


def send(
    source: WeightSource,
    buckets: Sequence[Bucket],
    sink: WeightSink | None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Sent:
    """Send all buckets; `sink` is None on ranks that receive nothing. Collective. `progress`: (bytes, of all, tensor).

    In memory there is one bucket, and what the source needs to fill it. Raises what any rank raises, on all of them,
    after `abort`.
    """
    total, done = sum(bucket.nbytes for bucket in buckets), 0
    try:
        with together():
            if sink is not None:
                sink.begin(buckets)
        for bucket in buckets:
            with together():
                views = None if sink is None else bucket.views(sink.room(bucket.nbytes))
            source.fill(bucket, views)
            with together():
                if sink is not None and views is not None:
                    sink.take(bucket, views)
            views = None
            done += bucket.nbytes
            if progress is not None:
                progress(done, total, bucket.tensors[-1].name)
        with together():
            if sink is not None:
                sink.end()
    except BaseException:
        if sink is not None:
            sink.abort()
        raise
    return Sent(sum(len(bucket.tensors) for bucket in buckets), total, len(buckets))
