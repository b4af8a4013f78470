"""Drafters against transformers: the logits and states of every step of a draft, behind every token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bridge.generate.acceptance import Acceptance
from bridge.generate.rows import Completion, Prompt
from bridge.generate.sampling import SamplingOptions
from bridge.generate.task import ModelTask
from bridge.geometry import Geometry
from bridge.megatron.draft_loss import DraftLoss
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.toy import VARIANTS

from .conftest import Toy
from .drafter_kit import (
    Pair,
    Rows,
    answer_accepting_all,
    answer_with_drafter,
    counted_with_transformers,
    drafted,
    drafted_with_transformers,
    fit,
    gradients,
    gradients_with_transformers,
    task_of,
    with_layout,
)
from .generation_kit import random_prompts

BOUND = 1e-5
STEPS = 5
TOKENS, DRAFTS = 40, 4
GREEDY = SamplingOptions(max_new_tokens=TOKENS)
LAYOUTS = {"one": Parallel(), "TP2": Parallel(tp=2), "TP2+SP": Parallel(tp=2, sequence_parallel=True)}

ANSWER_LAYOUTS = {"one": Parallel(), "TP2+SP": Parallel(tp=2, sequence_parallel=True), "PP2": Parallel(pp=2)}


GRADIENT_LAYOUTS = {
    "TP2+SP": Parallel(tp=2, sequence_parallel=True),
    "PP2": Parallel(pp=2),
    "TP2 PP2": Parallel(tp=2, pp=2),
    "CP2": Parallel(cp=2),
}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], where: str) -> None:
    furthest = 0.0
    for name, wanted in theirs.items():
        apart = float((ours[name].float() - wanted).norm() / wanted.norm().clamp(min=1e-12))
        assert apart <= 1e-4, f"{where}: {name} {apart:.2g}"
        furthest = max(furthest, apart)
    print(f"{where}: {furthest:.1e}")


class Guessing(NamedTuple):
    """A target and a drafter that guesses some of its tokens, prompts, and the target's own greedy answers."""

    pair: Pair
    prompts: list[Prompt]
    plain: list[Completion]


def some_ids(folder: Path, rows: int, length: int, seed: int = 0) -> Tensor:
    """Tokens of no picture; rows of three windows and more."""
    geometry = Geometry.from_folder(folder)
    allowed = torch.tensor([i for i in range(8, geometry.vocab_size) if i not in geometry.placeholder_ids])
    return allowed[torch.randint(len(allowed), (rows, length), generator=torch.Generator().manual_seed(seed))]


def assert_same_steps(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> None:
    """Logits of words that a head computes, and states, within the bound; and the head computes the same words."""
    for step, ((logits, states), (wanted, wanted_states)) in enumerate(zip(ours, theirs, strict=True), 1):
        length = wanted.shape[1]
        logits, states = logits[:, :length], states[:, :length]
        apart = [float((states - wanted_states).abs().max() / wanted_states.abs().max())]
        chosen = logits.isfinite()
        assert torch.equal(chosen, wanted.isfinite()), f"step {step}: other words"
        apart.append(float((logits - wanted)[chosen].abs().max() / wanted[chosen].abs().max()))
        assert max(apart) <= BOUND, f"step {step}"
        print(f"step {step}: states {apart[0]:.1e}, logits {apart[1]:.1e}")


@pytest.mark.parametrize(
    ("variant", "ordered"), [*((v, v in ("e2b", "e4b")) for v in VARIANTS), ("e2b", False), ("31b", True)]
)
def test_steps_of_a_draft(ranks: RankPool, toy: Toy, variant: str, ordered: bool) -> None:
    pair = Pair(toy(variant), toy(variant, drafter=True, ordered=ordered))
    ids = some_ids(pair.target, rows=2, length=32)
    (theirs,) = ranks.run(drafted_with_transformers, pair, ids, STEPS, world_size=1)
    layouts = LAYOUTS if variant in ("e2b", "12b", "26b-a4b") else {"one": Parallel()}
    for name, parallel in layouts.items():
        if variant == "26b-a4b" and name == "TP2":
            continue  # experts need sequence parallelism there
        for ours in ranks.run(drafted, with_layout(pair, parallel), ids, STEPS, world_size=parallel.world_size):
            assert_same_steps(ours, theirs)


@pytest.fixture(scope="module")
def guessing(ranks: RankPool, toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Guessing]:
    """A toy whose drafter was tuned for a while to guess its answers: some are accepted, some are not."""
    base, made = tmp_path_factory.mktemp("tuned"), dict[str, Guessing]()

    def get(variant: str) -> Guessing:
        if variant not in made:
            pair = Pair(toy(variant), toy(variant, drafter=True))
            prompts = random_prompts(Geometry.from_folder(pair.target))
            alone = replace(task_of(pair, DRAFTS), drafter=None)
            (plain,) = ranks.run(answer_with_drafter, alone, prompts, GREEDY, world_size=1)
            # Of every other answer the drafter has seen nothing.
            rows = [[*c.prompt_tokens, *c.tokens] for c in plain[::2]]
            ranks.run(fit, pair, rows, base / variant, steps=60, world_size=1)
            made[variant] = Guessing(replace(pair, drafter=base / variant), prompts, plain)
        return made[variant]

    return get


@pytest.mark.parametrize("variant", ["e2b", "12b"])
def test_greedy_answers_and_counts(ranks: RankPool, guessing: Callable[[str], Guessing], variant: str) -> None:
    """The tokens that there are without a drafter, in any layout and company; as many accepted as transformers has."""
    pair, prompts, plain = guessing(variant)
    theirs = {
        as_meant: ranks.run(counted_with_transformers, pair, prompts, TOKENS, DRAFTS, as_meant, world_size=1)[0]
        for as_meant in (True, False)
    }
    expected = [tuple(rounds) for _, rounds in theirs[True]]
    accepted = [n for rounds in expected for _, n in rounds]
    assert accepted.count(DRAFTS) > 0 and accepted.count(0) > 0, "nothing is shown by a drafter that is all or nothing"
    for name, parallel in ANSWER_LAYOUTS.items():
        task = task_of(with_layout(pair, parallel), DRAFTS)
        for found in ranks.run(answer_with_drafter, task, prompts, GREEDY, max_rows=3, world_size=parallel.world_size):
            assert [c.tokens for c in found] == [c.tokens for c in plain], name
            assert [c.rounds for c in found] == expected, name
            for ours, alone in zip(found, plain, strict=True):
                torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(alone.logprobs), rtol=0, atol=1e-4)
    for (tokens, _), completion in zip(theirs[True] + theirs[False], 2 * plain, strict=True):
        assert tuple(tokens) == completion.tokens


def test_answers_end_where_they_end_without_a_drafter(ranks: RankPool, guessing: Callable[[str], Guessing]) -> None:
    """At a stop id in the middle of what was accepted, and at a penalty's tokens."""
    pair, prompts, plain = guessing("e2b")
    stops = tuple(completion.tokens[position] for position, completion in enumerate(plain, 6))
    for options in (
        replace(GREEDY, stop_token_ids=stops),
        replace(GREEDY, repetition_penalty=1.3),
        replace(GREEDY, max_new_tokens=1),
    ):
        asked = task_of(pair, DRAFTS)
        (alone,) = ranks.run(answer_with_drafter, replace(asked, drafter=None), prompts, options, world_size=1)
        (found,) = ranks.run(answer_with_drafter, asked, prompts, options, world_size=1)
        assert [(c.tokens, c.finish_reason) for c in found] == [(c.tokens, c.finish_reason) for c in alone]
        for completion in found:
            assert sum(n + 1 for _, n in completion.rounds) == len(completion.tokens) - 1


def test_sampled_answers_do_not_depend_on_company(ranks: RankPool, guessing: Callable[[str], Guessing]) -> None:
    pair, prompts, _ = guessing("e2b")
    options = replace(GREEDY, temperature=0.7, top_k=20, seed=5)
    answers = []
    for parallel, rows in ((Parallel(), 16), (Parallel(), 2), (Parallel(tp=2, pp=2, sequence_parallel=True), 3)):
        task = task_of(with_layout(pair, parallel), DRAFTS)
        (found, *_) = ranks.run(
            answer_with_drafter, task, prompts, options, max_rows=rows, world_size=parallel.world_size
        )
        answers.append([(c.tokens, c.rounds) for c in found])
    assert answers[0] == answers[1] == answers[2]
    assert sum(n for _, rounds in answers[0] for _, n in rounds) > 0


@pytest.mark.slow
def test_sampled_answers_have_the_distribution_without(ranks: RankPool, guessing: Callable[[str], Guessing]) -> None:
    """20,000 answers of four tokens with a drafter, and as many without: chi-square. It tells drafts that are all
    accepted from those that are weighed."""
    pair, prompts, plain = guessing("e2b")
    prompt = Prompt((*prompts[0].ids, *plain[0].tokens[:3]))
    options = SamplingOptions(max_new_tokens=4, temperature=1.0, top_k=4, seed=1, num_return_sequences=20_000)
    task = task_of(pair, 2)

    def answers(function: Callable[..., list[Completion]], task: ModelTask, seed: int) -> list[Completion]:
        said = replace(options, seed=seed)
        (found,) = ranks.run(function, task, [prompt], said, max_rows=500, world_size=1)
        return found

    without = answers(answer_with_drafter, replace(task, drafter=None), 2)
    drafted = answers(answer_with_drafter, task, 1)
    rate = Acceptance.of(drafted).rates[0]
    p, wrong = (same_distribution(found, without) for found in (drafted, answers(answer_accepting_all, task, 1)))
    print(f"p {p:.3g}, with every draft accepted {wrong:.3g}; {Acceptance.of(drafted)}")
    assert 0.05 < rate < 0.95, "nothing is shown by a drafter that is all or nothing"
    assert p > 0.01
    assert wrong < 1e-6


def same_distribution(some: Sequence[Completion], others: Sequence[Completion]) -> float:
    """How likely counts of as many answers are to differ so much by chance: chi-square; rare answers count as one."""
    one, other = (Counter(completion.tokens for completion in each) for each in (some, others))
    assert one.total() == other.total()
    common = [tokens for tokens in one | other if one[tokens] + other[tokens] >= 20]
    pairs = [(one[tokens], other[tokens]) for tokens in common]
    rest = tuple(count.total() - sum(count[tokens] for tokens in common) for count in (one, other))
    pairs += [rest] if any(rest) else []
    statistic, degrees = sum((a - b) ** 2 / (a + b) for a, b in pairs), len(pairs) - 1
    return float(torch.special.gammaincc(*torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)))


@pytest.mark.parametrize(
    ("variant", "packed"),
    [
        ("e2b", True),
        ("12b", False),
        pytest.param("e2b", False, marks=pytest.mark.slow),
        pytest.param("12b", True, marks=pytest.mark.slow),
    ],
)
def test_gradients(ranks: RankPool, toy: Toy, variant: str, packed: bool) -> None:
    """Of every parameter: a plain loop's over transformers' classes on one rank, and one rank's in any layout."""
    pair = Pair(toy(variant), toy(variant, drafter=True))
    ids = some_ids(pair.target, rows=1 if packed else 2, length=32)
    rows = Rows(ids, (0, 5, 19) if packed else (0,), packed)
    asked = DraftLoss(steps=3, cross_entropy=0.7, kl=1.3, centroids=0.9)
    (theirs,) = ranks.run(gradients_with_transformers, pair, rows, asked, world_size=1)
    (one,) = ranks.run(gradients, pair, rows, asked, world_size=1)
    assert_same_in_layouts(ranks, pair, rows, asked, one, theirs)


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        ("e2b", "image"),
        *(pytest.param(v, "two images", marks=pytest.mark.slow) for v in ("12b", "26b-a4b")),
        pytest.param("e2b", "image, audio, text", marks=pytest.mark.slow),
    ],
)
def test_gradients_with_media(ranks: RankPool, toy: Toy, variant: str, kind: str) -> None:
    """Rows with images and sounds; drafts behind them, and across them, read what the target made of them."""
    pair = Pair(toy(variant), toy(variant, drafter=True))
    rows, asked = Rows.of_kind(pair.target, kind), DraftLoss(steps=3, cross_entropy=0.7, kl=1.3, centroids=0.0)
    (theirs,) = ranks.run(gradients_with_transformers, pair, rows, asked, world_size=1)
    (one,) = ranks.run(gradients, pair, rows, asked, world_size=1)
    # Not darker: patches that are normalised say the same.
    negative = rows.media | {"pixel_values": 1 - rows.media["pixel_values"]}
    (other,) = ranks.run(gradients, pair, replace(rows, media=negative), asked, world_size=1)
    assert abs(float(other["loss"] - one["loss"])) > 1e-4, "the image says nothing"
    layouts = GRADIENT_LAYOUTS if variant == "12b" else {}
    assert_same_in_layouts(ranks, pair, rows, asked, one, theirs, layouts)


def assert_same_in_layouts(
    ranks: RankPool,
    pair: Pair,
    rows: Rows,
    asked: DraftLoss,
    one: dict[str, Tensor],
    theirs: dict[str, Tensor],
    layouts: Mapping[str, Parallel] = GRADIENT_LAYOUTS,
) -> None:
    assert set(theirs) <= set(one)
    assert float(one["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-5)
    assert_same_gradients(one, theirs, "one rank")
    del one["loss"]
    for name, parallel in layouts.items():
        for found in ranks.run(gradients, with_layout(pair, parallel), rows, asked, world_size=parallel.world_size):
            assert_same_gradients(found, one, name)
