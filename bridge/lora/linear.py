"""Low-rank adapters of Megatron's linears: delta = scaling · B A x, beside the frozen weight.

Mathematics: PEFT's `lora.Linear`, and its `ParamWrapper` for experts. A fused linear carries one adapter for each
Hugging Face projection in it: their A's lie one below the other, their B's row for row where the rows of the weight
lie. So both are cut over ranks as the weight is, whatever that is, and one product serves all projections:

    z = x Aᵀ                        [..., projections · rank]
    delta = z (B spread)ᵀ           row i of B meets the part of z of its own projection only

DoRA (PEFT's `DoraLinearLayer`) multiplies each row of the adapted weight by magnitude / norm, so that its norm is the
magnitude; the norm is a constant to the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridge.megatron.linear import Split

# How many rows of a weight are float32 at once.
_ROWS = 1024


@dataclass(frozen=True)
class Placement:
    """How the weight lies on the ranks of `group`, and whether its input is a part of the sequence."""

    split: Split
    group: dist.ProcessGroup | None
    sequence_parallel: bool


class LinearAdapter(torch.nn.Module):
    """The adapters of one linear.

    `lora_A` [n · rank, in] and `lora_B` [out, rank], for the n projections that are adapted and this rank's part of the
    weight [out, in]; with DoRA `lora_magnitude` [out]. `projections` [out]: on the CPU, which of the n each row belongs
    to (-1: none). `scalings` and `dropouts`: of each of the n.
    """

    # The axis of the weight that each parameter has not: see `megatron.linear.adapter_items`.
    MISSING_AXIS: ClassVar = {"lora_A": -2, "lora_B": -1, "lora_magnitude": -1}

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        projections: Tensor,
        scalings: Sequence[float],
        placement: Placement,
        dropouts: Sequence[float],
        dora: bool,
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.lora_A = torch.nn.Parameter(weight.new_zeros(len(scalings) * rank, columns))
        self.lora_B = torch.nn.Parameter(weight.new_zeros(rows, rank))
        self.lora_magnitude = torch.nn.Parameter(weight.new_zeros(rows)) if dora else None
        self.placement, self.dropouts = placement, tuple(dropouts)
        selection = torch.nn.functional.one_hot(projections + 1, len(scalings) + 1)[:, 1:]
        # Float32 even where the weight is bf16, in which 0.1 or an rsLoRA scaling would be off by up to 0.4 %.
        selection = (selection * torch.tensor(list(scalings), device="cpu")).to(weight.device)
        self.selection: Tensor
        self.register_buffer("selection", selection, persistent=False)
        # Those of the first projection, then of the second, ...: found here, because the host of a GPU waits for that.
        owned = [(projections == number).nonzero().flatten() for number in range(len(scalings))]
        self.counts = [len(rows) for rows in owned]
        self.rows: Tensor
        self.register_buffer("rows", torch.cat(owned).to(weight.device), persistent=False)
        split, sequence_parallel = placement.split, placement.sequence_parallel
        for name, parameter in self.named_parameters():
            of: Split = "row" if name == "lora_A" else "column"
            set_tensor_model_parallel_attributes(
                parameter, is_parallel=split == of, dim=int(name == "lora_A"), stride=1
            )
            # What meets a part of the sequence only has a part of its gradient only: Megatron sums it over the ranks.
            parameter.sequence_parallel = sequence_parallel and split != of  # type: ignore[attr-defined]

    def forward(self, x: Tensor, output: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the linear takes, [..., in], and what it gives for it, [..., out] -> what it gives with its adapters."""
        dropped = self._dropped(x)
        if all(part is x for part in dropped):
            z = torch.nn.functional.linear(x, self.lora_A)
        else:
            products = zip(dropped, self.lora_A.chunk(len(dropped)), strict=True)
            z = torch.cat([torch.nn.functional.linear(part, a) for part, a in products], dim=-1)
        # The small z travels, not x.
        z, spread = self._over_ranks(z), self._spread().to(z.dtype)
        if self.lora_magnitude is None:
            return _add_product(output, z, spread)
        delta = torch.nn.functional.linear(z, spread)
        scale = self._scale(weight)
        base = output if bias is None else output - bias
        for part, rows in zip(dropped, self.rows.split(self.counts), strict=True):
            if part is not x:
                base = base.index_copy(-1, rows, self._product(part, weight, rows))
        # Float32 up to here: near 1, where it is, bf16 is coarse.
        return output + (scale - 1).to(base.dtype) * base + scale.to(delta.dtype) * delta

    def start_magnitude(self, weight: Tensor) -> None:
        """Make the magnitudes those of the weight [out, in] and the factors as they are. Collective."""
        if self.lora_magnitude is not None:
            self.lora_magnitude.data.copy_(self._norm(weight) * (self.selection.sum(1) != 0))

    def _spread(self) -> Tensor:
        """[out, n · rank]: B times scaling, each row in the columns of its own projection."""
        return (self.lora_B[:, None] * self.selection[:, :, None]).flatten(1)

    def _over_ranks(self, z: Tensor) -> Tensor:
        """A whole sequence, to the rows of a column-parallel weight; the sum over a row-parallel one's columns."""
        place = self.placement
        if place.split == "column" and place.sequence_parallel:
            return gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=True, group=place.group)
        if place.split == "column":
            return copy_to_tensor_model_parallel_region(z, group=place.group)
        if place.split == "row" and place.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(z, group=place.group)
        if place.split == "row":
            return reduce_from_tensor_model_parallel_region(z, group=place.group)
        return z

    def _product(self, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        """x [..., in] by `rows` of the weight, in its dtype (where the linear itself may multiply in fp8)."""
        if self.placement.split == "row":
            return self._over_ranks(_rows_product(x, weight, rows))
        return _rows_product(self._over_ranks(x), weight, rows)

    def _scale(self, weight: Tensor) -> Tensor:
        """[out], float32: by what DoRA multiplies a row of the adapted weight; 1 where it has no adapter."""
        assert self.lora_magnitude is not None
        return torch.where(self.selection.sum(1) != 0, self.lora_magnitude.float() / self._norm(weight).float(), 1.0)

    @torch.no_grad()
    def _norm(self, weight: Tensor) -> Tensor:
        """[out]: the norms of the rows of W + scaling · B A, a constant to the gradient as in PEFT.

        |w + b A|² = |w|² + 2 (w Aᵀ) · b + b (A Aᵀ) · b: never is there a second matrix of the weight's size. Float32,
        rounded to the dtype of the weight, which is PEFT's with `autocast_adapter_dtype=False`.
        """
        a, spread = self.lora_A.float(), self._spread()
        pieces = (rows.float() for rows in weight.split(_ROWS))
        sums = [(rows.square().sum(1), torch.nn.functional.linear(rows, a)) for rows in pieces]
        squares, crossed = (torch.cat(each) for each in zip(*sums, strict=True))
        squares += ((2 * crossed + spread @ (a @ a.T)) * spread).sum(1)
        place = self.placement
        if place.split == "row" and place.group is not None and place.group.size() > 1:
            dist.all_reduce(squares, group=place.group)
        return squares.sqrt().to(weight.dtype)

    def _dropped(self, x: Tensor) -> list[Tensor]:
        """x for each projection: every one draws a dropout of its own, as in PEFT; x itself where there is none."""
        if not (self.training and any(self.dropouts)):
            return [x for _ in self.dropouts]
        place = self.placement
        if place.sequence_parallel or (place.split == "row" and place.group is not None and place.group.size() > 1):
            # Each rank has other numbers of x, and draws for them with the generator of its own.
            with get_cuda_rng_tracker().fork():
                return self._draw(x)
        return self._draw(x)

    def _draw(self, x: Tensor) -> list[Tensor]:
        return [torch.nn.functional.dropout(x, dropout) if dropout else x for dropout in self.dropouts]


def _add_product(output: Tensor, z: Tensor, spread: Tensor) -> Tensor:
    """`output` [..., out] + z [..., k] @ spread [out, k]ᵀ, in the place of `output`, which is the caller's no more."""
    if not output.is_contiguous() or not output.dtype == z.dtype == spread.dtype:
        return output + torch.nn.functional.linear(z, spread)
    total: Tensor = _AddProduct.apply(output, z, spread)
    return total


class _AddProduct(torch.autograd.Function):
    """One product that adds to what is there: to write, read and add a delta of its size is twice the bytes.

    Linears keep what they take, not what they give, and torch raises where that is not so: a detached tensor counts its
    versions with the one it was made of. (As an operation in place it would be refused behind collectives of one rank,
    which hand on their input.)
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, z: Tensor, spread: Tensor) -> Tensor:
        ctx.save_for_backward(z, spread)
        total = output.detach()
        total.view(-1, total.shape[-1]).addmm_(z.flatten(0, -2), spread.t())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        (gradient,), (z, spread) = grads, ctx.saved_tensors
        d_z = gradient @ spread if ctx.needs_input_grad[1] else None
        d_spread = None
        if ctx.needs_input_grad[2]:
            d_spread = gradient.flatten(0, -2).t() @ z.flatten(0, -2)
        return gradient, d_z, d_spread


def _rows_product(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """x [..., in] by `rows` of a frozen weight [out, in] -> [..., rows]."""
    if len(rows) == len(weight):
        return torch.nn.functional.linear(x, weight)
    product: Tensor = _RowsProduct.apply(x, weight, rows)
    return product


class _RowsProduct(torch.autograd.Function):
    """Takes the rows out of the weight once more in the backward pass: until then it would keep a copy of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(weight, rows)
        return torch.nn.functional.linear(x, weight[rows])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, rows = ctx.saved_tensors
        return grads[0] @ weight[rows], None, None


class ExpertAdapter(torch.nn.Module):
    """An adapter for each expert of a rank: two grouped products.

    `lora_A` [E', rank, in] and `lora_B` [E', out, rank] for the E' experts of the rank and its part of their weights
    [E', out, in]. Under expert tensor parallelism the dispatcher gathers tokens and sums partial outputs: products
    stay partial, and only the gradient of the factor that every rank holds is summed.
    """

    MISSING_AXIS: ClassVar = {"lora_A": -2, "lora_B": -1}

    def __init__(self, weight: Tensor, rank: int, scaling: float, split: Split, group: dist.ProcessGroup) -> None:
        super().__init__()
        experts, rows, columns = weight.shape
        self.lora_A = torch.nn.Parameter(weight.new_zeros(experts, rank, columns))
        self.lora_B = torch.nn.Parameter(weight.new_zeros(experts, rows, rank))
        self.split, self.group, self.scaling = split, group, scaling
        for parameter, of, dim in ((self.lora_A, "row", 2), (self.lora_B, "column", 1)):
            set_tensor_model_parallel_attributes(parameter, is_parallel=split == of, dim=dim, stride=1)
            # As the weight's: summed over the expert data-parallel group.
            parameter.allreduce = False  # type: ignore[attr-defined]

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Tokens [t, in] sorted by expert, which end at `offsets` [E'] int32 -> [t, out]."""
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        if self.group.size() > 1:
            if self.split == "column":
                a = copy_to_tensor_model_parallel_region(a, group=self.group)
            else:
                b = copy_to_tensor_model_parallel_region(b, group=self.group)
        # Grouped products want rows that are multiples of 16 bytes.
        spare = -a.shape[1] % (16 // a.element_size())
        if spare:
            a, b = torch.nn.functional.pad(a, (0, 0, 0, spare)), torch.nn.functional.pad(b, (0, spare))
        # What is scaled is as wide as the rank, not as the weight.
        z = torch.nn.functional.grouped_mm(x, a.transpose(1, 2), offs=offsets) * self.scaling
        return torch.nn.functional.grouped_mm(z, b.transpose(1, 2), offs=offsets)
