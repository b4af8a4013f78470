"""What stands in, on a device that computes nothing, for what asks a GPU, needs one, or needs values."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bridge.megatron import cpu_runtime
from bridge.megatron.attention_backends import Backend
from bridge.megatron.attention_backends.flex import block_mask, block_size
from bridge.megatron.cpu_runtime import Patch
from bridge.megatron.mask import Mask
from recipes.simulate.trace import Trace

DEVICE = torch.device("meta")

# What the model asks of a GPU's properties.
_H100 = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=233_472)


@contextmanager
def standing_in(gpu: Trace | None) -> Iterator[None]:
    """The CPU runtime for the device, with what stands in for what it cannot do; `gpu`: it is a GPU, whose kernels are
    noted there, or else a CPU."""
    was_enabled = cpu_runtime.is_enabled()
    cpu_runtime.disable()
    try:
        cpu_runtime.enable(DEVICE, [*_stand_ins(), *(() if gpu is None else _of_a_gpu(gpu))])
        yield
    finally:
        cpu_runtime.disable()
        if was_enabled:
            cpu_runtime.enable()


def _stand_ins() -> Iterator[Patch]:
    moe = "megatron.core.transformer.moe"
    yield Patch(
        f"{moe}.router.TopKRouter",
        "__init__",
        _made_there,
        "makes a tensor on the host and moves it into a parameter, which no real tensor of a fake one can do",
    )
    yield Patch(
        f"{moe}.token_dispatcher.MoEAlltoAllTokenDispatcher",
        "preprocess",
        spread_evenly,
        "reads on the host how many tokens go where, which the device does not know",
    )
    yield Patch(
        f"{moe}.moe_utils.MoEAuxLossAutoScaler",
        "main_loss_backward_scale",
        lambda _: None,
        "a step leaves its scale there",
    )
    yield Patch("torch", "autocast", lambda _: _Autocast, "does not know the device")
    for name in ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices"):
        for module in ("torch.utils._foreach_utils", "torch.optim.optimizer", "torch.optim.adam"):
            if hasattr(importlib.import_module(module), name):
                yield Patch(module, name, _and_the_device, "optimizers do for each parameter what a GPU does for all")


def _and_the_device(supported: Callable[[], list[str]]) -> Callable[[], list[str]]:
    return lambda: [*supported(), DEVICE.type]


def _of_a_gpu(trace: Trace) -> Iterator[Patch]:
    """What code asks of a GPU before it goes its way, and what stands in for what only a GPU can run."""

    def launch(*args: Any, **kwargs: Any) -> None:
        trace.move(sum(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))

    def attend_there(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        return attend(query, key, value, mask, trace)

    def with_flex(backends: dict[str, Backend]) -> dict[str, Backend]:
        return backends | {"flex": backends["flex"]._replace(attend=attend_there)}

    asked = "what kernels and backends are chosen by"
    yield Patch("bridge.megatron.attention_backends", "BACKENDS", with_flex, "is compiled for a GPU")
    yield Patch("torch.Tensor", "is_cuda", lambda _: property(lambda x: x.is_meta), asked)
    yield Patch("torch.cuda", "get_device_capability", lambda _: lambda *_: (9, 0), asked)
    yield Patch("torch.cuda", "get_device_properties", lambda _: lambda *_: _H100, asked)
    yield Patch("triton.runtime.jit.JITFunction", "run", lambda _: launch, "needs a GPU")


def spread_evenly(preprocess: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The dispatcher's counts: its own collectives and tensors, the numbers those of an even spread, on the host."""

    @functools.wraps(preprocess)
    def evenly(self: Any, routing_map: Tensor) -> Tensor:
        preprocess(self, routing_map)
        total, experts = len(routing_map) * self.config.moe_router_topk, self.num_experts
        each = torch.full((experts,), total // experts, device="cpu")
        # What is left over goes to experts of different ranks in turn.
        places = torch.arange(experts, device="cpu").view(self.ep_size, -1).T.flatten()
        each[places[: total % experts]] += 1
        local = each[self.local_expert_indices]
        self.input_splits = each.view(self.ep_size, self.num_local_experts).sum(1)
        self.output_splits = local.sum().expand(self.ep_size).clone()
        self.output_splits_tp = (local.sum() * self.ep_size).expand(self.tp_size).clone()
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = local.expand(self.tp_size * self.ep_size, -1).clone()
        return local * self.tp_size * self.ep_size

    return evenly


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


class _Attention(torch.autograd.Function):
    """What FlexAttention's compiled kernels make and keep, without its values; heads are the last axis but one.

    Forward: the output, and two float32 numbers a row, one of them for a moment. Kept for the backward pass: query,
    key, value, output and the other. Backward: a float32 number a row, and the three gradients in the dtype of their
    tensors (torch/_inductor/kernel/flex: nothing is repeated for the heads of a group, or summed in float32 in memory).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, product: int, trace: Trace) -> Tensor:
        # Scores once more, and the gradients of probabilities, query, key and value.
        ctx.count = partial(trace.work, "attention_backward", 5 * product)
        trace.work("attention", 2 * product)
        output = query.new_empty(query.shape)
        lse, _ = (query.new_empty(query.shape[:-1], dtype=torch.float32) for _ in range(2))
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        ctx.count()
        query, key, value, _, lse = ctx.saved_tensors
        _ = torch.empty_like(lse)
        query, key, value = (torch.empty_like(x) for x in (query, key, value))
        return query, key, value, None, None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, trace: Trace) -> Tensor:
    """In the place of FlexAttention: [sq, b, heads, d], and [sk, b, groups, d] twice -> [sq, b, heads, d].

    The mask's blocks are made as for it. Counted are the pairs that see each other.
    """
    block_mask(mask, block_size(query.shape[-1]))
    host = mask.on_host
    pairs = host.cache.get("pairs")
    if pairs is None:
        pairs = host.cache["pairs"] = int((host.reach.stop - host.reach.first).sum())
    assert isinstance(pairs, int)
    output: Tensor = _Attention.apply(query, key, value, 2 * pairs * query.shape[2] * query.shape[3], trace)
    return output


def attend_as_transformers(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """The same as an attention implementation of transformers: [b, heads, s, d] three times -> [b, s, heads, d].

    It flatters: sdpa takes a mask [s, s] for sliding layers, and repeated keys and values above head dim 256.
    """
    output: Tensor = _Attention.apply(*(x.transpose(1, 2) for x in (query, key, value)), 0, Trace())
    return output, None
