"""Likelihoods of given answers against transformers, in every layout, and from a session that also answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bridge.errors import UsageError
from bridge.generate.rows import Continuation, Likelihood
from bridge.generate.sampling import SamplingOptions
from bridge.generate.scoring import score
from bridge.generate.session import Session
from bridge.generate.task import ModelTask, build_model
from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.toy import VARIANTS

from .conftest import Toy
from .generation_kit import generate_with_transformers, random_prompts, task, teacher_forced

# Behind prompts of up to five windows; every other continuation is what the model says itself.
LENGTHS, TOKENS = (3, 25, 8, 40, 1, 17), 6
CASES = {
    "one rank": ("e4b", Parallel()),
    "TP2+SP PP2": ("e4b", Parallel(tp=2, pp=2, sequence_parallel=True)),
    "PP2 VPP2": ("31b", Parallel(pp=2, vpp=2)),
    "TP2+SP EP2": ("26b-a4b", Parallel(tp=2, ep=2, sequence_parallel=True)),
}


def scored(asked: ModelTask, rows: list[Continuation], max_rows: int) -> list[Likelihood]:
    """On a rank."""
    model, groups = build_model(asked)
    return score(model, groups, rows, max_rows=max_rows, prefill_tokens=50)


def continuations(ranks: RankPool, folder: Path) -> list[Continuation]:
    prompts = random_prompts(Geometry.from_folder(folder), LENGTHS)
    others = random_prompts(Geometry.from_folder(folder), [1 + i % TOKENS for i in range(len(prompts))], seed=1)
    (said,) = ranks.run(generate_with_transformers, folder, prompts[::2], TOKENS, world_size=1)
    tokens = [tuple(said[i // 2]) if i % 2 == 0 else others[i].ids for i in range(len(prompts))]
    return [Continuation(prompt.ids, behind) for prompt, behind in zip(prompts, tokens, strict=True)]


def expected(ranks: RankPool, folder: Path, rows: list[Continuation]) -> list[Likelihood]:
    prompts = random_prompts(Geometry.from_folder(folder), LENGTHS)
    (logits,) = ranks.run(teacher_forced, folder, prompts, [row.tokens for row in rows], world_size=1)
    found = []
    for index, (row, of_row) in enumerate(zip(rows, logits, strict=True)):
        tokens = torch.tensor(row.tokens)
        logprob = of_row.double().log_softmax(-1).gather(1, tokens[:, None]).sum()
        found.append(Likelihood(index, float(logprob), bool((of_row.argmax(-1) == tokens).all())))
    return found


def assert_alike(ours: list[Likelihood], theirs: list[Likelihood]) -> None:
    assert [(each.index, each.greedy) for each in ours] == [(each.index, each.greedy) for each in theirs]
    assert [each.logprob for each in ours] == pytest.approx([each.logprob for each in theirs], rel=0, abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_layouts(ranks: RankPool, toy: Toy, case: str) -> None:
    variant, parallel = CASES[case]
    rows = continuations(ranks, toy(variant))
    theirs = expected(ranks, toy(variant), rows)
    assert [each.greedy for each in theirs] == [True, False] * 3
    for ours in ranks.run(scored, task(toy(variant), parallel), rows, 4, world_size=parallel.world_size):
        assert_alike(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(ranks: RankPool, toy: Toy, variant: str) -> None:
    rows = continuations(ranks, toy(variant))
    for max_rows in (1, 6):
        (ours,) = ranks.run(scored, task(toy(variant)), rows, max_rows, world_size=1)
        assert_alike(ours, expected(ranks, toy(variant), rows))


def test_a_session_scores_and_answers(ranks: RankPool, toy: Toy) -> None:
    """One after the other, with one model: of an answer both say the same."""
    folder = toy("e2b")
    prompts = random_prompts(Geometry.from_folder(folder), (9, 20))
    with Session(ranks, task(folder), None, max_rows=2) as session:
        said = sorted(session.generate(prompts, SamplingOptions(max_new_tokens=4)), key=lambda each: each.index)
        rows = [Continuation(each.prompt_tokens, each.tokens) for each in said]
        found = sorted(session.score(rows), key=lambda each: each.index)
        assert list(session.score([])) == []
    assert_alike(found, [Likelihood(each.index, sum(each.logprobs), True) for each in said])


def test_nothing_to_score_is_refused(ranks: RankPool, toy: Toy) -> None:
    with pytest.raises(UsageError, match="continuation 1: it has 1 tokens, 0 behind them"):
        ranks.run(scored, task(toy("e2b")), [Continuation((5,), (6,)), Continuation((5,), ())], 4, world_size=1)
