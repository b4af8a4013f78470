"""Generation against transformers: tokens of greedy answers, and the logits of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.flops import decoder_flops, head_flops, layer_flops
from bridge.generate.rows import Completion, Prompt
from bridge.generate.sampling import SamplingOptions
from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.toy import VARIANTS

from .adapter_kit import OPTIONS
from .conftest import Toy
from .generation_kit import (
    Answers,
    answer,
    generate_with_transformers,
    letters,
    media_prompts,
    prefill_flops,
    random_prompts,
    save_adapter,
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


def assert_teacher_forced(
    ranks: RankPool, folder: Path, prompts: Sequence[Prompt], found: Answers, adapter: Path | None = None
) -> None:
    """Each step's logits are those of transformers on the same tokens, and the token is their highest."""
    (theirs,) = ranks.run(teacher_forced, folder, prompts, tokens_of(found.completions), adapter, world_size=1)
    for index, (completion, wanted) in enumerate(zip(found.completions, theirs, strict=True)):
        ours = found.logits[index]
        assert ours.shape == wanted.shape
        assert (ours - wanted).abs().max() / wanted.abs().max() <= BOUND, f"row {index}"
        logprobs = wanted.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["e2b", "26b-a4b"])
def test_a_prefill_multiplies_what_the_geometry_says(ranks: RankPool, toy: Toy, variant: str) -> None:
    """Every token where keys and values are made; the last one in layers that read those of others, and the head."""
    folder = toy(variant)
    geometry, tokens = Geometry.from_folder(folder), 40
    [prompt] = random_prompts(geometry, [tokens])
    last_only = [layer.shares_kv for layer in geometry.layers]
    assert any(last_only) == (variant == "e2b")
    layers = sum(layer_flops(geometry, layer) * (1 if layer.shares_kv else tokens) for layer in geometry.layers)
    embedded = decoder_flops(geometry) - sum(layer_flops(geometry, layer) for layer in geometry.layers)
    [found] = ranks.run(prefill_flops, task(folder), prompt, world_size=1)
    assert found == layers + embedded * tokens + head_flops(geometry)


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


def unless_telling(variant: str, layout: str) -> Any:
    """A case; slow but of E4B, where stages share K/V and per-layer inputs, and the fullest layout of the others."""
    telling = variant == "e4b" or layout == "TP2+SP PP2"
    return pytest.param(variant, layout, marks=() if telling else pytest.mark.slow)


@pytest.mark.parametrize(("variant", "layout"), [*(unless_telling(*case) for case in CASES), *EXPERT_CASES])
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


FAR_LAYOUTS = {"one": ONE, "DP2": ONE, **{name: LAYOUTS[name] for name in ("TP2", "PP2", "TP2+SP PP2")}}
FAR_CASES = [
    (variant, layout) for variant in VARIANTS for layout in FAR_LAYOUTS if (variant, layout) != ("26b-a4b", "TP2")
]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "layout"), [*FAR_CASES, *EXPERT_CASES])
def test_two_hundred_tokens(ranks: RankPool, toy: Toy, variant: str, layout: str) -> None:
    """Seven rows of text, and every kind of media, all at once: twenty-five windows behind their prompts."""
    folder, parallel = toy(variant), (FAR_LAYOUTS | EXPERT_LAYOUTS)[layout]
    (named,) = ranks.run(media_prompts, folder, world_size=1)
    prompts = [*random_prompts(Geometry.from_folder(folder)), *named.values()]
    size = 2 if layout == "DP2" else None
    options = replace(GREEDY, max_new_tokens=200)
    found = ask(ranks, folder, prompts, options, parallel, world_size=size, max_rows=len(prompts), prefill_tokens=24)
    assert_teacher_forced(ranks, folder, prompts, found)


def test_media_with_a_static_cache(ranks: RankPool, toy: Toy) -> None:
    """12B's own generation with pictures, the way in which its class masks them as it is served."""
    folder = toy("12b")
    (named,) = ranks.run(media_prompts, folder, world_size=1)
    prompts = [named[name] for name in ("two images", "two videos", "in an image")]
    found = ask(ranks, folder, prompts, GREEDY)
    (theirs,) = ranks.run(generate_with_transformers, folder, prompts, TOKENS, True, world_size=1)
    assert [list(completion.tokens) for completion in found.completions] == theirs


@pytest.mark.parametrize("variant", ["e2b", "26b-a4b"])
def test_adapters(ranks: RankPool, toy: Toy, tmp_path: Path, variant: str) -> None:
    """With an adapter as PEFT's model answers; without it, in the same weights, as the base does."""
    folder, adapter = toy(variant), tmp_path / "adapter"
    ranks.run(save_adapter, folder, adapter, world_size=1, **OPTIONS.get(variant, {"target_modules": "all-linear"}))
    prompts = random_prompts(Geometry.from_folder(folder), (5, 30))
    found = ask(ranks, folder, prompts, GREEDY, changes={"adapter": adapter})
    assert_teacher_forced(ranks, folder, prompts, found, adapter)
    base = ask(ranks, folder, prompts, GREEDY)
    assert tokens_of(base.completions) != tokens_of(found.completions)
    without = ask(ranks, folder, prompts, GREEDY, changes={"adapter": adapter}, without=True)
    assert tokens_of(without.completions) == tokens_of(base.completions)


def test_rows_end_by_themselves(ranks: RankPool, toy: Toy) -> None:
    """At a stop id; the place of a row that has ended is taken, and nobody else's answer changes."""
    folder = toy("e4b")
    prompts = random_prompts(Geometry.from_folder(folder), (3, 9, 20, 4, 12, 7))
    whole = ask(ranks, folder, prompts, SAMPLED)
    stops = tuple(
        {completion.tokens[n] for completion, n in zip(whole.completions, (0, 11, 3, 30, 20, 5), strict=True)}
    )
    found = ask(ranks, folder, prompts, replace(SAMPLED, stop_token_ids=stops), max_rows=2, prefill_tokens=8)
    for ended, completion in zip(found.completions, whole.completions, strict=True):
        first = next(i for i, token in enumerate(completion.tokens) if token in stops)
        assert ended.tokens == completion.tokens[: first + 1]
        assert ended.finish_reason == "stop"
    assert {completion.finish_reason for completion in whole.completions} == {"length"}
    assert len({len(completion.tokens) for completion in found.completions}) > 3


def test_a_stop_string_ends_a_row_in_its_middle(ranks: RankPool, toy: Toy) -> None:
    """Of two letters, which are two tokens: the tokens go up to its end, the text up to its beginning."""
    folder = toy("e4b")
    prompts = random_prompts(Geometry.from_folder(folder), (3, 9, 20))
    whole = ask(ranks, folder, prompts, SAMPLED).completions
    stop = whole[1].text[10:12]
    found = ask(ranks, folder, prompts, replace(SAMPLED, stop_strings=(stop, "no letter")), max_rows=2).completions
    for ended, completion in zip(found, whole, strict=True):
        assert completion.text == letters(completion.tokens)
        at = completion.text.find(stop)
        assert ended.text == (completion.text[:at] if at >= 0 else completion.text)
        assert ended.tokens == (completion.tokens[: at + 2] if at >= 0 else completion.tokens)
        assert ended.finish_reason == ("stop" if at >= 0 else "length")
    assert found[1].finish_reason == "stop" and len(found[1].tokens) <= 12


def test_several_answers(ranks: RankPool, toy: Toy) -> None:
    """Of one prompt: each has its own draws, and a prompt's do not depend on the others."""
    folder = toy("31b")
    prompts = random_prompts(Geometry.from_folder(folder), (4, 6))
    options = replace(SAMPLED, num_return_sequences=3, max_new_tokens=12)
    found = ask(ranks, folder, prompts, options).completions
    assert [(c.index, c.sample) for c in found] == [(i, j) for i in range(2) for j in range(3)]
    assert len({c.tokens for c in found}) == 6
    assert tokens_of(ask(ranks, folder, prompts[:1], options).completions) == tokens_of(found[:3])


@pytest.mark.parametrize("variant", ["e4b", "12b"])
def test_a_vocabulary_that_ranks_do_not_divide(ranks: RankPool, toy: Toy, variant: str) -> None:
    """What fills it up is never chosen, though every other word is as likely as can be."""
    folder = toy(variant, vocab_size=515)
    prompts = random_prompts(Geometry.from_folder(folder), (3, 20, 9))
    hot = replace(SAMPLED, temperature=1e4, top_k=None, top_p=None)
    one = ask(ranks, folder, prompts, hot)
    many = ask(ranks, folder, prompts, hot, Parallel(tp=4, sequence_parallel=True))
    assert tokens_of(many.completions) == tokens_of(one.completions)
    assert max(token for completion in one.completions for token in completion.tokens) > 500
