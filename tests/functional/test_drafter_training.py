"""A drafter trained by a recipe: what it is for, and the folder that comes of it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bridge.generate.acceptance import Acceptance
from bridge.generate.rows import Prompt
from bridge.generate.sampling import SamplingOptions
from bridge.ranks import RankPool
from recipes.config import load_recipe
from recipes.train.loop import train

from .conftest import Toy
from .drafter_kit import Pair, answer_with_drafter, counted_with_transformers, task_of

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def run(ranks: RankPool, recipe: str, overrides: list[str], world_size: int = 1) -> Any:
    (outcome, *_) = ranks.run(train, load_recipe(recipe, overrides), world_size=world_size)
    return outcome


def logged(output: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def _weight(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[name]


def test_a_run(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """It learns, goes on where it was, the same in another layout; its folder is one for transformers' generate."""
    pair = Pair(toy("e2b"), toy("e2b", drafter=True))
    common = [f"model.hf={pair.target}", f"drafter.path={pair.drafter}", "train.seq_length=64", "data.packing=true"]
    losses = {}
    for name, layout, ranks_of in (
        ("one", ["train.steps=6"], 1),
        ("parallel", ["train.steps=6", "parallel.tp=2", "parallel.sequence_parallel=true"], 2),
    ):
        run(ranks, "drafter/smoke", [*common, *layout, f"output={tmp_path / name}"], ranks_of)
        losses[name] = logged(tmp_path / name)
    assert losses["one"][-1] < losses["one"][0]
    assert losses["parallel"] == pytest.approx(losses["one"], rel=1e-3)
    out = tmp_path / "out"
    run(ranks, "drafter/smoke", [*common, "train.steps=8", f"output={tmp_path / 'one'}", f"export.hf={out}"])
    assert len(logged(tmp_path / "one")) == 8
    before, after = (load_file(path / "model.safetensors") for path in (pair.drafter, out))
    ordering = "masked_embedding.token_ordering"
    assert torch.equal(before[ordering], after[ordering])
    assert not torch.equal(before["masked_embedding.centroids.weight"], after["masked_embedding.centroids.weight"])
    trained, prompts = replace(pair, drafter=out), [Prompt((5, 6, 7)), Prompt((9,))]
    (theirs,) = ranks.run(counted_with_transformers, trained, prompts, 8, 3, True, world_size=1)
    options = SamplingOptions(max_new_tokens=8)
    (ours,) = ranks.run(answer_with_drafter, task_of(trained, 3), prompts, options, world_size=1)
    assert [(list(c.tokens), list(c.rounds)) for c in ours] == theirs


LORA = ["lora.rank=4"]
TP2 = ["parallel.tp=2", "parallel.sequence_parallel=true"]


@pytest.mark.parametrize(
    ("said", "layout", "world_size"),
    [
        (LORA, [*TP2, "parallel.pp=2"], 4),
        *(pytest.param([], layout, 2, marks=pytest.mark.slow) for layout in (TP2, ["parallel.pp=2"], [])),
        pytest.param(LORA, [], 1, marks=pytest.mark.slow),
    ],
)
def test_a_model_trained_with_its_drafter(
    ranks: RankPool, toy: Toy, tmp_path: Path, said: list[str], layout: list[str], world_size: int
) -> None:
    """It goes on where it was; the acceptance is logged at evaluations; both are folders for transformers' generate."""
    pair, options = Pair(toy("e2b"), toy("e2b", drafter=True)), SamplingOptions(max_new_tokens=8)
    common = [f"model.hf={pair.target}", f"drafter.path={pair.drafter}", "train.seq_length=64", "data.packing=true"]
    common += ["drafter.target=trained", "drafter.steps=3", "data.val_fraction=0.2", "train.eval_every=3"]
    common += [
        "train.samples=3",
        "train.sample_tokens=8",
        "train.steps=6",
        "optimizer.schedule=constant",
        "optimizer.warmup=0",
        *said,
    ]
    whole, halves, model, drafter = (tmp_path / name for name in ("whole", "halves", "model", "drafter"))
    export = [f"export.hf={model}", f"export.drafter={drafter}"]
    run(ranks, "drafter/smoke", [*common, *layout, f"output={whole}", *export], world_size)
    run(ranks, "drafter/smoke", [*common, "train.steps=3", f"output={halves}"])
    run(ranks, "drafter/smoke", [*common, *layout, f"output={halves}"], world_size)
    for name in ("loss", "draft_loss", "eval_draft_loss"):
        assert logged(halves, name) == pytest.approx(logged(whole, name), rel=1e-3), name
    assert logged(whole)[-1] < logged(whole)[0] and logged(whole, "draft_loss")[-1] < logged(whole, "draft_loss")[0]

    trained = Pair(model, drafter)
    query = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(_weight(pair.target, query), _weight(model, query))
    lines = [json.loads(line) for line in (whole / "samples" / "step-6.jsonl").read_text().splitlines()]
    prompts = [Prompt(tuple(line["prompt_tokens"])) for line in lines]
    (theirs,) = ranks.run(counted_with_transformers, trained, prompts, 8, 3, True, world_size=1)
    for line, (tokens, rounds) in zip(lines, theirs, strict=True):
        length = len(line["tokens"])  # ours end at a stop id
        assert line["tokens"] == tokens[:length]
        if line["finish_reason"] == "length":
            assert [tuple(each) for each in line["rounds"]] == rounds
    rounds = [tuple(each) for line in lines for each in line.get("rounds", ())]
    assert logged(whole, "eval_mean_accepted_length")[-1] == pytest.approx(sum(n for _, n in rounds) / len(rounds))
    assert 0 <= logged(whole, "eval_acceptance/1")[-1] <= 1
    (ours,) = ranks.run(answer_with_drafter, task_of(trained, 3), prompts, options, world_size=1)
    assert [(list(c.tokens), list(c.rounds)) for c in ours] == theirs


@pytest.mark.slow
def test_a_tuned_model_gets_its_speed_back(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """A drafter that guessed a model; the model is tuned on a task; the drafter trained again on its own answers.

    Mean accepted length on prompts that were not among them: at least twice that of the drafter as it was. Tokens a
    second: more with the drafter than without.
    """
    base, drafter = toy("e4b"), toy("e4b", drafter=True)
    # The task: to go on with the alphabet, from the letter asked for.
    conversations = [
        {"messages": [{"role": "user", "content": f"{word} {first}"}, {"role": "assistant", "content": _from(first)}]}
        for word in ("from", "go on", "behind", "letters")
        for first in _LETTERS
    ]
    held_out = conversations[::7]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(c) + "\n" for c in conversations if c not in held_out))
    common = [f"data.path={data}", "train.seq_length=128", "train.global_batch_size=8", "checkpoint.every=0"]
    first, tuned, second = (tmp_path / name for name in ("first", "tuned", "second"))
    smoke = ["drafter/smoke", [*common, f"model.hf={base}", f"drafter.path={drafter}", "train.steps=60"]]
    run(ranks, smoke[0], [*smoke[1], f"output={tmp_path / 'run1'}", f"export.hf={first}"])  # type: ignore[list-item]
    sft = [*common, f"model.hf={base}", "train.steps=250", "optimizer.lr=4e-3", f"output={tmp_path / 'run2'}"]
    run(ranks, "sft/smoke", [*sft, f"export.hf={tuned}"])
    again = [*common, f"model.hf={tuned}", f"drafter.path={first}", "train.steps=150", f"output={tmp_path / 'run3'}"]
    run(ranks, "drafter/smoke", [*again, f"export.hf={second}"])

    prompts = [_prompt(tuned, c["messages"][0]["content"]) for c in held_out]
    options = SamplingOptions(max_new_tokens=24)
    measured, speeds = {}, {}
    for name, folder in (("before", first), ("after", second), ("without", None)):
        task = task_of(Pair(tuned, folder or first), 4)
        task = task if folder is not None else replace(task, drafter=None)
        ranks.run(answer_with_drafter, task, prompts[:1], options, world_size=1)
        begun = time.perf_counter()
        (found,) = ranks.run(answer_with_drafter, task, prompts, options, max_rows=1, world_size=1)
        speeds[name] = sum(len(c.tokens) for c in found) / (time.perf_counter() - begun)
        measured[name] = Acceptance.of(found)
        print(name, measured[name], f"{speeds[name]:.0f} tokens/s, with the time of loading")
    assert measured["after"].mean_length >= 2 * measured["before"].mean_length
    assert measured["after"].mean_length > 1


def _from(first: str) -> str:
    start = _LETTERS.index(first)
    return " ".join((2 * _LETTERS)[start : start + 10])


def _prompt(folder: Path, text: str) -> Prompt:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    messages = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return Prompt(tuple(ids))
