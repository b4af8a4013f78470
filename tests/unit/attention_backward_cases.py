"""The backward kernels of `flex_triton` against dense attention in float64; run as kernel_cases.py is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor

from bridge.megatron.attention_backends import BACKENDS, flex_triton
from bridge.megatron.kernels.attention_backward import attention_backward
from bridge.megatron.kernels.attention_tiles import TileRange, plan
from bridge.megatron.mask import Mask, mask_of
from bridge.megatron.visibility import MaskRule, Visibility
from bridge.megatron.zigzag import Zigzag

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Of the largest gradient: sums in another order. Of bf16's norm: what a few weights more or less rounded up make of it.
FLOAT32, BFLOAT16 = 2e-6, 3e-4

IN_FLOAT32 = pytest.mark.skipif(DEVICE == "cuda", reason="tiles of float32 do not fit in shared memory")


@dataclass(frozen=True)
class Case:
    """What is visible, and the heads: query groups, queries of each, head dim."""

    mask: Mask
    heads: tuple[int, int, int]


def visibility(
    length: int,
    documents: tuple[int, ...] = (),
    images: tuple[tuple[int, int], ...] = (),
    padding: tuple[tuple[int, int], ...] = (),
) -> Visibility:
    """`documents` begin there, besides at 0; `images` and `padding` are runs; a row of its own for each padding."""
    ids = torch.zeros(max(1, len(padding)), length, dtype=torch.int64, device=DEVICE)
    types, real = torch.zeros_like(ids), torch.ones_like(ids)
    for start, stop in images:
        types[:, start:stop] = 1
    for row, (start, stop) in enumerate(padding):
        real[row, start:stop] = 0
    bounds = torch.tensor([0, *documents, length], device=DEVICE) if documents else None
    return Visibility.of(ids, real if padding else None, bounds, types if images else None)


CAUSAL = MaskRule(None, "causal")
PACKED = visibility(421, (70, 71, 300), ((10, 40), (280, 320)))
CASES = {
    "16:1": Case(mask_of(visibility(150), CAUSAL), (1, 16, 32)),
    "8:1": Case(mask_of(visibility(128), CAUSAL), (2, 8, 16)),
    "short": Case(mask_of(visibility(5), CAUSAL), (1, 2, 16)),
    "wide": Case(mask_of(visibility(140), CAUSAL), (1, 2, 512)),
    "packed": Case(mask_of(PACKED, CAUSAL), (1, 2, 64)),
    "images": Case(mask_of(PACKED, MaskRule(None, "full")), (2, 2, 32)),
    "window": Case(mask_of(PACKED, MaskRule(20, "windowed")), (1, 2, 32)),
    "window, images whole": Case(mask_of(PACKED, MaskRule(20, "full")), (1, 1, 256)),
    "padding": Case(mask_of(visibility(290, padding=((0, 130), (200, 290))), CAUSAL), (1, 2, 16)),
    # Its tokens lie at both ends of the rows and between them.
    "padding within": Case(
        mask_of(visibility(390, padding=((128, 256), (5, 300))), MaskRule(150, "causal")), (1, 2, 16)
    ),
    "context parallel": Case(mask_of(visibility(600, (333,)).on(Zigzag(600, 2, 0)), CAUSAL), (1, 2, 16)),
    "context parallel, window": Case(
        mask_of(visibility(800, (50,), ((190, 230),)).on(Zigzag(800, 2, 1)), MaskRule(30, "full")), (1, 2, 16)
    ),
}


def tensors(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the output; the first is a strided view, as of a fused projection."""
    torch.manual_seed(0)
    (groups, repeat, d), batch = case.heads, len(case.mask.row_document)
    rows, columns = len(case.mask.row_places), len(case.mask.column_places)
    fused = torch.randn(rows, batch, groups * repeat, 2 * d) * 2 * d**-0.5
    others = (torch.randn(n, batch, h, d) for n, h in ((columns, groups), (columns, groups), (rows, groups * repeat)))
    return [fused.to(DEVICE, dtype)[..., d:], *(x.to(DEVICE, dtype) for x in others)]


def dense(case: Case, given: list[Tensor], rounded: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, log-sum-exp and gradients in float64, but output, weights and gradients of scores in `rounded`."""
    query, key, value, upstream = (x.double().permute(1, 2, 0, 3) for x in given)
    key, value = (x.repeat_interleave(case.heads[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)).masked_fill(~case.mask.dense[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    output = (weights @ value).to(rounded)
    delta = (output.double() * upstream).sum(-1, keepdim=True)
    d_scores = (weights * (upstream @ value.transpose(2, 3) - delta)).to(rounded).double()
    d_value = weights.to(rounded).double().transpose(2, 3) @ upstream
    d_key = d_scores.transpose(2, 3) @ query
    sums = (x.unflatten(1, case.heads[:2]).sum(2) for x in (d_key, d_value))
    return output.permute(2, 0, 1, 3), lse, [x.permute(2, 0, 1, 3) for x in (d_scores @ key, *sums)]


@pytest.fixture(autouse=True)
def _nothing_is_zero_by_chance() -> Iterator[None]:
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def errors(case: Case, dtype: torch.dtype) -> list[float]:
    given = tensors(case, dtype)
    output, lse, expected = dense(case, given, torch.float64 if dtype is torch.float32 else dtype)
    runs, parts = flex_triton.runs_of(case.mask), flex_triton.parts_of(case.mask, given[0])
    query, key, value, upstream = given
    found = attention_backward(query, key, value, output.to(dtype), lse.float(), upstream, runs, parts)
    for a, b in zip(found, (query, key, value), strict=True):
        assert a.shape == b.shape and a.dtype is dtype
    if dtype is torch.float32:
        return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
    return [float((a.double() - b.to(dtype)).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@IN_FLOAT32
@pytest.mark.parametrize("small", [pytest.param(False, marks=pytest.mark.slow), True], ids=["at once", "in parts"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_in_float32(name: str, small: bool) -> None:
    """Also a tile of queries at a time."""
    with mock.patch.object(flex_triton, "WORKSPACE", 1 if small else flex_triton.WORKSPACE):
        found = errors(CASES[name], torch.float32)
        # One by one: NaN is not below a bound, and may be the largest of nothing.
        assert all(error <= FLOAT32 for error in found), found


@pytest.mark.parametrize(
    "name", [name if name in ("16:1", "window") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_gradients_in_bf16(name: str) -> None:
    """Weights and gradients of scores are rounded once, gradients once; all sums are float32."""
    found = errors(CASES[name], torch.bfloat16)
    assert all(error <= BFLOAT16 for error in found), found


@IN_FLOAT32
def test_forward_and_backward() -> None:
    """The backend as the model calls it."""
    case = CASES["images"]
    query, key, value, upstream = tensors(case, torch.float32)
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    assert BACKENDS["flex_triton"].refuse(*leaves[:2], case.mask) is None
    output = BACKENDS["flex_triton"].attend(*leaves, case.mask)
    found = torch.autograd.grad(output, leaves, upstream)
    wanted, _, expected = dense(case, [query, key, value, upstream], torch.float64)
    for a, b in zip((output, *found), (wanted, *expected), strict=True):
        assert (a - b).abs().max() <= FLOAT32 * b.abs().max()


def test_parts() -> None:
    """Of at most so many tiles, a tile of queries at the least."""
    low, high = [0, 0, 0, 2, 3], [1, 2, 9, 4, 5]
    assert plan(low, high, 4) == [
        TileRange(0, 2, 0, 2),
        TileRange(2, 3, 0, 9),
        TileRange(3, 4, 2, 4),
        TileRange(4, 5, 3, 5),
    ]
    assert plan(low, high, 45) == [TileRange(0, 5, 0, 9)]
