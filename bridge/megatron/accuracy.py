"""How many tokens a model would have said: those that it holds the likeliest, each behind the true ones before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from bridge.megatron.embedding import head_weight, held_rows
from bridge.megatron.loss import Head, LossContext, fused_loss, positions_with_labels, whole_tiles


class AccuracyContext(NamedTuple):
    """What `loss_and_accuracy` is told. `correct`, float64 []: the forward pass adds the number of right tokens."""

    loss: LossContext
    correct: Tensor


def loss_and_accuracy(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    config: Any,
    context: AccuracyContext,
    **unused: Any,
) -> Tensor:
    """`fused_loss`, and the likeliest tokens counted: an `output_processor` of Megatron's GPTModel."""
    losses, right = losses_and_likeliest(
        hidden_states=hidden_states,
        output_layer=output_layer,
        output_weight=output_weight,
        labels=labels,
        config=config,
        context=context.loss,
    )
    context.correct.add_(right.sum())
    return losses


def losses_and_likeliest(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    config: Any,
    context: LossContext,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """`fused_loss`, and which of the labels are the likeliest tokens, bool [labels]: an `output_processor` too."""
    right = are_likeliest(
        hidden_states,
        head_weight(output_layer, output_weight),
        labels,
        vocab_size=config.geometry.vocab_size,
        softcap=config.geometry.logit_softcap,
        tp_group=output_layer.tp_group,
        sequence_parallel=config.sequence_parallel,
        label_positions=context.label_positions,
    )
    losses = fused_loss(
        hidden_states=hidden_states,
        output_layer=output_layer,
        output_weight=output_weight,
        labels=labels,
        config=config,
        context=context,
    )
    return losses, right


@torch.no_grad()
def are_likeliest(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    label_positions: Tensor | None = None,
) -> Tensor:
    """Which of `labels` [b, s] are the likeliest token at their place, alike on every rank of `tp_group`.

    bool [labels], in the order of `positions_with_labels`. Arguments as of `linear_cross_entropy`, where -100 is no
    label. Of tokens that are alike the first one counts, as in an argmax of the logits, softcap and all, in the dtype
    of `hidden`.
    """
    group = tp_group if tp_group is not None and tp_group.size() > 1 else None
    if group is not None and sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=group)
    rank, local_rows = 0 if group is None else group.rank(), weight.shape[0]
    words = held_rows(vocab_size, local_rows, rank)
    positions = positions_with_labels(labels) if label_positions is None else label_positions
    rows, targets = hidden.flatten(0, 1), labels.t().flatten()
    found = [torch.zeros(0, dtype=torch.bool, device=hidden.device)]
    # Not by the kernels, which leave the softcap to what is behind the logits.
    head = Head(weight[:words], local_rows, 0, softcap, 0.0, group, "torch")
    for chunk in head.chunks(positions):
        logits = head.logits(whole_tiles(rows[chunk]))[: len(chunk)]
        top, column = logits.max(-1)
        likeliest = column + rank * local_rows
        if group is not None:
            tops, tokens = _gathered(top.float(), group), _gathered(likeliest, group)
            likeliest = tokens.gather(0, tops.argmax(0, keepdim=True))[0]
        found.append(likeliest == targets[chunk])
    return torch.cat(found)


def _gathered(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n] of every rank: [ranks, n]."""
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values, group=group)
    return torch.stack(parts)
