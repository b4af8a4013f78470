"""Parquet files and saved datasets as pyarrow and datasets themselves write them, against the same records as JSONL."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import DataError
from recipes.data import Corpus, CorpusOptions, open_corpus

from .data_helpers import write_jsonl

pyarrow = pytest.importorskip("pyarrow", reason="reads Parquet")
datasets = pytest.importorskip("datasets", reason="reads datasets")
pytest.importorskip("torchvision", reason="transformers' Gemma 4 processors need torchvision")


def picture(shade: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (shade, 0, 255 - shade)).save(buffer, "PNG")
    return buffer.getvalue()


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 1})}}
# Columns and keys that only some rows have: a table fills them with nulls.
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well, hello"}]},
    {
        "messages": [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": "so", "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "one", "reasoning_content": "easy"},
        ],
        "tools": json.dumps(TOOLS),
    },
    {"messages": [{"role": "user", "content": "ünïcode?"}, {"role": "assistant", "content": "⟦yes⟧ 😀"}]},
]
SEEN: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a square"}]},
        ],
        "images": [{"bytes": picture(shade), "path": None}],
    }
    for shade in (10, 200)
]


def opened(path: Path, model: Path, tmp_path: Path, **options: Any) -> Corpus:
    return open_corpus(CorpusOptions(str(path), 256, cache=str(tmp_path / "cache"), **options), model)


def assert_same(one: Corpus, other: Corpus) -> None:
    assert len(one) == len(other) > 0
    for index in range(len(one)):
        a, b = one[index], other[index]
        assert (a.ids.tolist(), a.supervised.tolist(), a.types.tolist()) == (
            b.ids.tolist(),
            b.supervised.tolist(),
            b.types.tolist(),
        )
        media, same = one.media_tensors(index), other.media_tensors(index)
        assert media.keys() == same.keys() and all(media[name].equal(same[name]) for name in media)


def columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the same keys in each, as tables ask for."""
    names = {name for row in rows for name in row}
    return [dict.fromkeys(names) | row for row in rows]


def as_jsonl(rows: list[dict[str, Any]], path: Path) -> Path:
    def plain(value: Any) -> Any:
        if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
            return f"data:image/png;base64,{base64.b64encode(value['bytes']).decode()}"
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    return write_jsonl(path, plain(rows))


@pytest.mark.parametrize("rows", [ROWS, SEEN], ids=["text", "images"])
def test_parquet(rows: list[dict[str, Any]], model: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    # Groups of one row: records keep their numbers over them.
    parquet.write_table(pyarrow.Table.from_pylist(columns(rows)), tmp_path / "data.parquet", row_group_size=1)
    corpus = opened(tmp_path / "data.parquet", model, tmp_path)
    assert_same(corpus, opened(as_jsonl(rows, tmp_path / "data.jsonl"), model, tmp_path))
    assert str(corpus.where(1)) == f"{tmp_path / 'data.parquet'}:2"


def test_what_is_no_parquet(model: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    path = tmp_path / "data.parquet"
    path.write_bytes(b"junk")
    with pytest.raises(DataError, match=r"data\.parquet: not a readable Parquet file"):
        opened(path, model, tmp_path)
    parquet.write_table(pyarrow.Table.from_pylist(columns(ROWS)), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"data\.parquet: not a readable Parquet file"):
        opened(path, model, tmp_path)
    parquet.write_table(pyarrow.table({"number": [1, 2]}), path)
    with pytest.raises(DataError, match=r"data\.parquet:1: "):
        opened(path, model, tmp_path)


def test_saved_datasets(model: Path, tmp_path: Path) -> None:
    text = datasets.Dataset.from_list(columns(ROWS))
    text.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": text, "test": text.select([2])}).save_to_disk(tmp_path / "splits")
    expected = opened(as_jsonl(ROWS, tmp_path / "data.jsonl"), model, tmp_path)
    assert_same(opened(tmp_path / "one", model, tmp_path), expected)
    assert_same(opened(tmp_path / "splits", model, tmp_path), expected)
    test = opened(tmp_path / "splits", model, tmp_path, split="test")
    assert len(test) == 1 and test[0].ids.tolist() == expected[2].ids.tolist()
    with pytest.raises(DataError, match=r"splits: a dataset folder that `datasets` can load"):
        opened(tmp_path / "splits", model, tmp_path, split="none")


def test_a_dataset_with_an_image_column(model: Path, tmp_path: Path) -> None:
    seen = datasets.Dataset.from_list(SEEN).cast_column("images", datasets.Sequence(datasets.Image()))
    seen.save_to_disk(tmp_path / "seen")
    expected = opened(as_jsonl(SEEN, tmp_path / "data.jsonl"), model, tmp_path)
    assert_same(opened(tmp_path / "seen", model, tmp_path), expected)
