"""The attention backends, and which of them computes a layer.

A backend is asked first whether it can honour a mask (`refuse` says why not). One that cannot is never used: "auto"
goes on to the next, and where it was asked for by name that is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from torch import Tensor

from bridge.errors import UsageError
from bridge.megatron.attention_backends import banded, blockwise, dense, ffpa, flex, flex_triton, reference, sdpa
from bridge.megatron.mask import Mask

logger = logging.getLogger(__name__)

AUTO = "auto"


class Backend(NamedTuple):
    """`attend`: (query [sq, b, heads, d], key and value [sk, b, groups, d], mask) -> [sq, b, heads, d].

    `refuse`: (query, key, mask) -> why this backend cannot compute that, or None.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
    refuse: Callable[[Tensor, Tensor, Mask], str | None]


BACKENDS: dict[str, Backend] = {
    name: Backend(name, module.attend, module.refuse)
    for name, module in (
        ("reference", reference),
        ("dense", dense),
        ("banded", banded),
        ("blockwise", blockwise),
        ("sdpa", sdpa),
        ("flex", flex),
        ("flex_triton", flex_triton),
        ("ffpa", ffpa),
    )
}
# What "auto" tries, by device, the fastest first (docs/benchmarks-attention.md); `blockwise` takes everything.
_CPU_ORDER = ("banded", "dense", "sdpa", "blockwise")
_GPU_ORDER = ("ffpa", "flex", "blockwise")


def select(name: str, query: Tensor, key: Tensor, mask: Mask) -> Backend:
    """The backend called `name`, or the one that "auto" comes to. Once a step, mask and shape; logged once.

    Raises UsageError where the named one cannot honour the mask.
    """
    grad = query.requires_grad or key.requires_grad
    case = (name, query.shape, key.shape, query.dtype, grad)
    chosen = mask.cache.get(case)
    if chosen is None:
        chosen = mask.cache[case] = _select(name, query, key, mask)
    assert isinstance(chosen, Backend)
    return chosen


def _select(name: str, query: Tensor, key: Tensor, mask: Mask) -> Backend:
    if name != AUTO:
        reason = BACKENDS[name].refuse(query, key, mask)
        if reason is not None:
            raise UsageError(f"attention backend {name} cannot honour the mask ({mask.rule}): {reason}")
        _log(name, str(mask.rule), query.device.type, "as asked for")
        return BACKENDS[name]
    order = _GPU_ORDER if query.is_cuda else _CPU_ORDER
    chosen = next(BACKENDS[candidate] for candidate in order if not BACKENDS[candidate].refuse(query, key, mask))
    _log(chosen.name, str(mask.rule), query.device.type, "chosen")
    return chosen


@cache
def _log(name: str, rule: str, device: str, how: str) -> None:
    logger.info("attention, %s, on %s: %s (%s)", rule, device, name, how)
