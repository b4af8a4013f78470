"""`data list` says what caches there are; `data clean` removes them, but never what a live process uses."""

from __future__ import annotations

import gc
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bridge.cli import app
from bridge.convert.lock import Owner, held
from bridge.errors import UsageError
from recipes.data import Corpus, CorpusOptions, open_corpus
from recipes.data.uses import FOLDER, lock_of

from .data_helpers import caches, chat, write_jsonl


@pytest.fixture
def options(tmp_path: Path) -> CorpusOptions:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("q", "a"), chat("q", "b")])
    return CorpusOptions(str(path), 64, workers=1, cache=str(tmp_path / "cache"))


def command(*arguments: str, answer: str | None = None) -> Any:
    return CliRunner().invoke(app, ["data", *arguments], input=answer, catch_exceptions=False)


def listed(folder: Path) -> list[dict[str, Any]]:
    result = command("list", "--cache", str(folder), "--json", "-")
    found: list[dict[str, Any]] = json.loads(result.stdout)["caches"]
    return found


def closed(corpus: Corpus) -> Path:
    """A cache that this process has used and uses no longer."""
    folder = corpus.folder
    del corpus
    gc.collect()
    return folder


def interrupted(options: CorpusOptions, model: Path) -> None:
    def interrupt(read: int, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_corpus(options, model, progress=interrupt)


def test_what_is_listed(tmp_path: Path, options: CorpusOptions, model: Path) -> None:
    corpus = open_corpus(options, model, asked_by="runs/first")
    interrupted(replace(options, seq_length=65), model)
    (tmp_path / "cache" / "theirs").mkdir()
    (tmp_path / "cache" / ("0" * 32)).mkdir()
    found = {one["state"]: one for one in listed(tmp_path / "cache")}
    assert set(found) == {"complete", "unfinished"}
    whole = found["complete"]
    assert whole["folder"] == str(corpus.folder) and whole["live"] and not found["unfinished"]["live"]
    assert whole["bytes"] == sum(file.stat().st_size for file in corpus.folder.iterdir())
    assert (whole["samples"], whole["tokens"], whole["files"]) == (2, int(corpus.lengths.sum()), [options.path])
    assert whole["used_by"] == {"for": "runs/first", "model": str(model), "seq_length": 64}
    said = command("list", "--cache", str(tmp_path / "cache")).stdout
    assert "in use" in said and "runs/first" in said and "unfinished" in said and "2 caches" in said
    assert listed(tmp_path / "none") == []


def test_what_is_used_stays(tmp_path: Path, options: CorpusOptions, model: Path) -> None:
    """By this process, by one of another machine that shows itself; not by those that have ended."""
    folder = tmp_path / "cache"
    corpus = open_corpus(options, model)
    interrupted(replace(options, seq_length=65), model)
    (folder / "theirs").mkdir()
    clean = ("clean", "--cache", str(folder), "--all", "--yes")
    assert "removed 1 of 2 caches" in command(*clean).stdout
    assert caches(folder) == sorted([corpus.folder, folder / "theirs"]) and len(corpus[0].ids)
    cache = closed(corpus)
    del corpus
    gc.collect()
    ended = replace(Owner.new(), pid=1, started="0")
    elsewhere = replace(Owner.new(), space="another machine")
    for owner, age, stays in ((elsewhere, 1, True), (elsewhere, 3600, False), (ended, 1, False)):
        use = folder / FOLDER / f"{cache.name}-{'0' * 32}"
        use.mkdir(exist_ok=True)
        (use / "owner.json").write_text(json.dumps(asdict(owner)))
        os.utime(use / "owner.json", (time.time() - age,) * 2)
        command(*clean)
        assert cache.exists() is stays, (owner, age)
        closed(open_corpus(options, model))
    with held(lock_of(cache), "busy"):
        assert "is being prepared or opened" in command(*clean).output
    assert cache.exists()
    assert "removed 1 of 1" in command(*clean).stdout and caches(folder) == [folder / "theirs"]
    assert not list((folder / ".files").glob("*.json"))


def test_it_asks_and_knows_ages(tmp_path: Path, options: CorpusOptions, model: Path) -> None:
    folder = tmp_path / "cache"
    old, new = (closed(open_corpus(replace(options, seq_length=length), model)) for length in (64, 65))
    gc.collect()
    os.utime(folder / FOLDER / f"{old.name}.json", (time.time() - 40 * 86400,) * 2)
    result = command("clean", "--cache", str(folder), "--older-than", "30d", answer="n\n")
    assert result.exit_code == 1 and old.exists() and "remove 1 caches" in result.stdout
    assert command("clean", "--cache", str(folder), "--older-than", "30d", answer="y\n").exit_code == 0
    assert caches(folder) == [new]
    for arguments, message in [((), "say which"), (("--older-than", "30"), "is a number with h, d or w")]:
        with pytest.raises(UsageError, match=message):
            command("clean", "--cache", str(folder), *arguments)
