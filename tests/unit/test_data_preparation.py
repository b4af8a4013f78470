"""`data prepare` is the preparation of `train`; a second start reads no data; how far it is, is said."""

from __future__ import annotations

import gzip
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bridge.cli import app
from bridge.errors import DataError, UsageError
from recipes.config import load_recipe
from recipes.data import CorpusOptions, fingerprints, open_corpus, report
from recipes.data.files import DataFile
from recipes.data.tokenising import ReadShare
from recipes.data.training import corpora

from .data_helpers import chat, write_jsonl


def never(*arguments: Any) -> Any:
    pytest.fail("data is read")


def test_a_second_start_reads_no_data(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless size or times have changed, those that no tool sets back too; another place has the same cache."""
    path = write_jsonl(tmp_path / "a.jsonl", [chat("q", "a"), chat("q", "b")])
    options = CorpusOptions(str(path), 64, cache=str(tmp_path / "cache"))
    # This file is as young as can be: it is not trusted.
    monkeypatch.setattr(fingerprints, "_SETTLED_S", 1e6)
    opened = [open_corpus(options, model).folder]
    (record,) = (tmp_path / "cache" / ".files").iterdir()
    assert json.loads(record.read_text()) == {}
    monkeypatch.setattr(fingerprints, "_SETTLED_S", 0.0)
    opened.append(open_corpus(options, model).folder)
    with monkeypatch.context() as patch:
        for name in ("fingerprint", "record_batches"):
            patch.setattr(DataFile, name, never)
        opened.append(open_corpus(options, model).folder)
    assert len(set(opened)) == 1
    before = path.stat()
    write_jsonl(path, [chat("q", "a"), chat("q", "c")])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert open_corpus(options, model).folder != opened[0]
    copy = write_jsonl(tmp_path / "b.jsonl", [chat("q", "a"), chat("q", "b")])
    assert open_corpus(replace(options, path=str(copy)), model).folder == opened[0]
    record.write_text("[1, 2")  # damaged: read again
    assert open_corpus(options, model).folder != opened[0]
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl"):
        open_corpus(options, model)


def prepared(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["data", "prepare", *arguments, "--json", "-"], catch_exceptions=False)
    found: dict[str, Any] = json.loads(result.stdout[result.stdout.index("{") :])["sets"]
    return found


def test_the_command_prepares_what_train_takes(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a recipe, its evaluation too, and by files with the same keys; then nothing is left to be tokenised."""
    path = write_jsonl(tmp_path / "a.jsonl", [chat("q", "a"), chat("q", "x" * 99), {"text": "t"}])
    other = write_jsonl(tmp_path / "b.jsonl", [chat("r", "b")])
    keys = [f"model.hf={model}", f"data.cache={tmp_path / 'cache'}", "train.seq_length=64"]
    said = [f"data.path={path}", f"data.eval={other}", "train.eval_every=1", *keys]
    sets = prepared("sft/e2b", *said)
    assert {name: one["samples"] for name, one in sets.items()} == {"train": 2, "eval": 1}
    assert sets["train"]["dropped"] == {"too long": 1}
    monkeypatch.setattr("recipes.data.corpus.tokenise", never)
    opened = corpora(load_recipe("sft/e2b", said))
    assert str(opened.train.folder) == sets["train"]["cache"] and len(opened.evaluation[""]) == 1
    alone = prepared(str(path), "--model", str(model), "--seq-length", "64", keys[1])
    assert alone["train"]["cache"] == sets["train"]["cache"]
    for arguments, message in [
        ((), "name a recipe, or data"),
        ((str(path),), "--model: tokens are those of a model"),
        (("sft/e2b", str(path)), "beside a recipe come its keys"),
        ((str(path), "none.jsonl"), r"none\.jsonl: no such file"),
        ((str(path), "data.pth=x", "--model", str(model)), "data.pth"),
    ]:
        with pytest.raises(UsageError, match=message):
            prepared(*arguments)


def test_pairs_are_known_by_their_first_record(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "b", "rejected": "c"}])
    assert prepared(str(path), "--model", str(model), f"data.cache={tmp_path / 'c'}")["train"]["samples"] == 2


def test_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the bytes of all files as they lie there, packed or not; the time left by the time so far."""
    plain = write_jsonl(tmp_path / "a.jsonl", [chat("q", str(n)) for n in range(500)])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    rows = tmp_path / "c.csv"
    rows.write_text("prompt,completion\n" + "a,b\n" * 500)
    sources = [DataFile(plain), DataFile(packed), DataFile(rows)]
    share, seen = ReadShare(sources), list[float]()
    for number, source in enumerate(sources):
        seen += [share.read(number) for _ in source.record_batches()]
    assert seen == sorted(seen) and seen[0] < 0.3 and seen[-1] == 1.0
    said: list[str] = []
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = report.ProgressLines(said.append)
    progress.read(1, 0.2)
    now = 105.0
    progress.read(2, 0.3)
    now = 160.0
    progress.read(3, 0.4)
    progress.read(4, 0.4)
    now = 170.0
    progress.read(5)
    assert said == ["tokenising", "tokenising: 3 records, 40%, about 3 min to go", "tokenising: 5 records"]
