"""Bad records are named by file and line, counted, skipped or fatal, whatever is wrong with them."""

from __future__ import annotations

import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bridge.errors import DataError
from recipes.data import CorpusOptions, open_corpus

from .data_helpers import (
    ANSWER,
    GOOD,
    USER,
    caches,
    chat,
    corpus_of,
    messages,
    part,
    picture_folder,
    write_jsonl,
)

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
    """Pictures, and what is none or cannot be reached."""
    data = picture_folder(tmp_path)
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
