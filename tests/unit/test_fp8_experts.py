"""Experts in FP8: rounding, both products and the gradient of the weights, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.megatron.fp8_experts import E4M3, grouped_mm, quantize_columns, quantize_rows
from bridge.megatron.parallel import Parallel
from bridge.megatron.provider import Gemma4Provider
from bridge.toy.config import published, toy_config

from .fp8_products import exact_products, products

# Rows of five experts: the second, the third and the last have none.
ENDS = [7, 7, 7, 30, 40, 40]
INTO, OUT = 48, 32


def operands(dtype: torch.dtype, rows: int = ENDS[-1]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [t, in], weight [E, out, in], the gradient of the output [t, out], and the ends."""
    torch.manual_seed(0)
    x, gradient = torch.randn(rows, INTO), torch.randn(rows, OUT)
    ends = torch.tensor(ENDS, dtype=torch.int32).clamp(max=rows)
    return x.to(dtype), (torch.randn(len(ENDS), OUT, INTO) * 0.1).to(dtype), gradient.to(dtype), ends


def run(product: Callable[..., Tensor], x: Tensor, weight: Tensor, gradient: Tensor, ends: Tensor) -> list[Tensor]:
    """Output, and gradients of tokens and weights."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = product(x, weight, ends)
    return [output.detach(), *torch.autograd.grad(output, (x, weight), gradient)]


def in_fp8(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return grouped_mm(x, weight, ends, "torch")


def expert_by_expert(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    starts = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ w.T for a, b, w in zip(starts, starts[1:], weight, strict=False)])


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_a_row_reaches_to_the_largest_number_and_is_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 5, 64) * torch.logspace(-20, 6, 5)[:, None]).to(dtype)
    x[1, 2] = 0
    values, scales = quantize_rows(x, "torch")
    assert values.dtype is E4M3 and values.shape == x.shape and scales.dtype is torch.float32
    back = values.double() * scales.double()[..., None]
    # Three bits behind the leading one; below 2^-6 the numbers lie 2^-9 apart.
    assert ((back - x.double()).abs() <= x.double().abs() * 2**-4 * 1.0001 + scales[..., None] * 2**-10).all()
    top = values.float().abs().amax(-1)
    assert (top[x.abs().amax(-1) > 0] == 448).all() and not values[1, 2].float().any() and scales.isfinite().all()
    # What was not finite is seen.
    x[0, 0, 7] = float("inf")
    assert quantize_rows(x, "torch")[0][0, 0].float().isnan().any()


def test_columns_are_rows_of_the_transposed() -> None:
    weight = operands(torch.bfloat16)[1]
    values, scales = quantize_columns(weight, "torch")
    expected, sizes = quantize_rows(weight.transpose(1, 2), "torch")
    assert values.is_contiguous() and values.shape == (len(ENDS), INTO, OUT)
    assert torch.equal(values.float(), expected.float()) and torch.equal(scales, sizes)


@pytest.mark.parametrize("rows", [ENDS[-1], 7, 0])
def test_without_rounding_it_is_the_product_of_each_expert(rows: int) -> None:
    x, weight, gradient, ends = operands(torch.float32, rows)
    with exact_products() as made:
        found = run(in_fp8, x, weight, gradient, ends)
    expected = run(expert_by_expert, x.double(), weight.double(), gradient.double(), ends)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype is torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    # Forward fast, backward precise; nothing where there is nothing to multiply.
    assert [fast for fast, _ in made.asked] == ([True, False] if rows else [])


def test_in_fp8() -> None:
    x, weight, gradient, ends = operands(torch.bfloat16)
    # A token far larger than the rest, and a channel far smaller, take no precision from the others.
    x[3] *= 1000
    weight[3, 5] *= 0.001
    with products() as made:
        found = run(in_fp8, x, weight, gradient, ends)
    assert made.asked == [(True, E4M3), (False, E4M3)]
    assert all(a.dtype is torch.bfloat16 for a in found)
    exact = run(expert_by_expert, x.double(), weight.double(), gradient.double(), ends)
    output, dx, dw = found
    # Two operands, each off by up to 2^-4 of a value, evenly spread over that: 0.026 each.
    for a, b in ((output, exact[0]), (dx, exact[1])):
        per_row = [distance(p, q) for p, q in zip(a, b, strict=True)]
        assert 0.01 < max(per_row) < 0.08
    assert distance(output[7:30, 5], exact[0][7:30, 5]) < 0.08
    # The gradient of the weights is none of FP8's.
    assert distance(dw, exact[2]) < 3e-3 and not dw[1].any() and not dw[5].any()


def test_a_frozen_weight_keeps_no_tokens_and_has_no_gradient() -> None:
    x, weight, gradient, ends = operands(torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x.requires_grad_()
    with products(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = in_fp8(x, weight, ends)
        (dx,) = torch.autograd.grad(output, x, gradient)
    assert dx.shape == x.shape
    assert [tuple(tensor.shape) for tensor in kept] == [tuple(weight.shape), tuple(ends.shape)]


A4B = Geometry.from_dict(published("26b-a4b"))


@pytest.mark.parametrize(
    ("geometry", "parallel", "dtype", "said"),
    [
        (Geometry.from_dict(published("31b")), Parallel(), torch.bfloat16, "for models with experts, and this one"),
        (A4B, Parallel(), torch.float32, "needs a model in bfloat16, this one is float32"),
        (A4B, Parallel(etp=8), torch.bfloat16, "experts' width at etp=8 is 88, no multiple of 16"),
        (Geometry.from_dict(toy_config("26b-a4b").written), Parallel(), torch.bfloat16, "etp=1 is 24, no multiple"),
        (A4B, Parallel(), torch.bfloat16, "run on a GPU, and none is visible"),
    ],
)
def test_refused(geometry: Geometry, parallel: Parallel, dtype: torch.dtype, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Gemma4Provider(geometry, parallel, dtype, fp8_experts=True)


def test_which_gpus_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, fits in (((8, 9), False), ((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        if fits:
            assert Gemma4Provider(A4B, fp8_experts=True).config.fp8_experts
            # The linears are another matter.
            assert Gemma4Provider(A4B, fp8_experts=True).config.fp8 is None
            continue
        with pytest.raises(UsageError, match=r"needs a GPU of compute capability 9\.0 \(H100, H200\), this one has "):
            Gemma4Provider(A4B, fp8_experts=True)


def test_experts_multiply_in_bf16_unless_asked() -> None:
    assert not Gemma4Provider(A4B).config.fp8_experts
