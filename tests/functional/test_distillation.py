"""A larger model teaches a smaller one: every layout, packed and with pictures, live and asked once, on own answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import BridgeError
from bridge.ranks import RankPool

from .conftest import Toy
from .distillation_kit import recipe, write_chats
from .preference_kit import LINEARS, TIMED, apart, logged, train_data, width_of
from .reinforcement_kit import train_sampling

pytest.importorskip("torchvision", reason="transformers' Gemma 4 processors need torchvision")

BOUND, STEPS, ROWS = 1e-5, 3, 4
# What each log has to have.
NEEDED = {"loss", "divergence", "cross_entropy", "grad_norm", "eval_loss", "eval_divergence"}
TP2, PP2, CP2 = ["parallel.tp=2", "parallel.sequence_parallel=true"], ["parallel.pp=2"], ["parallel.cp=2"]
PACKED = ["data.packing=true"]
# All words with all that losses can have; the teacher's likeliest.
ALL = {"beta": 0.4, "temperature": 1.5, "cross_entropy": 0.3}
TOP = {"beta": 0.1, "top_k": 12}
E2B, MOE = ("e2b", "e4b"), ("26b-a4b", "e4b")
Case = tuple[tuple[str, str], dict[str, Any], int, list[str]]
LAYOUTS: dict[str, Case] = {
    "top, asked once, CP2, packed": (E2B, TOP, 2, [*CP2, *PACKED, "distill.cache=true"]),
}
MORE: dict[str, Case] = {
    "all, TP2+SP": (E2B, ALL, 2, TP2),
    "top, PP2, packed": (E2B, TOP, 2, [*PP2, *PACKED]),
    "all, EP2, of a dense teacher": (MOE, ALL, 2, ["parallel.ep=2"]),
    "all, DP2, overlap": (E2B, ALL, 2, ["parallel.overlap=true"]),
    "all, CP2, packed": (E2B, ALL, 2, [*CP2, *PACKED]),
    "all, CP2": (E2B, ALL, 2, CP2),
    "all, PP2 VPP2": (E2B, ALL, 2, [*PP2, "parallel.vpp=2"]),
    "all, packed": (E2B, ALL, 1, PACKED),
    "all, an expert teacher, EP2": (("26b-a4b", "26b-a4b"), ALL, 2, ["parallel.ep=2"]),
    "top, an expert teacher, TP2+SP EP2": (("26b-a4b", "26b-a4b"), TOP, 2, [*TP2, "parallel.ep=2"]),
    "top, TP2+SP": (E2B, TOP, 2, TP2),
    "top, asked once, TP2+SP PP2": (E2B, TOP, 4, [*TP2, *PP2, "distill.cache=true"]),
    "top, asked once, DP2, packed": (E2B, TOP, 2, [*PACKED, "distill.cache=true"]),
    "top, EP2": (MOE, TOP, 2, ["parallel.ep=2"]),
    "all, own answers, PP2": (E2B, {**ALL, "lmbda": 0.6, "max_new_tokens": 8}, 2, PP2),
    "all, own answers, TP2+SP": (E2B, {**ALL, "lmbda": 0.6, "max_new_tokens": 8}, 2, TP2),
    "all, own answers, CP2": (E2B, {**ALL, "lmbda": 0.6, "max_new_tokens": 8}, 2, CP2),
    "all, own answers, DP2": (E2B, {**ALL, "lmbda": 0.6, "max_new_tokens": 8}, 2, []),
}


class Runs:
    """Runs on all eight conversations a step, evaluated at the end; those of one rank once."""

    def __init__(self, ranks: RankPool, toy: Toy, folder: Path) -> None:
        self._ranks, self._toy, self._folder = ranks, toy, folder
        self.data = write_chats(folder / "data", pictures=True)
        self._alone: dict[str, list[dict[str, float]]] = {}

    def run(
        self, models: tuple[str, str], distill: dict[str, Any], world: int, overrides: list[str], name: str
    ) -> list[dict[str, float]]:
        # A teacher of the same kind has other weights: else there is nothing to learn, and only rounding is seen.
        student, teacher = self._toy(models[0]), self._toy(models[1], **({"seed": 1} if models[0] == models[1] else {}))
        said = recipe(student, teacher, self.data, self._folder / name, distill)
        said["data"]["eval"] = str(self.data)
        said["train"]["eval_every"] = STEPS
        said["lora"] = {"rank": 4, "alpha": 8, "targets": LINEARS} if "cross_entropy" not in distill else {}
        split = [part for part in ("tp=2", "pp=2", "cp=2") if part in str(overrides)]
        if world > 2 ** len(split):
            overrides = [*overrides, "train.micro_batch_size=1"]
        if "data.packing=true" in overrides:
            width = width_of(self.data, student, self._folder / "data" / "cache", ROWS)
            more = (f"train.global_batch_size={ROWS}", "train.micro_batch_size=1", f"train.seq_length={width}")
            overrides = [*overrides, *more]
        done = self._ranks.run(train_data, said, overrides, world_size=world, timeout_s=400)
        assert done == [(STEPS, False)] * world
        return logged(self._folder / name)

    def alone(self, models: tuple[str, str], distill: dict[str, Any]) -> list[dict[str, float]]:
        key = f"{models} {distill}"
        if key not in self._alone:
            self._alone[key] = self.run(models, distill, 1, [], f"alone {len(self._alone)}")
        return self._alone[key]


@pytest.fixture(scope="module")
def runs(ranks: RankPool, toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, toy, tmp_path_factory.mktemp("distillation"))


def check(runs: Runs, name: str, record_property: Any) -> None:
    models, distill, world, overrides = {**LAYOUTS, **MORE}[name]
    found = apart(runs.run(models, distill, world, overrides, name), runs.alone(models, distill), NEEDED)
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


def test_a_teacher_is_asked_once(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """The live teacher's figures to the last bit; files that are there are taken; what cannot be written is said.

    All words but one and the rest are all words, at the same temperature.
    """
    data = write_chats(tmp_path / "data", pictures=False)

    def figures(name: str, overrides: list[str]) -> list[dict[str, float]]:
        asked = {"top_k": 511, "beta": 0.0, "temperature": 0.25}
        said = recipe(toy("e2b"), toy("e4b"), data, tmp_path / name, asked)
        said["train"] |= {"steps": 2, "micro_batch_size": 4, "seq_length": 64}
        ranks.run(train_data, said, overrides, world_size=1)
        return [{k: v for k, v in line.items() if k not in TIMED} for line in logged(tmp_path / name)]

    live = figures("live", [])
    assert live[1]["divergence"] < live[0]["divergence"] == live[0]["loss"]
    for found, each in zip(figures("all", ["distill.top_k=0"]), live, strict=True):
        assert found == {name: pytest.approx(value, rel=BOUND) for name, value in each.items()}
    assert figures("first", ["distill.cache=true"]) == live
    ids, logps = sorted((tmp_path / "data" / "cache").rglob("teacher-*.npy"))
    made = logps.stat().st_mtime_ns
    assert figures("second", ["distill.cache=true"]) == live
    assert logps.stat().st_mtime_ns == made, "they are taken as they are"
    ids.write_bytes(ids.read_bytes()[:100])
    logps.unlink()
    logps.mkdir()
    with pytest.raises(BridgeError, match=re.escape(f"{logps}: cannot be written")):
        figures("third", ["distill.cache=true"])
    assert not list((tmp_path / "data" / "cache").rglob("*.partial"))


def test_a_run_on_own_answers_that_goes_on_is_the_run_itself(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """A share of the steps is of own answers; a signal comes while they are sampled."""
    data = write_chats(tmp_path / "data", pictures=False)
    keys = {"beta": 1.0, "lmbda": 0.5, "max_new_tokens": 8, "max_rows": 4}
    said = {name: recipe(toy("e2b"), toy("e4b"), data, tmp_path / name, keys) for name in ("whole", "parts")}
    steps = ["train.steps=6", "train.seq_length=64", "train.micro_batch_size=4"]
    assert ranks.run(train_sampling, said["whole"], steps, world_size=1) == [(False, 6)]
    whole = logged(tmp_path / "whole")
    own = [line["on_policy"] for line in whole]
    assert set(own) == {0.0, 1.0}
    # Once a step, and in one of own answers twice more; the signal comes at the last time of the first such step.
    stopped = own.index(1.0)
    assert ranks.run(train_sampling, said["parts"], steps, stopped + 2, world_size=1) == [(True, stopped)]
    assert ranks.run(train_sampling, said["parts"], steps, world_size=1) == [(False, 6)]

    def plain(lines: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]

    assert plain(logged(tmp_path / "parts")) == plain(whole)


@pytest.mark.parametrize(
    ("student", "teacher", "overrides", "message"),
    [
        ("e2b", "12b", [], "sees pictures otherwise than the model"),
        ("e2b", "e4b", ["distill.top_k=512"], "distill.top_k=512: the teacher has 512 tokens; 0 is all of them"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(
    ranks: RankPool, toy: Toy, tmp_path: Path, student: str, teacher: str, overrides: list[str], message: str
) -> None:
    data = write_chats(tmp_path / "data", pictures=True)
    said = recipe(toy(student), toy(teacher), data, tmp_path / "run", {})
    with pytest.raises(BridgeError, match=re.escape(message)):
        ranks.run(train_data, said, overrides, world_size=1)
