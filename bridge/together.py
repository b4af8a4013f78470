"""What fails on one rank fails on all: nobody waits for a rank that has gone its own way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from bridge.errors import BridgeError, CheckpointError


@contextmanager
def together() -> Iterator[None]:
    """What the block raises on one rank is raised at its end on every rank. Collective; the block itself is not.

    A BridgeError as it is; of anything else the others get a CheckpointError that names the rank. What ends a process
    (an interrupt) is let through: the launcher ends the others.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if dist.is_initialized() and _anywhere(failure is not None):
        said: list[BridgeError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(said, None if failure is None else _message(failure))
        failure = failure or next(error for error in said if error is not None)
    if failure is not None:
        raise failure


def _anywhere(failed: bool) -> bool:
    flag = torch.tensor(int(failed), device=torch.cuda.current_device())
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _message(error: Exception) -> BridgeError:
    if isinstance(error, BridgeError):
        return error
    what = (str(error).splitlines() or [""])[0]
    return CheckpointError(f"rank {dist.get_rank()}: {type(error).__name__}: {what}")
