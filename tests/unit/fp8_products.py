"""torch's FP8 product of experts, which has no CPU kernel, by its definition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import ScalingType

from bridge.megatron import fp8_experts


@dataclass
class Products:
    """What was asked for: `fast` and the dtype of each product."""

    asked: list[tuple[bool, torch.dtype]] = field(default_factory=list)

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        scale_a: Tensor,
        recipe_a: Any,
        scale_b: Tensor,
        recipe_b: Any,
        *,
        offs: Tensor,
        output_dtype: torch.dtype,
        use_fast_accum: bool,
    ) -> Tensor:
        """[t, n] by [E, n, m] -> [t, m]: float32 products of operands times their scales, rounded once."""
        assert recipe_a is recipe_b is ScalingType.RowWise
        if a.dtype is fp8_experts.E4M3:
            _checked(a, b, scale_a, scale_b, offs, output_dtype)
        self.asked.append((use_fast_accum, a.dtype))
        rows, matrices = a.float() * scale_a[:, None], b.float() * scale_b[:, None]
        output = torch.full((len(a), b.shape[2]), float("nan"))
        start = 0
        for end, matrix in zip(offs.tolist(), matrices, strict=True):
            output[start:end] = rows[start:end] @ matrix
            start = end
        return output.to(output_dtype)


def _checked(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, dtype: torch.dtype) -> None:
    """torch's own checks of dtypes, strides and scales, which the older name of the product has without a GPU too, and
    of widths, which its CUDA source (aten/src/ATen/native/cuda/GroupedBlas.cpp) has besides."""
    meta = [tensor.to("meta") for tensor in (a, b, scale_a, scale_b, offs)]
    assert [x.stride() for x in meta] == [x.stride() for x in (a, b, scale_a, scale_b, offs)]
    made = torch.ops.aten._scaled_grouped_mm(*meta, out_dtype=dtype)
    assert made.shape == (len(a), b.shape[2])
    assert a.shape[1] % 16 == b.shape[1] % 16 == b.shape[2] % 16 == 0


@contextmanager
def products() -> Iterator[Products]:
    """In place of torch's."""
    made = Products()
    with patch.object(torch.nn.functional, "scaled_grouped_mm", made):
        yield made


def exact_rows(x: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    return x, torch.ones(x.shape[:-1])


def exact_columns(weight: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    return weight.transpose(1, 2).contiguous(), torch.ones(weight.shape[0], weight.shape[2])


@contextmanager
def exact_products() -> Iterator[Products]:
    """`products` of operands that are not rounded: all else is as it is."""
    rows = patch.object(fp8_experts, "quantize_rows", exact_rows)
    columns = patch.object(fp8_experts, "quantize_columns", exact_columns)
    with products() as made, rows, columns:
        yield made
