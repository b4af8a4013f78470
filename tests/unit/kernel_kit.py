"""How kernels are compared with the torch code that they stand for.

float32 is compared with the same mathematics in float64, bf16 with torch's own bf16, from which the order of a sum may
move a value by one rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FLOAT32_BOUND = 1e-6
EPS = 1e-6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
Function = Callable[..., Tensor | Sequence[Tensor]]


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def both(function: Function, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of a function and gradients of its inputs, for given gradients of its outputs."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [x for x in leaves if x is not None]
    found = torch.autograd.grad(outputs, wanted, [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=True)])
    return [y.detach() for y in outputs] + list(found)


def compare(kernel: Function, torch_code: Function, inputs: Sequence[Tensor | None], outputs: int = 1) -> None:
    """Outputs and gradients of both."""
    dtype = next(x for x in inputs if x is not None).dtype
    wide = [None if x is None else x.double() for x in inputs]
    with torch.no_grad():
        shapes = torch_code(*wide)
    shapes = [shapes] if isinstance(shapes, Tensor) else shapes
    gradients = [random(*y.shape, dtype=dtype) for y in shapes]
    assert len(gradients) == outputs
    found = both(kernel, inputs, gradients)
    assert all(x.dtype is dtype for x in found)
    if dtype is torch.float32:
        expected = both(torch_code, wide, gradients)
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() <= FLOAT32_BOUND * b.abs().max() if b.numel() else True
        return
    expected = both(torch_code, inputs, gradients)
    exact = both(torch_code, wide, gradients)
    for a, b, c in zip(found, expected, exact, strict=True):
        assert a.shape == b.shape
        if a.numel():
            assert (a - c).norm() <= 1.02 * (b - c).norm() + 1e-6 * c.norm()
            one_rounding(a.float(), b.float())


def one_rounding(found: Tensor, expected: Tensor) -> None:
    """bf16 values are those of torch: nearly all to the bit, and neighbours (2^-7 away at most) where not.

    What is next to nothing beside the largest is compared with that: it is what is left of larger values.
    """
    nothing = expected.abs().max() * 2**-12
    far = (found - expected).abs()
    assert (far <= torch.maximum(found.abs(), expected.abs()) * 2**-7 + nothing).all()
    assert (far > nothing * 2**-8).float().mean() <= 0.02 + 2 / found.numel()
