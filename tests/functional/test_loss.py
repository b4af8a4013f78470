"""The fused loss against the path with whole logits: losses and gradients, every way the vocabulary is split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.errors import UsageError
from bridge.megatron.parallel import Parallel, initialize
from bridge.ranks import RankPool

from .gpu_kit import HostReads

FLOAT32_BOUND = 1e-6
TOKENS, BATCH, HIDDEN, VOCAB = 24, 2, 32, 96


@dataclass(frozen=True)
class Case:
    """How the head is split, and what is asked of the loss."""

    parallel: Parallel = Parallel()  # noqa: RUF009 - frozen
    dtype: torch.dtype = torch.float32
    softcap: float | None = 30.0
    z_loss: float = 0.0
    weighted: bool = False
    all_ignored: bool = False
    chunk: int = 7
    main_grad: bool = False
    vocab: int = VOCAB


CASES = {
    "sum": Case(),
    "every token weighs another": Case(weighted=True),
    "no softcap": Case(softcap=None),
    "z-loss": Case(z_loss=1e-2),
    "z-loss, weighted, no softcap": Case(z_loss=1e-2, weighted=True, softcap=None),
    "nothing to learn": Case(all_ignored=True),
    "one chunk": Case(chunk=10_000),
    "TP2": Case(Parallel(tp=2)),
    "TP2 weighted": Case(Parallel(tp=2), weighted=True, z_loss=1e-2),
    "TP2+SP": Case(Parallel(tp=2, sequence_parallel=True)),
    "TP4": Case(Parallel(tp=4)),
    "TP4+SP": Case(Parallel(tp=4, sequence_parallel=True), weighted=True),
    "TP4 nothing to learn": Case(Parallel(tp=4), all_ignored=True),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16 weighted": Case(dtype=torch.bfloat16, weighted=True),
    "bf16 TP2+SP": Case(Parallel(tp=2, sequence_parallel=True), dtype=torch.bfloat16),
    "bf16 nothing to learn": Case(dtype=torch.bfloat16, all_ignored=True),
    "main_grad": Case(main_grad=True),
    "main_grad, weighted": Case(main_grad=True, weighted=True, z_loss=1e-2),
    "main_grad, nothing to learn": Case(main_grad=True, all_ignored=True),
    "main_grad, bf16": Case(main_grad=True, dtype=torch.bfloat16),
    # A vocabulary that the ranks do not divide.
    "TP2, 95 words": Case(Parallel(tp=2), vocab=95),
    "TP4, 95 words, z-loss, weighted": Case(Parallel(tp=4), vocab=95, z_loss=1e-2, weighted=True),
    "TP4+SP, 93 words, no softcap": Case(Parallel(tp=4, sequence_parallel=True), vocab=93, softcap=None),
    "TP4, 94 words, nothing to learn": Case(Parallel(tp=4), vocab=94, all_ignored=True),
    "TP4, 93 words, main_grad": Case(Parallel(tp=4), vocab=93, main_grad=True, weighted=True),
    "TP4, 93 words, bf16": Case(Parallel(tp=4), vocab=93, dtype=torch.bfloat16, weighted=True, z_loss=1e-2),
    "TP2, 93 words, bf16, main_grad": Case(Parallel(tp=2), vocab=93, dtype=torch.bfloat16, main_grad=True),
    # As many as Gemma 4 has, and three that were added.
    "262,147 words": Case(vocab=262_147, z_loss=1e-4),
    "TP2, 262,147 words": Case(Parallel(tp=2), vocab=262_147, z_loss=1e-4, weighted=True),
    "TP4, 262,147 words": Case(Parallel(tp=4), vocab=262_147, z_loss=1e-4),
    "main_grad, bf16 TP2": Case(Parallel(tp=2), main_grad=True, dtype=torch.bfloat16, weighted=True, z_loss=1e-2),
}


@dataclass(frozen=True)
class Inputs:
    """The same on every rank; `weights` [b, s] multiply the token losses."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    weights: Tensor

    @classmethod
    def make(cls, case: Case) -> Inputs:
        generator = torch.Generator().manual_seed(5)
        # Logits that reach into the bend of the softcap, as the model's do.
        hidden = torch.randn(TOKENS, BATCH, HIDDEN, generator=generator).to(case.dtype)
        weight = (torch.randn(case.vocab, HIDDEN, generator=generator) * 2).to(case.dtype)
        labels = torch.randint(case.vocab, (BATCH, TOKENS), generator=generator)
        labels[:, 0] = case.vocab - 1  # the last rank's last word
        labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
        if case.all_ignored:
            labels.fill_(-100)
        weights = torch.rand(labels.shape, generator=generator) if case.weighted else torch.full(labels.shape, 0.37)
        return cls(hidden, weight, labels, weights)


def naive(case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and gradients of hidden and weight by whole logits and autograd, in `dtype`, as transformers has it."""
    hidden, weight = (t.clone().to(dtype).requires_grad_() for t in (inputs.hidden, inputs.weight))
    logits = torch.nn.functional.linear(hidden, weight)
    if case.softcap is not None:
        logits = torch.tanh(logits / case.softcap) * case.softcap
    logits = logits.to(torch.promote_types(dtype, torch.float32)).transpose(0, 1)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs.labels.flatten(), reduction="none")
    losses = losses.view(inputs.labels.shape)
    losses = losses + case.z_loss * (logits.logsumexp(-1) ** 2 * (inputs.labels != -100))
    (losses * inputs.weights).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


def fused(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the fused loss, on this rank's part. Runs on every rank.

    With `main_grad` twice, as two microbatches: half the sum of both. What fills up the vocabulary is no number at all,
    so that it shows where it counts, and gets zeros as its gradient; returned is that of the words.
    """
    from bridge.megatron import loss

    groups = initialize(case.parallel)
    inputs = Inputs.make(case)
    rank, size = groups.tp.rank(), case.parallel.tp
    hidden = inputs.hidden.chunk(size)[rank] if case.parallel.sequence_parallel else inputs.hidden
    hidden = hidden.clone().requires_grad_()
    local_rows = -(-case.vocab // size)
    words = inputs.weight[rank * local_rows : (rank + 1) * local_rows]
    weight = torch.full((local_rows, HIDDEN), float("nan"), dtype=case.dtype)
    weight[: len(words)] = words
    weight.requires_grad_()
    main_grad = torch.zeros_like(weight, dtype=torch.float32) if case.main_grad else None
    with (
        mock.patch.object(loss, "_CHUNK_BYTES", case.chunk * weight.shape[0] * weight.dtype.itemsize),
        mock.patch.object(loss, "_BLOCK_BYTES", 3 * weight.shape[0] * 4),
    ):
        for _ in range(2 if case.main_grad else 1):
            hidden.grad = None
            losses = loss.linear_cross_entropy(
                hidden,
                weight,
                inputs.labels,
                softcap=case.softcap,
                z_loss=case.z_loss,
                tp_group=groups.tp,
                sequence_parallel=case.parallel.sequence_parallel,
                main_grad=main_grad,
                vocab_size=case.vocab,
            )
            (losses * inputs.weights).sum().backward()
    assert hidden.grad is not None
    assert (weight.grad is None) == case.main_grad
    gradient = weight.grad if main_grad is None else main_grad / 2
    assert gradient is not None and not gradient[len(words) :].any()
    return losses.detach(), hidden.grad, gradient[: len(words)]


def relative(value: Tensor, truth: Tensor) -> float:
    difference = (value.double() - truth.double()).norm().item()
    return difference / truth.double().norm().item() if truth.any() else difference


@pytest.mark.parametrize("name", CASES)
def test_against_whole_logits(ranks: RankPool, name: str) -> None:
    case = CASES[name]
    parts = ranks.run(fused, case, world_size=case.parallel.world_size)
    inputs = Inputs.make(case)
    sequence_parallel = case.parallel.sequence_parallel
    hidden = torch.cat([part[1] for part in parts]) if sequence_parallel else parts[0][1]
    ours = (parts[0][0], hidden, torch.cat([part[2] for part in parts]))
    theirs = naive(case, inputs, case.dtype)
    for part in parts:
        assert torch.equal(part[0], ours[0])
    truth = naive(case, inputs, torch.float64)
    for what, mine, other, exact in zip(("losses", "hidden", "weight"), ours, theirs, truth, strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == (
            torch.float32 if what == "losses" or (what == "weight" and case.main_grad) else case.dtype
        )
        if case.dtype is torch.float32:
            assert relative(mine, exact) <= FLOAT32_BOUND, what
            # Torch sums over 262,147 words in float32, and is then itself further from the truth than that.
            assert relative(mine, other) <= FLOAT32_BOUND or relative(other, exact) > FLOAT32_BOUND, what
        elif what == "losses":
            # The same roundings in the same places: logits, and each operation of the softcap.
            assert relative(mine, other) <= FLOAT32_BOUND, what
        else:
            # Nearer to the truth than bf16 autograd, or as near: one rounding less on the way.
            assert relative(mine, exact) <= 1.05 * relative(other, exact), what


def labels_that_are_no_words(parallel: Parallel) -> None:
    from bridge.megatron.loss import linear_cross_entropy

    groups = initialize(parallel)
    hidden, weight = torch.randn(2, 1, HIDDEN), torch.randn(24, HIDDEN)
    for label in (95, 96, -1, -101):  # 96 rows on four ranks, of which the last is padding
        labels = torch.tensor([[5, label]])
        with pytest.raises(UsageError, match=rf"token id {label} has no row in the head \(95 rows\)"):
            linear_cross_entropy(hidden, weight, labels, tp_group=groups.tp, vocab_size=95)
    linear_cross_entropy(hidden, weight, torch.tensor([[94, -100]]), tp_group=groups.tp, vocab_size=95)


def test_labels_that_are_no_words_raise(ranks: RankPool) -> None:
    """Cut over ranks, such a label is on none of them: its loss would have no target."""
    ranks.run(labels_that_are_no_words, Parallel(tp=4), world_size=4)


def test_sums_of_bf16_are_rounded_once(ranks: RankPool) -> None:
    """As many pieces as there are tokens, or one: a sum kept in bf16 would be rounded at each of them."""
    found = [ranks.run(fused, Case(dtype=torch.bfloat16, chunk=chunk), world_size=1)[0] for chunk in (1, 10_000)]
    for pieces, whole in zip(*found, strict=True):
        assert relative(pieces, whole) <= 2**-9


def gradients_twice_or_not_at_all() -> None:
    """What a caller may do with the graph, besides one backward pass."""
    from bridge.megatron.loss import linear_cross_entropy

    inputs = Inputs.make(Case())
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, inputs.labels)
    losses = linear_cross_entropy(hidden, weight, inputs.labels)
    assert torch.equal(evaluated, losses) and not evaluated.requires_grad
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        losses.sum().backward()
    # A frozen head costs nothing and gets nothing.
    linear_cross_entropy(hidden, weight.detach(), inputs.labels).sum().backward()


def test_gradients_twice_or_not_at_all(ranks: RankPool) -> None:
    ranks.run(gradients_twice_or_not_at_all, world_size=1)


def known_labels_and_one_weight() -> None:
    """Told where labels are, and behind a sum, the loss reads nothing: a GPU's host would wait for it."""
    from bridge.megatron.loss import linear_cross_entropy, positions_with_labels

    inputs = Inputs.make(Case())
    positions = positions_with_labels(inputs.labels)
    assert 0 < len(positions) < inputs.labels.numel()
    found = []
    for known in (True, False):
        hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
        with HostReads() as reads:
            if known:
                losses = linear_cross_entropy(hidden, weight, inputs.labels, softcap=30.0, label_positions=positions)
                (losses.sum() * 3).backward()
            else:
                # A gradient of its own for every token, though all are alike.
                losses = linear_cross_entropy(hidden, weight, inputs.labels, softcap=30.0)
                (losses * 3).sum().backward()
        assert bool(reads.places) is not known
        found.append((losses.detach(), hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_known_labels_and_one_weight(ranks: RankPool) -> None:
    ranks.run(known_labels_and_one_weight, world_size=1)


def peak_above_inputs(tokens: int, hidden_size: int, vocab: int, dtype: torch.dtype) -> int:
    """Bytes that the loss needs at its peak beyond inputs and gradients."""
    from bridge.megatron.loss import linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 1, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden_size, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (1, tokens), generator=generator)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, labels, softcap=30.0).sum().backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak - hidden.nbytes - weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_the_logits_are_never_there(ranks: RankPool, dtype: torch.dtype) -> None:
    tokens, hidden_size, vocab = 1024, 256, 8192
    [peak] = ranks.run(_small_budget_peak, tokens, hidden_size, vocab, dtype, world_size=1)
    assert peak < tokens * vocab * dtype.itemsize / 4
    # Nor a second gradient of the weight.
    assert peak < 1.1 * vocab * hidden_size * dtype.itemsize


def _small_budget_peak(*what: Any) -> int:
    from bridge.megatron import loss

    with mock.patch.object(loss, "_CHUNK_BYTES", 1 << 20), mock.patch.object(loss, "_BLOCK_BYTES", 1 << 18):
        return peak_above_inputs(*what)


class _Products(TorchDispatchMode):
    """Sizes (m, k, n) of products, and the distances of rows of both operands."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int, int]] = []
        self.strides: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.sizes.append((*left.shape, right.shape[1]))
            self.strides |= {max(left.stride()), max(right.stride())}
        return func(*args, **kwargs or {})


def _products(positions: int) -> _Products:
    from bridge.megatron import loss

    hidden = torch.randn(positions, 1, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1024, 64, dtype=torch.bfloat16, requires_grad=True)
    with mock.patch.object(loss, "_CHUNK_BYTES", 300 * 1024), _Products() as found:
        loss.linear_cross_entropy(hidden, weight, torch.ones(1, positions, dtype=torch.int64)).sum().backward()
    return found


@pytest.mark.parametrize("positions", [1, 63, 255, 4095])
def test_products_that_a_gpu_does_fast(positions: int) -> None:
    """On an H200 a chunk of 255 positions, and words in pieces of 7,282, went to slow kernels (docs/benchmarks.md)."""
    found = _products(positions)
    assert len(found.sizes) >= 4
    assert all(size % 64 == 0 for sizes in found.sizes for size in sizes), found.sizes
    assert all(stride % 8 == 0 for stride in found.strides), found.strides
