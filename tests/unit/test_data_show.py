"""What `data show` and the start of a run say of data: for people, for programs; what is lost, with the key to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from bridge.cli import app
from bridge.errors import UsageError
from recipes.data import Supervise, report
from recipes.data.report import warnings

from .data_helpers import MERGING_TEMPLATE, chat, corpus_of, write_jsonl


def shown(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["data", "show", *arguments, "--json", "-"], catch_exceptions=False)
    found: dict[str, Any] = json.loads(result.stdout[result.stdout.index("{") :])
    return found


def test_the_json(tmp_path: Path, model: Path) -> None:
    rows = [chat("q", "an answer"), {"prompt": "p", "completion": "c" * 100}, chat("r", "s"), {"text": "t"}, "not JSON"]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    options = ["--model", str(model), "--cache", str(tmp_path / "cache"), "--seq-length", "40"]
    said = shown("--data", str(path), *options, "-n", "2")
    assert said["format"] == "messages, prompt-completion, text"
    assert (said["read"], said["kept"], said["dropped"]) == (5, 3, {"invalid": 1, "too long": 1})
    assert (len(said["samples"]), said["sample_count"]) == (2, 3)
    first = said["samples"][0]
    assert first["text"] == "<bos><|turn>user\nq<turn|>\n<|turn>model\nan answer<turn|>\n"
    learnt = [label for label in first["labels"] if label != -100]
    assert all(label in (-100, token) for label, token in zip(first["labels"], first["input_ids"], strict=True))
    whole = shown("--data", str(path), *options, "-n", "9")
    assert said["supervised"] == sum(label != -100 for one in whole["samples"] for label in one["labels"])
    assert said["tokens"] == sum(len(one["input_ids"]) for one in whole["samples"]) and learnt[-1] == 106


def test_the_plot(tmp_path: Path, model: Path) -> None:
    """Well-formed, with every figure of the statistics in it, and names that XML would misread."""
    first = write_jsonl(tmp_path / "a&<b.jsonl", [chat("q", "x" * size) for size in (1, 5, 20)])
    second = write_jsonl(tmp_path / "c.jsonl", [{"text": "some words"}])
    options = ["--model", str(model), "--cache", str(tmp_path / "cache"), "--seq-length", "64"]
    target = tmp_path / "plot.svg"
    said = shown("--data", str(first), "--data", str(second), *options, "--plot", str(target))
    root = ElementTree.parse(target).getroot()
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    tokens, learnt = said["tokens"], said["supervised"]
    assert f"4 samples by tokens, {tokens / 4:.0f} in the mean" in texts and "a&<b.jsonl" in texts
    assert f"samples by the part that is learnt, {learnt / tokens:.1%} of all tokens" in texts
    assert f"{said['packing']['efficiency']:.1%}" in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 2 * 24 + 2 + 2
    by_source = [int(text.replace(",", "")) for text in texts if text.replace(",", "").isdigit()][-2:]
    assert sum(by_source) == tokens
    for name, message in ((tmp_path / "plot.png", "is written as .svg"), (tmp_path / "no" / "a.svg", "does not exist")):
        with pytest.raises(UsageError, match=message):
            shown("--data", str(first), *options, "--plot", str(name))
    with pytest.raises(UsageError, match="--plot: draws tokens"):
        shown("--data", str(first), "--plot", str(target))


def test_what_a_shell_expands_is_data(tmp_path: Path, model: Path) -> None:
    paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", [chat("q", name)])) for name in "abc"]
    options = ["--model", str(model), "--cache", str(tmp_path / "cache")]
    texts = [one["text"] for one in shown("--data", *paths, *options, "-n", "9")["samples"]]
    assert [text[-9:] for text in texts] == [f"{name}<turn|>\n" for name in "abc"]
    with pytest.raises(UsageError, match=r"d\.jsonl: no such file; without a recipe"):
        shown("--data", *paths, "d.jsonl", *options)


def test_what_is_lost_is_said_with_the_key(tmp_path: Path, model: Path) -> None:
    thought = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    kinds: list[tuple[Any, dict[str, Any], str]] = [
        (
            chat("q", "x" * 200),
            {},
            r"1 of 3 records \(33.3%\) are left out, longer than train.seq_length=64: .*overlong",
        ),
        ("not JSON", {}, r"1 of 3 records .*data.on_error=skip has it pass; the first: .*data.jsonl:3: not JSON"),
        (
            {"messages": [{"role": "user", "content": "q"}, call]},
            {"supervise": Supervise(tool_calls=False)},
            r"1 of 3 records .* without anything to learn: data.supervise_turns",
        ),
        (
            {"messages": [*chat("a")["messages"], thought, *chat("b", "c")["messages"]]},
            {},
            r"1 thoughts of the data are not learnt: the chat template leaves them out",
        ),
        (chat("a", "x" * 20, "b", "y" * 99), {"overlong": "split"}, r"1 pieces of split records are left out"),
        (
            chat("a", "b", "c", "d"),
            {"chat_template": str(tmp_path / "merging.jinja")},
            r"1 answers before the last are learnt without the empty thought",
        ),
    ]
    (tmp_path / "merging.jinja").write_text(MERGING_TEMPLATE)
    for bad, options, message in kinds:
        options = {"seq_length": 64, "on_error": "skip", **options}
        corpus = corpus_of(tmp_path, model, [chat("a", "b"), chat("c", "d"), bad], **options)
        said = warnings(corpus.statistics, corpus.options)
        assert len(said) == 1 and re.search(f"^warning: {message}", said[0]), said
    many = corpus_of(tmp_path, model, [*(chat("a", str(i)) for i in range(100)), chat("q", "x" * 99)], seq_length=64)
    assert many.statistics.dropped == {"too long": 1} and not warnings(many.statistics, many.options)
    known = (many.statistics, many.options, many.files)
    text = "\n".join(report.lines(*known))
    assert "101 records read, 100 kept, dropped: 1 too long; 100 samples" in text and str(tmp_path) in text
    assert report.facts(*known)["dropped"] == {"too long": 1}
