"""The norm with a backward pass of its own against transformers' module and torch's autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from bridge.megatron.norm import rms_norm

EPS = 1e-6


def both(dtype: torch.dtype, weighted: bool, view: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Output, and gradients of input, residual and weight: ours and transformers'."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    module = Gemma4RMSNorm(24, eps=EPS, with_scale=weighted).to(dtype)
    if weighted:
        module.weight.data = normal(24)
    base, residual, d_output = normal(5, 3, 4, 24), normal(5, 3, 2, 24), normal(5, 3, 2, 24)
    results = []
    for ours in (True, False):
        whole, added = base.clone().requires_grad_(), residual.clone().requires_grad_()
        x = whole[:, :, 1:3] if view else whole[:, :, :2].contiguous()
        weight = module.weight if weighted else None
        output = rms_norm(x, weight, EPS, added, kernels="torch") if ours else added + module(x)
        wanted = [whole, added] + ([weight] if weight is not None else [])
        results.append([output, *torch.autograd.grad(output, wanted, d_output)])
    return results[0], results[1]


@pytest.mark.parametrize("view", [False, True], ids=["whole", "view"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)], ids=["float32", "bf16"])
def test_values_and_gradients_are_those_of_transformers(
    dtype: torch.dtype, bound: float, weighted: bool, view: bool
) -> None:
    ours, theirs = both(dtype, weighted, view)
    assert len(ours) == 3 + weighted
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype == dtype
        assert (mine - other).abs().max() <= bound * other.abs().max()


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), EPS, kernels="torch").sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
