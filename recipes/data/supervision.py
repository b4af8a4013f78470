"""Which characters of a rendered conversation are learnt.

Read off the rendered text itself, by its markers: neither `{% generation %}` blocks nor renderings of prefixes are
needed, so a template may drop earlier thoughts, merge turns or answer for tools inside a model turn. That is exact
because no message can hold a marker (`recipes.data.chat` refuses those), so every marker is the template's own.

A model turn is `<|turn>model\\n ... <turn|>`. Where tools answer inside of it, it has several steps:

    <|turn>model\\n call <|tool_response> answer <tool_response|> reply <turn|>
                   ^^^^^^^^^^^^^^^^^^^^^^                        ^^^^^^^^^^^^^

`<|tool_response>` is what the model stops at to wait for a tool, as `<turn|>` is when it is done; both are learnt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from recipes.data.options import Supervise

TURN, TURN_END = "<|turn>", "<turn|>"
THOUGHT, THOUGHT_END = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
RESPONSE, RESPONSE_END = "<|tool_response>", "<tool_response|>"
MARKERS = (TURN, TURN_END, THOUGHT, THOUGHT_END, CALL, CALL_END, RESPONSE, RESPONSE_END)
MODEL_HEADER = f"{TURN}model\n"
_ANY = re.compile("|".join(re.escape(marker) for marker in MARKERS))

Span = tuple[int, int]


class TemplateError(ValueError):
    """A rendered text that is not turns as Gemma 4 has them, or lacks what the messages say."""


class Step(NamedTuple):
    """What the model says at one go: characters [start, end), end marker included. `turn`: number of its turn."""

    start: int
    end: int
    turn: int
    thoughts: tuple[Span, ...]
    calls: int


def model_steps(text: str) -> list[Step]:
    """All steps of all model turns, in order. Raises TemplateError."""
    steps: list[Step] = []
    turn, start = -1, None
    thoughts: list[Span] = []
    calls, thought_from = 0, None

    def close(end: int, stop: int) -> None:
        """The step said text[start:end]; `stop` is behind the marker that ended it."""
        nonlocal start, thoughts, calls, thought_from
        if thought_from is not None:
            raise TemplateError(f"a thought without {THOUGHT_END}")
        # A second tool response follows the first one without the model saying anything.
        if start is not None and text[start:end].strip():
            steps.append(Step(start, stop, turn, tuple(thoughts), calls))
        start, thoughts, calls = None, [], 0

    in_model = False
    for match in _ANY.finditer(text):
        marker, at, after = match.group(), match.start(), match.end()
        if marker == TURN:
            if in_model:
                close(at, at)  # A turn that the template left open.
            in_model = text.startswith(MODEL_HEADER, at)
            if in_model:
                turn += 1
                start = at + len(MODEL_HEADER)
        elif not in_model:
            continue
        elif marker == TURN_END:
            close(at, after)
            in_model = False
        elif marker == RESPONSE:
            close(at, after)
        elif marker == RESPONSE_END:
            start = after
        elif marker == THOUGHT:
            thought_from = at
        elif marker == THOUGHT_END and thought_from is not None:
            thoughts.append((thought_from, after))
            thought_from = None
        elif marker == CALL:
            calls += 1
    if in_model:
        close(len(text), len(text))
    return steps


class Answer(NamedTuple):
    """What one of the assistant's messages says: `texts`, without white space around and thoughts, and `calls`, how
    many. `train`: whether it is learnt, where the record says so."""

    texts: Sequence[str]
    calls: int = 0
    train: bool | None = None


def check_answers(text: str, steps: Sequence[Step], answers: Sequence[Answer]) -> list[bool | None]:
    """Hold the steps against the messages: every answer is in one of them, in order, and so are all tool calls.

    A template that does not render what it was given would otherwise train on something else without a word. Returns
    what the messages say of each step, whether it is learnt. Raises TemplateError.
    """
    found, calls = sum(step.calls for step in steps), sum(answer.calls for answer in answers)
    if found != calls:
        raise TemplateError(f"the chat template renders {found} of {calls} tool calls as the model's")
    said: list[set[bool | None]] = [set() for _ in steps]
    number = position = 0
    calls_left = steps[0].calls if steps else 0
    for answer in answers:
        for _ in range(answer.calls):
            while not calls_left:
                number += 1
                calls_left = steps[number].calls
            said[number].add(answer.train)
            calls_left -= 1
        for piece in answer.texts:
            while (at := _find(text, piece, steps, number, position)) < 0:
                number += 1
                if number >= len(steps):
                    short = piece if len(piece) <= 40 else piece[:37] + "..."
                    raise TemplateError(
                        f"the chat template does not render the answer {short!r} between {MODEL_HEADER!r} and "
                        f"{TURN_END!r}"
                    )
                calls_left = steps[number].calls
            said[number].add(answer.train)
            position = at + len(piece)
    if any(len(of_step) > 1 for of_step in said):
        raise TemplateError("messages of which one is learnt (train) and one is not are one turn in the chat template")
    return [next(iter(of_step), None) for of_step in said]


def _find(text: str, piece: str, steps: Sequence[Step], number: int, position: int) -> int:
    if number >= len(steps):
        return -1
    start = max(position, steps[number].start)
    # Where nearly every answer is; to search takes many times as long.
    return start if text.startswith(piece, start) else text.find(piece, start, steps[number].end)


def supervised_spans(steps: Sequence[Step], choice: Supervise, said: Sequence[bool | None] | None = None) -> list[Span]:
    """The characters that are learnt, as sorted spans that neither touch nor overlap.

    `choice.turns="everything"` is here as "all": `around` adds what is asked. `said`: of each step, what its messages
    say themselves; `choice.turns` counts where they say nothing.
    """
    spans: list[Span] = []
    last = steps[-1].turn if steps else -1
    for step, learnt in zip(steps, said or [None] * len(steps), strict=True):
        if learnt is None:
            learnt = choice.turns != "last" or step.turn == last
        if not learnt or (step.calls and not choice.tool_calls):
            continue
        position = step.start
        for start, end in () if choice.thinking else step.thoughts:
            spans.append((position, start))
            position = end
        spans.append((position, step.end))
    return [span for span in spans if span[1] > span[0]]


def around(length: int, spans: Sequence[Span], steps: Sequence[Step]) -> list[Span]:
    """All `length` characters but what the model says and is not in `spans`."""
    left_out: list[Span] = []
    for step in steps:
        position = step.start
        for start, end in [span for span in spans if step.start <= span[0] < step.end]:
            left_out.append((position, start))
            position = end
        left_out.append((position, step.end))
    outside, position = [], 0
    for start, end in left_out:
        if end > start:
            outside.append((position, start))
            position = end
    return [span for span in [*outside, (position, length)] if span[1] > span[0]]


def with_prefix(text: str, spans: Sequence[Span], steps: Sequence[Step], prefix: str) -> tuple[str, list[Span], int]:
    """Have `prefix`, with which answers are asked for, before what the model says in its last turn; it is not learnt.

    A turn that begins with a thought of its own stays as it is. Also returns how many earlier turns are learnt without.
    """
    turns: dict[int, int] = {}
    for step in steps:
        turns.setdefault(step.turn, step.start)
    there = [at for at in turns.values() if text.startswith(prefix, at)]
    bare = [at for at in turns.values() if at not in there and not text.startswith(THOUGHT, at)]
    trimmed = [(start + len(prefix) if start in there else start, stop) for start, stop in spans]
    starts = {start for start, _ in spans}
    last = turns[steps[-1].turn]
    if last not in bare:
        return text, trimmed, sum(at in starts for at in bare)
    moved = [(start + len(prefix), stop + len(prefix)) if start >= last else (start, stop) for start, stop in trimmed]
    return text[:last] + prefix + text[last:], moved, sum(at in starts for at in bare if at != last)
