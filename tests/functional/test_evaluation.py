"""Evaluation that can be trusted: one loss for one model and its data, and what a run makes of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.ranks import RankPool

from . import training_kit
from .evaluation_kit import evaluations, recipe, reference, squares, train_scripted, train_signalled, write_chats
from .training_kit import Trouble, train_toy

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


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("world", [1, 2])
def test_the_best_checkpoint_stays_and_is_exported(
    ranks: RankPool, toy: Callable[..., Path], tmp_path: Path, world: int
) -> None:
    """A loss that is no number is not the best, the run says why it ended, and again where it is started again."""
    from bridge.convert.export import export_hf

    run = tmp_path / "run"
    said = training_kit.recipe(toy("e2b"), run, 8)
    keys = ["train.eval_every=1", "train.patience=3", "checkpoint.every=1", "checkpoint.keep=1"]
    keys.append(f"export.hf={tmp_path / 'exported'}")
    script = {1: float("nan"), 2: 2.0, 3: float("nan"), 4: 2.5, 5: 2.0, 6: 1.0}
    ended = ranks.run(train_scripted, said, keys, script, world_size=world)
    assert [(told.exit_code, told.step) for told in ended] == [(0, 5)] * world
    why = (
        "ended early after step 5 of 8: eval_loss was not better than 2 of step 2 in 3 evaluations "
        "(train.patience=3; with more it goes on)"
    )
    best = run / "iter_0000002"
    assert ended[0].said[-2:] == [why, f"exporting the best checkpoint, {best}"] and not any(t.said for t in ended[1:])
    assert sorted(path.name for path in run.glob("iter_*")) == ["iter_0000002", "iter_0000005"]
    for checkpoint in (best, run / "iter_0000005"):
        export_hf(checkpoint, tmp_path / checkpoint.name)
    weights = {
        name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("exported", best.name, "iter_0000005")
    }
    assert weights["exported"] == weights[best.name] != weights["iter_0000005"]
    logged = lines(run)
    evaluated = [line for line in logged if "eval_loss" in line]
    assert [line["eval_loss"] for line in evaluated] == ["nan", 2.0, "nan", 2.5, 2.0]
    # The eleven days of an evaluation, and the time of a save, are no time of training.
    assert all(line["tokens_per_s"] > 1 for line in logged if "tokens_per_s" in line)
    again = ranks.run(train_scripted, said, keys, script, world_size=world)
    assert [(told.exit_code, told.step) for told in again] == [(0, 5)] * world and why in again[0].said
    # With more patience it goes on, from where it was.
    more = ranks.run(train_scripted, said, [*keys, "train.patience=4", "train.steps=6"], script, world_size=world)
    assert more[0].step == 6 and not any(text.startswith("ended early") for text in more[0].said)
    assert [path.name for path in run.glob("iter_*")] == ["iter_0000006"]


def test_a_loss_that_is_no_number_is_never_the_best(ranks: RankPool, toy: Callable[..., Path], tmp_path: Path) -> None:
    """It was, and the run ended by it with a good conscience, and said «resuming» when it was started again."""
    said = training_kit.recipe(toy("e2b"), tmp_path, 4)
    script = dict.fromkeys(range(1, 5), float("nan"))
    (ended,) = ranks.run(train_scripted, said, ["train.eval_every=1", "train.patience=2"], script, world_size=1)
    assert ended.step == 2 and ended.said[-1] == (
        "ended early after step 2 of 4: eval_loss was no number in 2 evaluations "
        "(train.patience=2; with more it goes on)"
    )
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"], "nothing is kept as the best"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_an_evaluation_and_it_is_made_up_for(
    ranks: RankPool, toy: Callable[..., Path], tmp_path: Path, number: int
) -> None:
    """Between two microbatches, not when all are through; the step is saved, and its evaluation comes first later."""
    said = training_kit.recipe(toy("e2b"), tmp_path / "run", 3)
    keys = ["train.eval_every=2", "train.patience=5"]
    (first, taken), (second, _) = ranks.run(train_signalled, said, keys, number, 5, world_size=2)
    assert (first.step, second.step) == (2, 2) and taken == 5
    assert (first.exit_code, second.exit_code) == ((130, 75) if number == signal.SIGINT else (75, 75))
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not any("eval_loss" in line for line in lines(tmp_path / "run"))
    ranks.run(train_toy, said, keys, world_size=2)
    ranks.run(train_toy, said | {"output": str(tmp_path / "whole")}, keys, world_size=2)
    ours, whole = ([(line["step"], line.get("eval_loss")) for line in lines(tmp_path / n)] for n in ("run", "whole"))
    assert ours == whole and [step for step, loss in ours if loss is not None] == [2, 3]


def test_a_line_of_the_log_is_the_mean_of_its_steps(ranks: RankPool, toy: Callable[..., Path], tmp_path: Path) -> None:
    """Over tokens; also where another process did the first steps of a line."""
    said = training_kit.recipe(toy("e2b"), tmp_path / "each", 7)
    ranks.run(train_toy, said, [], world_size=1)
    some = said | {"output": str(tmp_path / "some")}
    keys = ["log.every=3", "train.z_loss=1e-9"]
    stop = Trouble(5, 0, signal.SIGTERM)
    assert ranks.run(train_toy, some, keys, stop, world_size=1) == [(True, 5)]
    ranks.run(train_toy, some, keys, world_size=1)
    each, ours = lines(tmp_path / "each"), lines(tmp_path / "some")
    assert [line["step"] for line in ours] == [3, 6, 7]
    for line, steps in zip(ours, (each[:3], each[3:6], each[6:]), strict=True):
        tokens = sum(step["supervised"] for step in steps)
        mean = sum(step["loss"] * step["supervised"] for step in steps) / tokens
        assert line["supervised"] == tokens and line["loss"] == pytest.approx(mean, rel=1e-6) and line["z_loss"] > 0


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, []),
        (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
        (2, ["parallel.cp=2"]),
        (2, ["parallel.pp=2"]),
    ],
    ids=["one rank", "TP2", "CP2", "PP2"],
)
def test_the_z_loss_is_logged_apart(
    ranks: RankPool, toy: Callable[..., Path], tmp_path: Path, world: int, layout: list[str]
) -> None:
    """Training and evaluation losses are of the same kind: cross entropy, as transformers has it."""
    said = training_kit.recipe(toy("e2b"), tmp_path, 1)
    ((entropy, squared),) = ranks.run(squares, str(toy("e2b")), said["train"]["seed"], world_size=1)
    # Large enough to be seen in the loss, were it there.
    ranks.run(train_toy, said, [*layout, "train.z_loss=0.1"], world_size=world)
    (line,) = lines(tmp_path)
    assert line["loss"] == pytest.approx(entropy, rel=1e-6)
    assert line["z_loss"] == pytest.approx(squared, rel=1e-6) and squared > 1


def test_the_best_by_a_metric_is_the_highest() -> None:
    """Of a loss the least; what is no number is never it; with another measure the best is looked for anew, aloud."""
    from types import SimpleNamespace

    from recipes.train.best import BestEvaluation
    from recipes.train.checkpoint import RunProgress

    said: list[str] = []

    def after(progress: RunProgress, best: str, *values: float) -> tuple[float | None, int, int]:
        for value in values:
            progress.step += 1
            recipe: Any = SimpleNamespace(eval=SimpleNamespace(best=best))
            BestEvaluation(recipe, progress, said.append).compare(value)
        return progress.best_eval, progress.best_step, progress.evals_since_best

    one = RunProgress()
    assert after(one, "loss", 3.0, 1.0, 2.0, float("nan")) == (1.0, 2, 2) and not said
    assert after(one, "json_tree", 0.5, 0.9, 0.9, 0.1) == (0.9, 6, 2)
    assert said == ["eval.best was loss and is json_tree: the best evaluation is looked for anew"]
