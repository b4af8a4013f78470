"""Generation against transformers: tokens of greedy answers, and the logits of every step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.generate.rows import Completion, Prompt
from bridge.generate.sampling import SamplingOptions
from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.toy import VARIANTS

from .conftest import Toy
from .generation_kit import (
    Answers,
    answer,
    generate_with_transformers,
    media_prompts,
    random_prompts,
    task,
    teacher_forced,
)

BOUND = 1e-5
ONE = Parallel()
TOKENS = 40
GREEDY = SamplingOptions(max_new_tokens=TOKENS)
SAMPLED = SamplingOptions(max_new_tokens=TOKENS, temperature=0.9, top_k=50, top_p=0.95, seed=7)
LAYOUTS = {
    "TP2": Parallel(tp=2),
    "TP2+SP": Parallel(tp=2, sequence_parallel=True),
    "PP2": Parallel(pp=2),
    "PP2 VPP2": Parallel(pp=2, vpp=2),
    "TP2+SP PP2": Parallel(tp=2, pp=2, sequence_parallel=True),
}
EXPERT_LAYOUTS = {"EP2": Parallel(ep=2), "TP2+SP EP2": Parallel(tp=2, ep=2, sequence_parallel=True)}


def ask(
    ranks: RankPool,
    folder: Path,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    parallel: Parallel = ONE,
    *,
    world_size: int | None = None,
    changes: dict[str, Any] | None = None,
    **settings: Any,
) -> Answers:
    """The answers, with the logits that any rank saw."""
    found = ranks.run(
        answer,
        task(folder, parallel, **(changes or {})),
        prompts,
        options,
        **settings,
        world_size=world_size or parallel.world_size,
    )
    assert all(rank.completions == found[0].completions for rank in found), "ranks do not agree"
    return Answers(found[0].completions, {i: logits for rank in found for i, logits in rank.logits.items()})


def tokens_of(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in completions]


def assert_teacher_forced(ranks: RankPool, folder: Path, prompts: Sequence[Prompt], found: Answers) -> None:
    """Each step's logits are those of transformers on the same tokens, and the token is their highest."""
    (theirs,) = ranks.run(teacher_forced, folder, prompts, tokens_of(found.completions), world_size=1)
    for index, (completion, wanted) in enumerate(zip(found.completions, theirs, strict=True)):
        ours = found.logits[index]
        assert ours.shape == wanted.shape
        assert (ours - wanted).abs().max() / wanted.abs().max() <= BOUND, f"row {index}"
        logprobs = wanted.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text(ranks: RankPool, toy: Toy, variant: str) -> None:
    """Seven rows of different length, four at once, prompts of up to five windows read in parts of two."""
    folder = toy(variant)
    prompts = random_prompts(Geometry.from_folder(folder))
    found = ask(ranks, folder, prompts, GREEDY, max_rows=4, prefill_tokens=16)
    assert_teacher_forced(ranks, folder, prompts, found)
    some = [0, 4]
    (theirs,) = ranks.run(generate_with_transformers, folder, [prompts[i] for i in some], TOKENS, world_size=1)
    assert [list(found.completions[i].tokens) for i in some] == theirs


CASES = [(variant, layout) for variant in VARIANTS for layout in LAYOUTS if (variant, layout) != ("26b-a4b", "TP2")]
EXPERT_CASES = [("26b-a4b", layout) for layout in EXPERT_LAYOUTS]


@pytest.mark.parametrize(("variant", "layout"), CASES + EXPERT_CASES)
def test_layouts(ranks: RankPool, toy: Toy, variant: str, layout: str) -> None:
    """Sampled answers are those of one rank, token by token: other rows run beside, prompts are cut elsewhere."""
    folder = toy(variant)
    prompts = random_prompts(Geometry.from_folder(folder))
    one = ask(ranks, folder, prompts, SAMPLED, max_rows=7)
    many = ask(ranks, folder, prompts, SAMPLED, (LAYOUTS | EXPERT_LAYOUTS)[layout], max_rows=3, prefill_tokens=16)
    assert tokens_of(many.completions) == tokens_of(one.completions)


@pytest.mark.parametrize("variant", VARIANTS)
def test_media(ranks: RankPool, toy: Toy, variant: str) -> None:
    """Pictures, films and tones in prompts that are read in parts: no part may cut a picture."""
    folder = toy(variant)
    (named,) = ranks.run(media_prompts, folder, world_size=1)
    prompts = list(named.values())
    found = ask(ranks, folder, prompts, GREEDY, max_rows=4, prefill_tokens=24)
    assert_teacher_forced(ranks, folder, prompts, found)


def test_media_with_a_static_cache(ranks: RankPool, toy: Toy) -> None:
    """12B's own generation with pictures, the way in which its class masks them as it is served."""
    folder = toy("12b")
    (named,) = ranks.run(media_prompts, folder, world_size=1)
    prompts = [named[name] for name in ("two images", "two videos", "in an image")]
    found = ask(ranks, folder, prompts, GREEDY)
    (theirs,) = ranks.run(generate_with_transformers, folder, prompts, TOKENS, True, world_size=1)
    assert [list(completion.tokens) for completion in found.completions] == theirs
