"""What a record can be: one table of formats, by the columns that show each, and how each becomes a conversation.

A record is of the first format of `FORMATS` whose columns it all has. The columns that a format does not read are
counted and said (`recipes.data.report`).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.errors import DataError, UsageError
from recipes.data.checks import is_list, kind_of, text_of
from recipes.data.dialects import MEDIA_KINDS, conversation, tools_of
from recipes.data.tokens import LEARNT_MASKS
from recipes.imported import imported_function


@dataclass(frozen=True)
class FormatOptions:
    """How records are to be read, where they do not show it: the keys `data.format`, `.columns` and `.function`.

    `format`: the name of one of `FORMATS` for all of them. `columns`: the name of a column here -> what the data calls
    it; `role` and `content` are of messages. `function`: `module:function`, of a record as it was read to one that is
    of a format, or None to leave it out.
    """

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    function: str | None = None

    def __post_init__(self) -> None:
        names = [one.name for one in FORMATS]
        if self.format is not None and self.format not in names:
            raise UsageError(f"data.format={self.format}: is one of {', '.join(names)}")
        known = ["role", "content", *dict.fromkeys(column for one in FORMATS for column in (*one.columns, *one.also))]
        for ours, theirs in self.columns.items():
            if ours not in known or not isinstance(theirs, str):
                raise UsageError(
                    f"data.columns.{ours}={theirs}: names a column of the data for one of {', '.join(known)}"
                )


class Columns:
    """A record's columns by the names that they have here. `read`: those that were asked for, as the data has them."""

    def __init__(self, record: Mapping[str, Any], where: object, names: Mapping[str, str]) -> None:
        self._record, self.where, self._names = record, where, names
        self.read: set[str] = set()
        self.role, self.content = names.get("role"), names.get("content")

    def theirs(self, name: str) -> str:
        """What the data calls it."""
        return self._names.get(name, name)

    def get(self, name: str) -> Any:
        """Its value; None where it is not there."""
        self.read.add(self.theirs(name))
        return self._record.get(self.theirs(name))

    def has(self, *names: str) -> bool:
        """Whether all of them are there."""
        return all(self._record.get(self.theirs(name)) is not None for name in names)

    def may_have(self, name: str) -> bool:
        """Whether it is worth asking `has`."""
        return name in self._record or name in self._names

    def any(self, names: frozenset[str]) -> bool:
        """Whether one of them may be there."""
        return bool(self._names) or not names.isdisjoint(self._record)

    def at(self, name: str) -> str:
        """For a message: the record and the column."""
        return f"{self.where}: {self.theirs(name)}"

    def text(self, name: str, *, empty: bool = False) -> str:
        """Raises DataError for what is no text."""
        return text_of(self.get(name), self.at(name), empty=empty)

    @property
    def given(self) -> list[str]:
        """Those that say something, as the data calls them."""
        return [str(key) for key, value in self._record.items() if value is not None]


@dataclass(frozen=True)
class Recognised:
    """A record in the one form that is checked further: `messages` with `tools` and media, `text`, or `input_ids`.

    `field`: the column that messages come from. `unread`: columns that say something and are not read.
    """

    format: str
    record: Mapping[str, Any]
    field: str = "messages"
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """`columns`: a record that has all of them is of this format. `also`: columns that it may have.

    `to_record`: what `Recognised.record` is. Raises DataError. `field`: what `Recognised.field` is, by default the
    first of `columns`.
    """

    name: str
    columns: tuple[str, ...]
    to_record: Callable[[Columns], Mapping[str, Any]]
    also: tuple[str, ...] = ()
    field: str = ""


_SYSTEM = ("system", "system_prompt")
_BESIDE = ("tools", "functions", *(name for kind in MEDIA_KINDS for name in (kind, f"{kind}s")))
_AROUND = (*_SYSTEM, *_BESIDE)
_ALL_AROUND = frozenset(_AROUND)


def _media(columns: Columns) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for kind in MEDIA_KINDS:
        one, several = columns.get(kind), columns.get(f"{kind}s")
        if several is not None and not is_list(several):
            raise DataError(f"{columns.at(f'{kind}s')}: expected a list, found {kind_of(several)}")
        found[kind] = [*(several or ()), *(one if is_list(one) else () if one is None else (one,))]
    return found


def _record(
    columns: Columns, rows: Any, name: str, *, role: str | None = None, content: str | None = None
) -> dict[str, Any]:
    """Messages, of the column `name`, with what stands beside them in the record."""
    if not columns.any(_ALL_AROUND):
        return {"messages": conversation(rows, columns.at(name), {}, role=role, content=content)}
    media = _media(columns)
    rows = conversation(rows, columns.at(name), media, role=role, content=content)
    system = next((text for key in _SYSTEM if (text := columns.get(key)) not in (None, "")), None)
    if system is not None and is_list(rows) and not any(_role(row) in ("system", "developer") for row in rows):
        rows = [_said("system", system), *rows]
    tools = tools_of(columns.get("tools"), columns.get("functions"), columns.at("functions"))
    return {"messages": rows, "tools": tools, **{f"{kind}s": media[kind] for kind in media if media[kind]}}


def _role(row: Any) -> Any:
    return row.get("role") if isinstance(row, Mapping) else None


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _conversation(name: str) -> Callable[[Columns], Mapping[str, Any]]:
    return lambda columns: _record(columns, columns.get(name), name, role=columns.role, content=columns.content)


def _pair(prompt: str, answer: str, more: str | None = None) -> Callable[[Columns], Mapping[str, Any]]:
    """A question and its answer, each in a column; `more`, where it says something, on a line of its own below."""

    def to_record(columns: Columns) -> Mapping[str, Any]:
        asked = [columns.text(name, empty=more is not None) for name in (prompt, more) if name and columns.has(name)]
        history = columns.get("history") or []
        if not is_list(history) or not all(is_list(turn) and len(turn) == 2 for turn in history):
            raise DataError(f"{columns.at('history')}: expected a list of [question, answer]")
        turns = [*history, ("\n".join(text for text in asked if text.strip()), columns.text(answer))]
        rows = [_said(role, said) for turn in turns for role, said in zip(("user", "assistant"), turn, strict=True)]
        return _record(columns, rows, prompt)

    return to_record


def _completion(columns: Columns) -> Mapping[str, Any]:
    """Prompt and completion, each a text or messages. Of a prompt's messages nothing is learnt unless they say so."""
    sides = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = columns.get(name)
        if isinstance(value, str) and value.lstrip()[:1] != "[":
            value = [_said(role, columns.text(name))]
        else:
            value = conversation(value, columns.at(name), {}, role=columns.role, content=columns.content)
        if not is_list(value) or not value:
            raise DataError(f"{columns.at(name)}: expected a string or a list of messages, found {kind_of(value)}")
        sides.append(value)
    asked = [{"train": False, **row} if isinstance(row, Mapping) else row for row in sides[0]]
    return _record(columns, [*asked, *sides[1]], "prompt")


def _cauldron(columns: Columns) -> Mapping[str, Any]:
    turns = columns.get("texts")
    if not is_list(turns) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{columns.at('texts')}: expected a list of objects with user and assistant")
    rows = [_said(role, turn.get(role)) for turn in turns for role in ("user", "assistant")]
    return _record(columns, rows, "texts")


def _tokens(columns: Columns) -> Mapping[str, Any]:
    names = ("input_ids", "labels", *LEARNT_MASKS, "attention_mask")
    return {name: columns.get(name) for name in names}


# Of a line that `generate --output` writes, beside the tokens.
_OF_ANSWERS = ("index", "sample", "text", "logprobs", "finish_reason", "drafted", "accepted", "rounds")


def _answer(columns: Columns) -> Mapping[str, Any]:
    """What a model was asked and what it said, both as tokens; only the answer is learnt."""
    asked, said = (columns.get(name) for name in ("prompt_tokens", "tokens"))
    for name, value in (("prompt_tokens", asked), ("tokens", said)):
        if not is_list(value):
            raise DataError(f"{columns.at(name)}: expected a list of integers, found {kind_of(value)}")
    columns.read.update(map(columns.theirs, _OF_ANSWERS))
    return {"input_ids": [*asked, *said], "completion_mask": [0] * len(asked) + [1] * len(said)}


def _refused(why: str) -> Callable[[Columns], Mapping[str, Any]]:
    def refuse(columns: Columns) -> Mapping[str, Any]:
        raise DataError(f"{columns.where}: {why}")

    return refuse


# The name of the format, and of the only column of its records.
MEGATRON = "megatron"
_PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("prompt", "response"),
    ("problem", "solution"),
    ("inputs", "targets"),
    ("input", "output"),
)
_NO_PREFERENCE = (
    "is a pair of a chosen and a rejected answer, for the dpo recipes; to learn the chosen ones alone, set "
    "data.format=messages and data.columns.messages=chosen, or data.function"
)
_NO_LABEL = (
    "has a label beside prompt and completion, for the kto recipes; to learn every completion whatever its label, set "
    "data.format=prompt-completion"
)

FORMATS: tuple[Format, ...] = (
    Format("input_ids", ("input_ids",), _tokens, ("labels", *LEARNT_MASKS, "attention_mask")),
    Format(MEGATRON, (MEGATRON,), lambda columns: {"input_ids": columns.get(MEGATRON)}),
    Format("answer", ("prompt_tokens", "tokens"), _answer, field="tokens"),
    Format("messages", ("messages",), _conversation("messages"), _AROUND),
    Format("llava", ("conversations", "image"), _conversation("conversations"), _AROUND),
    Format("llava-images", ("conversations", "images"), _conversation("conversations"), _AROUND),
    Format("sharegpt", ("conversations",), _conversation("conversations"), _AROUND),
    Format("conversation", ("conversation",), _conversation("conversation"), _AROUND),
    Format("texts", ("images", "texts"), _cauldron, _BESIDE, field="texts"),
    Format("preference", ("chosen", "rejected"), _refused(_NO_PREFERENCE)),
    Format("unpaired-preference", ("prompt", "completion", "label"), _refused(_NO_LABEL)),
    Format("prompt-completion", ("prompt", "completion"), _completion, _AROUND),
    Format(
        "alpaca", ("instruction", "output"), _pair("instruction", "output", "input"), ("input", "history", *_AROUND)
    ),
    Format("dolly", ("instruction", "response"), _pair("instruction", "response", "context"), ("context", *_AROUND)),
    *(Format(f"{asked}-{said}", (asked, said), _pair(asked, said), _AROUND) for asked, said in _PAIRS),
    Format("text", ("text",), lambda columns: {"text": columns.text("text")}),
)
DEFAULT_FORMAT = FormatOptions()
_BY_NAME = {one.name: one for one in FORMATS}


def recognised(record: Any, where: object, format_options: FormatOptions) -> Recognised:
    """The record in the form that is checked further. Raises DataError that says which columns there are."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object, found {kind_of(record)}")
    columns = Columns(record, where, format_options.columns)
    chosen = _BY_NAME.get(format_options.format or "")
    if chosen is None:
        chosen = next((one for one in FORMATS if columns.may_have(one.columns[0]) and columns.has(*one.columns)), None)
        if chosen is None:
            raise DataError(f"{where}: {_unlike(columns)}")
    elif not columns.has(*chosen.columns):
        missing = next(name for name in chosen.columns if not columns.has(name))
        raise DataError(
            f"{where}: has no {columns.theirs(missing)}, which data.format={chosen.name} needs; it has "
            f"{', '.join(columns.given) or 'nothing'} (data.columns.{missing}=... names another column)"
        )
    found = chosen.to_record(columns)
    unread = tuple(name for name in columns.given if name not in columns.read)
    return Recognised(chosen.name, found, columns.theirs(chosen.field or chosen.columns[0]), unread)


def _unlike(columns: Columns) -> str:
    """Why the columns are of no format: what the likeliest ones lack."""
    for one in FORMATS:
        lacking = [name for name in one.columns if not columns.has(name)]
        found = " and ".join(columns.theirs(name) for name in one.columns if name not in (*lacking, *_BESIDE))
        if found and len(lacking) == 1:
            return (
                f"has {found}, but has no {columns.theirs(lacking[0])} ({one.name}); the columns are "
                f"{', '.join(columns.given)} (data.columns.{lacking[0]}=... names another one)"
            )
    known = "messages, conversations, prompt and completion, instruction and output, text, input_ids or others"
    return (
        f"has none of {known} (docs/data.md), but {', '.join(columns.given[:12]) or 'nothing'}; "
        "data.columns.messages=... says which column is which, data.function=module:function makes records of these"
    )


def loaded_function(format_options: FormatOptions) -> Callable[[Any, object], Any]:
    """`data.function`, which says the record where it raises. Raises UsageError."""
    name = format_options.function
    if name is None:
        return lambda record, where: record
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"data.function={name}: is written module:function")
    found = imported_function(name, f"data.function={name}:", "a record")

    def applied(record: Any, where: object) -> Any:
        try:
            return found(record)
        except Exception as error:
            said = " ".join(str(error).split())
            raised = f"{type(error).__name__}{f': {said}' if said else ''}"
            raise DataError(f"{where}: data.function={name} raises {raised}") from None

    return applied


def function_digest(format_options: FormatOptions) -> str:
    """Of the file that `data.function` is in: another one gives other records. Raises UsageError."""
    loaded_function(format_options)
    file = getattr(sys.modules[str(format_options.function).partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""
