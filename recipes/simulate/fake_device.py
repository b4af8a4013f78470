"""A device that computes nothing, on which to count: bytes held, operations, what passes between it and the host.

Its tensors are torch's on "meta": shapes, dtypes and storages, no values and no memory, so that the published
sizes fit anywhere (`FakeTensorMode` would have the same done in Python, several times as slowly). Tensors of the host
are real. So what a GPU would refuse is refused here (an operation on tensors of both), and where it would wait is noted
(`reads`, `copies`). Code that asks is told of a GPU (`Tensor.is_cuda`): it goes the GPU's way. What cannot run without
one is stood in for by what takes the same memory (`stand_ins.py`):

- Triton kernels: their outputs are made, the launch is left out;
- FlexAttention: an operation that makes and keeps what torch's compiled kernel does.

With `gpu=False` it stands for a CPU: code goes the way that it goes where there is no GPU.

Collectives of a fake process group are done by no one; a `Trace` notes them, and the work between them.
Tokens are taken to be spread evenly over experts: how many go where depends on values, of which there are none, and
Megatron's dispatcher reads it on the host. That one operation is told what to answer (`stand_ins.spread_evenly`).

Not counted: workspaces inside of an operation (cuBLAS, sorting), the allocator's rounding, CUDA itself.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from recipes.simulate.stand_ins import DEVICE, standing_in
from recipes.simulate.trace import Trace

_aten = torch.ops.aten
# What brings values from one side to the other.
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
# What a kernel is not launched for.
_FREE = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.detach.default,
    _aten.lift_fresh.default,
}
# What the host has to wait for, because a shape depends on it.
_SHAPES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")


class MixedDevicesError(RuntimeError):
    """An operation on a tensor of the host and one of the device."""


class Snapshot(NamedTuple):
    """Of a while: most bytes held, FLOPs of products, and by the line that asked: reads, copies, bytes at the peak."""

    peak: int
    flops: int
    reads: dict[str, int]
    copies: dict[str, int]
    at_peak: dict[str, int]


class FakeDevice(TorchDispatchMode):
    """Counts what happens on the device while it is active.

    `held`, `peak`: bytes of storages that live, and the most there were since `restart`. `reads`: where the host waits
    for a value; `copies`: where it sends one, but for tensors of one number; both by the line that asked. `flops`: of
    products.
    """

    def __init__(self, gpu: bool = True, trace: Trace | None = None) -> None:
        super().__init__()
        self.gpu, self.trace = gpu, trace or Trace()
        self.held = self.peak = 0
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._by_place: Counter[str] = Counter()
        self._rising = False
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._stack: ExitStack | None = None

    def snapshot(self) -> Snapshot:
        """What was counted since `restart`."""
        self._note_peak()
        named = (dict(counter) for counter in (self.reads, self.copies, +self.at_peak))
        return Snapshot(self.peak, self.flops.total(), *named)

    def restart(self) -> None:
        """Forget what was counted; what is held stays."""
        self.peak, self._rising = self.held, True
        for counter in (self.reads, self.copies, self.flops):
            counter.clear()

    def _note_peak(self) -> None:
        """Before anything is let go of: who holds what there is, where there never was more."""
        if self._rising:
            self.at_peak, self._rising = self._by_place.copy(), False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((*args, *kwargs.values())))
        there = any(x.is_meta for x in given)
        target = kwargs.get("device")
        if not there and (target is None or torch.device(target) != DEVICE):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":
            self.reads[f"{_asked_by()}: item"] += 1
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if there and func is _aten._to_copy.default and target is not None and torch.device(target) != DEVICE:
            self.reads[f"{_asked_by()}: copy"] += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if there and func is _aten.copy_.default and not args[0].is_meta:
            self.reads[f"{_asked_by()}: copy"] += 1
            return args[0].fill_(1)
        if name.startswith("c10d::"):
            return self.trace.communicate(func, args)
        if name in _SHAPES or (name == "index" and any(x is not None and x.dtype is torch.bool for x in args[1])):
            self.reads[f"{_asked_by()}: {name}"] += 1
        if not all(x.is_meta for x in given):
            args, kwargs = tree_map(lambda x: self._brought(x, func), (args, kwargs))
        result = _grouped_mm(*args, **kwargs) if func is _aten._grouped_mm.default else func(*args, **kwargs)
        self._count(func, args, kwargs, given, result)
        return result

    def _brought(self, x: Any, func: Any) -> Any:
        """An argument as the device takes it."""
        if not isinstance(x, Tensor) or x.is_meta:
            return x
        if func in _COPIES:
            if x.dim():
                self.copies[_asked_by()] += 1
        elif x.dim():
            raise MixedDevicesError(f"{func} in {_asked_by()}: a tensor {list(x.shape)} of the host among the device's")
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=DEVICE)

    def _count(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], result: Any) -> None:
        formula = flops_formula(func._overloadpacket)
        results = [x for x in _tensors((result,)) if x.is_meta]
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            self.flops[func._schema.name] += flops
            self.trace.work("experts" if formula is _grouped_flops else "products", flops)
        elif not func.is_view and func not in _FREE:
            self.trace.move(sum(x.nbytes for x in given) + sum(x.nbytes for x in results))
        for x in results:
            self.hold(x)
        if not self.gpu and torch.Tag.pointwise in func.tags:
            self._hold_for_a_moment(_converted(given))

    def hold(self, x: Tensor) -> None:
        """Count the storage of a tensor, once, for as long as it lives."""
        storage = x.untyped_storage()
        key = id(storage)
        known = self._storages.get(key)
        if known is not None and known[0]() is storage:
            return
        size, place = storage.nbytes(), _asked_by()
        self._storages[key] = (weakref.ref(storage, lambda ref: self._free(key, ref)), size, place)
        self.held += size
        self._by_place[place] += size
        if self.held > self.peak:
            self.peak, self._rising = self.held, True

    def _hold_for_a_moment(self, size: int) -> None:
        if self.held + size > self.peak:
            self.peak, self._rising = self.held + size, True
            self._by_place[_asked_by()] += size
            self._note_peak()
            self._by_place[_asked_by()] -= size

    def _free(self, key: int, ref: weakref.ref[Any]) -> None:
        if key in self._storages and self._storages[key][0] is ref:
            self._note_peak()
            _, size, place = self._storages.pop(key)
            self.held -= size
            self._by_place[place] -= size

    def __enter__(self) -> FakeDevice:
        if self._stack is None:
            with ExitStack() as stack:
                stack.enter_context(standing_in(self.trace if self.gpu else None))
                self._stack = stack.pop_all()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        assert self._stack is not None
        self._stack.close()
        self._stack = None


def _converted(given: list[Tensor]) -> int:
    """Bytes of the copies that an elementwise operator of a CPU makes of operands of different dtypes, while it runs; a
    GPU's kernels convert as they read."""
    whole = [x for x in given if x.dim()]
    if len({x.dtype for x in whole}) < 2:
        return 0
    common = functools.reduce(torch.promote_types, (x.dtype for x in whole))
    return sum(x.numel() * common.itemsize for x in whole if x.dtype != common)


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Torch's own, which on "meta" refuses all but bf16."""
    halves = (torch.empty_strided(x.size(), x.stride(), dtype=torch.bfloat16, device=DEVICE) for x in (a, b))
    result = _aten._grouped_mm(*halves, offs)
    return torch.empty_strided(result.size(), result.stride(), dtype=a.dtype, device=DEVICE)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among arguments or results, lists of them included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@functools.cache
def flops_formula(packet: Any) -> Callable[..., int] | None:
    """FLOPs of an operation's products, by its arguments and its result."""
    found: Callable[..., int] | None = flop_registry.get(packet) or _FLOPS.get(packet)
    return found


def _asked_by() -> str:
    """The innermost function of this project, of Megatron or of transformers on the stack."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        place = _place(frame.f_code)
        if place is not None:
            return place
        frame = frame.f_back
    return "torch"


@functools.cache
def _place(code: CodeType) -> str | None:
    path = code.co_filename
    for root in ("/bridge/", "/recipes/", "/megatron/core/", "/transformers/", "/peft/", "/torch/optim/"):
        if (
            root in path
            and "/tests/" not in path
            and not path.endswith(("cpu_runtime.py", "/simulate/fake_device.py", "/simulate/stand_ins.py"))
        ):
            return f"{root[1:]}{path.rpartition(root)[2]}:{code.co_name}"
    return None


def _grouped_flops(a: Tensor, b: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Of `_grouped_mm`, rows spread over groups: [t, k] @ [E, k, n], or [k, t] @ [t, n], summed over rows of each."""
    if b.dim() == 3:
        return 2 * a.shape[0] * a.shape[1] * b.shape[2]
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


_FLOPS: dict[Any, Callable[..., int]] = {_aten._grouped_mm: _grouped_flops}
