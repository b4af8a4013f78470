"""Where records are looked for, and how files, folders and datasets are read."""

from __future__ import annotations

import json
import os
import re
import sys
import types
from pathlib import Path
from typing import IO, Any

import pytest

from bridge.errors import DataError, UsageError
from recipes.data import CorpusOptions, open_corpus
from recipes.data.files import DataFile

from .data_helpers import ANSWER, GOOD, USER, chat, corpus_of, write_jsonl


def test_blank_lines_and_byte_order_marks(folder: Path, model: Path) -> None:
    opened = corpus_of(folder, model, [b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", "", "  ", GOOD])
    assert (len(opened), opened.statistics.read, opened.statistics.blank_lines) == (2, 2, 2)
    with pytest.raises(DataError, match="no sample to train on \\(no records\\)"):
        corpus_of(folder, model, ["", " "])


def test_an_array_over_many_lines_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('[\n{"text": "a"}\n]', encoding="utf-8")
    first = next(DataFile(path).records())
    assert "an array over many lines" in str(first.error)


def test_a_line_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.data.files._MAX_LINE", 100)
    path = write_jsonl(folder / "data.jsonl", [GOOD, {"text": "x" * 1000}, GOOD])
    records = list(DataFile(path).records())
    assert [(record.where.line, record.error is None) for record in records] == [(1, True), (2, False), (3, True)]


def test_where_data_is_looked_for(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a"):
        write_jsonl(folder / f"{name}.jsonl", [chat("q", name)])
    monkeypatch.chdir(folder)

    def answers(path: str | tuple[str, ...]) -> list[str]:
        opened = open_corpus(CorpusOptions(path, 64, cache=str(folder / "cache")), model)
        return [Path(opened.where(index).file).stem for index in range(len(opened))]

    assert answers(str(folder)) == answers(str(folder / "*.jsonl")) == answers("?.jsonl") == ["a", "b"]
    assert answers(("b.jsonl", "a.jsonl")) == ["b", "a"]
    for path, message in [
        ("c.jsonl", "c.jsonl: no such file or folder"),
        ("*.parquet", "no file matches"),
        ("good.png", "expected one of .jsonl"),
        (str(model), "no .jsonl, .parquet or .csv file in this folder"),
    ]:
        with pytest.raises(DataError, match=re.escape(message)):
            answers(path)
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        answers("pipe.jsonl")


class Table:
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def to_pylist(self) -> list[Any]:
        return self.rows


def tables_of(folder: Path) -> list[Table]:
    """Records as both packages give them: in batches, with the nulls that Parquet fills in."""
    image = {"bytes": (folder / "good.png").read_bytes(), "path": None}
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    asked = {**USER, "tool_calls": None, "content": parts}
    rows = [
        {"messages": [asked, ANSWER], "images": [image], "text": None},
        {**GOOD, "images": None},
        {"messages": [{**USER, "role": "usr"}]},
    ]
    return [Table(rows[:2]), Table(rows[2:])]


def options_of(folder: Path, path: str) -> CorpusOptions:
    return CorpusOptions(path, 256, on_error="skip", cache=str(folder / "cache"))


def test_parquet(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for pyarrow: rows come in batches, nulls that Parquet filled in are taken out."""
    tables = tables_of(folder)

    class ParquetFile:
        def __init__(self, file: IO[bytes]) -> None:
            if file.read() != b"PAR1":
                raise ValueError("Parquet magic bytes not found\nin the footer")

        def __enter__(self) -> ParquetFile:
            return self

        def __exit__(self, *error: object) -> None: ...

        def iter_batches(self, batch_size: int) -> Any:
            return iter(tables)

    path = folder / "data.parquet"
    path.write_bytes(b"PAR1")
    options = options_of(folder, str(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"data\.parquet: reading Parquet needs the Python package `pyarrow`"):
        open_corpus(options, model)
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    stand_in: Any = types.ModuleType("pyarrow.parquet")
    stand_in.ParquetFile = ParquetFile
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", stand_in)
    opened = open_corpus(options, model)
    assert (len(opened), opened.statistics.media) == (2, {"image": 1})
    assert opened.statistics.skipped[0].startswith(f"{path}:3: messages[0]: unknown role 'usr'")
    assert opened.media_tensors(0)["pixel_values"].shape[0] == 1
    path.write_bytes(b"JUNK")
    with pytest.raises(DataError, match=r"data.parquet: not a readable Parquet file \(Parquet magic bytes not found\)"):
        open_corpus(options, model)


def test_datasets(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for datasets."""
    tables, named = tables_of(folder), options_of(folder, "someone/chats")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"someone/chats: neither .* of that name needs the Python package `datasets`"):
        open_corpus(named, model)

    class Dataset:
        _fingerprint = "f"

        def __len__(self) -> int:
            return 2

        def with_format(self, kind: str) -> Dataset:
            assert kind == "arrow"
            return self

        def iter(self, batch_size: int) -> Any:
            return iter(tables)

    hub: Any = types.ModuleType("datasets")
    hub.load_dataset = lambda name, subset, split: Dataset()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    opened = open_corpus(named, model)
    assert (len(opened), opened.where(1)) == (2, opened.where(1))
    assert str(opened.where(1)) == "someone/chats:2"
