"""Evaluation that can be trusted: one loss for one model and its data, and what a run makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.ranks import RankPool

from .evaluation_kit import evaluations, recipe, reference, write_chats

# Of one set, over batch sizes and layouts, absolute; and against transformers, relative.
ONE_LOSS, AGAINST_TRANSFORMERS = 1e-6, 1e-6
ROWS = 11
# No batch size divides eleven rows, the largest leaves most of a second batch empty.
BATCHES = [
    [f"train.micro_batch_size={size}", f"data.packing={packing}"] for packing in ("false", "true") for size in (1, 3, 8)
]
LAYOUTS: dict[str, tuple[str, int, list[str]]] = {
    "one rank": ("e2b", 1, []),
    "TP2": ("e2b", 2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "PP2": ("e2b", 2, ["parallel.pp=2"]),
    "CP2": ("e2b", 2, ["parallel.cp=2"]),
    "DP2": ("e2b", 2, []),
    "VPP2": ("e4b", 2, ["parallel.pp=2", "parallel.vpp=2"]),
    "EP2": ("26b-a4b", 2, ["parallel.ep=2"]),
}


class Losses:
    """Runs, and what transformers says of the same data, computed once for each variant."""

    def __init__(self, ranks: RankPool, toy: Callable[..., Path], folder: Path) -> None:
        self.ranks, self.toy, self.folder = ranks, toy, folder
        self.data = write_chats(folder / "chats.jsonl", ROWS, seed=1)
        self.other = write_chats(folder / "other.jsonl", 4, seed=2)
        self.one = write_chats(folder / "one.jsonl", 1, seed=3)
        self._references: dict[str, dict[str, float]] = {}

    def said(self, variant: str) -> dict[str, Any]:
        return recipe(self.toy(variant), self.data, self.folder / "cache")

    def reference(self, variant: str) -> dict[str, float]:
        if variant not in self._references:
            (self._references[variant],) = self.ranks.run(reference, self.said(variant), world_size=1)
        return self._references[variant]


@pytest.fixture(scope="module")
def losses(ranks: RankPool, toy: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Losses:
    return Losses(ranks, toy, tmp_path_factory.mktemp("evaluation"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_loss_whatever_the_batch_and_the_layout(losses: Losses, record_property: Any, name: str) -> None:
    variant, world, layout = LAYOUTS[name]
    expected = losses.reference(variant)
    ours = losses.ranks.run(evaluations, losses.said(variant), layout, BATCHES, world_size=world)
    assert all(rank == ours[0] for rank in ours), "every rank decides by the same numbers"
    assert [values["eval_tokens"] for values in ours[0]] == [expected["eval_tokens"]] * len(BATCHES)
    found = [values["eval_loss"] for values in ours[0]]
    record_property("spread", max(found) - min(found))
    record_property("from transformers", max(abs(loss / expected["eval_loss"] - 1) for loss in found))
    assert max(found) - min(found) <= ONE_LOSS
    # Through one number for all layouts, so that no two of them are further apart.
    assert found == pytest.approx([expected["eval_loss"]] * len(found), rel=AGAINST_TRANSFORMERS)


def test_named_sets_few_rows_and_a_single_row(losses: Losses) -> None:
    named = ["data.eval=null", f"data.eval.chats={losses.data}", f"data.eval.other=[{losses.other}]"]
    cases = [
        named,
        [f"data.eval={losses.other}"],
        [f"data.eval={losses.one}", "train.micro_batch_size=8"],
        ["train.eval_rows=1"],
        ["train.eval_rows=1", "data.packing=true"],
        ["data.eval=null", "data.val_fraction=0.3"],
    ]
    (both, other, one, first, packed, held_out), _ = losses.ranks.run(
        evaluations, losses.said("e2b"), [], cases, world_size=2
    )
    assert set(both) == {"eval_loss", "eval_tokens", "eval_loss/chats", "eval_loss/other"}
    whole = losses.reference("e2b")
    assert both["eval_loss/chats"] == pytest.approx(whole["eval_loss"], abs=ONE_LOSS)
    assert both["eval_loss/other"] == pytest.approx(other["eval_loss"], abs=ONE_LOSS)
    # Over all of them, by tokens.
    tokens = whole["eval_tokens"] + other["eval_tokens"]
    assert both["eval_tokens"] == tokens
    weighed = (whole["eval_loss"] * whole["eval_tokens"] + other["eval_loss"] * other["eval_tokens"]) / tokens
    assert both["eval_loss"] == pytest.approx(weighed, abs=ONE_LOSS)
    assert 0 < one["eval_tokens"] < other["eval_tokens"] and one["eval_loss"] > 0
    assert first == pytest.approx(packed, abs=ONE_LOSS) and 0 < first["eval_tokens"] < whole["eval_tokens"]
    assert 0 < held_out["eval_tokens"] < whole["eval_tokens"]
