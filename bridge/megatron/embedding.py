"""The scaling of Gemma 4's embeddings (transformers `Gemma4TextScaledWordEmbedding`)."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor


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
