"""Weights rounded as a quantized folder stores them, in the forward pass; gradients go straight through to the weights.

So a model learns to be good after its rounding. The values are those that come back from the folder: of `int4-g32` that
which `export --quantize w4a16` writes, of `fp8` that of `fp8-dynamic` (`bridge.convert.quantize` and `dequantize`: the
constants are theirs, `tests/unit/test_fake_quant.py` holds the bits against them), of `q4_0` those of ggml's blocks.

Parameters stay as they are, and so do checkpoints. What is frozen is rounded once, by `round_frozen`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bridge.convert.quantize import EPSILON, HALF_RANGE
from bridge.megatron.fake_quant_schemes import FAKE_QUANT
from bridge.megatron.linear import ColumnLinear, RowLinear

Group = dist.ProcessGroup | None

# How many rows of a weight are float32 at once.
_ROWS = 1024
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@torch.no_grad()
def rounded(weight: Tensor, scheme: str, group: Group = None) -> Tensor:
    """The values of `weight` [..., out, in] after quantization, in its dtype.

    `group`: the ranks that hold the other columns of its rows, which share scales with these under `fp8`: collective
    there. The columns are a multiple of the scheme's block.
    """
    out = torch.empty_like(weight)
    rows, width = weight.flatten(0, -2), FAKE_QUANT[scheme]
    largest = None
    if width is None:
        largest = rows.abs().amax(-1)
        if group is not None and group.size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    for low in range(0, len(rows), _ROWS):
        part = rows[low : low + _ROWS]
        if largest is not None:
            values = _fp8(part, largest[low : low + _ROWS, None])
        else:
            blocks = part.unflatten(-1, (-1, width))
            values = (_q4_0(blocks) if scheme == "q4_0" else _int4(blocks)).flatten(1)
        out.view(rows.shape)[low : low + _ROWS] = values
    return out


def _fp8(rows: Tensor, largest: Tensor) -> Tensor:
    scale = _scale(largest, "F8_E4M3")
    limit = torch.finfo(torch.float8_e4m3fn).max
    codes = _quotient(rows, scale).clamp(-limit, limit).to(torch.float8_e4m3fn)
    return (codes.float() * scale.float()).to(rows.dtype)


def _int4(blocks: Tensor) -> Tensor:
    scale = _scale(blocks.abs().amax(-1, keepdim=True), "int4")
    codes = _quotient(blocks, scale).clamp(-8, 7).round()
    return (codes.float() * scale.float()).to(blocks.dtype)


def _scale(largest: Tensor, kind: str) -> Tensor:
    """See `bridge.convert.quantize.scales`."""
    wide = largest.float()
    # Divided by a tensor: torch multiplies by the rounded reciprocal where one side is a number.
    scale = (wide / torch.full_like(wide, HALF_RANGE[kind])).to(largest.dtype)
    return torch.where(scale == 0, EPSILON[_NAMES[largest.dtype]], scale)


def _quotient(values: Tensor, scale: Tensor) -> Tensor:
    return (values.float() / scale.float()).to(values.dtype)


def _q4_0(blocks: Tensor) -> Tensor:
    """ggml's `quantize_row_q4_0_ref` and its inverse: the value of the largest magnitude, with its sign, is code -8.

    Codes are found with the float32 step, values are of the step as it is stored, in float16.
    """
    wide = blocks.float()
    top = wide.gather(-1, wide.abs().argmax(-1, keepdim=True))
    step = top / torch.full_like(top, -8)
    inverse = torch.where(step == 0, step, 1 / step)
    codes = (wide * inverse + 8.5).trunc().clamp(max=15) - 8
    return (codes * step.half().float()).to(blocks.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: str, group: Group) -> Tensor:
        return rounded(weight, scheme, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


@dataclass
class Rounding:
    """How a module's weights look to its products. `groups`: of each of them that of `rounded`, by its name.

    `frozen`: those that need no gradient, rounded already. Weights that blocks do not divide stay as they are.
    """

    scheme: str
    groups: Mapping[str, Group]
    frozen: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        if not self.applies(weight):
            return weight
        if name in self.frozen and not weight.requires_grad:
            return self.frozen[name]
        product: Tensor = _StraightThrough.apply(weight, self.scheme, self.groups[name])
        return product

    def applies(self, weight: Tensor) -> bool:
        return self.scheme != "none" and weight.shape[-1] % (FAKE_QUANT[self.scheme] or 1) == 0


class _FakeQuantized:
    """What comes before a linear among the bases of a class."""

    config: Any
    weight: Tensor
    tp_group: dist.ProcessGroup

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        group = self.tp_group if isinstance(self, RowLinear) else None
        self.rounding = Rounding(self.config.fake_quant, {"weight": group})

    def multiplied(self) -> Tensor:
        return self.rounding("weight", self.weight)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Where Megatron's linears, which send parts of their input and output, multiply."""
        output: Tensor = super()._forward_impl(input, self.multiplied(), *args, **kwargs)  # type: ignore[misc]
        return output


class FakeQuantColumnLinear(_FakeQuantized, ColumnLinear):
    """A column-parallel linear whose weight is rounded: every rank has whole rows of it."""


class FakeQuantRowLinear(_FakeQuantized, RowLinear):
    """A row-parallel linear whose weight is rounded: every rank has whole blocks of every row."""


def round_frozen(models: Iterable[torch.nn.Module], *, in_place: bool) -> None:
    """Round the weights that need no gradient, once for all products to come. Collective.

    `in_place`: the parameters themselves, where no checkpoint holds them; else beside them, in a second copy.
    """
    for model in models:
        for module in model.modules():
            rounding = getattr(module, "rounding", None)
            if not isinstance(rounding, Rounding):
                continue
            for name, group in rounding.groups.items():
                weight = getattr(module, name)
                if weight.requires_grad or not rounding.applies(weight):
                    continue
                rounding.frozen[name] = rounded(weight, rounding.scheme, group)
                if in_place:
                    weight.data.copy_(rounding.frozen[name])
                    rounding.frozen[name] = weight
