"""Preferences in every layout, packed and not, with pictures: what one rank makes of the same pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge.ranks import RankPool

from .conftest import Toy
from .preference_kit import LINEARS, SEED, TIMED, apart, logged, train_data, width_of, write_pairs

pytest.importorskip("torchvision", reason="transformers' Gemma 4 processors need torchvision")

BOUND, STEPS, ROWS, LENGTH = 1e-5, 3, 4, 192
# What each log has to have.
NEEDED = {"loss", "rewards/margins", "grad_norm", "eval_loss"}
TP2, PP2 = ["parallel.tp=2", "parallel.sequence_parallel=true"], ["parallel.pp=2"]
PACKED = ["data.packing=true"]
# Of both adapters, a loss with all that losses need: a reference, means over tokens, the likelihood of chosen answers.
MIXED = {"loss": ["sigmoid", "ipo", "sft"], "loss_weights": [1.0, 0.5, 0.5]}
KTO = {"loss": "kto"}
LAYOUTS: dict[str, tuple[str, dict[str, Any], int, list[str]]] = {
    "e4b TP2+SP": ("e4b", MIXED, 2, TP2),
    "e4b PP2, packed": ("e4b", MIXED, 2, [*PP2, *PACKED]),
    "e4b CP2, packed": ("e4b", MIXED, 2, ["parallel.cp=2", *PACKED]),
    "26b-a4b EP2": ("26b-a4b", MIXED, 2, ["parallel.ep=2"]),
}
MORE: dict[str, tuple[str, dict[str, Any], int, list[str]]] = {
    "e4b packed": ("e4b", MIXED, 1, PACKED),
    "e4b DP2, overlap": ("e4b", MIXED, 2, ["parallel.overlap=true"]),
    "12b CP2, packed": ("12b", MIXED, 2, ["parallel.cp=2", *PACKED]),
    "e4b KTO CP2, packed": ("e4b", KTO, 2, ["parallel.cp=2", *PACKED]),
    "e4b TP2+SP, packed": ("e4b", MIXED, 2, [*TP2, *PACKED]),
    "e4b PP2": ("e4b", MIXED, 2, PP2),
    "e4b PP2 VPP2": ("e4b", MIXED, 2, [*PP2, "parallel.vpp=2"]),
    "12b CP2": ("12b", MIXED, 2, ["parallel.cp=2"]),
    "12b CP2 TP2+SP": ("12b", MIXED, 4, ["parallel.cp=2", *TP2]),
    "26b-a4b EP2, packed": ("26b-a4b", MIXED, 2, ["parallel.ep=2", *PACKED]),
    "26b-a4b TP2+SP EP2": ("26b-a4b", MIXED, 2, [*TP2, "parallel.ep=2"]),
    "e4b DP2, packed": ("e4b", MIXED, 2, PACKED),
    "e4b orpo TP2+SP PP2": ("e4b", {"loss": "orpo"}, 4, [*TP2, *PP2]),
    "12b orpo CP2, packed": ("12b", {"loss": "orpo"}, 2, ["parallel.cp=2", *PACKED]),
    "e4b KTO packed": ("e4b", KTO, 1, PACKED),
    "e4b KTO TP2+SP": ("e4b", KTO, 2, TP2),
    "e4b KTO PP2": ("e4b", KTO, 2, PP2),
    "e4b KTO PP2 VPP2": ("e4b", KTO, 2, [*PP2, "parallel.vpp=2"]),
    "e4b KTO DP2": ("e4b", KTO, 2, []),
    "26b-a4b KTO EP2": ("26b-a4b", KTO, 2, ["parallel.ep=2"]),
}


class Runs:
    """Runs on all eight records a step, in four microbatches, evaluated at the end; those of one rank once."""

    def __init__(self, ranks: RankPool, toy: Toy, folder: Path) -> None:
        self._ranks, self._toy, self._folder = ranks, toy, folder
        self._pairs = write_pairs(folder / "data", pictures=True)
        self._alone: dict[tuple[str, str], list[dict[str, float]]] = {}

    def recipe(self, variant: str, preference: dict[str, Any], output: Path) -> dict[str, Any]:
        labelled = preference["loss"] == "kto"
        path = str(self._pairs.with_name("labelled.jsonl") if labelled else self._pairs)
        return {
            "output": str(output),
            "model": {"hf": str(self._toy(variant)), "dtype": "float32"},
            "data": {"path": path, "eval": path, "cache": str(self._folder / "cache")},
            "preference": preference,
            "train": {
                "steps": STEPS,
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "seq_length": LENGTH,
                "seed": SEED,
                "eval_every": STEPS,
            },
            "optimizer": {"lr": 5e-3, "schedule": "constant", "min_lr": 5e-3, "eps": 1e-6},
            "lora": {"rank": 4, "alpha": 8, "targets": LINEARS},
        }

    def run(
        self, variant: str, preference: dict[str, Any], world: int, overrides: list[str], name: str
    ) -> list[dict[str, float]]:
        output = self._folder / name
        said = self.recipe(variant, preference, output)
        dp = world // (2 if any(part in str(overrides) for part in ("tp=2", "pp=2", "cp=2")) else 1)
        if "CP2 TP2" in name or "TP2+SP PP2" in name:
            dp = 1
        overrides = [*overrides, "train.micro_batch_size=1"] if dp == 2 else overrides
        if "data.packing=true" in overrides:
            extra = {"mismatched": True} if preference["loss"] == "kto" else {}
            width = width_of(Path(said["data"]["path"]), self._toy(variant), self._folder / "cache", ROWS, **extra)
            overrides = [
                *overrides,
                f"train.global_batch_size={ROWS}",
                "train.micro_batch_size=1",
                f"train.seq_length={width}",
            ]
        done = self._ranks.run(train_data, said, overrides, world_size=world, timeout_s=400)
        assert done == [(STEPS, False)] * world
        return logged(output)

    def alone(self, variant: str, preference: dict[str, Any]) -> list[dict[str, float]]:
        key = (variant, str(preference))
        if key not in self._alone:
            self._alone[key] = self.run(variant, preference, 1, [], f"{variant} {preference['loss']} alone")
        return self._alone[key]


@pytest.fixture(scope="module")
def runs(ranks: RankPool, toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, toy, tmp_path_factory.mktemp("layouts"))


def check(runs: Runs, name: str, record_property: Any) -> None:
    variant, preference, world, overrides = {**LAYOUTS, **MORE}[name]
    found = apart(runs.run(variant, preference, world, overrides, name), runs.alone(variant, preference), NEEDED)
    record_property("apart", str(found))
    print(name, max(found.items(), key=lambda item: item[1]))
    assert max(found.values()) <= BOUND, found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_what_one_rank_gives(runs: Runs, record_property: Any, name: str) -> None:
    check(runs, name, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_layouts(runs: Runs, record_property: Any, name: str) -> None:
    check(runs, name, record_property)


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_goes_on_exactly(ranks: RankPool, runs: Runs, tmp_path: Path, lora: bool) -> None:
    """Also where the reference's log-probabilities, which a run of all weights keeps beside the data, are gone."""

    def recipe(output: str) -> dict[str, Any]:
        said = runs.recipe("e4b", {"loss": "sigmoid"}, tmp_path / output)
        said["data"] |= {"path": str(write_pairs(tmp_path / "data", pictures=False)), "cache": str(tmp_path / output)}
        said["data"]["eval"] = None
        said["train"] |= {"eval_every": 0, "global_batch_size": 4}
        return said if lora else {key: value for key, value in said.items() if key != "lora"}

    ranks.run(train_data, recipe("whole"), ["train.steps=6"], world_size=1, timeout_s=300)
    ranks.run(train_data, recipe("cut"), ["train.steps=3"], world_size=1, timeout_s=300)
    kept = list((tmp_path / "cut").rglob("ref_logps-*.npy"))
    assert len(kept) == (0 if lora else 1)
    for path in kept:
        path.unlink()
    ranks.run(train_data, recipe("cut"), ["train.steps=6"], world_size=1, timeout_s=300)
    whole, cut = (
        [{k: v for k, v in line.items() if k not in TIMED} for line in logged(tmp_path / name)]
        for name in ("whole", "cut")
    )
    assert len(whole) == 6 and whole == cut
    assert whole[0]["rewards/margins"] == 0 or not lora
    assert whole[-1]["rewards/margins"] > 0


def test_ends_early(ranks: RankPool, runs: Runs, tmp_path: Path) -> None:
    """What does not move does not become better: the first evaluation stays the best one, and its checkpoint."""
    said = runs.recipe("e4b", {"loss": "sigmoid"}, tmp_path / "run")
    said["data"] |= {"path": str(write_pairs(tmp_path / "data", pictures=False)), "cache": str(tmp_path / "cache")}
    said["data"]["eval"] = said["data"]["path"]
    said["train"] |= {"steps": 9, "eval_every": 1, "patience": 2, "global_batch_size": 2}
    said["checkpoint"] = {"keep": 1}
    still = ["optimizer.lr=0", "optimizer.min_lr=0"]
    assert ranks.run(train_data, said, still, world_size=1) == [(3, False)]
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines if "eval_loss" in line] == [1, 2, 3]
    assert len({line["eval_loss"] for line in lines if "eval_loss" in line}) == 1
    assert {path.name for path in (tmp_path / "run").glob("iter_*")} == {"iter_0000001", "iter_0000003"}
    # With more patience it goes on.
    assert ranks.run(train_data, said, [*still, "train.patience=3"], world_size=1) == [(4, False)]
