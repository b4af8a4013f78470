"""Megatron-Core without a GPU: its hardcoded CUDA calls sent to the CPU, and what gloo lacks made up for.

`enable()` is called explicitly, once per process, best before Megatron is imported, and does nothing where a GPU is
visible. Every change is one row of `_patches`, with its reason, and `disable()` takes them all back; but
what was imported without torch's compiler stays so (`_import_megatron`). The semantics: there
is one device, the CPU; streams and events are inert since everything runs at once; "the CUDA generator" is the CPU's.
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.jit._builtins
from torch.utils._device import _device_constructors

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_device = _CPU
_ABSENT = object()
_saved: list[tuple[Any, str, Any]] = []
_RNG_LOGGER = "megatron.core.tensor_parallel.random"


class Patch(NamedTuple):
    """`owner.name` becomes `make(what it was)`."""

    owner: str
    name: str
    make: Callable[[Any], Any]
    why: str


def enable(device: torch.device = _CPU, stand_ins: Iterable[Patch] = ()) -> bool:
    """Let this process run Megatron-Core on the CPU. Idempotent; False, and no change, where a GPU is visible.

    `device` takes the GPU's place: another than the CPU is a fake device ("meta"), on which to count; `stand_ins`: what
    it needs beside the rows here.
    """
    global _device
    if torch.cuda.is_available():
        return False
    if _saved:
        return True
    _device = device
    _import_megatron()
    # The set of factory functions that `with torch.device(...)` knows is made once, on first use, from torch's
    # attributes: made after the rows below it would hold the wrappers, and `with torch.device("meta")` do nothing.
    _device_constructors()
    try:
        for patch in chain(_patches(), stand_ins):
            owner = pkgutil.resolve_name(patch.owner)
            original = getattr(owner, patch.name, None)
            _saved.append((owner, patch.name, vars(owner).get(patch.name, _ABSENT)))
            setattr(owner, patch.name, patch.make(original))
    except BaseException:
        disable()
        raise
    logging.getLogger(_RNG_LOGGER).addFilter(_no_rng_warning)
    logger.info("no GPU is visible: Megatron-Core runs on the CPU (%d functions redirected)", len(_saved))
    return True


def _import_megatron() -> None:
    """Import Megatron-Core, as far as no one has yet, without torch's compiler.

    It has little fusions compiled as it is imported, for which torch loads its compiler: a third of the seconds that a
    process takes to start. Uncompiled they are what is written; of them the model calls one, the router's count of
    tokens for a bias, which does nothing here.
    """

    def uncompiled(function: Any = None, **_: Any) -> Any:
        return uncompiled if function is None else function

    original = torch.compile
    torch.compile = uncompiled  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core.models.gpt")
    finally:
        torch.compile = original


def disable() -> None:
    """Take every change back."""
    while _saved:
        owner, name, original = _saved.pop()
        if original is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    logging.getLogger(_RNG_LOGGER).removeFilter(_no_rng_warning)


def is_enabled() -> bool:
    """Whether this process runs Megatron-Core on the CPU."""
    return bool(_saved)


def _patches() -> Iterator[Patch]:
    cuda, tensor = "torch.cuda", "torch.Tensor"

    # The device
    yield Patch(
        cuda, "current_device", lambda _: lambda: _device, "what Megatron allocates on; it passes it on as device="
    )
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect"):
        yield Patch(cuda, name, _constant(None), "called unconditionally, nothing to do")
    for name in ("range_push", "range_pop", "mark"):
        yield Patch("torch.cuda.nvtx", name, _constant(None), "raises in a torch built without CUDA")
    yield Patch(cuda, "device", _constant(nullcontext()), "`with torch.cuda.device(i)` would initialise CUDA")

    # Streams and events
    yield Patch(cuda, "Stream", _replace(_Stream), "made by DDP, the alltoall dispatcher and shared experts")
    yield Patch(cuda, "Event", _replace(_Event), "made by recompute, offload and MoE; timers want elapsed_time")
    yield Patch(cuda, "current_stream", _constant(_STREAM), "waited for and recorded on everywhere")
    yield Patch(cuda, "default_stream", _constant(_STREAM), "the same")
    yield Patch(cuda, "stream", _constant(nullcontext()), "`with torch.cuda.stream(s)`")
    yield Patch(cuda, "is_current_stream_capturing", _constant(False), "asks a CUDA stream")
    yield Patch(tensor, "record_stream", _constant(None), "the CPU has no stream to record")

    # Tensors that ask for CUDA. Wrapping the functions that make tensors costs nothing in all others; a
    # TorchFunctionMode would cost microseconds in every operation, and hold in one thread only.
    yield Patch(tensor, "cuda", _replace(lambda self, *_, **__: self.to(_device)), "Module.cuda() comes here too")
    yield Patch(tensor, "pin_memory", _replace(lambda self, *_, **__: self), "raises where there is no accelerator")
    yield Patch(tensor, "to", _to_on_cpu, ".to('cuda'), .to(0); Module.to() comes here too")
    for name in _FACTORIES:
        yield Patch("torch", name, _on_cpu, "device='cuda' or pin_memory=True, which Megatron writes out")
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        yield Patch(tensor, name, _on_cpu, "the same")
    for name in ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Short", "Byte", "Bool"):
        cpu_type = getattr(torch, f"{name}Tensor")
        yield Patch(cuda, f"{name}Tensor", _replace(cpu_type), "isinstance checks, and constructors")
    yield Patch(tensor, "type", _cuda_type, "the optimizers sort parameters by `param.type() == 'torch.cuda…'`")

    # Random state
    for owner in (cuda, "torch.cuda.random"):
        yield Patch(owner, "get_rng_state", _replace(_get_rng_state), "the RNG tracker and recompute save it")
        yield Patch(owner, "set_rng_state", _replace(_set_rng_state), "and restore it")
        yield Patch(owner, "initial_seed", _replace(lambda: torch.initial_seed()), "would initialise CUDA")
        for name in ("manual_seed", "manual_seed_all"):
            yield Patch(owner, name, _replace(_manual_seed), "silently ignored without CUDA: all TP ranks alike")
    random = "megatron.core.tensor_parallel.random"
    yield Patch(random, "_get_cuda_rng_state", _replace(_get_rng_state), "Megatron's own copies of the two above")
    yield Patch(random, "_set_cuda_rng_state", _replace(_set_rng_state), "reaches into CUDA's generator")

    yield from _distributed_patches()


def _distributed_patches() -> Iterator[Patch]:
    # What gloo lacks
    yield Patch("torch.distributed", "barrier", _barrier, "gloo refuses device_ids=[torch.cuda.current_device()]")
    yield Patch("torch.distributed", "all_gather", _uneven_all_gather, "ETP > 1 with EP > 1: unequal token counts")
    yield Patch("torch.distributed", "reduce_scatter", _uneven_reduce_scatter, "the same, on the way back")
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        owner = "megatron.core.distributed.param_and_grad_buffer"
        yield Patch(owner, name, _alone, "gloo copies all that a group of one rank has to itself")
    for owner in ("megatron.core.transformer.moe.moe_utils", "megatron.core.transformer.moe.token_dispatcher"):
        yield Patch(owner, "maybe_move_tensor_to_cpu", _move_from_cpu_too, "alltoall: split sizes stayed tensors")

    # Checkpoints
    yield Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "get_write_results_queue",
        lambda original: functools.partial(original, "fork"),
        "spawns a process for its queue, which imports __main__ and torch again (seconds); CUDA forbids it to fork",
    )


# fmt: off
_FACTORIES = [
    "arange", "as_tensor", "asarray", "empty", "empty_like", "empty_strided", "eye", "full",
    "full_like", "linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn",
    "randn_like", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "zeros_like",
]
# fmt: on


def _constant(value: Any) -> Callable[[Any], Any]:
    return _replace(lambda *_, **__: value)


def _replace(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


class _Stream:
    """A stream on which everything has already happened."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *_: Any, **__: Any) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event


class _Event:
    """An event that has happened; it remembers when."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: _Event) -> float:
        return (end_event._time - self._time) * 1000


_STREAM = _Stream()


def _is_cuda(device: Any) -> bool:
    if device is _CPU or device is None:
        return False
    if isinstance(device, torch.device):
        return device.type == "cuda"
    # torch reads a bare number as an accelerator's index
    return device.startswith("cuda") if isinstance(device, str) else isinstance(device, int)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with device="cuda" read as the CPU, and without pinned memory."""

    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _device
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    # torch.jit.script looks builtins up by identity
    builtin = torch.jit._builtins._find_builtin(function)
    if builtin is not None:
        torch.jit._builtins._register_builtin(on_cpu, builtin)
    return on_cpu


def _to_on_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def to_on_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # a bool is an int, but no device
        if args and not isinstance(args[0], torch.dtype | bool) and _is_cuda(args[0]):
            args = (_device, *args[1:])
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = _device
        return to(self, *args, **kwargs)

    return to_on_cpu


_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _cuda_type(type_: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(type_)
    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return _TYPE_NAMES.get(self.dtype) or type_(self)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return type_(self, dtype, *args, **kwargs)

    return cuda_type


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed, which calls torch.cuda.manual_seed_all, which is this function.
    torch.default_generator.manual_seed(int(seed))


def _no_rng_warning(record: logging.LogRecord) -> bool:
    # Each fork of "the CUDA generator" moves the CPU's, since they are one.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _barrier(barrier: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(barrier)
    def on_gloo(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return barrier(*args, **kwargs)

    return on_gloo


def _uneven_all_gather(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(all_gather)
    def on_gloo(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        rows = [part.shape[0] if part.ndim else 1 for part in tensor_list]
        if len(set(rows)) == 1:
            return all_gather(tensor_list, tensor, group, async_op)
        padded = tensor.new_zeros((max(rows), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in rows]
        all_gather(gathered, padded, group)
        for part, whole in zip(tensor_list, gathered, strict=True):
            part.copy_(whole[: part.shape[0]])
        return _Done() if async_op else None

    return on_gloo


def _uneven_reduce_scatter(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reduce_scatter)
    def on_gloo(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        rows = [part.shape[0] if part.ndim else 1 for part in input_list]
        if len(set(rows)) == 1:
            return reduce_scatter(output, input_list, op, group, async_op)
        everything = torch.cat(input_list)
        dist.all_reduce(everything, op, group)
        output.copy_(everything.split(rows)[dist.get_rank(group)])
        return _Done() if async_op else None

    return on_gloo


def _alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def on_gloo(output: torch.Tensor, given: torch.Tensor, *, group: Any, async_op: bool, **options: Any) -> Any:
        in_place = output.shape == given.shape and output.data_ptr() == given.data_ptr()
        if in_place and dist.get_world_size(group) == 1:
            return _Done() if async_op else None
        return collective(output, given, group=group, async_op=async_op, **options)

    return on_gloo


class _Done:
    """The handle of a collective that has finished."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _move_from_cpu_too(_: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu
