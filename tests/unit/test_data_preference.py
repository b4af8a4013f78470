"""Records of preferences: pairs and labelled answers, as samples, in batches and packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.errors import DataError
from bridge.toy import write_toy
from recipes.data import Batches, BatchOptions, CorpusOptions, Supervise, open_corpus
from recipes.data.preference import LABELLED, PAIRS, of_its_kind, parse
from recipes.data.sample import Where

WHERE = Where("a.jsonl", 3)
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "y"), ("assistant", "no"))
)


def pairs_of(record: Any) -> list[str]:
    samples, _ = parse(record, WHERE, CorpusOptions("x", 64, records=PAIRS))
    assert {sample.form for sample in samples} == {"preference"}
    return ["/".join(str(message.parts[0]) for message in sample.messages) for sample in samples]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "y", "rejected": "no"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "score": 3},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
    ],
)
def test_a_pair_however_it_is_written(record: Any) -> None:
    assert pairs_of(record) == ["q/y", "q/no"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q", "chosen": "y"}, "has no rejected"),
        ({"chosen": "y", "rejected": "no"}, "has no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [BAD, BAD]}, "differ before their last"),
        ({"prompt": [GOOD], "chosen": "y", "rejected": "no"}, "behind a message of the user"),
        ({"prompt": "q", "chosen": [GOOD, GOOD], "rejected": [BAD]}, "chosen: expected a string or one message"),
        ({"prompt": "q", "chosen": "y", "rejected": 3}, "rejected: expected"),
        ("text", "expected an object"),
    ],
)
def test_what_is_no_pair_is_named(record: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        pairs_of(record)
    assert str(caught.value).startswith("a.jsonl:3") and message in str(caught.value)


def test_an_answer_with_a_label() -> None:
    options = CorpusOptions("x", 64, records=LABELLED)
    samples, wanted = parse({"prompt": "q", "completion": "y", "label": True}, WHERE, options)
    assert wanted and len(samples) == 1 and samples[0].messages[-1].parts == ("y",)
    with pytest.raises(DataError, match="label: expected true or false, found 1"):
        parse({"prompt": "q", "completion": "y", "label": 1}, WHERE, options)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy("e4b", folder / "toy", dtype="float32", text_only=True)
    return folder / "toy"


def corpus_of(toy: Path, folder: Path, **options: Any) -> Any:
    rows = [{"prompt": f"What is {i}?", "chosen": str(i), "rejected": f"It is {i} " * (i % 5 + 1)} for i in range(30)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = {"supervise": Supervise("last"), "records": PAIRS, "cache": str(folder / "cache")}
    return open_corpus(CorpusOptions(str(folder / "pairs.jsonl"), **{"seq_length": 128, **said, **options}), toy)


def test_the_kind_is_read_off_the_first_record(toy: Path, tmp_path: Path) -> None:
    corpus_of(toy, tmp_path)
    assert of_its_kind(CorpusOptions(str(tmp_path / "pairs.jsonl"), 64)).records == PAIRS


@pytest.mark.parametrize("packing", [False, True])
def test_pairs_stay_together(toy: Path, tmp_path: Path, packing: bool) -> None:
    """In every batch answers 2i and 2i + 1 are to one prompt, the chosen one first; labels know theirs."""
    corpus = corpus_of(toy, tmp_path)
    options = BatchOptions(128, 2, packing=packing, epochs=1, seed=1, workers=0)
    seen = 0
    with Batches(corpus, options) as batches:
        for batch in batches:
            numbers, labels = batch["sequence_ids"].flatten(), batch["labels"].flatten()
            assert ((numbers >= 0) == (labels != -100)).all()
            lengths = batch["completion_lengths"].tolist()
            assert np.bincount(numbers[numbers >= 0], minlength=len(lengths)).tolist() == lengths
            assert len(lengths) % 2 == 0
            if not packing:
                assert len(batch["input_ids"]) == 4
            answers = [corpus.tokenizer.decode(labels[numbers == number]) for number in range(len(lengths))]
            for chosen, rejected in zip(answers[::2], answers[1::2], strict=True):
                number = chosen.removesuffix("<turn|>").strip()
                assert rejected.startswith((f"It is {number} ", f"It is {number}<"))
            seen += len(lengths)
    assert seen == len(corpus) == 60


def test_a_pair_is_kept_or_dropped_whole(toy: Path, tmp_path: Path) -> None:
    longest = int(corpus_of(toy, tmp_path).lengths.max())
    corpus = corpus_of(toy, tmp_path, seq_length=longest - 1)
    assert corpus.statistics.dropped["too long"] and len(corpus) == 2 * corpus.statistics.kept < 60
    packed = corpus_of(toy, tmp_path, seq_length=longest + 8, one_row=True)
    assert int(packed.lengths.reshape(-1, 2).sum(1).max()) <= longest + 8 and len(packed) < 60
