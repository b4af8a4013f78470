"""Low-rank adapters of Megatron's linears: delta = scaling · B A x, beside the frozen weight.

Mathematics: PEFT's `lora.Linear`, and its `ParamWrapper` for experts. A fused linear carries one adapter for each
Hugging Face projection in it: their A's lie one below the other, their B's row for row where the rows of the weight
lie. So both are cut over ranks as the weight is, whatever that is, and one product serves all projections:

    z = x Aᵀ                        [..., projections · rank]
    delta = z (B spread)ᵀ           row i of B meets the part of z of its own projection only
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

from bridge.megatron.linear import Split


@dataclass(frozen=True)
class Placement:
    """How the weight lies on the ranks of `group`, and whether its input is a part of the sequence."""

    split: Split
    group: dist.ProcessGroup | None
    sequence_parallel: bool


class LinearAdapter(torch.nn.Module):
    """The adapters of one linear.

    `lora_A` [n · rank, in] and `lora_B` [out, rank], for the n projections that are adapted and this rank's part of the
    weight [out, in]. `projections` [out]: on the CPU, which of the n each row belongs to (-1: none).
    `scalings`: of each of the n.
    """

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        projections: Tensor,
        scalings: Sequence[float],
        placement: Placement,
        dropout: float,
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.lora_A = torch.nn.Parameter(weight.new_zeros(len(scalings) * rank, columns))
        self.lora_B = torch.nn.Parameter(weight.new_zeros(rows, rank))
        self.placement, self.dropout, self.count = placement, dropout, len(scalings)
        selection = torch.nn.functional.one_hot(projections + 1, len(scalings) + 1)[:, 1:]
        # Float32 even where the weight is bf16, in which 0.1 or an rsLoRA scaling would be off by up to 0.4 %.
        selection = (selection * torch.tensor(list(scalings), device="cpu")).to(weight.device)
        self.selection: Tensor
        self.register_buffer("selection", selection, persistent=False)
        split, sequence_parallel = placement.split, placement.sequence_parallel
        for parameter, of, dim in ((self.lora_A, "row", 1), (self.lora_B, "column", 0)):
            set_tensor_model_parallel_attributes(parameter, is_parallel=split == of, dim=dim, stride=1)
        # What meets a part of the sequence only has a part of its gradient only: Megatron sums it over the ranks.
        self.lora_A.sequence_parallel = sequence_parallel and split != "row"  # type: ignore[attr-defined]
        self.lora_B.sequence_parallel = sequence_parallel and split != "column"  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """What the linear takes, [..., in] -> what is added to its output, [..., out]."""
        z, place = self._down(x), self.placement
        # The small z travels, not x: with a whole sequence to the rows of a column-parallel weight, summed over the
        # columns of a row-parallel one.
        if place.split == "column" and place.sequence_parallel:
            z = gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=True, group=place.group)
        elif place.split == "column":
            z = copy_to_tensor_model_parallel_region(z, group=place.group)
        elif place.split == "row" and place.sequence_parallel:
            z = reduce_scatter_to_sequence_parallel_region(z, group=place.group)
        elif place.split == "row":
            z = reduce_from_tensor_model_parallel_region(z, group=place.group)
        spread = (self.lora_B[:, None] * self.selection[:, :, None]).flatten(1)
        return torch.nn.functional.linear(z, spread.to(z.dtype))

    def _down(self, x: Tensor) -> Tensor:
        """[..., n · rank]; every projection draws a dropout of its own, as in PEFT."""
        if not (self.training and self.dropout):
            return torch.nn.functional.linear(x, self.lora_A)
        place = self.placement
        if place.sequence_parallel or (place.split == "row" and place.group is not None and place.group.size() > 1):
            # Each rank has other numbers of x, and draws for them with the generator of its own.
            with get_cuda_rng_tracker().fork():
                return self._dropped(x)
        return self._dropped(x)

    def _dropped(self, x: Tensor) -> Tensor:
        parts = self.lora_A.chunk(self.count)
        dropped = (torch.nn.functional.dropout(x, self.dropout) for _ in parts)
        return torch.cat([torch.nn.functional.linear(d, a) for d, a in zip(dropped, parts, strict=True)], dim=-1)


class ExpertAdapter(torch.nn.Module):
    """An adapter for each expert of a rank: two grouped products.

    `lora_A` [E', rank, in] and `lora_B` [E', out, rank] for the E' experts of the rank and its part of their weights
    [E', out, in]. Under expert tensor parallelism the dispatcher gathers tokens and sums partial outputs: products
    stay partial, and only the gradient of the factor that every rank holds is summed.
    """

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
        z = torch.nn.functional.grouped_mm(x, a.transpose(1, 2), offs=offsets)
        return torch.nn.functional.grouped_mm(z, b.transpose(1, 2), offs=offsets) * self.scaling
