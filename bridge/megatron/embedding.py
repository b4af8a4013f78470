"""Gemma 4's embeddings: their scaling (transformers `Gemma4TextScaledWordEmbedding`), and a vocabulary cut over ranks.

Ranks of tensor parallelism hold equal numbers of rows, so a vocabulary that they do not divide is filled up with rows
of zeros at its end. They are in no checkpoint, no id means them, and the loss and the logits are without them.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from bridge.errors import UsageError


def padded_size(size: int, tp: int) -> int:
    """The rows of a vocabulary of `size` words in a model whose `tp` ranks hold equal parts of it."""
    return size + -size % tp


def held_rows(size: int, local_rows: int, rank: int) -> int:
    """How many of the `local_rows` of a rank are words of a vocabulary of `size`, and no padding."""
    return min(local_rows, max(0, size - rank * local_rows))


def head_weight(output_layer: torch.nn.Module, output_weight: Tensor | None) -> Tensor:
    """What an `output_processor` of Megatron's GPTModel projects with: a tied head is given the embedding's weight.

    The head is not called, and what comes before a call is done here: with overlap Megatron's DDP fetches its weight.
    """
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    weight = output_layer.weight if output_weight is None else output_weight
    assert isinstance(weight, Tensor)
    return weight


def require_rows(ids: Tensor, size: int, table: str, ignore: int | None = None) -> None:
    """Let ids that a table of `size` rows has none for raise: one that is cut over ranks would give zeros.

    On a CPU that is a UsageError which names the id. On a GPU it is an assertion of the device, as torch's own lookup
    makes it: the host waits for nothing. An id of `ignore` is none.
    """
    inside = (ids >= 0) & (ids < size)
    if ignore is not None:
        inside |= ids == ignore
    try:
        torch._assert_async(inside.all(), f"a token id has no row in {table} ({size} rows)")
    except RuntimeError:
        raise UsageError(f"token id {int(ids[~inside][0])} has no row in {table} ({size} rows)") from None


def scale_embeddings(
    embeddings: Tensor,
    input_ids: Tensor,
    pad_token_id: int | None,
    dim: int,
    config: TransformerConfig,
    table: VocabParallelEmbedding,
) -> Tensor:
    """Rows [s (/tp), b, n] looked up in `table`, with its adapter, times sqrt(dim), the factor rounded to their dtype.

    A lookup of the padding row gets no gradient (torch's `padding_idx`), so placeholders give none; the tied head's
    gradient for that row is another matter and stays. `input_ids` is [b, s].
    """
    if pad_token_id is not None and torch.is_grad_enabled():
        ids = input_ids.t().contiguous()
        if config.sequence_parallel:
            ids = ids.chunk(get_pg_size(table.tp_group))[get_pg_rank(table.tp_group)]
        embeddings = torch.where((ids == pad_token_id)[..., None], embeddings.detach(), embeddings)
    if "weight" in table.adapters:
        embeddings = table.adapters["weight"](input_ids, embeddings, table.weight, pad_token_id)
    # float32 first: a loaded model's factor is a float32 buffer that is cast to the weight's dtype.
    scale = torch.tensor(dim**0.5, dtype=torch.float32).to(embeddings.dtype).item()
    return embeddings * scale
