"""The file of answers: in order, whole lines, gone on with after whatever ended it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridge.errors import UsageError
from bridge.generate.output import OutputFile
from bridge.generate.rows import Completion
from bridge.generate.sampling import SamplingOptions

OPTIONS = SamplingOptions(temperature=1.0, num_return_sequences=2)


def completion(number: int) -> Completion:
    return Completion(number // 2, number % 2, (1, 2), (number,), (-0.5,), "length", f"text {number}\n")


def opened(path: Path, options: SamplingOptions = OPTIONS, prompts: bytes = b"prompts") -> OutputFile:
    return OutputFile(path, options, prompts, "model")


def test_answers_are_written_in_order_and_gone_on_with(tmp_path: Path) -> None:
    path, counted = tmp_path / "out.jsonl", list[int]()
    with pytest.raises(KeyboardInterrupt), opened(path) as file:
        for number in (1, 0, 4, 2):
            file.write(completion(number), counted.append)
        raise KeyboardInterrupt
    assert counted == [1, 2, 3]
    with path.open("a") as half:
        half.write('{"index": 1, "prom')
    for options, prompts in ((SamplingOptions(), b"prompts"), (OPTIONS, b"others")):
        with pytest.raises(UsageError, match="begun with another"):
            opened(path, options, prompts)
    with opened(path) as file:
        assert file.done == 3
        for number in (5, 4, 3):
            file.write(completion(number), counted.append)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [[number] for number in range(6)]
    assert [line.get("sample", 0) for line in lines] == [0, 1] * 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(UsageError, match="is there already"):
        opened(path)
