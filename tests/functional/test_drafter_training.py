"""A drafter trained by a recipe: what it is for, and the folder that comes of it."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bridge.generate.acceptance import Acceptance
from bridge.generate.rows import Completion, Prompt
from bridge.generate.sampling import SamplingOptions
from bridge.ranks import RankPool
from recipes.config import load_recipe
from recipes.train.loop import train

from .conftest import Toy
from .drafter_kit import Pair, answer_with_drafter, counted_with_transformers, task_of
from .test_drafter_layouts import LAYOUTS

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def run(ranks: RankPool, recipe: str, overrides: list[str], world_size: int = 1) -> Any:
    (outcome, *_) = ranks.run(train, load_recipe(recipe, overrides), world_size=world_size)
    return outcome


def logged(output: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def resumed(ranks: RankPool, whole: Path, output: Path, said: list[str], world_size: int, step: int = 3) -> None:
    """What a run would be that was ended behind the checkpoint of a step, and goes on: of the very same recipe."""
    last = f"iter_{len(logged(whole)):07d}"
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns(last, "samples"))
    (output / "latest_checkpointed_iteration.txt").write_text(str(step))
    run(ranks, "drafter/smoke", [*said, f"output={output}"], world_size)


Layout = tuple[int, list[str]]
ONE: Layout = (1, [])
TRAINED = ["drafter.target=trained"]
LORA = [*TRAINED, "lora.rank=4"]
# What of a model is trained with its drafter; the layout of a run, and the one that it goes on in.
RUNS = {
    "drafter": ([], ONE, ONE),
    "both": (TRAINED, ONE, LAYOUTS["TP2+SP"]),
    "drafter, PP2": ([], LAYOUTS["PP2"], ONE),
    "both, one rank": (TRAINED, ONE, ONE),
    "both, TP2 PP2": (TRAINED, LAYOUTS["TP2 PP2"], LAYOUTS["TP2 PP2"]),
    "both, PP2 and DP2": (TRAINED, LAYOUTS["PP2"], LAYOUTS["DP2"]),
    "drafter, CP2": ([], LAYOUTS["CP2"], ONE),
    "both, CP2": (TRAINED, LAYOUTS["CP2"], LAYOUTS["CP2"]),
    "LoRA, one rank": (LORA, ONE, ONE),
    "LoRA, TP2 PP2": (LORA, ONE, LAYOUTS["TP2 PP2"]),
}


@pytest.mark.parametrize("name", [*list(RUNS)[:2], *(pytest.param(n, marks=pytest.mark.slow) for n in list(RUNS)[2:])])
def test_a_run(ranks: RankPool, toy: Toy, tmp_path: Path, name: str) -> None:
    """It learns, and goes on as if it had never ended; acceptance is logged; its folders are for transformers."""
    trained, layout, other = RUNS[name]
    pair = Pair(toy("e2b"), toy("e2b", drafter=True))
    said = [f"model.hf={pair.target}", f"drafter.path={pair.drafter}", "train.seq_length=64", "data.packing=true"]
    said += ["train.steps=6", "checkpoint.every=3", "data.val_fraction=0.2", "train.eval_every=3", "drafter.steps=3"]
    said += ["train.samples=2", "train.sample_tokens=8", *trained]
    whole, halves, model, drafter = (tmp_path / name for name in ("whole", "halves", "model", "drafter"))
    export = [f"export.hf={model}", f"export.drafter={drafter}"] if trained else [f"export.hf={drafter}"]
    run(ranks, "drafter/smoke", [*said, *layout[1], *export, f"output={whole}"], layout[0])
    resumed(ranks, whole, halves, [*said, *other[1]], other[0])
    for figure in ("loss", "eval_loss", *(("draft_loss", "eval_draft_loss") if trained else ())):
        once, again = logged(whole, figure), logged(halves, figure)
        assert once[-1] < once[0] and len(once) == (2 if "eval" in figure else 6)
        assert again == (once if other == layout else pytest.approx(once, rel=1e-4)), figure

    if trained and other == layout:
        # A run that is over, started again, writes what the other wrote at its end.
        run(
            ranks,
            "drafter/smoke",
            [*said, *other[1], f"output={halves}", f"export.drafter={tmp_path / 'late'}"],
            other[0],
        )
        weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "late", drafter)]
        assert weights[0] == weights[1]
    before, after = (load_file(path / "model.safetensors") for path in (pair.drafter, drafter))
    ordering = "masked_embedding.token_ordering"
    assert torch.equal(before[ordering], after[ordering])
    assert not torch.equal(before["masked_embedding.centroids.weight"], after["masked_embedding.centroids.weight"])
    query = "model.language_model.layers.0.self_attn.q_proj.weight"
    if trained:
        assert not torch.equal(*(load_file(path / "model.safetensors")[query] for path in (pair.target, model)))
    assert_acceptance_is_logged(ranks, whole, Pair(model if trained else pair.target, drafter))


def assert_acceptance_is_logged(ranks: RankPool, output: Path, pair: Pair) -> None:
    """At the last evaluation: what transformers has with the folders that were exported behind it."""
    lines = [json.loads(line) for line in (output / "samples" / "step-6.jsonl").read_text().splitlines()]
    prompts = [Prompt(tuple(line["prompt_tokens"])) for line in lines]
    (theirs,) = ranks.run(counted_with_transformers, pair, prompts, 8, 3, True, world_size=1)
    for line, (tokens, rounds) in zip(lines, theirs, strict=True):
        assert line["tokens"] == tokens[: len(line["tokens"])]  # ours end at a stop id
        if line["finish_reason"] == "length":
            assert [tuple(each) for each in line["rounds"]] == rounds
    found = Acceptance.of(Completion(0, 0, (), (), (), "", "", line["rounds"]) for line in lines)
    assert logged(output, "eval_mean_accepted_length")[-1] == found.mean_length
    assert len(found.rates) == 3
    for place, rate in enumerate(found.rates, 1):
        assert logged(output, f"eval_acceptance/{place}")[-1] == rate
    (ours,) = ranks.run(answer_with_drafter, task_of(pair, 3), prompts, SamplingOptions(max_new_tokens=8), world_size=1)
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
