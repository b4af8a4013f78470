"""RMSNorm as Gemma 4 computes it (transformers `Gemma4RMSNorm`)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.kernels import fused


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None, *, kernels: str) -> Tensor:
    """Normalise the last axis in float32, multiply by `weight` as stored, and cast back to the dtype of `x`.

    `residual`, of the shape and dtype of `x`, is added to that.
    """
    if fused(kernels, x):
        from bridge.megatron.kernels import rms_norm as triton

        return triton.rms_norm(x, weight, eps, residual)
    if torch.is_inference_mode_enabled() and (weight is None or weight.dtype is x.dtype):
        # torch's own, which has no backward pass to prepare: a token at a time, what a norm costs is its calls.
        output = torch.rms_norm(x, x.shape[-1:], weight, eps)
        return output if residual is None else output.add_(residual)
    normed: Tensor = _RMSNorm.apply(x, weight, eps, residual)
    return normed


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of the last axis, which stays as one, of float32 `x`."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """For the backward pass `x` is kept as it is, and one float32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None) -> Tensor:
        wide = x.float()
        scale = inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight, scale)
        output = wide * scale
        if weight is not None:
            output *= weight.float()
        output = output.type_as(x)
        return output if residual is None else output.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, Tensor | None]:
        x, weight, scale = ctx.saved_tensors
        wide, d_wide = x.float(), grad.float()
        products = (d_wide * wide).flatten(0, -2)
        d_weight = None
        if weight is None:
            along, d_normed = products.sum(-1), d_wide
        else:
            along, d_normed = products @ weight.float(), d_wide * weight.float()
            if ctx.needs_input_grad[1]:
                d_weight = (scale.flatten() @ products).to(weight.dtype)
        # The mean of squares turns with x: its part lies along the row.
        along = along.view_as(scale).mul_(scale).mul_(scale).div_(-x.shape[-1])
        # Without a weight it is the caller's gradient, which is not to be written over.
        add_product = d_normed.addcmul if weight is None else d_normed.addcmul_
        d_x = add_product(wide, along).mul_(scale).type_as(x)
        return d_x, d_weight, None, grad if ctx.needs_input_grad[3] else None


class RMSNorm(torch.nn.Module):
    """RMSNorm with a weight [hidden_size] that is replicated on every tensor-parallel rank.

    Under sequence parallelism each rank sees a part of the sequence only: `sequence_parallel` on the weight makes
    Megatron sum its gradient over the ranks.
    """

    def __init__(self, config: Gemma4TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.kernels = config.kernels
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=init_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """The norm of `x` [..., hidden_size], plus `residual`. Without `x` the weight, for code that norms with it.

        Megatron waits for a parameter that is still on its way from other ranks when its module is called: it must not
        be read otherwise.
        """
        if x is None:
            return self.weight
        return rms_norm(x, self.weight, self.eps, residual, kernels=self.kernels)


def init_device(config: TransformerConfig) -> torch.device:
    """Where new parameters are made; `torch.device("meta")` wins, as it does for Megatron's own layers."""
    default = torch.get_default_device()
    if default.type == "meta" or config.use_cpu_initialization:
        return torch.device("meta" if default.type == "meta" else "cpu")
    return torch.device(torch.cuda.current_device())
