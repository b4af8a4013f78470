"""Divergences from a teacher, straight from hidden states: TRL's on whole logits, every way the vocabulary is split."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bridge.megatron.distillation import Distillation, TeacherStates, TopK, head_of, linear_distillation, top_k
from bridge.megatron.parallel import Parallel, initialize
from bridge.ranks import RankPool

LOSS, GRADIENT = 1e-5, 1e-4
TOKENS, BATCH, HIDDEN, TEACHER, SOFTCAP = 24, 2, 32, 20, 30.0


@dataclass(frozen=True)
class Case:
    """`k`: how many of the teacher's tokens, 0: all. `weighted`: every token weighs another."""

    asked: Distillation = Distillation()  # noqa: RUF009 - frozen
    k: int = 0
    parallel: Parallel = Parallel()  # noqa: RUF009 - frozen
    vocab: int = 96
    weighted: bool = False
    main_grad: bool = False


TP2, SP = Parallel(tp=2), Parallel(tp=2, sequence_parallel=True)
HOT = Distillation(0.3, 1.7, 0.25)
CASES = {
    "forward": Case(Distillation(0.0)),
    "reverse": Case(Distillation(1.0)),
    "between": Case(Distillation(0.5)),
    "forward, hot": Case(Distillation(0.0, 2.0)),
    "reverse, cold": Case(Distillation(1.0, 0.5)),
    "near forward": Case(Distillation(0.05)),
    "between, hot, cross entropy, weighted": Case(HOT, weighted=True),
    "between, TP2": Case(HOT, parallel=TP2, weighted=True),
    "between, TP2+SP, 95 words": Case(HOT, parallel=SP, vocab=95),
    "reverse, TP4, 93 words, main_grad": Case(Distillation(1.0), parallel=Parallel(tp=4), vocab=93, main_grad=True),
    "forward, 5 of them": Case(Distillation(0.0), 5),
    "reverse, 5": Case(Distillation(1.0, 0.7), 5),
    "between, 5, weighted": Case(HOT, 5, weighted=True),
    "between, 5, TP2": Case(HOT, 5, TP2, 95),
    "reverse, 5, TP2+SP": Case(Distillation(1.0), 5, SP, 95, main_grad=True),
    "between, 30, TP4, 93 words": Case(HOT, 30, Parallel(tp=4), 93, weighted=True),
    "forward, all but one": Case(Distillation(0.0), 95),
}


@dataclass(frozen=True)
class Inputs:
    """The same on every rank; `weights` [b, s] multiply the losses."""

    hidden: Tensor
    weight: Tensor
    states: Tensor
    words: Tensor
    labels: Tensor
    weights: Tensor

    @classmethod
    def make(cls, case: Case) -> Inputs:
        generator = torch.Generator().manual_seed(5)

        def some(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        labels = torch.randint(case.vocab, (BATCH, TOKENS), generator=generator)
        labels[:, 0] = case.vocab - 1  # the last rank's last word
        labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
        weights = torch.rand(labels.shape, generator=generator) if case.weighted else torch.full(labels.shape, 0.37)
        # Logits of a deviation of about 3, and of both signs.
        return cls(
            some(TOKENS, BATCH, HIDDEN),
            some(case.vocab, HIDDEN) / 2,
            some(TOKENS, BATCH, TEACHER),
            some(case.vocab, TEACHER) / 2,
            labels,
            weights,
        )


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """[b, s, words], by whole logits."""
    return (SOFTCAP * torch.tanh(hidden @ weight.t() / SOFTCAP)).transpose(0, 1)


def classes(teacher: Tensor, student: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Logits of both, at temperature 1: of the teacher's likeliest tokens and of the rest as one."""
    chosen = teacher.topk(case.k, dim=-1).indices
    found = []
    for logits in (teacher, student):
        p = (logits / case.asked.temperature).softmax(-1)
        named = p.gather(-1, chosen)
        others = p.masked_fill(torch.zeros_like(p).scatter(-1, chosen, 1.0).bool(), 0.0).sum(-1, keepdim=True)
        found.append(torch.cat([named, others], -1).log())
    return found[0], found[1]


def expected(case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [b, s] and gradients of hidden and weight by whole logits, TRL's loss and autograd."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental
        trl = pytest.importorskip("trl.experimental.gkd", reason="the losses are compared with TRL's")
    hidden, weight = (t.clone().to(dtype).requires_grad_() for t in (inputs.hidden, inputs.weight))
    student, temperature = logits_of(hidden, weight), case.asked.temperature
    teacher = logits_of(inputs.states.to(dtype), inputs.words.to(dtype))
    entropies = torch.nn.functional.cross_entropy(student.transpose(1, 2), inputs.labels, reduction="none")
    ours = student
    if case.k:
        (teacher, ours), temperature = classes(teacher, student, case), 1.0
    jsd = trl.GKDTrainer.generalized_jsd_loss(
        ours, teacher, beta=case.asked.beta, temperature=temperature, reduction="none"
    ).sum(-1)
    losses = (jsd + case.asked.cross_entropy * entropies) * (inputs.labels != -100)
    (losses * inputs.weights).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


def fused(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and the cross entropies, on this rank's part. What fills up the vocabulary is no number at all."""
    from bridge.megatron import loss

    groups = initialize(case.parallel)
    inputs = Inputs.make(case)
    rank, size = groups.tp.rank(), case.parallel.tp
    local_rows = -(-case.vocab // size)

    def part(whole: Tensor) -> Tensor:
        held = torch.full((local_rows, whole.shape[1]), float("nan"))
        own = whole[rank * local_rows : (rank + 1) * local_rows]
        held[: len(own)] = own
        return held

    sp = case.parallel.sequence_parallel
    hidden, states = ((t.chunk(size)[rank] if sp else t) for t in (inputs.hidden, inputs.states))
    hidden, weight = hidden.clone().requires_grad_(), part(inputs.weight).requires_grad_()
    main_grad = torch.zeros(weight.shape) if case.main_grad else None
    positions = loss.positions_with_labels(inputs.labels)
    with mock.patch.object(loss, "_CHUNK_BYTES", 7 * local_rows * 4):
        whole = TeacherStates(states, head_of(part(inputs.words), case.vocab, SOFTCAP, groups.tp), sp)
        teacher: Any = top_k(whole, positions, case.k, case.asked.temperature) if case.k else whole
        found = linear_distillation(
            hidden,
            weight,
            inputs.labels,
            teacher,
            case.asked,
            label_positions=positions,
            softcap=SOFTCAP,
            tp_group=groups.tp,
            sequence_parallel=sp,
            main_grad=main_grad,
            vocab_size=case.vocab,
        )
        (found[..., 0] * inputs.weights).sum().backward()
    assert hidden.grad is not None and (weight.grad is None) == case.main_grad
    gradient = weight.grad if main_grad is None else main_grad
    words = min(local_rows, case.vocab - rank * local_rows)
    assert gradient is not None and not gradient[words:].any()
    return found[..., 0].detach(), hidden.grad, gradient[:words], found[..., 1].detach()


def apart(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).abs().max() / truth.double().abs().max())


@pytest.mark.parametrize("name", CASES)
def test_against_trl_on_whole_logits(ranks: RankPool, name: str, record_property: Any) -> None:
    case = CASES[name]
    parts = ranks.run(fused, case, world_size=case.parallel.world_size)
    inputs = Inputs.make(case)
    hidden = torch.cat([part[1] for part in parts]) if case.parallel.sequence_parallel else parts[0][1]
    ours = (parts[0][0], hidden, torch.cat([part[2] for part in parts]))
    assert all(torch.equal(part[0], ours[0]) for part in parts)
    theirs = expected(case, inputs, torch.float64)
    found = [apart(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    record_property("apart", found)
    print(name, found)
    assert found[0] <= LOSS and max(found[1:]) <= GRADIENT, found
    entropies = torch.nn.functional.cross_entropy(
        logits_of(inputs.hidden, inputs.weight).transpose(1, 2), inputs.labels, reduction="none"
    )
    assert apart(parts[0][3], entropies) <= LOSS


def test_nothing_to_learn() -> None:
    """Without a label there is no loss, and no gradient."""
    case = Case(HOT)
    inputs = Inputs.make(case)
    hidden = inputs.hidden.clone().requires_grad_()
    none = torch.full_like(inputs.labels, -100)
    whole = TeacherStates(inputs.states, head_of(inputs.words, 96, None, None), False)
    positions = torch.empty(0, dtype=torch.int64)
    for teacher in (whole, top_k(whole, positions, 4, 1.0)):
        assert isinstance(teacher, TopK | TeacherStates)
        found = linear_distillation(hidden, inputs.weight, none, teacher, HOT, label_positions=positions, vocab_size=96)
        found.sum().backward()
        assert not found.any() and hidden.grad is not None and not hidden.grad.any()
