"""Recipes of several sources: their keys, what is said of them, and what they hold."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.errors import BridgeError, UsageError
from recipes.check import check_recipe, check_startable
from recipes.config import load_recipe, resolve, to_yaml
from recipes.data import Batches
from recipes.data.blend import Blend
from recipes.data.training import batch_options, corpora, rows_of_run, streams

from .blend_cases import CHATS_AND_CODE, said


def test_sources_of_a_recipe(model: Path, files: Path) -> None:
    """Each with its own keys, what it does not say as the data has it; the batches hold what was asked for."""
    own = "{path: [DIR/code.jsonl], name: sums, weight: 1, format: alpaca, max_samples: 25}"
    sources = f"[{{path: DIR/chats.jsonl, weight: 3}}, {own}]"
    recipe = said(model, files, sources)
    check_startable(recipe, 1)
    opened = corpora(recipe)
    assert isinstance(opened.train, Blend) and len(opened.train) == 45
    assert [(source.name, len(source.samples)) for source in opened.train.sources] == [("chats", 20), ("sums", 25)]
    assert opened.notes == ("source sums is of its first 25 of 30 samples (max_samples)",)
    with Batches(opened.train, batch_options(recipe)) as batches:
        rows, _ = batches.ahead(400, batches.position)
    assert sum(row[0] < 20 for row in rows) == pytest.approx(300, abs=2)
    assert {row[0] for row in rows} == set(range(45))
    assert [str(opened.train.where(sample)) for sample in (0, 44)] == [
        f"{files}/chats.jsonl:1",
        f"{files}/code.jsonl:25",
    ]
    assert resolve(json.loads(json.dumps(_plain(recipe)))) == recipe, "a resolved recipe is complete"


def _plain(recipe: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(to_yaml(recipe)))


def test_one_source_is_data_path(model: Path, files: Path) -> None:
    """The same tokens in the same order, and a checkpoint of one goes on with the other."""
    listed = said(model, files, "[{path: DIR/chats.jsonl}]")
    plain = resolve(_plain(listed), [f"data.path={files}/chats.jsonl"])
    assert not plain.data.sources, "an override takes the place of the recipe's own"
    assert resolve(_plain(plain), ["data.sources=[{path: x}]"]).data.path is None
    of = [Batches(corpora(recipe).train, batch_options(recipe)) for recipe in (listed, plain)]
    with of[0] as one, of[1] as other:
        for left, right in zip(islice(one, 30), islice(other, 30), strict=True):
            assert left["input_ids"].equal(right["input_ids"])
        assert one.state_dict() == other.state_dict() and set(one.state_dict()) == {"epoch", "row", "stream"}


def test_what_is_said_of_sources(model: Path, files: Path) -> None:
    """Once, before the first step: how much there is, how much is seen how often, what is not."""
    recipe = said(model, files, CHATS_AND_CODE)
    opened = corpora(recipe)
    found = streams(recipe, None, 0, 1, opened)  # type: ignore[arg-type]
    tokens = [int(source.samples.lengths.sum()) for source in opened.train.sources]  # type: ignore[union-attr]
    assert [line for line in found.notes if line.startswith("  source")] == [
        f"  source chats (weight=3): 20 samples, {tokens[0]} tokens, 20 rows; the run takes 30 rows (75.0%), 1.5 times "
        "all of them",
        f"  source code (weight=1): 30 samples, {tokens[1]} tokens, 30 rows; the run takes 10 rows (25.0%), 0.333 "
        f"times all of them, 20 rows (about {round(tokens[1] * 2 / 3)} tokens) are not used",
    ]
    assert found.facts["rows"] is None and [each["name"] for each in found.facts["sources"]] == ["chats", "code"]
    assert found.facts["sources"][1]["unused_rows"] == 20
    whole = said(
        model, files, "[{path: DIR/chats.jsonl, repeat: 2}, {path: DIR/code.jsonl, tokens: 100}]", "train.epochs=2"
    )
    _, factory = _prepared(whole)
    assert factory.train.steps == -(-2 * _epoch_rows(whole) // 4)


def _prepared(recipe: Any) -> tuple[Any, Any]:
    from recipes.data.training import prepared

    settled, factory = prepared(recipe)
    return factory, settled


def _epoch_rows(recipe: Any) -> int:
    return Batches(corpora(recipe).train, batch_options(recipe)).rows(0)


def test_held_out_of_every_source(model: Path, files: Path) -> None:
    """The same records whatever the seed and the weights, said, and evaluated on by the names of the sources."""
    keys = ("data.val_fraction=0.2", "train.eval_every=5")
    opened = corpora(said(model, files, CHATS_AND_CODE, *keys))
    assert {name: len(held) for name, held in opened.evaluation.items()} == {"chats": 4, "code": 6}
    assert (
        "4 of 20 samples of chats are held out and evaluated on, chosen by their content (data.val_fraction=0.2)"
        in opened.notes
    )
    again = corpora(said(model, files, CHATS_AND_CODE.replace("3", "1"), "train.seed=99", *keys))
    alone = corpora(said(model, files, "[{path: DIR/chats.jsonl}]", *keys))
    held = [
        {one[sample].ids.tobytes() for sample in range(len(one))}
        for one in (opened.evaluation["chats"], again.evaluation["chats"], alone.evaluation["chats"])
    ]
    assert held[0] == held[1] == held[2] and len(held[0]) == 4
    trained = {opened.train[sample].ids.tobytes() for sample in range(len(opened.train))}
    assert not trained & held[0] and len(opened.train) == 40


@pytest.mark.parametrize(
    ("sources", "keys", "message"),
    [
        ("[{files: a.jsonl}]", [], "unknown key data.sources[0].files; did you mean data.sources[0].path?"),
        ("[{path: a}, {path: b, wieght: 1}]", [], "unknown key data.sources[1].wieght; did you mean"),
        ("{path: a}", [], "data.sources is a list: data.sources=[{path: FILE, weight: 1}, ...]"),
        ("[a.jsonl]", [], "data.sources[0] is a group of keys, not a value"),
        ("[{path: a, weight: many}]", [], "data.sources[0].weight: Value 'many'"),
        ("[{weight: 1}]", [], "data.sources[0]: path is not set"),
        ("[{path: x/a.jsonl}, {path: y/a.jsonl}]", [], "[1]: is called a, as data.sources[0] is; set its name"),
        ("[{path: a, name: b/c}]", [], "data.sources[0].name=b/c: is what the log calls it"),
        ("[{path: a, weight: 0}, {path: b, weight: 0}]", [], "data.sources: every weight is 0"),
        ("[{path: a, weight: -1}, {path: b, weight: 1}]", [], "[0] (a): weight=-1.0: must be a number of at least 0"),
        ("[{path: a, weight: .nan}, {path: b, weight: 1}]", [], "data.sources[0] (a): weight=nan: must be a number"),
        ("[{path: a, weight: 1}]", [], "data.sources[0]: a weight has no meaning for the only source"),
        ("[{path: a, weight: 1}, {path: b}]", [], "data.sources[1] (b): has no weight, and others have"),
        (
            "[{path: a, weight: 1, tokens: 5}, {path: b, weight: 1}]",
            [],
            "data.sources[0] (a): tokens and weight both say",
        ),
        (
            "[{path: a, weight: 1, repeat: 2}, {path: b, weight: 1}]",
            [],
            "data.sources[0] (a): repeat and weight both say",
        ),
        ("[{path: a, tokens: 0}]", [], "data.sources[0] (a): tokens=0: must be at least 1"),
        ("[{path: a, repeat: 0}]", [], "data.sources[0] (a): repeat=0: must be at least 1"),
        ("[{path: a, max_samples: -1}]", [], "data.sources[0] (a): max_samples=-1: must be at least 0"),
        (
            "[{path: a, weight: 1}, {path: b, weight: 1}]",
            ["train.epochs=2"],
            "train.epochs=2: has no meaning where data.sources",
        ),
        ("[{path: a}]", ["data.path=b"], "data.path and data.sources: set one of them"),
    ],
)
def test_sources_that_cannot_be(sources: str, keys: list[str], message: str) -> None:
    base = {"output": "run", "model": {"hf": "toy"}, "train": {"steps": 3}}
    with pytest.raises(BridgeError) as caught:
        check_recipe(resolve(base, [f"data.sources={sources}", *keys]), 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_keys_of_sources_in_a_file(tmp_path: Path) -> None:
    text = "output: run\nmodel: {hf: toy}\ntrain: {steps: 3}\ndata:\n  sources:\n  - {path: a, wait: 1}\n"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(
        UsageError, match=re.escape("r.yaml: unknown key data.sources[0].wait; did you mean data.sources[0].weight?")
    ):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("recipe", "files_"), [("dpo/smoke", ("pairs", "more")), ("kto/smoke", ("labelled", "others"))]
)
def test_preferences_blend(model: Path, files: Path, recipe: str, files_: tuple[str, str]) -> None:
    """Pairs stay together, and an answer is put behind the prompt before it in its own source."""
    import torch

    sources = f"[{{path: {files}/{files_[0]}.jsonl, weight: 1}}, {{path: {files}/{files_[1]}.jsonl, weight: 3}}]"
    chosen = load_recipe(recipe, [f"model.hf={model}", f"data.cache={files / 'cache'}", f"data.sources={sources}"])
    check_startable(chosen, 1)
    opened = corpora(chosen)
    found = streams(chosen, None, 0, 1, opened)  # type: ignore[arg-type]
    assert len(found.answers) == 2, "a reference is asked by the source, and kept with it"
    together = 2 if recipe == "dpo/smoke" else 1
    assert [len(each.samples) for each in found.answers] == [8 * together, 5 * together]
    for each in found.answers:
        rows = np.arange(len(each.samples), dtype=np.float64)
        found.ref_logps[each.samples.fingerprint] = np.stack([rows, rows + 100])
    with found.train as batches:  # type: ignore[attr-defined]
        seen = [next(batches) for _ in range(20)]
    numbers = torch.cat([batch["sample_ids"] for batch in seen]).tolist()
    assert sum(number >= 8 * together for number in numbers) / len(numbers) == pytest.approx(0.75, abs=0.03)
    own = [number if number < 8 * together else number - 8 * together for number in numbers]
    assert torch.cat([batch["ref_logps"] for batch in seen]).tolist() == own
    if together == 2:
        assert all(second == first + 1 for first, second in zip(numbers[::2], numbers[1::2], strict=True))


def test_prompts_of_rollouts_blend(model: Path, files: Path) -> None:
    keys = [f"model.hf={model}", f"data.cache={files / 'cache'}", "train.steps=8", f"data.sources={CHATS_AND_CODE}"]
    recipe = load_recipe("grpo/smoke", [key.replace("DIR", str(files)) for key in keys])
    check_startable(recipe, 1)
    assert rows_of_run(recipe) == 16
    opened = corpora(recipe)
    found = streams(recipe, None, 0, 1, opened)  # type: ignore[arg-type]
    said_of = [line for line in found.notes if line.startswith("  source")]
    taken = [int(re.findall(r"the run takes (\d+) rows", line)[0]) for line in said_of]
    assert sum(taken) == 16 and taken[0] == pytest.approx(12, abs=1), "of rows, three in four"


def test_shown_and_prepared_by_the_source(model: Path, files: Path, tmp_path: Path) -> None:
    """`data show` and `data prepare` of a recipe with sources have each of them, by its name."""
    from typer.testing import CliRunner

    from bridge.cli import app

    text = f"output: run\nmodel: {{hf: {model}}}\ntrain: {{steps: 3, seq_length: 128}}\n"
    text += f"data: {{cache: {files / 'cache'}}}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    keys = [str(tmp_path / "recipe.yaml"), "data.sources=" + CHATS_AND_CODE.replace("DIR", str(files))]
    run = CliRunner()
    shown = run.invoke(app, ["data", "show", *keys, "-n", "1"])
    assert shown.exit_code == 0 and "source chats" in shown.output and "source code" in shown.output
    result = run.invoke(app, ["data", "show", *keys, "-n", "1", "--json", str(tmp_path / "shown.json")])
    assert result.exit_code == 0
    said = json.loads((tmp_path / "shown.json").read_text(encoding="utf-8"))
    assert {name: each["sample_count"] for name, each in said["sources"].items()} == {"chats": 20, "code": 30}
    result = run.invoke(app, ["data", "prepare", *keys, "--json", str(tmp_path / "made.json")])
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))["sets"]
    assert {name: each["samples"] for name, each in made.items()} == {"train/chats": 20, "train/code": 30}
