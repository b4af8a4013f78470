"""Log-probabilities and entropies of tokens, as an `output_processor` of Megatron's GPTModel."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from verl.utils.megatron.tensor_parallel import vocab_parallel_entropy, vocab_parallel_log_probs_from_logits

from bridge.megatron.embedding import head_weight, held_rows
from bridge.megatron.loss import LossContext, fused_loss
from bridge.token_ids import IGNORE

# Logits of so many bytes exist at a time.
_CHUNK_BYTES = 128 << 20
# Of words that fill up a vocabulary: their probability is 0, and 0 times this is 0.
_NEVER = -3e4


class TokenOptions(NamedTuple):
    """What `token_values` is told. `temperature` float32 [s]: None: 1 everywhere. `entropy`: whether it is wanted."""

    temperature: Tensor | None
    entropy: bool


def token_values(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    config: Any,
    context: TokenOptions,
    **unused: Any,
) -> Tensor:
    """Log-probabilities of `labels` [1, s], and entropies where wanted: float32 [1 or 2, 1, s]; 0 without a label.

    Log-probabilities alone, at temperature 1, are those of the fused loss. Otherwise logits are there for a chunk of
    tokens at a time, and made again in the backward pass.
    """
    if context.temperature is None and not context.entropy:
        losses = fused_loss(
            hidden_states=hidden_states,
            output_layer=output_layer,
            output_weight=output_weight,
            labels=labels,
            config=config,
            context=LossContext(),
        )
        return -losses[None]
    weight = head_weight(output_layer, output_weight)
    group = output_layer.tp_group
    hidden = hidden_states
    if group.size() > 1:
        if config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    rows, targets = hidden[:, 0], labels[0]
    of_chunk = partial(_chunk, weight=weight, rank=group.rank(), config=config, entropy=context.entropy)
    step = max(1, _CHUNK_BYTES // (4 * len(weight)))
    parts = []
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        temperature = None if context.temperature is None else context.temperature[piece]
        parts.append(checkpoint(of_chunk, rows[piece], targets[piece], temperature, use_reentrant=False))
    return torch.cat(parts, dim=-1)[:, None]


def _chunk(
    rows: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    *,
    weight: Tensor,
    rank: int,
    config: Any,
    entropy: bool,
) -> Tensor:
    """`token_values` of some tokens, [1 or 2, tokens]; `rows` [tokens, h]."""
    geometry, words = config.geometry, held_rows(config.geometry.vocab_size, len(weight), rank)
    logits = rows @ weight.t()
    if geometry.logit_softcap is not None:
        logits = torch.tanh(logits / geometry.logit_softcap) * geometry.logit_softcap
    logits = logits.float()
    if temperature is not None:
        logits = logits / temperature.clamp(min=1e-8)[:, None]
    if words < len(weight):
        logits = logits.masked_fill(torch.arange(len(weight), device=logits.device) >= words, _NEVER)
    labelled = labels != IGNORE
    # Both of verl's functions write into the logits.
    values = [vocab_parallel_log_probs_from_logits(logits.clone()[None], labels.clamp(min=0)[None])[0]]
    if entropy:
        values.append(vocab_parallel_entropy(logits.clone()[None])[0])
    return torch.stack(values).where(labelled, 0.0)
