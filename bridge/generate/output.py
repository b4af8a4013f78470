"""Answers as JSONL, in the order of the prompts; a file that was begun is gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from bridge.errors import UsageError

if TYPE_CHECKING:
    from bridge.generate.rows import Completion
    from bridge.generate.sampling import SamplingOptions


def record(completion: Completion) -> dict[str, object]:
    """A line of the output. `sample` is there where a prompt has several answers; where there is a drafter, how many
    tokens were `drafted` and `accepted` in all, and in each of the `rounds`."""
    line = {
        "index": completion.index,
        "prompt_tokens": list(completion.prompt_tokens),
        "tokens": list(completion.tokens),
        "text": completion.text,
        "logprobs": list(completion.logprobs),
        "finish_reason": completion.finish_reason,
    }
    if completion.rounds is not None:
        drafted, accepted = (sum(of_pass[place] for of_pass in completion.rounds) for place in (0, 1))
        line |= {"drafted": drafted, "accepted": accepted, "rounds": [list(of_pass) for of_pass in completion.rounds]}
    return line | {"sample": completion.sample} if completion.sample else line


class OutputFile:
    """A context manager. Beside the file lies what it was asked of, `.NAME.generate.json`, until it is complete.

    `done`: how many answers it holds already. Raises UsageError where the file is of other prompts or options.
    """

    def __init__(self, path: Path, options: SamplingOptions, prompts: bytes, model: str) -> None:
        self._path, self._note = path, path.with_name(f".{path.name}.generate.json")
        said = json.dumps(
            {"model": model, "prompts": hashlib.sha256(prompts).hexdigest(), "options": asdict(options)}, indent=1
        )
        self.done = 0
        if path.exists():
            if not self._note.exists():
                raise UsageError(f"{path}: is there already; take it away, or name another file")
            if self._note.read_text(encoding="utf-8") != said:
                raise UsageError(
                    f"{path}: was begun with another model, prompts or options; take it away to begin anew"
                )
            self.done = self._whole_lines()
        self._note.write_text(said, encoding="utf-8")
        self._waiting: dict[tuple[int, int], Completion] = {}
        self._samples = options.num_return_sequences

    def _whole_lines(self) -> int:
        """Count the lines of the file and cut off one that was not finished."""
        data = self._path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with self._path.open("r+b") as file:
                file.truncate(end)
        return data[:end].count(b"\n")

    def __enter__(self) -> OutputFile:
        self._file: IO[str] = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self._note.unlink()

    def write(self, completion: Completion, progress: Callable[[int], None]) -> None:
        """Take an answer; those that are next in order are written."""
        self._waiting[completion.index, completion.sample] = completion
        while (ready := self._waiting.pop(divmod(self.done, self._samples), None)) is not None:
            self._file.write(json.dumps(record(ready), ensure_ascii=False) + "\n")
            self._file.flush()
            self.done += 1
            progress(self.done)
