"""`evaluate`, and `eval.metrics` while a model trains: one pair of numbers for a model and its data, in any layout."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bridge.cli import app
from bridge.convert.manifest import MegatronFolder
from bridge.errors import BridgeError, DataError
from bridge.generate.sampling import SamplingOptions
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from recipes.data.options import CorpusOptions
from recipes.evaluate import EvaluationTask, evaluate_model
from recipes.metrics.named import token_f1

from .conftest import Toy
from .evaluation_kit import reference
from .generation_kit import answer, encode_prompts, run_recipe, task

ROWS, TOKENS = 10, 12
_PAIRS = [(animal, place) for animal in ("cat", "dog") for place in "abcde"]
# Numbers without a rule: what a few steps do not teach.
QUESTIONS = {
    f"the {animal} in the {place}": f"{place} {animal} {7919 * number % 97}"
    for number, (animal, place) in enumerate(_PAIRS)
}
LAYOUTS = {
    "one rank": Parallel(),
    "TP2+SP": Parallel(tp=2, sequence_parallel=True),
    "PP2": Parallel(pp=2),
    "EP2": Parallel(ep=2),
    "CP2": Parallel(cp=2),
}


@dataclass(frozen=True)
class Trained:
    """A run that knows a little, as a Megatron checkpoint and as an HF folder; its data, and its log."""

    run: Path
    hf: Path
    data: Path
    cache: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "log.jsonl").read_text().splitlines()]

    def task(self, parallel: Parallel, metrics: tuple[str, ...] = ()) -> EvaluationTask:
        checkpoint = MegatronFolder.open(self.run)
        asked = task(self.hf, parallel, weights=checkpoint.weights, megatron=True)
        options = CorpusOptions(str(self.data), 64, cache=str(self.cache))
        sampling = SamplingOptions(max_new_tokens=TOKENS, stop_token_ids=(1, 106, 50))
        return EvaluationTask(asked, self.hf, options, sampling, 40, metrics, micro_batch_size=3)


@pytest.fixture(scope="module")
def trained(ranks: RankPool, toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "chats.jsonl"
    rows = [{"prompt": question, "completion": wanted} for question, wanted in QUESTIONS.items()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Trained(folder / "run", folder / "hf", data, folder / "cache")
    said: dict[str, Any] = {
        "output": str(found.run),
        "model": {"hf": str(toy("26b-a4b")), "dtype": "float32"},
        "data": {"path": str(data), "eval": str(data), "cache": str(found.cache)},
        "train": {"steps": 10, "global_batch_size": 10, "micro_batch_size": 5, "seq_length": 64, "eval_every": 5},
        "eval": {"metrics": ["exact_match", "token_f1"], "metric_tokens": TOKENS},
        "optimizer": {"lr": 4e-3},
        "export": {"hf": str(found.hf)},
        "log": {"tensorboard": True},
    }
    ranks.run(run_recipe, said, ["train.samples=3"], world_size=2)
    return found


@pytest.fixture(scope="module")
def expected(ranks: RankPool, trained: Trained) -> dict[str, float]:
    """By definition: transformers on the exported folder, and the answers that `generate` gives to the questions."""
    said = {
        "output": "nowhere",
        "model": {"hf": str(trained.hf)},
        "data": {"path": str(trained.data), "eval": str(trained.data), "cache": str(trained.cache)},
        "train": {"steps": 1, "seq_length": 64, "eval_every": 1},
    }
    (values,) = ranks.run(reference, said, world_size=1)
    prompts = trained.data.with_name("prompts.jsonl")
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    (encoded,) = ranks.run(encode_prompts, trained.hf, prompts, world_size=1)
    options = SamplingOptions(max_new_tokens=TOKENS, stop_token_ids=(1, 106, 50))
    (found,) = ranks.run(answer, task(trained.hf), encoded, options, world_size=1)
    (texts,) = ranks.run(
        texts_of, trained.hf, [list(completion.tokens) for completion in found.completions], world_size=1
    )
    pairs = list(zip(texts, QUESTIONS.values(), strict=True))
    values["exact_match"] = sum(text == wanted for text, wanted in pairs) / ROWS
    values["token_f1"] = sum(token_f1(text, wanted) for text, wanted in pairs) / ROWS
    return values


def texts_of(folder: Path, answers: list[list[int]]) -> list[str]:
    """On a rank: the texts of answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_numbers_in_every_layout(
    ranks: RankPool, trained: Trained, expected: dict[str, float], layout: str
) -> None:
    parallel = LAYOUTS[layout]
    metrics = ("exact_match", "token_f1")
    found, *others = ranks.run(evaluate_model, trained.task(parallel, metrics), world_size=parallel.world_size)
    assert all(other == found for other in others)
    assert found.tokens == expected["eval_tokens"]
    assert found.loss == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert found.token_accuracy == expected["eval_token_accuracy"]
    assert 0.1 < found.token_accuracy < 1, "else it would say nothing"
    assert found.metrics == {name: pytest.approx(expected[name]) for name in metrics}


def test_a_run_logs_what_evaluate_says(trained: Trained, expected: dict[str, float]) -> None:
    """On the line of the loss, at every evaluation, and in TensorBoard; beside it the samples, with what was wanted."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluations = [line for line in trained.log if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [5, 10]
    assert evaluations[-1]["eval_exact_match"] == pytest.approx(expected["exact_match"])
    assert evaluations[-1]["eval_token_f1"] == pytest.approx(expected["token_f1"]) and expected["token_f1"] > 0
    events = EventAccumulator(str(trained.run / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("eval_token_f1")]
    assert shown == pytest.approx([line["eval_token_f1"] for line in evaluations], rel=1e-6)
    lines = [json.loads(line) for line in (trained.run / "samples" / "step-10.jsonl").read_text().splitlines()]
    assert [line["reference"] for line in lines] == list(QUESTIONS.values())[:3]


def test_what_a_function_raises_names_it_and_the_row(
    ranks: RankPool, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "picky.py").write_text(
        "def cats(answer, reference):\n    if 'dog' in reference:\n        raise ValueError('a dog')\n    return 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = trained.task(Parallel(tp=2, sequence_parallel=True), ("picky:cats",))
    with pytest.raises(DataError, match=r"chats.jsonl:6: picky:cats raises ValueError: a dog"):
        ranks.run(evaluate_model, asked, world_size=2)
    (found,) = ranks.run(evaluate_model, replace(asked, rows=5, model=trained.task(Parallel()).model), world_size=1)
    assert found.metrics == {"picky:cats": 1.0}


def test_the_command(trained: Trained, expected: dict[str, float], tmp_path: Path) -> None:
    """On the data by other names, as evaluated while training."""
    data = tmp_path / "asked.jsonl"
    data.write_text("".join(json.dumps({"asked": q, "wanted": a, "id": 3}) + "\n" for q, a in QUESTIONS.items()))
    names = ("--format", "prompt-completion", "--column", "prompt=asked", "--column", "completion=wanted")
    more = ("--metrics", "exact_match", "--json", tmp_path / "found.json", "--micro-batch-size", 4)
    result = evaluate(trained, *names, *more, data=data)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"loss", "tokens", "token_accuracy", "metrics"}
    assert found["loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert found["metrics"] == {"exact_match": pytest.approx(expected["exact_match"])}
    for word in ("token_accuracy", "exact_match", "reading data", "loss of 10 samples"):
        assert word in result.output


def evaluate(trained: Trained, *arguments: object, data: Path | None = None) -> Any:
    said = ["evaluate", trained.run, "--data", data or trained.data, "--cache", trained.cache, "--dtype", "float32"]
    said += ["--seq-length", 64, "--max-new-tokens", TOKENS, *arguments]
    return CliRunner().invoke(app, list(map(str, said)), catch_exceptions=False)


def test_what_makes_no_sense_is_said_before_anything_is_loaded(trained: Trained, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the cat"}\n')
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--metrics", "rouge"), "--metrics: 'rouge' is no metric; there are exact_match"),
        (("--metrics", "absent:function"), "absent:function cannot be imported"),
        (("--metrics", "json_tree"), "chats.jsonl:1: --metrics=json_tree: the answer is no JSON"),
        (("--metrics", "exact_match", "--data", text), "text.jsonl:1: asks nothing"),
        (("--data", tmp_path / "no.jsonl"), "no.jsonl"),
        (("--tp", 3), "tp=3"),
        (("--dtype", "int8"), "--dtype"),
        (("--column", "prompt"), "--column prompt: is written OURS=THEIRS"),
        (("--format", "chat"), "format"),
        (("--adapter", tmp_path / "no"), "not a folder"),
        (("--seq-length", 4), "no sample"),
        (("--json", tmp_path / "no" / "found.json"), "its folder does not exist"),
    ]
    for arguments, message in cases:
        with pytest.raises(BridgeError, match=message):
            evaluate(trained, *arguments)


def test_an_adapter(ranks: RankPool, toy: Toy, trained: Trained, tmp_path: Path) -> None:
    """With an adapter, as with it merged into its base."""
    from .generation_kit import save_adapter

    base, adapter, merged = toy("26b-a4b"), tmp_path / "adapter", tmp_path / "merged"
    ranks.run(save_adapter, base, adapter, world_size=1)
    done = CliRunner().invoke(
        app, ["adapter", "merge", str(adapter), str(merged), "--base", str(base)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    one = trained.task(Parallel(), ("token_f1",))
    for_base = replace(one, model=task(base, adapter=adapter), assets=base)
    found = [
        ranks.run(evaluate_model, asked, world_size=1)[0] for asked in (for_base, replace(one, model=task(merged)))
    ]
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5) and found[0].metrics == found[1].metrics
