"""Several sources in a run: the same figures of each in every layout, and the same rows however often it is killed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import DataError, ParallelError
from bridge.ranks import RankPool
from tests.functional.conftest import Toy

from .blends_kit import noted, train_recipe, train_watched
from .evaluation_kit import write_chats

LENGTH = 96
# Losses of one step, and of a step behind an update, relative.
SAME, UPDATED = 1e-6, 1e-4
LAYOUTS: dict[str, list[str]] = {
    "TP2": ["parallel.tp=2", "parallel.sequence_parallel=true"],
    "PP2": ["parallel.pp=2"],
    "CP2": ["parallel.cp=2"],
    "DP2": [],
}


def said_of(toy: Toy, folder: Path, output: Path, **train: Any) -> dict[str, Any]:
    """A run on three sources, of which one is small enough to come again."""
    sizes = {"chats": 20, "code": 9, "facts": 3}
    for seed, (name, count) in enumerate(sizes.items()):
        write_chats(folder / f"{name}.jsonl", count, seed)
    weights = zip(sizes, (5, 3, 2), strict=True)
    return {
        "output": str(output),
        "model": {"hf": str(toy("e2b")), "dtype": "float32"},
        "data": {
            "cache": str(folder / "cache"),
            "sources": [{"path": str(folder / f"{name}.jsonl"), "weight": weight} for name, weight in weights],
        },
        "train": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "seq_length": LENGTH, **train},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
    }


def logged(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def check_sums(lines: list[dict[str, float]], counted: str = "supervised") -> None:
    """What is logged of the sources adds up to what is logged of all."""
    names = [name.removeprefix("rows/") for name in lines[-1] if name.startswith("rows/")]
    assert names == ["chats", "code", "facts"]
    for line in lines:
        seen = [name for name in names if line[f"{counted}/{name}"]]
        total = sum(line[f"loss/{name}"] * line[f"{counted}/{name}"] for name in seen)
        assert total / line[counted] == pytest.approx(line["loss"], rel=1e-9)
        assert sum(line[f"{counted}/{name}"] for name in names) == line[counted]
        assert sum(line.get(f"tokens/{name}", 0) for name in names) == line["tokens"]


@pytest.fixture(scope="module")
def alone(ranks: RankPool, toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one rank logs, by the overrides of the run; computed once."""
    folder = tmp_path_factory.mktemp("blends")
    made: dict[tuple[str, ...], list[dict[str, float]]] = {}

    def get(*overrides: str) -> list[dict[str, float]]:
        if overrides not in made:
            output = folder / f"run{len(made)}"
            ranks.run(train_recipe, said_of(toy, folder, output), list(overrides), world_size=1)
            made[overrides] = logged(output)
        return made[overrides]

    return get


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["rows", "packed"])
@pytest.mark.parametrize(
    "name", ["TP2", pytest.param("PP2", marks=pytest.mark.slow), pytest.param("CP2", marks=pytest.mark.slow), "DP2"]
)
def test_losses_of_sources_are_the_same_in_every_layout(
    ranks: RankPool, toy: Toy, tmp_path: Path, alone: Any, record_property: Any, name: str, packing: bool
) -> None:
    z_loss = ["train.z_loss=0.01"] if name in ("TP2", "CP2") else []
    keys = [f"data.packing={str(packing).lower()}", *z_loss]
    ranks.run(train_recipe, said_of(toy, tmp_path, tmp_path / "run"), [*keys, *LAYOUTS[name]], world_size=2)
    expected, found = alone(*keys), logged(tmp_path / "run")
    check_sums(expected)
    check_sums(found)
    assert len(found) == len(expected) == 2
    apart = 0.0
    for step, (ours, one) in enumerate(zip(found, expected, strict=True)):
        for key in (key for key in one if "/" in key):
            if key.startswith("loss/"):
                apart = max(apart, abs(ours[key] / one[key] - 1))
                assert ours[key] == pytest.approx(one[key], rel=UPDATED if step else SAME), key
            else:
                assert ours[key] == one[key], key
        assert sum(ours[f"rows/{source}"] for source in ("chats", "code", "facts")) == 8 * (step + 1)
    record_property("apart", apart)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dpo", "kto", "orpo", "grpo"])
def test_preferences_and_rollouts_have_losses_by_source(ranks: RankPool, toy: Toy, tmp_path: Path, recipe: str) -> None:
    """The figures of the sources add up, and two data-parallel ranks say what one says."""
    kind, said = {"orpo": "dpo"}.get(recipe, recipe), said_of(toy, tmp_path, tmp_path / "one")
    for name, count, seed in (("chats", 12, 0), ("code", 7, 1), ("facts", 4, 2)):
        write_answers(tmp_path / f"{name}.jsonl", kind, count, seed)
    said["lora"] = {"rank": 4, "targets": r".*language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj"}
    own = {
        "dpo": ["preference.loss=sigmoid"],
        "orpo": ["preference.loss=orpo"],
        "kto": ["preference.loss=kto"],
        "grpo": ["grpo.rewards=[length]", "grpo.reward_length=8", "grpo.num_generations=4", "grpo.max_new_tokens=8"],
    }[recipe]
    ranks.run(train_recipe, said, own, world_size=1)
    ranks.run(train_recipe, said, [*own, f"output={tmp_path / 'two'}"], world_size=2)
    counted = {"dpo": "pairs", "orpo": "pairs", "kto": "answers", "grpo": "answers"}[recipe]
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    if recipe != "orpo":  # a mean over pairs, and one over tokens
        check_sums(one, counted)
    assert {key for line in one for key in line if key.startswith("loss/")} == {"loss/chats", "loss/code", "loss/facts"}
    for key in (key for key in one[0] if "/" in key and not key.startswith("expert")):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-4, abs=1e-6), key


def write_answers(path: Path, kind: str, count: int, seed: int) -> None:
    rows = []
    for number in range(count):
        words = f"{path.stem} {number} " * (1 + (number + seed) % 3)
        rows.append(
            {
                "dpo": {"prompt": words, "chosen": f"yes {number}", "rejected": f"no, not {words}"},
                "kto": {"prompt": words, "completion": f"say {words}", "label": number % 2 == 0},
                "grpo": {"prompt": words, "completion": f"yes {number}"},
            }[kind]
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_killed_twenty_times_the_tokens_come_in_their_order(
    ranks: RankPool, toy: Toy, tmp_path: Path, packing: bool
) -> None:
    """SIGKILL of a rank at random microbatches of a real run on two: what was not saved comes again, and alike."""
    steps, per_step = 44, 2
    said = said_of(toy, tmp_path, tmp_path / "killed", steps=steps)
    said["data"]["packing"], said["checkpoint"] = packing, {"every": 3}
    undisturbed = {**said, "output": str(tmp_path / "whole"), "checkpoint": {}}
    assert ranks.run(train_watched, undisturbed, None, 0, world_size=2) == [steps, steps]
    dice, kills, at = random.Random(1), 20, 0
    for number in range(kills):
        # Never before the last checkpoint, so that every run comes to its end; else anywhere.
        saved = 3 * per_step * (at // (3 * per_step))
        at = dice.randint(saved + 1, max(saved + 1, steps * per_step * (number + 1) // kills - 1))
        victim = dice.randint(0, 1)
        with pytest.raises(ParallelError, match=f"rank {victim} "):
            ranks.run(train_watched, said, at, victim, world_size=2)
    assert ranks.run(train_watched, said, None, 0, world_size=2) == [steps, steps]
    for rank in (0, 1):
        whole = {number: rest for number, *rest in noted(tmp_path / "whole", rank)}
        assert sorted(whole) == list(range(steps * per_step))
        found = noted(tmp_path / "killed", rank)
        assert len(found) > len(whole) and {number for number, *_ in found} == set(whole)
        assert all(rest == whole[number] for number, *rest in found)
    assert [line["loss"] for line in logged(tmp_path / "killed")] == [
        line["loss"] for line in logged(tmp_path / "whole")
    ]
    last = logged(tmp_path / "killed")[-1]
    assert {key: value for key, value in last.items() if key.startswith(("rows/", "tokens/"))} == {
        key: value for key, value in logged(tmp_path / "whole")[-1].items() if key.startswith(("rows/", "tokens/"))
    }


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_is_told_what_changed(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """In mid-epoch: two ranks, then one; another length that no sample feels; other shares, refused and begun anew."""
    said = said_of(toy, tmp_path, tmp_path / "run", steps=4)
    whole = {**said, "output": str(tmp_path / "whole")}
    ranks.run(train_recipe, whole, [], world_size=1)
    ranks.run(train_recipe, said, ["train.steps=2"], world_size=2)
    ranks.run(train_recipe, said, ["train.seq_length=112"], world_size=1)
    for ours, one in zip(logged(tmp_path / "run"), logged(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(one["loss"], rel=UPDATED)
        assert {key: ours[key] for key in one if key.startswith("rows/")} == {
            key: one[key] for key in one if key.startswith("rows/")
        }
    said["data"]["sources"][0]["weight"] = 1
    with pytest.raises(DataError, match=r"data.sources was 'chats weight=5, .* and is 'chats weight=1, .*on_change"):
        ranks.run(train_recipe, said, ["train.steps=6"], world_size=1)
    assert ranks.run(train_recipe, said, ["train.steps=6", "data.on_change=restart"], world_size=1) == [6]
