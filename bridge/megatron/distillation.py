"""What a teacher's distributions ask of a student's, straight from hidden states.

Divergences are as in GKD (arXiv 2306.13649, eq. 1) and in TRL's `generalized_jsd_loss`: `beta` 0 is
KL(teacher || student), 1 is KL(student || teacher), and what is between is
beta KL(teacher || mix) + (1 - beta) KL(student || mix), mix = beta teacher + (1 - beta) student. They are over all
words, or over the teacher's likeliest tokens and one class for the rest.

As in `loss.py` logits exist for some tokens at a time, over this rank's words alone. The forward pass turns them into
losses and the gradients of hidden states; the gradient of the weight is made by the backward pass, from logits of its
own, where it may be added straight to Megatron's `main_grad`. Loss and gradient are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from bridge.megatron.embedding import head_weight, held_rows, require_rows
from bridge.megatron.loss import Head, product, whole_tiles
from bridge.megatron.model import Gemma4Model
from bridge.megatron.vocabulary_softmax import log_softmax, logsumexp
from bridge.token_ids import IGNORE


@dataclass(frozen=True)
class Distillation:
    """`beta`: see above. Logits of both are divided by `temperature`. `cross_entropy`: factor of the cross entropy of
    the labels, at temperature 1, which is added."""

    beta: float = 0.5
    temperature: float = 1.0
    cross_entropy: float = 0.0


class TopK(NamedTuple):
    """The likeliest tokens of n positions, int64 [n, k], and their log-probabilities, float32 [n, k + 1]: the last is
    that of all others together."""

    ids: Tensor
    logps: Tensor

    def compare(self, log_q: Tensor, chunk: Tensor, head: Head, asked: Distillation) -> tuple[Tensor, Tensor]:
        """As `TeacherStates.compare`."""
        column, here = head.local(self.ids[chunk])
        words = log_q.shape[1]
        named = torch.zeros(len(log_q), words + 1, dtype=torch.bool, device=log_q.device)
        named.scatter_(1, column.where(here, words), True)
        named = named[:, :words]
        chosen = log_q.gather(1, column).where(here, 0.0)
        if head.group is not None:
            dist.all_reduce(chosen, group=head.group)
        rest = logsumexp(log_q.masked_fill(named, -torch.inf), head.group)[:, None]
        terms, slopes = _terms(self.logps[chunk], torch.cat([chosen, rest], dim=1), asked.beta)
        total = slopes.sum(-1, keepdim=True)
        gradient = (log_q - rest).exp_().mul_(slopes[:, -1:]).sub_(log_q.exp().mul_(total))
        chosen_gradient = slopes[:, :-1] - chosen.exp() * total
        rows = here.nonzero()[:, 0]
        gradient[rows, column[here]] = chosen_gradient[here]
        return terms.sum(-1), gradient


@dataclass(frozen=True)
class TeacherStates:
    """A teacher's final states [s (/tp), b, H], as its layout has them, and its head: every word, exactly."""

    states: Tensor
    head: Head
    sequence_parallel: bool

    def gathered(self) -> TeacherStates:
        """With the states [s * b, H] of all tokens of this rank's part of the rows."""
        states = self.states
        if self.head.group is not None and self.sequence_parallel:
            states = gather_from_sequence_parallel_region(states, group=self.head.group)
        return TeacherStates(states.flatten(0, 1), self.head, False)

    def log_p(self, positions: Tensor, temperature: float) -> Tensor:
        """Log-probabilities [n, words] of this rank's words at some of `gathered` states."""
        logits = self.head.capped(self.head.logits(self.states[positions]))
        return log_softmax(logits.div_(temperature), self.head.group)

    def compare(self, log_q: Tensor, positions: Tensor, head: Head, asked: Distillation) -> tuple[Tensor, Tensor]:
        """The divergence of each token [n] from a student's log-probabilities `log_q` [n, words], and its gradient to
        the student's logits over the temperature, [n, words]."""
        terms, slopes = _terms(self.log_p(positions, asked.temperature), log_q, asked.beta)
        sums = torch.stack([terms.sum(-1), slopes.sum(-1)])
        if head.group is not None:
            dist.all_reduce(sums, group=head.group)
        return sums[0], slopes.sub_(log_q.exp().mul_(sums[1][:, None]))


Teacher = TopK | TeacherStates


def whole_teacher(states: Tensor, chunk: Gemma4Model) -> TeacherStates:
    """Of the final states of a teacher, whose last `chunk` has the head."""
    weight = chunk.output_layer.weight
    weight = chunk.shared_embedding_or_output_weight() if weight is None else weight
    geometry = chunk.config.geometry
    head = head_of(weight.detach(), geometry.vocab_size, geometry.logit_softcap, chunk.pg_collection.tp)
    return TeacherStates(states, head, chunk.config.sequence_parallel)


@torch.no_grad()
def top_k(teacher: TeacherStates, positions: Tensor, count: int, temperature: float) -> TopK:
    """The `count` likeliest tokens at `positions` [n] of the flattened [s, b], alike on tensor-parallel ranks."""
    teacher = teacher.gathered()
    head, ids, logps = teacher.head, [], []
    for chunk in head.chunks(positions):
        log_p = teacher.log_p(chunk, temperature)
        values, columns = log_p.topk(min(count, log_p.shape[1]))
        words = columns + head.first_word
        if head.group is not None:
            values, words = _gathered(values, head, count), _gathered(words, head, count)
            values, order = values.topk(count)
            words = words.gather(1, order)
            column, here = head.local(words)
            filled = torch.nn.functional.pad(log_p, (0, 1))
            log_p = filled.scatter_(1, column.where(here, log_p.shape[1]), -torch.inf)[:, :-1]
        else:
            log_p.scatter_(1, columns, -torch.inf)
        ids.append(words)
        logps.append(torch.cat([values, logsumexp(log_p, head.group)[:, None]], dim=1))
    if not ids:
        return TopK(positions.new_empty(0, count), teacher.states.new_empty(0, count + 1, dtype=torch.float32))
    return TopK(torch.cat(ids), torch.cat(logps))


def _gathered(values: Tensor, head: Head, count: int) -> Tensor:
    """[n, up to `count`] of every rank, side by side; those that a rank has not are the last choice."""
    missing = count - values.shape[1]
    values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf if values.is_floating_point() else -1)
    assert head.group is not None
    parts = [torch.empty_like(values) for _ in range(head.group.size())]
    dist.all_gather(parts, values.contiguous(), group=head.group)
    return torch.cat(parts, dim=1)


def _terms(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The summands of a divergence of `log_q` from `log_p` [n, classes], and their derivatives to `log_q`, of which
    what a normalisation takes away is not subtracted yet."""
    if beta == 0:
        p = log_p.exp()
        return p * (log_p - log_q), p.neg_()
    if beta == 1:
        q = log_q.exp()
        terms = q * (log_q - log_p)
        return terms, terms + q
    mix = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    slopes = log_q.exp().mul_(log_q - mix).mul_(1 - beta)
    return log_p.exp().mul_(log_p - mix).mul_(beta).add_(slopes), slopes


def head_of(weight: Tensor, vocab_size: int, softcap: float | None, tp_group: dist.ProcessGroup | None) -> Head:
    """This rank's words of `weight`, whose rows behind the vocabulary are padding."""
    group = tp_group if tp_group is not None and tp_group.size() > 1 else None
    rank, local_rows = 0 if group is None else group.rank(), weight.shape[0]
    words = held_rows(vocab_size, local_rows, rank)
    # Not by the kernels, which leave the softcap to what is behind the logits.
    return Head(weight[:words], local_rows, rank * local_rows, softcap, 0.0, group, "torch")


def _measured(
    head: Head, rows: Tensor, labels: Tensor, teacher: Teacher, places: Tensor, asked: Distillation
) -> tuple[Tensor, Tensor, Tensor]:
    """Of tokens `rows` [n, h]: losses and cross entropies, float32 [n], and the gradient of the losses to the raw
    logits [n, words], in the dtype of `rows`. `places`: where `teacher` has them."""
    tanh_logits = head.logits(whole_tiles(rows))[: len(rows)]
    logits = head.capped(tanh_logits)
    alike = asked.temperature == 1
    plain = log_softmax(logits if alike else logits.clone(), head.group)
    column, here = head.local(labels)
    cross_entropy = -plain.gather(1, column[:, None])[:, 0].where(here, 0.0)
    if head.group is not None:
        dist.all_reduce(cross_entropy, group=head.group)
    log_q = plain if alike else log_softmax(logits.div_(asked.temperature), head.group)
    losses, gradient = teacher.compare(log_q, places, head, asked)
    if not alike:
        gradient /= asked.temperature
    if factor := asked.cross_entropy:
        losses = losses + factor * cross_entropy
        gradient.add_(plain.exp_(), alpha=factor)
        gradient.scatter_add_(1, column[:, None], -factor * here.to(gradient.dtype)[:, None])
    if head.softcap is not None:
        # d (cap · tanh(x / cap)) / dx
        gradient.addcmul_(gradient * tanh_logits, tanh_logits, value=-1)
    return losses, cross_entropy, gradient.to(rows.dtype)


class _Loss(torch.autograd.Function):
    """Losses [s * b], and cross entropies, which have no gradient; 0 where there is no label."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        positions: Tensor,
        main_grad: Tensor | None,
        teacher: Teacher,
        options: tuple[Head, Distillation],
    ) -> tuple[Tensor, Tensor]:
        head, asked = options
        losses, entropies = torch.zeros(2, len(labels), dtype=torch.float32, device=hidden.device).unbind()
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for chunk, places in zip(head.chunks(positions), head.chunks(_places(teacher, positions)), strict=True):
            loss, entropy, gradient = _measured(head, hidden[chunk], labels[chunk], teacher, places, asked)
            losses[chunk], entropies[chunk] = loss, entropy
            if grad_hidden is not None:
                grad_hidden[chunk] = product(gradient, head.weight).to(hidden.dtype)
        ctx.save_for_backward(hidden, weight, labels, positions)
        ctx.rest = (main_grad, teacher, options, grad_hidden)
        ctx.mark_non_differentiable(entropies)
        return losses, entropies

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, positions = ctx.saved_tensors
        if ctx.rest is None:
            raise RuntimeError("a distillation loss cannot be differentiated twice: its gradients are used in place")
        (main_grad, teacher, (head, asked), grad_hidden), ctx.rest = ctx.rest, None
        if grad_hidden is not None:
            grad_hidden *= grad_losses[:, None]
        nothing = (None,) * 5
        if not ctx.needs_input_grad[1]:
            return grad_hidden, None, *nothing
        total = torch.zeros_like(weight, dtype=torch.float32) if main_grad is None else main_grad
        words = len(head.weight)
        for chunk, places in zip(head.chunks(positions), head.chunks(_places(teacher, positions)), strict=True):
            rows = hidden[chunk]
            gradient = _measured(head, rows, labels[chunk], teacher, places, asked)[2]
            gradient *= grad_losses[chunk][:, None]
            total[:words] += product(gradient.t(), rows)
        return grad_hidden, total.to(weight.dtype) if main_grad is None else None, *nothing


def _places(teacher: Teacher, positions: Tensor) -> Tensor:
    """Where a teacher has the `positions` [n]: one of top tokens has these alone."""
    return torch.arange(len(positions), device=positions.device) if isinstance(teacher, TopK) else positions


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Teacher,
    asked: Distillation,
    *,
    label_positions: Tensor,
    vocab_size: int,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    main_grad: Tensor | None = None,
) -> Tensor:
    """Of every token its loss and its cross entropy, float32 [b, s, 2]; 0 where there is no label.

    Arguments as of `linear_cross_entropy`. `teacher`: a `TopK` is of the `label_positions`; `TeacherStates` have the
    same vocabulary. Only losses have a gradient. A label that is no word raises UsageError.
    """
    head = head_of(weight.detach(), vocab_size, softcap, tp_group)
    if head.group is not None and sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=head.group)
    elif head.group is not None:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=head.group)
    require_rows(labels, vocab_size, "the head", ignore=IGNORE)
    if isinstance(teacher, TeacherStates):
        teacher = teacher.gathered()
    found = _Loss.apply(
        hidden.flatten(0, 1), weight, labels.t().flatten(), label_positions, main_grad, teacher, (head, asked)
    )
    return torch.stack(found, dim=-1).view(*hidden.shape[:2], 2).transpose(0, 1)


class DistillationContext(NamedTuple):
    """What `distillation_loss` is told beside what Megatron hands it: see `linear_distillation`."""

    teacher: Teacher
    asked: Distillation
    label_positions: Tensor


def distillation_loss(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    config: Any,
    context: DistillationContext,
    **unused: Any,
) -> Tensor:
    """`linear_distillation` as Megatron's GPTModel calls an `output_processor`; see `fused_loss`."""
    weight = head_weight(output_layer, output_weight)
    return linear_distillation(
        hidden_states,
        weight,
        labels,
        context.teacher,
        context.asked,
        label_positions=context.label_positions,
        vocab_size=config.geometry.vocab_size,
        softcap=config.geometry.logit_softcap,
        tp_group=output_layer.tp_group,
        sequence_parallel=config.sequence_parallel,
        main_grad=getattr(weight, "main_grad", None) if output_layer.weight is None else None,
    )
