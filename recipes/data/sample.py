"""One record of training data, checked: a conversation with its tools and media, plain text, or tokens.

`parse_record` takes what a JSON line or a Parquet row holds and believes none of it. Every DataError begins with the
file and line.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from bridge.errors import DataError
from recipes.data.checks import (
    check_strings,
    is_list,
    is_unicode,
    kind_of,
    only_keys,
    parsed_json,
    short,
    text_of,
    unknown_key,
)
from recipes.data.dialects import MEDIA_KINDS, ROLES, is_plain
from recipes.data.formats import DEFAULT_FORMAT, FormatOptions, recognised
from recipes.data.tokens import Tokens, parse_tokens

THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "tool_responses", "train", *THINKING_KEYS}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# What the base64 of PNG, JPEG, GIF, WebP and WAV, BMP, TIFF, Ogg and FLAC begins with, longer than a path like it is.
_BASE64 = re.compile(r"(iVBOR|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0A|T2dnUw|ZkxhQw)[A-Za-z0-9+/\s]{64,}={0,2}\s*")
_SOURCE_KEYS = ("path", "url", "base64", "bytes")


class Where(NamedTuple):
    """A record's place: file and line (of Parquet: row), counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Blob:
    """The bytes of an image, clip or sound: exactly one of the three is given. `path` is as the record has it."""

    path: str | None = None
    url: str | None = None
    data: bytes | None = field(default=None, repr=False)

    @property
    def shown(self) -> str:
        return repr(self.path or self.url) if self.data is None else f"inline data of {len(self.data)} bytes"


@dataclass(frozen=True)
class Media:
    """One image, video or sound. A video is one blob, or its frames in order together with `fps`."""

    kind: str
    blobs: tuple[Blob, ...]
    fps: float | None = None


class Message(NamedTuple):
    """One message. `parts`: strings, and media in between; `extra`: keys that go to the template as they are.

    `train`: whether it is learnt, where the record says so.
    """

    role: str
    parts: tuple[str | Media, ...]
    thinking: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = MappingProxyType({})
    train: bool | None = None

    @property
    def bare(self) -> bool:
        """Whether it is text alone, and says nothing beside."""
        beside = self.thinking is not None or self.tool_calls or self.extra
        return not beside and len(self.parts) == 1 and isinstance(self.parts[0], str)

    def for_template(self, thinking_key: str | None) -> dict[str, Any]:
        """The message as chat templates expect it; content is a string wherever it is one piece of text."""
        content: Any
        if self.bare:
            return {"role": self.role, "content": self.parts[0]}
        if not self.parts:
            content = ""
        elif len(self.parts) == 1 and isinstance(self.parts[0], str):
            content = self.parts[0]
        elif self.role in ("system", "developer"):
            # Published templates print a system turn's content as it is: a list would come out as Python.
            content = "".join(part for part in self.parts if isinstance(part, str))
        else:
            content = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind} for part in self.parts
            ]
        message = {"role": self.role, "content": content, **self.extra}
        if self.thinking and thinking_key is not None:
            message[thinking_key] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


@dataclass(frozen=True)
class Sample:
    """A checked record: `messages` with `tools`, or `text`, or `tokens` (then there are no messages).

    `form`: the name of its format. `unread`: what it says beside, which nothing here reads.
    """

    where: Where
    form: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    tokens: Tokens | None = None
    unread: tuple[str, ...] = ()

    @cached_property
    def media(self) -> tuple[Media, ...]:
        """Of all messages, in order."""
        return tuple([part for message in self.messages for part in message.parts if isinstance(part, Media)])


def parse_record(record: Any, where: Where, format_options: FormatOptions = DEFAULT_FORMAT) -> Sample:
    """Check a record of any of `recipes.data.formats`, or of the one that `format_options` says. Raises DataError."""
    found = recognised(record, where, format_options)
    if "text" in found.record:
        return Sample(where, found.format, text=found.record["text"], unread=found.unread)
    if "input_ids" in found.record:
        return Sample(where, found.format, tokens=parse_tokens(found.record, where), unread=found.unread)
    unread: list[str] = []
    messages = _messages(found.record, where, found.field, unread)
    if messages[-1].role != "assistant":
        raise DataError(f"{where}: the last message is of role {messages[-1].role}; it has to be the assistant's")
    tools = _tools(found.record.get("tools"), where)
    return Sample(where, found.format, messages, tools, unread=(*found.unread, *dict.fromkeys(unread)))


def parse_prompt(record: Any, where: Where) -> Sample:
    """Check what a model is asked: `messages` (and `tools`, media) that end before its turn, or a `prompt`.

    Other columns are let be. Raises DataError.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object, found {kind_of(record)}")
    given = [key for key in ("messages", "prompt") if record.get(key) is not None]
    if len(given) != 1:
        raise DataError(f"{where}: has {' and '.join(given) or 'none'} of messages, prompt: exactly one is needed")
    if isinstance(record.get("prompt"), str):
        prompt = Message("user", (text_of(record["prompt"], f"{where}: prompt"),))
        return Sample(where, "prompt", (prompt,), _tools(record.get("tools"), where))
    found = recognised({"messages": record[given[0]], **record}, where, FormatOptions(format="messages"))
    messages = _messages(found.record, where, given[0], [])
    if messages[-1].role not in ("user", "tool"):
        raise DataError(f"{where}: the last message is of role {messages[-1].role}; the model answers a user or a tool")
    return Sample(where, "messages", messages, _tools(found.record.get("tools"), where))


def _messages(record: Mapping[str, Any], where: Where, field: str, unread: list[str]) -> tuple[Message, ...]:
    """`field`: the column they come from. Keys that are not read are added to `unread`."""
    rows = record["messages"]
    if not is_list(rows) or not rows:
        raise DataError(f"{where}: {field}: expected a list of messages, found {kind_of(rows)}")
    columns: dict[str, list[Media]] = {kind: [] for kind in MEDIA_KINDS}
    for kind in MEDIA_KINDS:
        if (column := record.get(f"{kind}s")) is not None:
            columns[kind] = _media_column(column, kind, f"{where}: {kind}s")
    # Nearly all messages are plain: no more is to be looked at.
    messages = tuple(
        [
            Message(row["role"], (row["content"],))
            if is_plain(row) and row["role"] != "tool" and is_unicode(row["content"])
            else _message(row, columns, f"{where}: {field}[{index}]", f"{field}[].", unread)
            for index, row in enumerate(rows)
        ]
    )
    for kind, left in columns.items():
        if left:
            raise DataError(
                f"{where}: {kind}s: {len(left)} more than the messages have parts of type {kind} (or tags <{kind}>)"
            )
    _check_order(messages, where, field)
    return messages


def _check_order(messages: Sequence[Message], where: Where, field: str) -> None:
    previous: Message | None = None
    for index, message in enumerate(messages):
        if message.role in ("system", "developer") and index:
            raise DataError(f"{where}: {field}[{index}]: a {message.role} message can only come first")
        if message.role == "tool" and (
            previous is None or (previous.role != "tool" and not (previous.role == "assistant" and previous.tool_calls))
        ):
            raise DataError(f"{where}: {field}[{index}]: a tool message has to follow the assistant's tool call")
        previous = message


def _message(row: Any, columns: dict[str, list[Media]], at: str, prefix: str, unread: list[str]) -> Message:
    if not isinstance(row, Mapping):
        raise DataError(f"{at}: expected an object, found {kind_of(row)}")
    row = {key: value for key, value in row.items() if value is not None}
    role = row.get("role")
    if role not in ROLES:
        raise DataError(f"{at}: unknown role {short(role)} (one of {', '.join(ROLES)})")
    if unknown := sorted(str(key) for key in row.keys() - _MESSAGE_KEYS):
        if not row.keys() & {"content", "tool_calls"}:
            unknown_key(unknown[0], _MESSAGE_KEYS, at)
        unread += [prefix + key for key in unknown]
    parts = _parts(row.get("content"), columns, f"{at}: content")
    thoughts = {key: row[key] for key in THINKING_KEYS if row.get(key) not in (None, "")}
    if len(thoughts) > 1:
        raise DataError(f"{at}: has both {' and '.join(thoughts)}")
    extra: dict[str, Any] = {
        key: text_of(row[key], f"{at}: {key}") for key in ("name", "tool_call_id") if row.get(key) is not None
    }
    calls = _tool_calls(row.get("tool_calls"), f"{at}: tool_calls")
    if role != "assistant":
        for key in ("tool_calls", "tool_responses", *thoughts):
            if row.get(key):
                raise DataError(f"{at}: {key} belongs into a message of the assistant, not of role {role}")
    if row.get("tool_responses"):
        extra["tool_responses"] = _tool_responses(row["tool_responses"], f"{at}: tool_responses")
    if role in ("system", "developer", "assistant"):
        for part in parts:
            if isinstance(part, Media):
                raise DataError(f"{at}: a message of role {role} holds text only, found a part of type {part.kind}")
    says = any(isinstance(part, Media) or part.strip() for part in parts)
    if role == "assistant" and not says and not calls:
        raise DataError(f"{at}: empty answer")
    if role not in ("assistant", "tool") and not says:
        raise DataError(f"{at}: empty content")
    thinking = text_of(next(iter(thoughts.values())), f"{at}: {next(iter(thoughts))}") if thoughts else None
    if role != "assistant" and row.get("train"):
        raise DataError(f"{at}: a message of role {role} cannot be learnt alone; data.supervise_turns=everything can")
    return Message(role, parts, thinking, calls, extra, row.get("train") if role == "assistant" else None)


def _parts(content: Any, columns: dict[str, list[Media]], at: str) -> tuple[str | Media, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (text_of(content, at, empty=True),) if content else ()
    if not is_list(content):
        raise DataError(f"{at}: expected a string or a list of parts, found {kind_of(content)}")
    return tuple(_part(part, columns, f"{at}[{index}]") for index, part in enumerate(content))


def _part(part: Any, columns: dict[str, list[Media]], at: str) -> str | Media:
    if not isinstance(part, Mapping):
        raise DataError(f"{at}: expected an object, found {kind_of(part)}")
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "text":
        only_keys(part, {"type", "text"}, at)
        return text_of(part.get("text"), f"{at}: text", empty=True)
    if kind not in MEDIA_KINDS:
        raise DataError(f"{at}: unknown type {short(kind)} (one of text, {', '.join(MEDIA_KINDS)})")
    only_keys(part, {"type", kind, *_SOURCE_KEYS} | ({"frames", "fps"} if kind == "video" else set()), at)
    given = sorted(part.keys() - {"type", "fps"})
    if len(given) > 1:
        raise DataError(f"{at}: has both {' and '.join(given)}; one source is needed")
    if not given:
        if not columns[kind]:
            raise DataError(f"{at}: names no {kind}, and the record's column {kind}s has none left")
        return columns[kind].pop(0)
    key, fps = given[0], part.get("fps")
    if key == "frames":
        frames = part["frames"]
        if not is_list(frames) or not frames:
            raise DataError(f"{at}: frames: expected a list of images, found {kind_of(frames)}")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
            raise DataError(f"{at}: fps: frames need a positive number, found {short(fps)}")
        blobs = tuple(_blob(frame, "path", f"{at}: frames[{index}]") for index, frame in enumerate(frames))
        return Media(kind, blobs, float(fps))
    if fps is not None:
        raise DataError(f"{at}: fps: only goes with frames")
    return Media(kind, (_blob(part[key], key, f"{at}: {key}"),))


def _blob(value: Any, key: str, at: str) -> Blob:
    if isinstance(value, Mapping):
        # What `datasets` and Parquet files make of an image: {"bytes": ..., "path": ...}; the bytes count.
        only_keys(value, {"bytes", "path"}, at)
        if value.get("bytes") is not None:
            return _blob(value["bytes"], "bytes", f"{at}: bytes")
        return _blob(value.get("path"), "path", f"{at}: path")
    if isinstance(value, bytes | bytearray | memoryview):
        if not len(value):
            raise DataError(f"{at}: no bytes")
        return Blob(data=bytes(value))
    text = text_of(value, at)
    if key == "base64":
        return Blob(data=_decoded(text, at))
    if text[:5].lower() == "data:":
        head, comma, body = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise DataError(f"{at}: a data URI has to be of the form data:<type>;base64,<data>")
        return Blob(data=_decoded(body, at))
    if _BASE64.fullmatch(text):
        return Blob(data=_decoded(text, at))
    if _URL.match(text):
        if not text.lower().startswith(("http://", "https://")):
            raise DataError(f"{at}: {short(text)}: only http and https URLs exist here")
        return Blob(url=text)
    if key == "url":
        raise DataError(f"{at}: {short(text)} is not a URL")
    if "\0" in text:
        raise DataError(f"{at}: a path with a NUL character")
    return Blob(path=text)


def _decoded(text: str, at: str) -> bytes:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{at}: not base64 ({error})") from None
    if not data:
        raise DataError(f"{at}: no bytes")
    return data


def _media_column(column: Any, kind: str, at: str) -> list[Media]:
    if not is_list(column):
        raise DataError(f"{at}: expected a list, found {kind_of(column)}")
    return [Media(kind, (_blob(value, "path", f"{at}[{index}]"),)) for index, value in enumerate(column)]


def _tool_calls(calls: Any, at: str) -> tuple[Mapping[str, Any], ...]:
    if calls is None:
        return ()
    if not is_list(calls):
        raise DataError(f"{at}: expected a list, found {kind_of(calls)}")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f'{at}[{index}]: expected {{"function": {{"name": ..., "arguments": ...}}}}')
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parsed_json(arguments or "{}", f"{at}[{index}]: arguments")
        if not isinstance(arguments, Mapping | None):
            raise DataError(f"{at}[{index}]: arguments: expected an object, found {kind_of(arguments)}")
        check_strings(call, f"{at}[{index}]")
        # The published templates take a mapping; a string they would print with its quotes escaped.
        checked.append({**call, "type": "function", "function": {**function, "arguments": dict(arguments or {})}})
    return tuple(checked)


def _tool_responses(responses: Any, at: str) -> list[Any]:
    if not is_list(responses):
        raise DataError(f"{at}: expected a list, found {kind_of(responses)}")
    for index, response in enumerate(responses):
        if not isinstance(response, Mapping) or "response" not in response:
            raise DataError(f'{at}[{index}]: expected {{"name": ..., "response": ...}}')
        check_strings(response, f"{at}[{index}]")
    return list(responses)


def _tools(tools: Any, where: Where) -> tuple[Mapping[str, Any], ...]:
    at = f"{where}: tools"
    if isinstance(tools, str):
        tools = parsed_json(tools, at) if tools.strip() else None
    if tools is None:
        return ()
    if not is_list(tools):
        raise DataError(f"{at}: expected a list, found {kind_of(tools)}")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f'{at}[{index}]: expected {{"type": "function", "function": {{"name": ...}}}}')
        check_strings(tool, f"{at}[{index}]")
    return tuple(tools)
