"""Low-rank adapters of embeddings, beside a frozen vocabulary-parallel table.

Mathematics: PEFT's `lora.Embedding` and `DoraEmbeddingLayer`: a row of the table is w + scaling · a B, with a the row
of A and B [r, hidden] (both transposed against PEFT's), before Gemma's scaling of embeddings, which PEFT applies to
both. DoRA multiplies every column by magnitude / norm. There is no dropout. A tied head stays the base's.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

# How much of a table is float32 at once.
_ROWS = 8192


class EmbeddingAdapter(torch.nn.Module):
    """The adapter of this rank's rows of an embedding [rows, hidden]: `lora_A` [rows, r], `lora_B` [r, hidden]."""

    # The axis of the weight that each parameter has not: see `megatron.linear.adapter_items`.
    MISSING_AXIS: ClassVar = {"lora_A": -1, "lora_B": -2, "lora_magnitude": -2}

    def __init__(self, table: VocabParallelEmbedding, rank: int, scaling: float, dora: bool) -> None:
        super().__init__()
        weight = table.weight
        rows, hidden = weight.shape
        self.lora_A = torch.nn.Parameter(weight.new_zeros(rows, rank))
        self.lora_B = torch.nn.Parameter(weight.new_zeros(rank, hidden))
        self.lora_magnitude = torch.nn.Parameter(weight.new_zeros(hidden)) if dora else None
        self.first_row, self.scaling = int(table.vocab_start_index), scaling
        self.group: dist.ProcessGroup = table.tp_group
        self.sequence_parallel = bool(table.reduce_scatter_embeddings)
        for name, parameter in self.named_parameters():
            set_tensor_model_parallel_attributes(parameter, is_parallel=name == "lora_A", dim=0, stride=1)
            # As in `LinearAdapter`.
            parameter.sequence_parallel = self.sequence_parallel and name != "lora_A"  # type: ignore[attr-defined]

    def forward(self, input_ids: Tensor, rows: Tensor, weight: Tensor, pad_token_id: int | None) -> Tensor:
        """The rows [s (/tp), b, hidden] of `input_ids` [b, s], before their scaling -> those of the adapted table.

        A lookup of the padding row gives no gradient to A, as in the table (torch's `padding_idx`).
        """
        count = self.lora_A.shape[0]
        ids = input_ids.t() - self.first_row
        held = (ids >= 0) & (ids < count)
        pad = None if pad_token_id is None else pad_token_id - self.first_row
        pad = pad if pad is not None and 0 <= pad < count else None
        z = torch.nn.functional.embedding(ids.where(held, 0), self.lora_A, padding_idx=pad)
        z = z * held[..., None]
        if self.sequence_parallel:
            z = reduce_scatter_to_sequence_parallel_region(z, group=self.group)
        else:
            z = reduce_from_tensor_model_parallel_region(z, group=self.group)
        delta = (z @ self.lora_B) * self.scaling
        if self.lora_magnitude is None:
            return rows + delta
        scale = self.lora_magnitude.float() / self._norm(weight).float()
        return rows + (scale - 1).to(rows.dtype) * rows + scale.to(delta.dtype) * delta

    def start_magnitude(self, weight: Tensor) -> None:
        """Make the magnitudes those of the table and the factors as they are. Collective."""
        if self.lora_magnitude is not None:
            self.lora_magnitude.data.copy_(self._norm(weight))

    @torch.no_grad()
    def _norm(self, weight: Tensor) -> Tensor:
        """[hidden]: the norms of the columns of W + scaling · A B, over all ranks; as `LinearAdapter` has them."""
        a, b = self.lora_A.float(), self.lora_B.float() * self.scaling
        squares, crossed = b.new_zeros(b.shape[1]), (a.T @ a) @ b
        for rows, of in zip(weight.split(_ROWS), a.split(_ROWS), strict=True):
            rows = rows.float()
            squares += rows.square().sum(0)
            crossed += 2 * (of.T @ rows)
        squares += (crossed * b).sum(0)
        if self.group.size() > 1:
            dist.all_reduce(squares, group=self.group)
        return squares.sqrt().to(weight.dtype)
