"""Bad data is named by file and line, counted, skipped or fatal; the cache is made once and never stale."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from PIL import Image

from bridge.errors import BridgeError, DataError, UsageError
from recipes.config import load_recipe
from recipes.data import Corpus, CorpusOptions, Supervise, cache, corpus, open_corpus
from recipes.data.chat import ChatModel
from recipes.data.files import DataFile
from recipes.data.sample import Sample
from recipes.data.training import corpus_options

from .data_helpers import caches, chat, corpus_of, model_folder, write_jsonl

GOOD = chat("hi", "hello")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "e2b")


def messages(*rows: Any) -> dict[str, Any]:
    return {"messages": list(rows)}


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def part(**keys: Any) -> dict[str, Any]:
    return messages({"role": "user", "content": [keys]}, ANSWER)


BAD: list[tuple[Any, str]] = [
    ('{"messages": [', "not JSON"),
    ("hello", "not JSON"),
    ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
    ('{"messages": NaN}', "NaN is not JSON"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
    ("[" * 100_000, "nested too deeply"),
    ("[1, 2]", "expected an object, found a list"),
    ("null", "expected an object, found nothing"),
    ({}, "has none of messages, conversations, prompt and completion"),
    ({"conversations": []}, "conversations: expected a list of messages, found an empty list"),
    ({"textt": "a"}, "but textt; data.columns.messages=... says which column is which"),
    ({"text": 3}, "text: expected a string, found a number"),
    ({"text": "  "}, "text: empty"),
    ({"text": "\ud800"}, "half of a surrogate pair at character 1"),
    ({"text": "a<eos>b"}, "text: holds the control token <eos>"),
    ({"prompt": "a"}, "has no completion"),
    ({"prompt": "a", "completion": ["b"]}, "prompt[1]: expected an object, found a string"),
    ({"prompt": "a", "completion": 3}, "completion: expected a string or a list of messages, found a number"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "for the dpo recipes; to learn the chosen ones alone"),
    ({"prompt": "a", "completion": "b", "label": True}, "for the kto recipes"),
    ({"instruction": "a", "input": "b"}, "has instruction, but has no output (alpaca)"),
    ({"instruction": "a", "input": 3, "output": "b"}, "input: expected a string, found a number"),
    ({"input_ids": [1, "a"]}, "input_ids: expected a list of integers"),
    ({"input_ids": [2, 5], "labels": [-100]}, "labels: 1 for 2 input_ids"),
    ({"input_ids": [2, 5, 6], "labels": [5, 6, -100]}, "labels[0]: 5 is neither -100 nor the token there, 2"),
    ({"input_ids": [2, 5], "loss_mask": [0, 2]}, "loss_mask: expected a 0 or 1 for each"),
    ({"input_ids": [-1]}, "input_ids: expected ids of tokens, found -1"),
    (messages({**USER, "train": True}, ANSWER), "messages[0]: a message of role user cannot be learnt alone"),
    (messages(USER, {**ANSWER, "weight": 0.5}), "weight: a message is learnt (true, 1) or not (false, 0), found 0.5"),
    (messages(USER, {**ANSWER, "weight": 1, "train": False}), "say different things of whether it is learnt"),
    (messages({**USER, "content": [{"type": "image_url"}]}, ANSWER), 'expected {"image_url": {"url": ...}}'),
    (
        messages({**USER, "content": [{"type": "image_url", "image_url": {"url": "http://x/a.png"}}]}, ANSWER),
        "only fetched with data.allow_urls=true",
    ),
    ({"prompt": "a", "completion": ""}, "completion: empty"),
    ({"messages": "hi"}, "messages: expected a list of messages, found a string"),
    ({"messages": []}, "messages: expected a list of messages, found an empty list"),
    (messages("hi", ANSWER), r"messages[0]: expected an object, found a string"),
    (messages({"role": "usr", "content": "q"}, ANSWER), "messages[0]: unknown role 'usr' (one of system, developer"),
    (messages({"content": "q"}, ANSWER), "messages[0]: unknown role None"),
    (messages({"role": ["user"], "content": "q"}, ANSWER), "messages[0]: unknown role ['user']"),
    (messages({"role": "user", "contnet": "q"}, ANSWER), "messages[0]: unknown key 'contnet'"),
    (messages(USER, {"role": "assistant", "content": ""}), "messages[1]: empty answer"),
    (messages(USER, {"role": "assistant", "content": " \n"}), "messages[1]: empty answer"),
    (messages(USER, {"role": "assistant", "content": None, "thinking": "hm"}), "messages[1]: empty answer"),
    (messages({"role": "user", "content": []}, ANSWER), "messages[0]: empty content"),
    (messages({"role": "system", "content": ""}, USER, ANSWER), "messages[0]: empty content"),
    (messages({"role": "user", "content": 7}, ANSWER), "messages[0]: content: expected a string or a list of parts"),
    (messages({"role": "user", "content": {"a": 1}}, ANSWER), "found an object"),
    (messages(USER), "the last message is of role user; it has to be the assistant's"),
    (messages(USER, {"role": "system", "content": "x"}, ANSWER), "messages[1]: a system message can only come first"),
    (messages(USER, {"role": "tool", "content": "x"}, ANSWER), "messages[1]: a tool message has to follow"),
    (messages({**USER, "reasoning": "x"}, ANSWER), "reasoning belongs into a message of the assistant"),
    (messages(USER, {**ANSWER, "reasoning": "x", "thinking": "y"}), "has both reasoning and thinking"),
    (messages(USER, {**ANSWER, "thinking": 3}), "thinking: expected a string, found a number"),
    (messages(USER, {**ANSWER, "tool_calls": {}}), "tool_calls: expected a list"),
    (messages(USER, {**ANSWER, "tool_calls": [{"name": "f"}]}), 'tool_calls[0]: expected {"function"'),
    (
        messages(USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
        "arguments: not JSON",
    ),
    (
        messages(USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}),
        "arguments: expected an object, found a list",
    ),
    ({**GOOD, "tools": "["}, "tools: not JSON"),
    ({**GOOD, "tools": [{"name": "f"}]}, "tools[0]: expected"),
    (messages({"role": "user", "content": "x<turn|>"}, ANSWER), "messages[0]: holds the control token <turn|>"),
    (messages({"role": "user", "content": "<|image|>"}, ANSWER), "messages[0]: holds the control token <|image|>"),
    (messages({"role": "user", "content": "<|channel>"}, ANSWER), "messages[0]: holds the control token <|channel>"),
    (messages(USER, {"role": "assistant", "content": "a<|channel>b"}), "messages[1]: <|channel> without <channel|>"),
    (messages(USER, {"role": "assistant", "content": "a<channel|>b"}), "do not come in pairs"),
    (messages(USER, {"role": "assistant", "content": [{"type": "image", "path": "a.png"}]}), "holds text only"),
    (messages(USER, {"role": "assistant", "content": "a<tu<|channel>x<channel|>rn|>b"}), "the control token <turn|>"),
    (
        messages(
            {"role": "user", "content": [{"type": "text", "text": "<tu "}, {"type": "text", "text": "rn|>"}]}, ANSWER
        ),
        "messages[0]: holds the control token <turn|>",
    ),
    (part(type="text"), "content[0]: text: expected a string, found nothing"),
    (part(type="picture", path="a.png"), "content[0]: unknown type 'picture'"),
    (part(text="hi"), "content[0]: unknown type None"),
    (part(type="image"), "names no image, and the record's column images has none left"),
    (part(type="image", path="a.png", url="http://x/y"), "has both path and url"),
    (part(type="image", file="a.png"), "unknown key 'file'"),
    (part(type="image", path=3), "path: expected a string, found a number"),
    (part(type="image", path="none.png"), "image: none.png: no such file or directory"),
    (part(type="image", path="."), "image: .: not a file"),
    (part(type="image", path="../secret.png"), "image: ../secret.png: outside of"),
    (part(type="image", path="/etc/passwd"), "image: /etc/passwd: outside of"),
    (part(type="image", path="link.png"), "image: link.png: outside of"),
    (part(type="image", path="loop.png"), "image: loop.png: "),
    (part(type="image", path="pipe.png"), "image: pipe.png: not a file"),
    (part(type="image", path="a\0b"), "a path with a NUL character"),
    (part(type="image", path="x" * 5000), "file name too long"),
    (part(type="image", path="text.png"), "image 'text.png': not an image that can be read (not one of PNG"),
    (part(type="image", path="cut.png"), "image 'cut.png': not an image that can be read"),
    (part(type="image", path="bomb.png"), "image 'bomb.png': not an image that can be read"),
    (part(type="image", url="http://127.0.0.1:9/a.png"), "a URL, which is only fetched with data.allow_urls=true"),
    (part(type="image", image="file:///etc/passwd"), "only http and https URLs exist here"),
    (part(type="image", url="a.png"), "'a.png' is not a URL"),
    (part(type="image", base64="?"), "base64: not base64"),
    (part(type="image", image="data:image/png,abc"), "a data URI has to be of the form"),
    (part(type="image", image="data:image/png;base64,"), "no bytes"),
    (part(type="image", base64="aGVsbG8="), "inline data of 5 bytes: not an image that can be read"),
    (part(type="audio", path="good.png"), "audio 'good.png': not a "),
    (part(type="audio", path="cut.wav"), "not a PCM WAV file"),
    (part(type="video", frames=[], fps=1), "frames: expected a list of images, found an empty list"),
    (part(type="video", frames=["good.png"]), "fps: frames need a positive number, found None"),
    (part(type="video", frames=["good.png", "other.png"], fps=1), "frames of different sizes"),
    ({**part(type="image"), "images": ["good.png", "good.png"]}, "images: 1 more than the messages have parts of type"),
    (messages(USER, {"role": "gpt", "content": "<image>"}) | {"images": ["good.png"]}, "holds text only"),
    ({**GOOD, "images": "good.png"}, "images: expected a list, found a string"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (24, 24)).save(data / "good.png")
    Image.new("RGB", (36, 24)).save(data / "other.png")
    Image.new("RGB", (24, 24)).save(tmp_path / "secret.png")
    Image.new("1", (20_000, 20_000)).save(data / "bomb.png")
    (data / "cut.png").write_bytes((data / "good.png").read_bytes()[:50])
    (data / "cut.wav").write_bytes(b"RIFF\0\0\0\0WAVEfmt ")
    (data / "text.png").write_text("no image")
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "loop.png").symlink_to("loop.png")
    os.mkfifo(data / "pipe.png")
    return data


def test_every_kind_of_bad_record_is_named(folder: Path, model: Path) -> None:
    """Between good lines, each bad one is skipped, counted and told by its line; nothing else goes missing."""
    rows: list[Any] = [GOOD]
    for bad, _ in BAD:
        rows += [bad, GOOD]
    told: list[str] = []
    path = write_jsonl(folder / "data.jsonl", rows)
    options = CorpusOptions(str(path), 256, on_error="skip", cache=str(folder / "cache"))
    opened = open_corpus(options, model, notify=told.append)
    assert len(told) == len(BAD)
    for number, (line, (_, message)) in enumerate(zip(told, BAD, strict=True)):
        assert line.startswith(f"skipped {path}:{2 * number + 2}: "), line
        assert message in line
        assert "\n" not in line
    statistics = opened.statistics
    assert (statistics.read, statistics.kept, statistics.dropped) == (len(rows), len(BAD) + 1, {"invalid": len(BAD)})
    assert [opened.where(index).line for index in range(len(opened))] == list(range(1, len(rows) + 1, 2))
    assert len((opened.folder / "skipped.txt").read_text().splitlines()) == len(BAD)


@pytest.mark.parametrize("bad", [0, 13, 21, 25, 57])
def test_a_bad_record_is_fatal_by_default(bad: int, folder: Path, model: Path) -> None:
    record, message = BAD[bad]
    with pytest.raises(DataError, match=rf"data\.jsonl:3: .*{re.escape(message)}"):
        corpus_of(folder, model, [GOOD, GOOD, record, GOOD, "later and worse"])
    assert not caches(folder / "cache")


def fuzzed(count: int) -> list[bytes]:
    """Good lines and lines damaged in many ways, the same every time."""
    dice = random.Random(5)
    words = ["messages", "role", "content", "user", "assistant", "type", "image", "path", "<turn|>", "\ud800", "", "é"]

    def value(depth: int) -> Any:
        kind = dice.randrange(9 if depth < 4 else 6)
        simple = [None, True, dice.randrange(-9, 10**20), dice.random(), dice.choice(words), "x" * dice.randrange(50)]
        if kind < 6:
            return simple[kind]
        if kind == 6:
            return [value(depth + 1) for _ in range(dice.randrange(4))]
        return {dice.choice(words): value(depth + 1) for _ in range(dice.randrange(4))}

    def damaged(row: Any) -> Any:
        """Something of the row, at random, becomes something else."""
        if not isinstance(row, dict | list) or not row or dice.random() < 0.2:
            return value(0)
        copy = dict(row) if isinstance(row, dict) else list(row)
        key: Any = dice.choice(list(copy)) if isinstance(copy, dict) else dice.randrange(len(copy))
        if dice.random() < 0.15:
            del copy[key]
        else:
            copy[key] = damaged(copy[key])
        return copy

    lines = []
    for _ in range(count):
        row = chat(*(dice.choice(["a b", "c", "<b>", "é"]) for _ in range(2 * dice.randrange(1, 4))))
        kind = dice.randrange(10)
        line = json.dumps(row if kind < 3 else damaged(row)).encode()
        if kind >= 7:
            blob = bytearray(line)
            for _ in range(dice.randrange(1, 4)):
                blob[dice.randrange(len(blob))] = dice.randrange(256)
            line = bytes(blob[: dice.randrange(len(blob) + 1)] if dice.random() < 0.3 else blob)
        lines.append(line.replace(b"\n", b" "))
    return lines


def test_a_thousand_fuzzed_lines(folder: Path, model: Path) -> None:
    lines = fuzzed(1000)
    started = time.monotonic()
    opened = corpus_of(folder, model, lines, on_error="skip")
    assert time.monotonic() - started < 60
    statistics = opened.statistics
    kept = {opened.where(index).line for index in range(len(opened))}
    dropped = re.findall(r"^([\w ]+): \S*data\.jsonl:(\d+): .", (opened.folder / "skipped.txt").read_text(), re.M)
    assert len((opened.folder / "skipped.txt").read_text().splitlines()) == len(dropped)
    blank = {number for number, line in enumerate(lines, 1) if not line.strip()}
    lost = {int(line) for _, line in dropped}
    # Every line is one of the three, and none is two.
    assert len(kept) + len(lost) + len(blank) == len(kept | lost | blank) == 1000
    assert (statistics.read, statistics.kept, statistics.blank_lines) == (1000 - len(blank), len(kept), len(blank))
    assert sum(statistics.dropped.values()) == len(dropped)
    assert len(kept) > 200 and len(lost) > 400
    with pytest.raises(DataError, match=rf"data\.jsonl:{min(lost)}: "):
        corpus_of(folder, model, lines)


def test_fuzzed_lines_one_by_one(folder: Path, model: Path) -> None:
    """A line's fate does not depend on its neighbours."""
    lines = fuzzed(1000)[:40]
    alone = set()
    for number, line in enumerate(lines, 1):
        try:
            alone |= {number} if len(corpus_of(folder, model, [line])) else set()
        except DataError as error:
            assert "data.jsonl:1: " in str(error) or "no records" in str(error)
    together = corpus_of(folder, model, lines, on_error="skip")
    assert {together.where(index).line for index in range(len(together))} == alone


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


def test_media_root(folder: Path, model: Path, tmp_path: Path) -> None:
    row = part(type="image", path="secret.png")
    assert corpus_of(folder, model, [row], media_root=str(tmp_path)).media_tensors(0)["pixel_values"].shape[0] == 1


def test_inline_and_fetched_media_are_kept_in_the_cache(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64

    data = (folder / "good.png").read_bytes()
    fetched = []
    monkeypatch.setattr("recipes.data.media._fetch", lambda url, at: fetched.append(url) or data)
    rows = [
        part(type="image", path="good.png"),
        part(type="image", base64=base64.b64encode(data).decode()),
        part(type="image", image="data:image/png;base64," + base64.b64encode(data).decode()),
        part(type="image", url="https://somewhere/good.png"),
    ]
    for _ in range(2):
        opened = corpus_of(folder, model, rows, allow_urls=True)
        expected = opened.media_tensors(0)
        for index in range(1, 4):
            for name, tensor in opened.media_tensors(index).items():
                assert tensor.equal(expected[name])
    assert fetched == ["https://somewhere/good.png"]


def test_media_that_changed_or_went(folder: Path, model: Path) -> None:
    opened = corpus_of(folder, model, [part(type="image", path="good.png")])
    Image.new("RGB", (100, 20)).save(folder / "good.png")
    with pytest.raises(DataError, match=r"data\.jsonl:1: its media have changed: \d+ tokens now, 64 when"):
        opened.media_tensors(0)
    (folder / "good.png").unlink()
    with pytest.raises(DataError, match=r"data\.jsonl:1: image: good.png: no such file"):
        opened.media_tensors(0)


def test_what_is_broken_inside_is_named_at_use(folder: Path, model: Path) -> None:
    """Header and end of the file are whole: it is counted, and record and file are named when it is decoded."""
    dice = np.random.default_rng(0)
    Image.fromarray(dice.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "good.png").write_bytes(whole[:2000] + bytes(50) + whole[2050:])
    opened = corpus_of(folder, model, [GOOD, part(type="image", path="good.png")])
    with pytest.raises(DataError, match=r"data\.jsonl:2: image 'good\.png': not an image that can be read \(broken"):
        opened.media_tensors(1)


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
    assert len(corpus_of(folder, model, [messages(system, *chat("aa", "bb", "cc", "dd")["messages"])],
                         seq_length=length)) == 1  # fmt: skip
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


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    rows = [chat("q", f"a {number}") for number in range(20)]
    path = write_jsonl(folder / "data.jsonl", rows)

    def opened(name: str, at: int = 0, then: Callable[[Path], None] = lambda parts: None) -> Corpus:
        def progress(read: int, share: float) -> None:
            if at and read == at:
                then(next((folder / name).glob(".*.parts")))

        return open_corpus(CorpusOptions(str(path), 64, cache=str(folder / name)), model, progress=progress)

    def interrupted(parts: Path) -> None:
        raise KeyboardInterrupt

    whole = files_of(opened("whole").folder)
    with pytest.raises(KeyboardInterrupt):
        opened("damaged", 10, interrupted)
    (parts,) = (folder / "damaged").glob(".*.parts")
    assert sorted(entry.name for entry in parts.iterdir()) == ["000000000000", "000000000004", "000000000008"]
    (parts / "000000000004" / "ids.bin").write_bytes(b"")
    assert files_of(opened("damaged").folder) == whole

    def another(parts: Path) -> None:
        """Who was cut off behind record 5 left another part where the next one is to be."""
        shutil.copytree(parts / "000000000000", parts / "000000000004")

    assert files_of(opened("others", 6, another).folder) == whole


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


class Table:
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def to_pylist(self) -> list[Any]:
        return self.rows


def test_parquet_and_datasets(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for both packages: rows come in batches, nulls that Parquet filled in are taken out."""
    image = {"bytes": (folder / "good.png").read_bytes(), "path": None}
    rows = [
        {"messages": [{**USER, "tool_calls": None, "content": [{"type": "image", "text": None},
                                                               {"type": "text", "text": "what?"}]}, ANSWER],
         "images": [image], "text": None},
        {**GOOD, "images": None},
        {"messages": [{**USER, "role": "usr"}]},
    ]  # fmt: skip
    tables = [Table(rows[:2]), Table(rows[2:])]

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
    options = CorpusOptions(str(path), 256, on_error="skip", cache=str(folder / "cache"))
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

    named = replace(options, path="someone/chats")
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
