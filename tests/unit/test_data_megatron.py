"""`.bin` and `.idx`: those of Megatron-Core's own builder read to the token, and ours read by Megatron-Core."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bridge.cli import app
from bridge.errors import DataError, UsageError
from bridge.megatron import cpu_runtime
from recipes.data import Batches, BatchOptions, CorpusOptions, open_corpus
from recipes.data.recognition import recognise

from .data_helpers import chat, write_jsonl


@pytest.fixture(scope="module")
def indexed() -> Iterator[Any]:
    """Megatron-Core's module."""
    was_enabled = cpu_runtime.is_enabled()
    cpu_runtime.enable()
    from megatron.core.datasets import indexed_dataset

    yield indexed_dataset
    if not was_enabled:
        cpu_runtime.disable()  # tests of this process tell a GPU's tensors from others


def built(indexed: Any, prefix: Path, documents: Sequence[Sequence[int]], dtype: Any) -> None:
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_what_megatrons_builder_wrote(dtype: Any, tmp_path: Path, model: Path, indexed: Any) -> None:
    """By its prefix, by either file or by a glob; documents are packed, longer ones cut, none joined."""
    rows = np.random.default_rng(0)
    documents = [[2, *rows.integers(300, 500, size)] for size in (5, 70, 1, 30, 9, 150)]
    prefix = tmp_path / "corpus_text_document"
    built(indexed, prefix, documents, dtype)
    for name in (prefix, f"{prefix}.bin", f"{prefix}.idx", tmp_path / "corpus*"):
        options = CorpusOptions(str(name), 64, overlong="split", cache=str(tmp_path / "cache"))
        corpus = open_corpus(options, model)
        assert dict(corpus.statistics.formats) == {"megatron": 6} and corpus.files == [str(prefix)]
        assert [str(corpus.where(sample)) for sample in range(3)] == [f"{prefix}:{n}" for n in (1, 2, 2)]
    pieces = [[document[0], *document[at : at + 63]] for document in documents for at in range(1, len(document), 63)]
    assert [corpus[sample].ids.tolist() for sample in range(len(corpus))] == pieces
    assert all(corpus[sample].supervised.all() for sample in range(len(corpus)))
    batches = Batches(corpus, BatchOptions(64, packing=True))
    found = []
    for _ in range(batches.rows(0)):
        batch = next(batches)
        bounds = batch["cu_seqlens"].tolist()
        for start, end in pairwise(bounds):
            if batch["attention_mask"].flatten()[start]:
                found.append(batch["input_ids"].flatten()[start:end].tolist())
    assert sorted(found) == sorted(pieces)
    assert recognise(CorpusOptions(str(prefix), 64), 1).to_json()["format"] == "megatron"


def test_ours_is_read_by_megatron(tmp_path: Path, model: Path, indexed: Any) -> None:
    """Documents whole, whatever train.seq_length; and read again here they are what they were."""
    texts = ["a b c " * 40, "d", "e f " * 9]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    cache, out = f"data.cache={tmp_path / 'cache'}", str(tmp_path / "written")
    known = ["--model", str(model), "--format", "megatron", cache, "--json", "-"]
    result = CliRunner().invoke(app, ["data", "prepare", str(path), "--out", out, *known], catch_exceptions=False)
    said = json.loads(result.stdout[result.stdout.index("{") :])["megatron"]["train"]
    direct = open_corpus(CorpusOptions(str(path), 4096, cache=str(tmp_path / "cache")), model)
    theirs = indexed.IndexedDataset(out)
    assert said == {"prefix": out, "sequences": 3, "tokens": int(direct.lengths.sum())}
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]
    for number, text in enumerate(texts):
        ids = direct.tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = [direct.tokenizer.bos_token_id, *ids, direct.tokenizer.eos_token_id]
        assert theirs[number].tolist() == whole == direct[number].ids.tolist()
    again = open_corpus(CorpusOptions(out, 4096, cache=str(tmp_path / "cache")), model)
    assert [again[n].ids.tolist() for n in range(3)] == [direct[n].ids.tolist() for n in range(3)]
    with pytest.raises(UsageError, match=r"written\.bin is there"):
        CliRunner().invoke(app, ["data", "prepare", str(path), "--out", out, *known], catch_exceptions=False)
    asked = write_jsonl(tmp_path / "b.jsonl", [chat("what is asked", "a")])
    known.remove("--json"), known.remove("-")
    arguments = ["data", "prepare", str(asked), "--out", f"{out}2", *known]
    told = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert "tokens that are not learnt of these records" in told
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith((".written", "written"))) == [
        "written.bin",
        "written.idx",
        "written2.bin",
        "written2.idx",
    ]


def test_files_that_are_no_such_data(tmp_path: Path, model: Path, indexed: Any) -> None:
    built(indexed, tmp_path / "a", [[2, 300, 301], [2, 300]], np.int32)

    def refused(name: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_corpus(CorpusOptions(str(tmp_path / name), 64, cache=str(tmp_path / "cache")), model)

    for name, index, tokens, message in [
        ("cut", None, -4, r"cut\.bin: is shorter than its index says"),
        ("empty", None, -20, r"empty\.idx: Megatron-Core cannot read it"),
        ("other", b"x" * 60, None, r"other\.idx: Megatron-Core cannot read it"),
    ]:
        (tmp_path / f"{name}.idx").write_bytes(index or (tmp_path / "a.idx").read_bytes())
        (tmp_path / f"{name}.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:tokens])
        refused(name, message)
    built(indexed, tmp_path / "floats", [[0.5]], np.float32)
    refused("floats", r"floats\.idx: holds float32, which are no tokens")
    built(indexed, tmp_path / "high", [[2, 10**6]], np.int32)
    with pytest.raises(UsageError, match=r"high:1: .*1000000"):
        open_corpus(CorpusOptions(str(tmp_path / "high"), 64, cache=str(tmp_path / "cache")), model)
