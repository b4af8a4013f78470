"""Control tokens in the texts of a record: the tokenizer would make them real ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge.errors import DataError
from recipes.data.sample import Message, Sample
from recipes.data.supervision import THOUGHT, THOUGHT_END, Answer

# Control tokens that a message of the role may hold, because the model's own documentation has people write them.
_ALLOWED = {"assistant": {THOUGHT, THOUGHT_END}, "system": {"<|think|>"}, "developer": {"<|think|>"}}
_THOUGHT_MARKER = re.compile(f"{re.escape(THOUGHT)}|{re.escape(THOUGHT_END)}")


@dataclass(frozen=True)
class ControlTokens:
    """The tokens that no text of a record may hold. All of them have a `<`."""

    tokens: Sequence[str]

    def refused(self, sample: Sample) -> DataError | None:
        """What `check` raises."""
        try:
            self.check(sample)
        except DataError as error:
            return error
        return None

    def check(self, sample: Sample) -> None:
        """Raises DataError that names the message and the token."""
        if sample.text is not None:
            self._refuse(sample.text, set(), f"{sample.where}: text")
        for index, message in enumerate(sample.messages):
            # Most messages have none of what a control token begins with, nor half of one.
            if "<" in "".join(_texts(message)):
                self._check_message(message, f"{sample.where}: messages[{index}]")
        for value in _strings(list(sample.tools)) if sample.tools else ():
            self._refuse(value, set(), f"{sample.where}: tools")

    def _check_message(self, message: Message, at: str) -> None:
        allowed = _ALLOWED.get(message.role, set())
        texts = [part for part in message.parts if isinstance(part, str)]
        for text in texts:
            self._refuse(text, allowed, at)
            if THOUGHT in text or THOUGHT_END in text:
                _check_thoughts(text, at)
        # Halves of a token in two parts, or around a thought, become one when the template joins what it trims.
        pieces = [piece for text in texts for piece in _outside_thoughts(text)]
        for parts in (texts, pieces):
            self._refuse("".join(parts), allowed, at)
            self._refuse("".join(part.strip() for part in parts), allowed, at)
        self._refuse(message.thinking or "", set(), f"{at}: thinking")
        for value in _strings([*message.tool_calls, message.extra]):
            self._refuse(value, set(), at)

    def _refuse(self, text: str, allowed: set[str], at: str) -> None:
        if "<" not in text:
            return
        for token in self.tokens:
            if token in text and token not in allowed:
                raise DataError(f"{at}: holds the control token {token}")


def _texts(message: Message) -> list[str]:
    texts = [part for part in message.parts if isinstance(part, str)]
    if message.thinking is None and not message.tool_calls and not message.extra:
        return texts
    return [*texts, message.thinking or "", *_strings([*message.tool_calls, message.extra])]


def answers_of(messages: Sequence[Message]) -> list[Answer]:
    """What the assistant says, piece by piece as templates trim it, without the thoughts written into it."""
    answers = []
    for message in messages:
        if message.role == "assistant":
            pieces = [
                piece.strip() for part in message.parts if isinstance(part, str) for piece in _outside_thoughts(part)
            ]
            texts = [piece for piece in pieces if piece]
            answers.append(Answer(texts, len(message.tool_calls), message.train))
    return answers


def _outside_thoughts(text: str) -> list[str]:
    if THOUGHT not in text:
        return [text]
    first, *rest = text.split(THOUGHT)
    return [first, *(piece.partition(THOUGHT_END)[2] for piece in rest)]


def _check_thoughts(text: str, at: str) -> None:
    """`<|channel>` and `<channel|>` come in pairs."""
    inside = False
    for marker in _THOUGHT_MARKER.findall(text):
        if (marker == THOUGHT) == inside:
            raise DataError(f"{at}: {THOUGHT} and {THOUGHT_END} do not come in pairs")
        inside = not inside
    if inside:
        raise DataError(f"{at}: {THOUGHT} without {THOUGHT_END}")


def has_thought(message: Message) -> bool:
    if message.role != "assistant":
        return False
    return any(isinstance(part, str) and THOUGHT in part for part in message.parts)


def _strings(value: Any) -> list[str]:
    found, stack = [], [value]
    while stack:
        top = stack.pop()
        if isinstance(top, str):
            found.append(top)
        elif isinstance(top, Mapping):
            stack += [*top.keys(), *top.values()]
        elif isinstance(top, list | tuple):
            stack += top
    return found
