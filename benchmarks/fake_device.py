"""A device that computes nothing, on which to count: bytes held, operations, what passes between it and the host.

Its tensors are torch's fake ones on "meta": shapes, dtypes and storages, no values and no memory, so that the published
sizes fit anywhere. Tensors of the host are real. So what a GPU would refuse is refused here (an operation on tensors of
both), and where it would wait is noted (`reads`, `copies`). Code that asks is told of a GPU (`Tensor.is_cuda`): it goes
the GPU's way. What cannot run without one is stood in for by what takes the same memory:

- Triton kernels: their outputs are made, the launch is left out;
- FlexAttention: an operation that makes and keeps what torch's compiled kernel does (`_Attention`).

Not counted: workspaces inside of an operation (cuBLAS, sorting), the allocator's rounding, CUDA itself.
"""

from __future__ import annotations

import functools
import importlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from bridge.megatron import attention_backends, cpu_runtime
from bridge.megatron.attention_backends.flex import block_mask, block_size
from bridge.megatron.mask import Mask

DEVICE = torch.device("meta")
_aten = torch.ops.aten
# What brings values from one side to the other.
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
# What the host has to wait for, because a shape depends on it.
_SHAPES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")


# What the model asks of a GPU's properties.
_H100 = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=233_472)


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

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._watched = 0
        self._mode = FakeTensorMode(allow_non_fake_inputs=False)
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._stack: ExitStack | None = None

    def snapshot(self) -> Snapshot:
        """What was counted since `restart`."""
        named = (dict(counter) for counter in (self.reads, self.copies, self.at_peak))
        return Snapshot(self.peak, self.flops.total(), *named)

    def restart(self, watch: int = 0) -> None:
        """Forget what was counted; what is held stays. `watch`: bytes at which to note in `at_peak` who holds them."""
        self.peak, self._watched = self.held, watch
        for counter in (self.reads, self.copies, self.flops, self.at_peak):
            counter.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        there = any(isinstance(x, FakeTensor) for x in flat)
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
        if there and func is _aten.copy_.default and not isinstance(args[0], FakeTensor):
            self.reads[f"{_asked_by()}: copy"] += 1
            return args[0].fill_(1)
        if name.startswith("c10d::"):
            # Of a group of one rank: there is nothing to do.
            work = FakeWork().boxed()
            return (args[0], work) if len(func._schema.returns) == 2 else work
        if name in _SHAPES or (name == "index" and any(x is not None and x.dtype is torch.bool for x in args[1])):
            self.reads[f"{_asked_by()}: {name}"] += 1
        if any(isinstance(x, Tensor) and not isinstance(x, FakeTensor) for x in flat):
            args, kwargs = tree_map(lambda x: self._brought(x, func), (args, kwargs))
        with self._mode:
            result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        return result

    def _brought(self, x: Any, func: Any) -> Any:
        """An argument as the device takes it."""
        if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
            return x
        if func in _COPIES:
            if x.dim():
                self.copies[_asked_by()] += 1
        elif x.dim():
            raise MixedDevicesError(f"{func} in {_asked_by()}: a tensor {list(x.shape)} of the host among the device's")
        return self._mode.from_tensor(x)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        formula = flop_registry.get(func._overloadpacket) or _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops[func._schema.name] += formula(*args, **kwargs, out_val=result)
        for x in tree_flatten(result)[0]:
            if isinstance(x, FakeTensor) and x.device == DEVICE:
                self.hold(x)

    def hold(self, x: Tensor) -> None:
        """Count the storage of a tensor, once, for as long as it lives."""
        storage = x.untyped_storage()
        key = id(storage)
        known = self._storages.get(key)
        if known is not None and known[0]() is storage:
            return
        size = storage.nbytes()
        self._storages[key] = (weakref.ref(storage, lambda ref: self._free(key, ref)), size, _asked_by())
        self.held += size
        if self.held > self.peak:
            self.peak = self.held
            if self._watched and self.held >= self._watched:
                self.at_peak = Counter()
                for _, nbytes, place in self._storages.values():
                    self.at_peak[place] += nbytes

    def _free(self, key: int, ref: weakref.ref[Any]) -> None:
        if key in self._storages and self._storages[key][0] is ref:
            self.held -= self._storages.pop(key)[1]

    def __enter__(self) -> FakeDevice:
        if self._stack is None:
            with ExitStack() as stack:
                stack.enter_context(_as_a_gpu())
                self._stack = stack.pop_all()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        assert self._stack is not None
        self._stack.close()
        self._stack = None


@contextmanager
def _as_a_gpu() -> Iterator[None]:
    """What code asks of a GPU before it goes its way, and what stands in for what only a GPU can run."""
    was_enabled = cpu_runtime.is_enabled()
    cpu_runtime.disable()
    cpu_runtime.enable(DEVICE)
    stand_in = attention_backends.BACKENDS["flex"]._replace(attend=attend)
    supported = "_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices"
    try:
        with ExitStack() as stack:
            for where, name, value in (
                (FakeTensor, "is_cuda", property(lambda x: x.fake_device == DEVICE)),
                (JITFunction, "run", lambda *_, **__: None),
                # Made on the host and moved into its parameter, which no real tensor of a fake one can do.
                (TopKRouter, "__init__", _made_there(TopKRouter.__init__)),
                # A step leaves its loss scale there.
                (MoEAuxLossAutoScaler, "main_loss_backward_scale", None),
                (torch, "autocast", _Autocast),
                (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
                (torch.cuda, "get_device_properties", lambda *_: _H100),
            ):
                stack.enter_context(mock.patch.object(where, name, value, create=True))
            for name in supported:
                found = [*getattr(torch.utils._foreach_utils, name)(), DEVICE.type]
                for module in map(
                    importlib.import_module, ("torch.utils._foreach_utils", "torch.optim.optimizer", "torch.optim.adam")
                ):
                    stack.enter_context(mock.patch.object(module, name, lambda found=found: found, create=True))
            stack.enter_context(mock.patch.dict(attention_backends.BACKENDS, {"flex": stand_in}))
            yield
    finally:
        cpu_runtime.disable()
        if was_enabled:
            cpu_runtime.enable()


class _Autocast(torch.autocast):
    """Which does not know the device; PEFT turns it off, for the device of a weight."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


def _made_there(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def made_there(*args: Any, **kwargs: Any) -> None:
        with DEVICE:
            init(*args, **kwargs)

    return made_there


def _asked_by() -> str:
    """The innermost function of this project, of Megatron or of transformers on the stack."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        for root in ("/bridge/", "/recipes/", "/megatron/core/", "/transformers/", "/peft/", "/torch/optim/"):
            if root in path and "/tests/" not in path and not path.endswith("cpu_runtime.py"):
                return f"{root[1:]}{path.rpartition(root)[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


class _Attention(torch.autograd.Function):
    """What FlexAttention's compiled kernels make and keep, without its values; heads are the last axis but one.

    Forward: the output, and two float32 numbers a row, one of them for a moment. Kept for the backward pass: query,
    key, value, output and the other. Backward: a float32 number a row, and the three gradients in the dtype of their
    tensors (torch/_inductor/kernel/flex: nothing is repeated for the heads of a group, or summed in float32 in memory).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(query.shape)
        lse, _ = (query.new_empty(query.shape[:-1], dtype=torch.float32) for _ in range(2))
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, lse = ctx.saved_tensors
        _ = torch.empty_like(lse)
        query, key, value = (torch.empty_like(x) for x in (query, key, value))
        return query, key, value


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """In the place of FlexAttention: [sq, b, heads, d], and [sk, b, groups, d] twice -> [sq, b, heads, d].

    The mask's blocks are made as for it.
    """
    block_mask(mask, block_size(query.shape[-1]))
    output: Tensor = _Attention.apply(query, key, value)
    return output


def attend_as_transformers(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """The same as an attention implementation of transformers: [b, heads, s, d] three times -> [b, s, heads, d].

    It flatters: sdpa takes a mask [s, s] for sliding layers, and repeated keys and values above head dim 256.
    """
    output: Tensor = _Attention.apply(*(x.transpose(1, 2) for x in (query, key, value)))
    return output, None


def _grouped_flops(a: Tensor, b: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Of `_grouped_mm`, rows spread over groups: [t, k] @ [E, k, n], or [k, t] @ [t, n], summed over rows of each."""
    if b.dim() == 3:
        return 2 * a.shape[0] * a.shape[1] * b.shape[2]
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


_FLOPS: dict[Any, Callable[..., int]] = {_aten._grouped_mm: _grouped_flops}
