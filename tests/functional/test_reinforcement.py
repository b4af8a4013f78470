"""Answers that a model under training samples, and steps that are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import ParallelError
from bridge.ranks import RankPool

from .conftest import Toy
from .reinforcement_kit import (
    LORA,
    logged,
    recipe,
    sample,
    train_fixed,
    train_sampling,
    write_questions,
)

APART, LAYOUT = 1e-5, 1e-5
SP = ["parallel.tp=2", "parallel.sequence_parallel=true"]
PP2, CP2, PACKED = ["parallel.pp=2"], ["parallel.cp=2"], ["data.packing=true"]
SAMPLING = {
    "e2b": ("e2b", 1, [], False),
    "e4b TP2+SP, pictures": ("e4b", 2, SP, True),
    "e2b PP2": ("e2b", 2, PP2, False),
    "26b-a4b EP2": ("26b-a4b", 2, ["parallel.ep=2"], False),
    "12b CP2, packed, pictures": ("12b", 2, [*CP2, *PACKED], True),
}
MORE_SAMPLING = {
    "26b-a4b CP2 EP2": ("26b-a4b", 2, [*CP2, "parallel.ep=2"], False),
    "e4b CP2 TP2+SP, packed, pictures": ("e4b", 4, [*CP2, *SP, *PACKED], True),
    "e4b PP2, packed, pictures": ("e4b", 2, [*PP2, *PACKED], True),
}


@pytest.mark.parametrize("case", [*SAMPLING, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_SAMPLING)])
def test_the_trainer_says_what_the_sampler_said(
    ranks: RankPool, toy: Toy, tmp_path: Path, case: str, record_property: Any
) -> None:
    """Log-probabilities of sampled tokens, recomputed; every rank has the same answers."""
    variant, world, layout, pictures = {**SAMPLING, **MORE_SAMPLING}[case]
    data = write_questions(tmp_path / "questions.jsonl", 6, pictures)
    said = recipe(toy(variant), data, tmp_path / "run")
    found = ranks.run(sample, said, layout, world_size=world)
    assert all(each == found[0] for each in found)
    record_property("apart", found[0].apart)
    print(found[0].apart, found[0].placeholders)
    assert len(found[0].tokens) == 8 and found[0].prompts == 2
    assert len(set(found[0].tokens[:4])) > 1, "answers to one prompt are drawn each by itself"
    assert 0 < found[0].apart <= APART


DP2 = ["train.micro_batch_size=2"]
EP2 = ["parallel.ep=2"]
# Of a variant and a loss, the layouts of two ranks.
FIXED = {
    "e4b": ("grpo", {"TP2+SP": SP, "PP2, packed": [*PP2, *PACKED], "DP2": DP2, "CP2, packed": [*CP2, *PACKED]}),
    "26b-a4b": ("grpo", {"EP2": EP2}),
}
MORE_FIXED = {
    "e4b": ("dapo", {"PP2": PP2, "CP2": CP2, "TP2+SP, packed": [*SP, *PACKED], "DP2, packed": [*DP2, *PACKED]}),
    "12b": (
        "gspo",
        {"CP2": CP2, "CP2, packed": [*CP2, *PACKED], "PP2 VPP2, packed": [*PP2, *PACKED, "parallel.vpp=2"]},
    ),
    "31b": ("rloo", {"CP2, packed": [*CP2, *PACKED], "TP2+SP, packed": [*SP, *PACKED]}),
    "26b-a4b": ("dr_grpo", {"EP2, packed": [*EP2, *PACKED], "CP2 EP2, packed": [*CP2, *PACKED, "parallel.ep=2"]}),
}
FIGURES = ("loss", "grad_norm", "clip_ratio", "mismatch", "kl", "reward", "completion_length")


@pytest.mark.parametrize("variant", FIXED)
def test_a_step_is_the_same_in_every_layout(
    ranks: RankPool, toy: Toy, tmp_path: Path, variant: str, record_property: Any
) -> None:
    check_layouts(ranks, toy(variant), tmp_path, *FIXED[variant], record_property)


@pytest.mark.slow
@pytest.mark.parametrize("variant", MORE_FIXED)
def test_more_layouts(ranks: RankPool, toy: Toy, tmp_path: Path, variant: str, record_property: Any) -> None:
    check_layouts(ranks, toy(variant), tmp_path, *MORE_FIXED[variant], record_property)


def check_layouts(
    ranks: RankPool, model: Path, tmp_path: Path, loss: str, layouts: dict[str, list[str]], record_property: Any
) -> None:
    """Two steps on fixed rollouts with pictures, clipped and held to the reference: figures, and with them the
    gradient."""
    keys = ["grpo.steps_per_generation=2", "grpo.epsilon=0.1", "grpo.max_new_tokens=16", f"grpo.loss={loss}"]
    keys += [] if loss == "rloo" else ["grpo.beta=0.1"]
    data = write_questions(tmp_path / "questions.jsonl", 6, pictures=True)
    found = {}
    for name, (world, layout) in {"one": (1, []), **{name: (2, keys) for name, keys in layouts.items()}}.items():
        said = recipe(model, data, tmp_path / name) | {"lora": LORA}
        assert set(ranks.run(train_fixed, said, [*keys, *layout], world_size=world)) == {2}
        found[name] = logged(tmp_path / name, FIGURES)
    one = found.pop("one")
    assert one[0]["clip_ratio"] > 0.1
    assert loss == "rloo" or (one[1]["kl"] > 0 and one[0]["kl"] == 0)
    worst = {
        f"{name} {figure}": max(
            # Of a KL the distance itself: log-probabilities that differ by 1e-6 enter it squared, so that it is no more
            # exact than they are over what the policy has moved.
            abs(a[figure] - b[figure]) / (1 if figure == "kl" else max(abs(b[figure]), 1e-3))
            for a, b in zip(lines, one, strict=True)
        )
        for name, lines in found.items()
        for figure in one[0].keys() - {"step"}
    }
    record_property("worst", worst)
    print(worst, one)
    assert max(worst.values()) <= LAYOUT, worst


def test_a_run_that_goes_on_is_the_run_itself(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """A signal while answers are sampled, SIGKILL there and behind their rewards, then an end between two steps of one
    rollout: all figures and answers."""
    data = write_questions(tmp_path / "questions.jsonl", 5)
    said = {name: recipe(toy("e2b"), data, tmp_path / name) for name in ("whole", "parts")}
    # Rollouts of four prompts, one at a time: a signal is asked for four times in each, and once a step.
    keys = ["grpo.steps_per_generation=2", "grpo.max_rows=4", "train.steps=6"]
    assert ranks.run(train_sampling, said["whole"], keys, world_size=1) == [(False, 6)]
    assert ranks.run(train_sampling, said["parts"], keys, 9, world_size=1) == [(True, 2)]
    for asked, kill in ((3, "asked"), (0, "rewarded")):
        with pytest.raises(ParallelError, match="rank 0 "):
            ranks.run(train_sampling, said["parts"], keys, asked, kill, world_size=1)
        assert json.loads((tmp_path / "parts" / "iter_0000002" / "progress.json").read_text())["step"] == 2
        assert not (tmp_path / "parts" / "iter_0000003").exists()
    assert ranks.run(train_sampling, said["parts"], [*keys, "train.steps=3"], world_size=1) == [(False, 3)]
    assert ranks.run(train_sampling, said["parts"], keys, world_size=1) == [(False, 6)]
    figures = ("loss", "grad_norm", "reward", "reward_std", "mismatch", "tokens")
    whole, parts = (logged(tmp_path / name, figures) for name in said)
    assert whole == parts and len(whole) == 6
    for step in (1, 3, 5):
        texts = [(tmp_path / name / "rollouts" / f"step-{step}.jsonl").read_text() for name in said]
        assert texts[0] == texts[1]
        lines = [json.loads(line) for line in texts[0].splitlines()]
        assert len(lines) == 16 and {line["tokens"] for line in lines} and all("reward" in line for line in lines)
    assert not list((tmp_path / "whole" / "rollouts").glob("step-[246].jsonl"))
