"""What is evaluated on: never what is trained on, unless asked for by name; the same rows whatever the seed."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bridge.cli import app
from bridge.errors import DataError, UsageError
from bridge.geometry import Geometry
from recipes.config import load_recipe, resolve
from recipes.data.evaluation import Opened, open_sets
from recipes.data.options import CorpusOptions
from recipes.data.selection import first_samples, held_out
from recipes.data.training import corpora, streams

from .data_helpers import chat, corpus_of, write_jsonl

ROWS = [chat(f"what is {number}", f"it is {number * number}") for number in range(30)]


def texts(corpus: Any) -> set[bytes]:
    return {corpus[sample].ids.tobytes() for sample in range(len(corpus))}


def test_a_part_is_a_corpus(tmp_path: Path, model: Path) -> None:
    corpus = corpus_of(tmp_path, model, ROWS)
    part = first_samples(corpus, 4)
    assert len(part) == 4 and part.lengths.tolist() == corpus.lengths[:4].tolist()
    assert [str(part.where(n)) for n in range(4)] == [str(corpus.where(n)) for n in range(4)]
    assert (
        first_samples(corpus, 0) is corpus is first_samples(corpus, 30)
        and len(first_samples(first_samples(corpus, 4), 2)) == 2
    )
    assert len({corpus.fingerprint, part.fingerprint, first_samples(corpus, 5).fingerprint}) == 3


def test_what_is_held_out_is_held_out(tmp_path: Path, model: Path) -> None:
    """Every sample is on one side, the same records whatever their order; what says the same is on the same side."""
    corpus = corpus_of(tmp_path, model, ROWS)
    rest, held = held_out(corpus, 0.2)
    assert len(held) == 6 and len(rest) == 24
    assert texts(rest) | texts(held) == texts(corpus) and not texts(rest) & texts(held)
    for name in ("again", "thrice"):
        (tmp_path / name).mkdir()
    again = corpus_of(tmp_path / "again", model, random.Random(1).sample(ROWS, len(ROWS)))
    assert texts(held_out(again, 0.2)[1]) == texts(held)
    # Three times each, in three places.
    thrice = corpus_of(tmp_path / "thrice", model, ROWS * 3)
    rest, held = held_out(thrice, 0.2)
    assert len(held) == 18 and not texts(rest) & texts(held)


def test_which_ones_does_not_change(tmp_path: Path, model: Path) -> None:
    """The least digests of ids and media, of all samples of a record: a run that goes on holds out what it held out."""
    rows = [*ROWS, *ROWS[:9], chat(*[f"{number} {'and so on ' * 6}" for number in range(8)])]
    corpus = corpus_of(tmp_path, model, rows, seq_length=160, overlong="split")
    assert len(corpus) > len(rows) and corpus.where(39) == corpus.where(len(corpus) - 1)
    for samples in (corpus, first_samples(corpus, 33)):
        digests: dict[bytes, list[int]] = {}
        for line in dict.fromkeys(samples.where(sample).line for sample in range(len(samples))):
            of_line = [sample for sample in range(len(samples)) if samples.where(sample).line == line]
            said = b"".join(samples[sample].ids.tobytes() + b"()" for sample in of_line)
            digests.setdefault(hashlib.blake2b(said, digest_size=16).digest(), []).extend(of_line)
        for fraction in (0.01, 0.2, 0.6):
            taken: list[int] = []
            for key in sorted(digests):
                taken += digests[key] if len(taken) < max(1, round(fraction * len(samples))) else []
            rest, held = held_out(samples, fraction)
            assert held.samples.tolist() == sorted(taken)
            assert rest.samples.tolist() == sorted({*range(len(samples))} - {*taken})


def test_how_many_are_held_out_is_said_once(tmp_path: Path, model: Path) -> None:
    """By `data prepare` and by a run; of pairs, pairs."""
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    pairs = [{"prompt": f"say {n}", "chosen": str(n), "rejected": f"no {n}"} for n in range(10)]
    others = write_jsonl(tmp_path / "b.jsonl", pairs)
    known = [f"model.hf={model}", f"data.cache={tmp_path / 'cache'}", "data.val_fraction=0.2", "train.eval_every=1"]
    keys = ["sft/smoke", f"data.path={path}", *known]
    said = "6 of 30 samples are held out and evaluated on, chosen by their content (data.val_fraction=0.2)"
    result = CliRunner().invoke(app, ["data", "prepare", *keys], catch_exceptions=False)
    assert result.output.count(said) == result.output.count("held out") == 1
    recipe = load_recipe(keys[0], keys[1:])
    found = streams(recipe, Geometry.from_folder(model), 0, 1)
    assert [line for line in found.notes if "held out" in line] == [said]
    answers = corpora(load_recipe("dpo/smoke", [f"data.path={others}", *known, "train.eval_rows=1"]))
    assert len(answers.train) == 16 and answers.notes == (
        said.replace("6 of 30", "2 of 10"),
        "evaluation is of the first 1 of 2 samples (train.eval_rows)",
    )


def test_pieces_of_a_record_stay_together(tmp_path: Path, model: Path) -> None:
    long = [chat(*[f"{word} {number} {'and so on ' * 6}" for number in range(8)]) for word in "abcdefgh"]
    corpus = corpus_of(tmp_path, model, long, seq_length=160, overlong="split")
    assert len(corpus) > 2 * len(long)
    rest, held = held_out(corpus, 0.3)
    lines = [{part.where(sample).line for sample in range(len(part))} for part in (rest, held)]
    assert lines[0] and lines[1] and not lines[0] & lines[1]


def test_a_fraction_leaves_something_of_both(tmp_path: Path, model: Path) -> None:
    corpus = corpus_of(tmp_path, model, ROWS[:3])
    assert [len(part) for part in held_out(corpus, 0.01)] == [2, 1]
    (tmp_path / "same").mkdir()
    same = corpus_of(tmp_path / "same", model, ROWS[:1] * 5)
    with pytest.raises(DataError, match=r"val_fraction=0.5 of 5 samples \(1 different ones\) leaves none to train on"):
        held_out(same, 0.5)


def opened(model: Path, tmp_path: Path, *keys: str) -> Opened:
    said = {
        "output": "run",
        "model": {"hf": str(model)},
        "data": {"cache": str(tmp_path / "cache")},
        "train": {"steps": 3, "seq_length": 256, "eval_every": 1},
    }
    return corpora(resolve(said, keys))


def test_named_sets_and_what_is_said_of_them(tmp_path: Path, model: Path) -> None:
    train, other = write_jsonl(tmp_path / "train.jsonl", ROWS[:20]), write_jsonl(tmp_path / "o.jsonl", ROWS[20:])
    data = opened(model, tmp_path, f"data.path={train}", f"data.eval={other}")
    assert set(data.evaluation) == {""} and not data.notes and not texts(data.train) & texts(data.evaluation[""])
    data = opened(
        model, tmp_path, f"data.path={train}", f"data.eval.a={other}", f"data.eval.b=[{train}]", "train.eval_rows=15"
    )
    assert {name: len(corpus) for name, corpus in data.evaluation.items()} == {"a": 10, "b": 15}
    assert data.notes == (
        f"evaluation b is on the data that is trained on ({train})",
        "evaluation b is of the first 15 of 20 samples (train.eval_rows)",
    )
    data = opened(model, tmp_path, f"data.path={train}", f"data.eval.a={other}", "data.val_fraction=0.25")
    assert {name: len(corpus) for name, corpus in data.evaluation.items()} == {"a": 10, "held_out": 5}
    assert len(data.train) == 15
    assert set(opened(model, tmp_path, f"data.path={train}", "data.val_fraction=0.25").evaluation) == {""}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.eval=DATA", "data.val_fraction=0.1"], "name the set, data.eval.NAME=PATH"),
        (["data.eval.held_out=DATA", "data.val_fraction=0.1"], "is the name of what data.val_fraction holds out"),
        (["data.eval.a.b=DATA"], r"data.eval.a={'b': .*: is a path"),
        (["data.eval.a="], "data.eval.a=None: is a path"),
        (["data.eval=DATA", "data.eval_split=test"], "data.eval_split=test: .*data.jsonl has no splits"),
        (["data.eval_split=test"], "data.eval_split=test: .*data.jsonl has no splits"),
    ],
)
def test_sets_that_cannot_be(tmp_path: Path, model: Path, keys: list[str], message: str) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ROWS[:3])
    with pytest.raises(UsageError, match=message):
        opened(model, tmp_path, f"data.path={data}", *(key.replace("DATA", str(data)) for key in keys))


def test_a_data_set_with_splits_is_not_evaluated_on_its_training_split(tmp_path: Path, model: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([dict(row) for row in ROWS])
    parts = {"train": rows.select(range(10)), "test": rows.select(range(10, 13)), "dev": rows.select(range(13, 18))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"train": parts["train"]}).save_to_disk(tmp_path / "alone")
    path = f"data.path={tmp_path / 'splits'}"
    data = opened(model, tmp_path, path, f"data.eval={tmp_path / 'splits'}")
    assert len(data.train) == 10 and len(data.evaluation[""]) == 5, "dev comes before test"
    assert len(opened(model, tmp_path, path, "data.eval_split=test").evaluation[""]) == 3
    asked = opened(model, tmp_path, path, "data.eval_split=train")
    assert asked.notes == (f"evaluation is on the data that is trained on ({tmp_path / 'splits'})",)
    with pytest.raises(UsageError, match=r"alone: has no split of its own for evaluation \(there are train\)"):
        opened(model, tmp_path, path, f"data.eval={tmp_path / 'alone'}")


def test_splits_of_the_hub(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which split is taken, without the network: what the hub lists, and the first that is for evaluation."""
    datasets = pytest.importorskip("datasets")
    listed = {"org/data": ["train", "test", "validation"], "org/bare": ["train"]}
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, subset: listed[name])
    corpus = corpus_of(tmp_path, model, ROWS)
    asked: list[tuple[Any, str]] = []

    def open_one(options: CorpusOptions) -> Any:
        asked.append((options.path, options.split))
        return corpus

    def sets(*keys: str) -> None:
        asked.clear()
        said = {"output": "run", "data": {"path": "org/data"}, "train": {"steps": 3, "eval_every": 1}}
        recipe = resolve(said, keys)
        open_sets(recipe, CorpusOptions("org/data", 64, split=recipe.data.split), open_one)

    sets("data.eval=org/data")
    assert asked == [("org/data", "train"), (("org/data",), "validation")]
    sets("data.eval=org/data", "data.split=validation")
    assert asked[1] == (("org/data",), "test")
    sets("data.eval_split=test")
    assert asked[1] == (("org/data",), "test")
    with pytest.raises(UsageError, match=r"org/bare: has no split of its own"):
        sets("data.eval=org/bare")
    with pytest.raises(DataError, match="its splits cannot be read"):
        sets("data.eval=org/absent")
