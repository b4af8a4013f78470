"""`gemma4-bridge generate`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bridge.cli import app
from bridge.errors import BridgeError

from .conftest import Toy

PROMPTS = [
    {"prompt": "What comes after 1?"},
    {"ids": [5, 6, 7]},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]},
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what"}]}]},
]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "a.png")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return path


def test_a_file_of_prompts_is_gone_on_with(toy: Toy, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    asked = (toy("e4b"), "--input", prompts, "--output", output, "--dtype", "float32", "--max-new-tokens", 6)
    result = run(*asked, "--temperature", 0.8, "--seed", 5, "--tp", 2)
    assert result.exit_code == 0, result.output
    whole = output.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["prompt_tokens"] == [5, 6, 7]
    for line in lines:
        assert line.keys() == {"index", "prompt_tokens", "tokens", "text", "logprobs", "finish_reason"}
        assert len(line["tokens"]) == len(line["logprobs"]) <= 6
        assert all(value < 0 for value in line["logprobs"])
    assert not list(tmp_path.glob(".answers*")), "what a complete file needs no more"
    # Complete, it is not written over; half-written, as a kill leaves it, it is finished, on one rank here.
    with pytest.raises(BridgeError, match="is there already"):
        run(*asked)
    note = json.dumps({"model": "another"})
    output.write_text(whole[: len(whole) // 2])
    (tmp_path / ".answers.jsonl.generate.json").write_text(note)
    with pytest.raises(BridgeError, match="another model, prompts or options"):
        run(*asked)


def test_a_drafter(toy: Toy, prompts: Path, tmp_path: Path) -> None:
    """The same greedy answers, to a picture too; what was drafted, in the file and on the terminal."""
    asked = (toy("e4b"), "--input", prompts, "--dtype", "float32", "--max-new-tokens", 6)
    drafter = toy("e4b", drafter=True)
    found = []
    for name, more in (("alone", ()), ("drafted", ("--drafter", drafter, "--draft-tokens", 3))):
        result = run(*asked, "--output", tmp_path / name, *more)
        assert result.exit_code == 0, result.output
        found.append([json.loads(line) for line in (tmp_path / name).read_text().splitlines()])
    assert "tokens accepted in" in result.output and str(drafter) in result.output
    for alone, drafted in zip(*found, strict=True):
        totals, rounds = [drafted.pop("drafted"), drafted.pop("accepted")], drafted.pop("rounds")
        assert totals == [sum(column) for column in zip(*rounds, strict=True)]
        assert alone["tokens"] == drafted["tokens"] and alone.keys() == drafted.keys()
        assert rounds[0][0] == 3 and sum(accepted + 1 for _, accepted in rounds) == len(alone["tokens"]) - 1
    for arguments, message in (
        ((*asked, "--drafter", toy("e4b")), "is no drafter"),
        ((*asked, "--drafter", toy("31b", drafter=True)), "the drafter is of another model"),
        ((*asked, "--draft-tokens", 3), "goes with --drafter"),
        ((*asked, "--drafter", drafter, "--draft-tokens", 0), "--draft-tokens 0"),
        ((drafter, "--ids", "5"), "is a drafter, which says nothing alone"),
    ):
        with pytest.raises(BridgeError, match=message):
            run(*arguments)


def test_what_makes_no_sense_is_said_before_anything_is_loaded(toy: Toy, prompts: Path, tmp_path: Path) -> None:
    folder = toy("31b", text_only=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"messages": [{"role": "assistant", "content": "b"}]}\n')
    for arguments, message in (
        ((), "exactly one of"),
        (("--prompt", "a", "--ids", "1"), "exactly one of"),
        (("--ids", "1,x"), "token ids with commas"),
        (("--ids", "1,2", "--image", "a.png"), "go with --prompt"),
        (("--prompt", "a", "--temperature", -1), "temperature"),
        (("--prompt", "a", "--num-return-sequences", 2), "num_return_sequences"),
        (("--prompt", "a", "--dtype", "int8"), "--dtype"),
        (("--prompt", "a", "--tp", 3), "tp=3"),
        (("--prompt", "a", "--adapter", tmp_path / "no"), "not a folder"),
        (("--chat", "--output", tmp_path / "out.jsonl"), "leave --output"),
        (("--input", tmp_path / "no.jsonl"), "not a file"),
        (("--input", bad), "bad.jsonl:2.*the model answers a user or a tool"),
        (("--input", prompts), "takes no image"),
    ):
        with pytest.raises(BridgeError, match=message):
            run(folder, *arguments)
