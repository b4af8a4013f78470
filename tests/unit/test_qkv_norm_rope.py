"""The norms and the rotation of q, k and v as one step of autograd, against autograd in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from bridge.megatron.attention import norm_and_rotate
from bridge.megatron.rope import Rotary

EPS = 1e-6


@pytest.fixture(autouse=True)
def memory_is_not_zero() -> Iterator[None]:
    """torch fills what it makes empty with NaN then."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def defined(mixed: Tensor, own: range, kv_rows: int, weights: Sequence[Tensor], rotary: Rotary) -> list[Tensor]:
    """As transformers' `Gemma4RMSNorm` and `apply_rotary_pos_emb`, in the dtype of its arguments."""

    def normed(x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).pow(-0.5)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * rotary.cos + torch.cat((-second, first), dim=-1) * rotary.sin

    key_row = mixed.shape[3] - kv_rows
    outputs = [turned((normed(mixed[:, :, :, own.start : own.stop]) * weights[0]).flatten(2, 3))]
    if kv_rows:
        outputs += [turned(normed(mixed[:, :, :, key_row]) * weights[1]), normed(mixed[:, :, :, -1])]
    return outputs


@pytest.mark.parametrize(
    ("groups", "queries", "kv_rows", "own"),
    [
        (1, 4, 2, range(4)),
        (2, 3, 2, range(3)),
        (2, 2, 1, range(2)),  # v is k
        (1, 4, 0, range(4)),  # k and v of another layer
        (1, 6, 2, range(2, 4)),  # queries of other ranks beside this one's
        (1, 6, 1, range(4, 6)),
    ],
    ids=str,
)
@pytest.mark.parametrize("inner", [False, True], ids=["own memory", "a part of wider rows"])
def test_outputs_and_gradients(groups: int, queries: int, kv_rows: int, own: range, inner: bool) -> None:
    torch.manual_seed(0)
    d, rows = 16, queries + kv_rows
    flat = torch.randn(5, 2, groups * rows * d * (2 if inner else 1), dtype=torch.float64)
    mixed = (flat.chunk(2, dim=-1)[1] if inner else flat).unflatten(-1, (groups, rows, d))
    weights = [torch.rand(d, dtype=torch.float64) + 0.5 for _ in range(2 if kv_rows else 1)]
    angles = torch.randn(5, 2, 1, d, dtype=torch.float64)
    rotary = Rotary(angles.cos(), angles.sin())
    inputs = [x.requires_grad_() for x in (mixed, *weights)]
    expected = defined(mixed, own, kv_rows, weights, rotary)
    # As attention hands them back: [b, heads, s, d] in memory.
    gradients = [torch.randn(x.shape, dtype=x.dtype).permute(1, 2, 0, 3).contiguous() for x in expected]
    gradients = [gradient.permute(2, 0, 1, 3) for gradient in gradients]
    expected += torch.autograd.grad(expected, inputs, gradients)

    single = [x.detach().float().requires_grad_() for x in inputs]
    key_weight = single[2] if kv_rows else None
    tables = Rotary(*(x.float() for x in rotary))
    found = list(norm_and_rotate(single[0], own, kv_rows, single[1], key_weight, tables, EPS, "torch"))
    found += torch.autograd.grad(found, single, [gradient.float() for gradient in gradients])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).abs().max() <= 2e-6 * theirs.abs().max()


def test_frozen_weights_have_no_gradient() -> None:
    mixed, weight = torch.randn(3, 1, 1, 3, 8, requires_grad=True), torch.ones(8)
    rotary = Rotary(torch.ones(3, 1, 1, 8), torch.zeros(3, 1, 1, 8))
    query, key, value = norm_and_rotate(mixed, range(1), 2, weight, weight, rotary, EPS, "torch")
    (query.sum() + key.sum() + value.sum()).backward()
    assert mixed.grad is not None and weight.grad is None


def test_the_same_where_no_gradient_can_be_asked_for() -> None:
    """Inference goes through the parts of the definition, one after the other."""
    torch.manual_seed(0)
    mixed, weight = torch.randn(3, 2, 2, 4, 8), torch.rand(8) + 0.5
    angles = torch.randn(3, 2, 1, 8)
    rotary = Rotary(angles.cos(), angles.sin())
    expected = norm_and_rotate(mixed, range(2), 2, weight, weight, rotary, EPS, "torch")
    with torch.inference_mode():
        found = norm_and_rotate(mixed, range(2), 2, weight, weight, rotary, EPS, "torch")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
