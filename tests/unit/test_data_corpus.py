"""What fits into a row; the cache is made once, gone on with and never stale."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.errors import BridgeError, DataError, UsageError
from recipes.config import load_recipe
from recipes.data import Corpus, CorpusOptions, Supervise, cache, corpus, open_corpus
from recipes.data.chat import ChatModel
from recipes.data.sample import Sample
from recipes.data.training import corpus_options

from .data_helpers import (
    GOOD,
    USER,
    caches,
    chat,
    corpus_of,
    files_of,
    messages,
    model_folder,
    part,
    write_jsonl,
)


def test_long_conversations_are_dropped_or_split_between_turns(folder: Path, model: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    long = messages(system, *chat("aa", "bb", "cc", "dd", "x" * 200, "ee", "ff", "gg")["messages"])
    dropped = corpus_of(folder, model, [long, chat("a", "b")], seq_length=64)
    assert (dropped.statistics.kept, dropped.statistics.dropped) == (1, {"too long": 1})
    split = corpus_of(folder, model, [long, chat("a", "b")], seq_length=64, overlong="split")
    texts = [split.tokenizer.decode(split[index].ids) for index in range(len(split))]
    head = "<bos><|turn>system\nbe brief<turn|>\n"
    assert texts == [
        f"{head}<|turn>user\naa<turn|>\n<|turn>model\nbb<turn|>\n<|turn>user\ncc<turn|>\n<|turn>model\ndd<turn|>\n",
        f"{head}<|turn>user\nff<turn|>\n<|turn>model\ngg<turn|>\n",
        "<bos><|turn>user\na<turn|>\n<|turn>model\nb<turn|>\n",
    ]
    assert (split.statistics.kept, split.statistics.samples, split.statistics.pieces_dropped) == (2, 3, 1)
    assert max(split.lengths) <= 64
    # Exactly at the limit is kept, one less is not.
    length = int(split.lengths[0])
    assert (
        len(corpus_of(folder, model, [messages(system, *chat("aa", "bb", "cc", "dd")["messages"])], seq_length=length))
        == 1
    )
    with pytest.raises(DataError, match=f"1 too long; first: .*data.jsonl:1: longer than {length - 1} tokens"):
        corpus_of(folder, model, [messages(system, *chat("aa", "bb", "cc", "dd")["messages"])], seq_length=length - 1)


def test_long_texts_are_split_without_loss(folder: Path, model: Path) -> None:
    text = "one two three " * 40
    split = corpus_of(folder, model, [{"text": text}], seq_length=32, overlong="split")
    whole = corpus_of(folder, model, [{"text": text}], seq_length=2048)[0].ids.tolist()
    pieces = [split[index] for index in range(len(split))]
    assert [token for piece in pieces for token in piece.ids.tolist()[1:]] == whole[1:]
    assert all(piece.ids[0] == whole[0] and not piece.supervised[0] and piece.supervised[1:].all() for piece in pieces)


def test_nothing_to_learn(folder: Path, model: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    opened = corpus_of(folder, model, [messages(USER, call), GOOD], supervise=Supervise(tool_calls=False))
    assert opened.statistics.dropped == {"nothing to learn": 1}


def test_the_cache_is_used_and_never_stale(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[Path] = []
    build = corpus._build
    monkeypatch.setattr(corpus, "_build", lambda place, *rest: (builds.append(place), build(place, *rest))[1])

    def built(rows: Any = (GOOD,), at: Path = model, **options: Any) -> bool:
        before = len(builds)
        opened = corpus_of(folder, at, rows, **options)
        assert opened.tokenizer.decode(opened[0].ids).startswith("<bos>")
        return len(builds) > before

    assert built()
    assert not built()
    assert not built(workers=1)
    assert built(rows=[GOOD, GOOD])
    assert built(seq_length=100)
    assert built(supervise=Supervise(turns="last"))
    assert built(template_kwargs={"enable_thinking": True})
    assert built(on_error="skip")
    template = tmp_path / "other.jinja"
    template.write_text((model / "chat_template.jinja").read_text() + "\n")
    assert built(chat_template=str(template))
    template.write_text((model / "chat_template.jinja").read_text() + "\n\n")
    assert built(chat_template=str(template))
    other = model_folder(tmp_path / "other")
    assert not built(at=other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert built(at=other)
    # Data that only moved is the same data.
    write_jsonl(folder / "moved.jsonl", [GOOD])
    moved = open_corpus(CorpusOptions(str(folder / "moved.jsonl"), 512, cache=str(folder / "cache")), model)
    assert moved.where(0).file.endswith("moved.jsonl")
    assert moved.folder == builds[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_tokenised_is_kept_and_gone_on_with(
    workers: int, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted twice, a cache has the bytes of one that was not, inline and fetched media and bad lines included."""
    data, encodings = (folder / "good.png").read_bytes(), list[Sample]()
    monkeypatch.setattr("recipes.data.media._fetch", lambda url, at: data)
    encode = ChatModel.encode
    monkeypatch.setattr(
        ChatModel, "encode", lambda self, samples, read: (encodings.extend(samples), encode(self, samples, read))[1]
    )
    rows: list[Any] = [chat("q", f"a {number}") for number in range(40)]
    for number, row in ((3, {}), (5, part(type="image", path="good.png")), (30, "not JSON"), (33, "")):
        rows[number] = row
    for number in (7, 21, 35):
        rows[number] = part(type="image", url=f"http://x/{number}.png")
    path = write_jsonl(folder / "data.jsonl", rows)
    options = CorpusOptions(str(path), 256, on_error="skip", allow_urls=True, workers=workers)

    def opened(cache: str, stop: int = 0) -> Corpus:
        def progress(read: int, share: float) -> None:
            if read == stop:
                raise KeyboardInterrupt

        return open_corpus(replace(options, cache=str(folder / cache)), model, progress=progress, notify=told.append)

    told: list[str] = []
    whole, once = opened("whole"), len(encodings)
    assert not any("goes on" in line for line in told)
    for stop in (9, 23):
        with pytest.raises(KeyboardInterrupt):
            opened("cut", stop)
        assert [entry.suffix for entry in caches(folder / "cut")] == [".parts"]
    del encodings[:]
    resumed = opened("cut")
    assert "tokenising goes on behind the 23 records of an interrupted run" in told
    assert len(encodings) == sum(whole.where(sample).line > 23 for sample in range(len(whole))) < once
    assert files_of(resumed.folder) == files_of(whole.folder)
    for sample in (5, 21):
        for name, tensor in resumed.media_tensors(sample).items():
            assert tensor.equal(whole.media_tensors(sample)[name])
    assert [entry.suffix for entry in caches(folder / "cut")] == [""]


def test_parts_that_were_damaged_or_made_by_others(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that lost its bytes is made again; of two builders that know nothing of each other both are right."""
    monkeypatch.setattr(cache, "_PART_RECORDS", 4)
    rows: list[Any] = [chat("q", f"a {number}") for number in range(20)]
    picture = base64.b64encode((folder / "good.png").read_bytes()).decode()
    rows[5], rows[6] = part(type="image", base64=picture), "not JSON"
    path = write_jsonl(folder / "data.jsonl", rows)

    def opened(name: str, at: int = 0, then: Callable[[Path], None] = lambda parts: None) -> Corpus:
        def progress(read: int, share: float) -> None:
            if at and read == at:
                then(next((folder / name).glob(".*.parts")))

        options = CorpusOptions(str(path), 256, on_error="skip", cache=str(folder / name))
        return open_corpus(options, model, progress=progress)

    def interrupted(parts: Path) -> None:
        raise KeyboardInterrupt

    whole = files_of(opened("whole").folder)
    assert len(whole) == 7
    for file in whole:
        with pytest.raises(KeyboardInterrupt):
            opened(file, 10, interrupted)
        (parts,) = (folder / file).glob(".*.parts")
        assert sorted(entry.name for entry in parts.iterdir()) == ["000000000000", "000000000004", "000000000008"]
        damaged = parts / "000000000004" / file
        assert damaged.stat().st_size > 1
        damaged.write_bytes(damaged.read_bytes()[:-1])
        assert files_of(opened(file).folder) == whole

    def another(parts: Path) -> None:
        """Who was cut off behind record 5 left another part where the next one is to be."""
        shutil.copytree(parts / "000000000000", parts / "000000000004")

    assert files_of(opened("others", 6, another).folder) == whole


def test_parts_of_other_data_are_not_gone_on_with(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interrupted run left is of its data, options and model alone; with them again it is gone on with."""
    monkeypatch.setattr(cache, "_PART_RECORDS", 4)
    other = model_folder(tmp_path / "other")
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + "\n")
    rows = [chat("q", f"a {number}") for number in range(12)]
    path = write_jsonl(folder / "data.jsonl", rows)
    told: list[str] = []

    def interrupt(read: int, share: float) -> None:
        if read == 9:
            raise KeyboardInterrupt

    def opened(name: str, at: Path = model, **changed: Any) -> Corpus:
        options = replace(CorpusOptions(str(path), 64, cache=str(folder / name)), **changed)
        return open_corpus(
            options, at, progress=interrupt if name == "cut" and not changed else None, notify=told.append
        )

    with pytest.raises(KeyboardInterrupt):
        opened("cut")
    (parts,) = (folder / "cut").glob(".*.parts")
    for changed in ({"seq_length": 80}, {"supervise": Supervise(turns="last")}, {"on_error": "skip"}):
        assert files_of(opened("cut", **changed).folder) == files_of(opened("whole", **changed).folder)
    with pytest.raises(KeyboardInterrupt):
        opened("cut", other)
    write_jsonl(path, [chat("r", f"b {number}") for number in range(12)])
    with pytest.raises(KeyboardInterrupt):
        opened("cut")
    assert not told and len(list((folder / "cut").glob(".*.parts"))) == 3 and parts.exists()
    write_jsonl(path, rows)
    options = CorpusOptions(str(path), 64, cache=str(folder / "cut"))
    again = open_corpus(options, model, notify=told.append)
    assert told == ["tokenising goes on behind the 9 records of an interrupted run"]
    assert files_of(again.folder) == files_of(opened("whole").folder)


def test_pretraining_loses_nothing_of_long_documents(folder: Path, model: Path) -> None:
    path = write_jsonl(folder / "data.jsonl", [{"text": "a b c " * size} for size in (5, 100, 300)])
    said = [f"data.path={path}", f"model.hf={model}", f"data.cache={folder / 'cache'}"]
    row, whole = (
        open_corpus(corpus_options(load_recipe("pretrain/e2b", [*said, f"train.seq_length={length}"])), model)
        for length in (64, 4096)
    )
    assert (row.statistics.read, row.statistics.kept, row.statistics.dropped) == (3, 3, {})
    assert row.statistics.supervised == whole.statistics.supervised and max(row.lengths) == 64 < max(whole.lengths)


def test_a_damaged_cache_is_named(folder: Path, model: Path) -> None:
    opened = corpus_of(folder, model, [GOOD])
    (opened.folder / "ids.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=f"{opened.folder}: this cache is damaged .*; remove it"):
        corpus_of(folder, model, [GOOD])


def test_ranks_that_come_together(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One builds, and the others wait for it."""
    path = write_jsonl(folder / "data.jsonl", [chat("q", str(index)) for index in range(50)])
    options = CorpusOptions(str(path), 64, cache=str(folder / "cache"))
    builds, build = [], corpus._build
    monkeypatch.setattr(corpus, "_build", lambda place, *rest: (builds.append(place), build(place, *rest))[1])
    gate = threading.Barrier(3)

    def rank(_: int) -> list[int]:
        gate.wait()
        opened = open_corpus(options, model)
        return [token for index in range(len(opened)) for token in opened[index].ids.tolist()]

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(rank, range(3))
    assert all(other == first for other in others)
    assert len(builds) == 1 and caches(folder / "cache") == builds


def test_options_that_make_no_sense(folder: Path, model: Path) -> None:
    for options, message in [
        ({"on_error": "ignore"}, "data.on_error: 'ignore' is not one of fail, skip"),
        ({"overlong": "cut"}, "data.overlong: 'cut' is not one of drop, split"),
        ({"seq_length": 1}, "seq_length: 1 is less than 2"),
        ({"chat_template": "none.jinja"}, "data.chat_template: none.jinja: cannot be read"),
    ]:
        with pytest.raises(UsageError, match=re.escape(message)):
            corpus_of(folder, model, [GOOD], **options)
    with pytest.raises(UsageError, match=r"data\.supervise_turns: 'some'"):
        Supervise(turns="some")
    with pytest.raises(BridgeError):
        corpus_of(folder, folder, [GOOD])


def test_statistics_add_up(folder: Path, model: Path) -> None:
    opened = corpus_of(folder, model, [chat("a", "b" * size) for size in (1, 10, 100)])
    statistics = opened.statistics
    assert statistics.tokens == int(opened.lengths.sum()) == sum(len(opened[index]) for index in range(3))
    assert statistics.supervised == sum(int(opened[index].supervised.sum()) for index in range(3)) == 111 + 3
    assert sum(statistics.lengths.values()) == 3
    assert statistics.longest == int(opened.lengths.max())
    assert np.isclose(statistics.supervised_fraction, 114 / statistics.tokens)
