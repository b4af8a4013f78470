"""What a drafter is trained on: at every step of a draft the data's next token, the target's own distribution, or both.

The logits of both heads exist for a part of the tokens at a time, as in `loss.py`, and turn into gradients at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_pg_rank, get_pg_size, unwrap_model
from torch import Tensor

from bridge.megatron.context_parallel import gather
from bridge.megatron.drafter import Gemma4Drafter, TargetEmbedding
from bridge.megatron.drafting import TargetPass, draft, shifted
from bridge.megatron.embedding import held_rows
from bridge.megatron.model import Gemma4Model
from bridge.megatron.vocabulary_softmax import log_softmax
from bridge.token_ids import IGNORE

# Logits of one head of so many bytes exist at a time.
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class DraftLoss:
    """`steps` of a draft, and factors: of the cross entropy of the data's tokens, of KL(target || drafter), and of the
    cross entropy of the clusters that hold the data's tokens (of ordered embeddings; it trains the centroids alone)."""

    steps: int = 4
    cross_entropy: float = 1.0
    kl: float = 1.0
    centroids: float = 1.0


@dataclass(frozen=True)
class _Heads:
    """This rank's words of both heads, [words, h] and [words, H] float or bf16, without padding."""

    drafter: Tensor
    target: Tensor
    softcap: float | None
    first_word: int
    cross_entropy: float
    kl: float
    group: dist.ProcessGroup | None

    def chunks(self, count: int) -> Iterator[slice]:
        """Tokens in pieces whose logits fit the budget; alike on every rank."""
        rows = max(1, _CHUNK_BYTES // (4 * max(1, len(self.drafter))))
        if self.group is not None:
            least = torch.tensor(rows, device=self.drafter.device)
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
            rows = int(least)
        return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


class _Loss(torch.autograd.Function):
    """The losses of tokens [n]; gradients are made in the forward pass, for losses that are summed."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, states: Tensor, heads: _Heads) -> Tensor:
        losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        words = len(heads.drafter)
        positions = (labels != IGNORE).nonzero()[:, 0]
        for part in heads.chunks(len(positions)):
            rows = positions[part]
            inputs = hidden[rows]
            log_q = log_softmax((inputs @ heads.drafter.t()).float(), heads.group)
            gradient = log_q.exp() * (heads.cross_entropy + heads.kl)
            if heads.cross_entropy:
                column = labels[rows] - heads.first_word
                here = ((column >= 0) & (column < words)).float()
                column = column.clamp(0, max(words - 1, 0))[:, None]
                losses[rows] -= heads.cross_entropy * log_q.gather(1, column)[:, 0] * here
                gradient.scatter_add_(1, column, -heads.cross_entropy * here[:, None])
            if heads.kl:
                logits = states[rows] @ heads.target.t()
                if heads.softcap is not None:
                    logits = torch.tanh(logits / heads.softcap) * heads.softcap
                log_p = log_softmax(logits.float(), heads.group)
                p = log_p.exp()
                losses[rows] += heads.kl * (p * (log_p - log_q)).sum(-1)
                gradient.sub_(p, alpha=heads.kl)
            gradient = gradient.to(hidden.dtype)
            grad_hidden[rows] = gradient @ heads.drafter
            grad_weight[:words] += (gradient.t() @ inputs).float()
        if heads.group is not None:
            dist.all_reduce(losses, group=heads.group)
        ctx.gradients = grad_hidden, grad_weight.to(weight.dtype)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        factor = grad_losses.flatten()[0]
        if grad_losses.numel() > 1 and not bool((grad_losses == factor).all()):
            raise RuntimeError("the losses of drafts are differentiated as their sum, times one factor")
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        return grad_hidden.mul_(factor), grad_weight.mul_(factor), None, None, None


def draft_loss(
    drafter: torch.nn.Module,
    embed: TargetEmbedding,
    chunk: Gemma4Model,
    target: TargetPass,
    labels: Tensor,
    asked: DraftLoss,
) -> Tensor:
    """The losses of drafts behind every token of this rank's part, float32 [b, s / cp]: the mean of their steps.

    `drafter` in DDP or without; `chunk`: the last one of the target. `labels` [b, s] are of the whole rows and shifted:
    the token behind each. A step counts where the token that it predicts has a label and is of the same document; else
    it adds nothing. The centroids' own loss is differentiated, and not in the figures. What reaches the target does so
    by its states and its keys and values; its embeddings, and the distribution of it that is learnt, get no gradient.
    """
    (model,) = unwrap_model([drafter])
    assert isinstance(model, Gemma4Drafter)
    group, sp = model.pg_collection.tp, model.config.sequence_parallel
    several = group if get_pg_size(group) > 1 else None
    vocab_size, local = model.config.geometry.vocab_size, len(model.head)
    words = held_rows(vocab_size, local, get_pg_rank(group))
    weight = chunk.output_layer.weight
    weight = chunk.shared_embedding_or_output_weight() if weight is None else weight
    heads = _Heads(
        model.head.detach()[:words],
        weight.detach()[:words],
        chunk.config.geometry.logit_softcap,
        get_pg_rank(group) * local,
        asked.cross_entropy,
        asked.kl,
        several,
    )
    states = _whole_states(chunk, target) if asked.kl else None
    document = target.visibility.document
    losses: Tensor = torch.zeros((), device=labels.device)
    for step, (hidden, _) in enumerate(draft(drafter, embed, target, asked.steps), 1):
        same = shifted(document, step, -2) == document
        wanted = target.take(torch.where(same, shifted(labels, step, IGNORE), IGNORE)).t().contiguous()
        if asked.centroids and model.masked_embedding is not None:
            local_labels = wanted.chunk(get_pg_size(group))[get_pg_rank(group)] if sp else wanted
            clusters = asked.centroids * _centroid_loss(model, hidden, local_labels) / wanted.numel()
            losses = losses + (clusters - clusters.detach())
        if several is not None and sp:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        elif several is not None:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        there = hidden.new_empty(0) if states is None else target.take(shifted(states, step, 0)).transpose(0, 1)
        flat = there.flatten(0, 1) if states is not None else there
        found = _Loss.apply(hidden.flatten(0, 1), model.head, wanted.flatten(), flat, heads)
        losses = losses + found.view(wanted.shape)
    return losses.t() / asked.steps


def _whole_states(chunk: Gemma4Model, target: TargetPass) -> Tensor:
    """The target's final states of the whole rows, [b, s, H], on every rank: the target's distributions are of them."""
    states = target.states.detach()
    if chunk.config.sequence_parallel:
        states = gather_from_sequence_parallel_region(states, group=chunk.pg_collection.tp)
    return gather(states.transpose(0, 1), chunk.pg_collection.cp)


def _centroid_loss(model: Gemma4Drafter, hidden: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross entropies of the clusters of `labels` [s, b]; `hidden` [s, b, h] gets no gradient."""
    embedding = model.masked_embedding
    assert embedding is not None
    ordering = embedding.token_ordering
    cluster = torch.empty_like(ordering)
    size = len(ordering) // embedding.centroids.out_features
    cluster[ordering] = torch.arange(len(ordering), device=ordering.device) // size
    cluster_labels = torch.where(labels == IGNORE, IGNORE, cluster[labels.clamp(min=0)])
    logits = embedding.centroids(hidden.detach()).float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), cluster_labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
