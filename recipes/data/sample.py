"""One record of training data, checked: a conversation with its tools and media, or plain text.

`parse_record` takes what a JSON line or a Parquet row holds and believes none of it. Every DataError begins with the
file and line.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from bridge.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
MEDIA_KINDS = ("image", "video", "audio")
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "tool_responses", *THINKING_KEYS}
# What a record can be -> the columns that say so.
_FORMS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "text": ("text",)}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SOURCE_KEYS = ("path", "url", "base64", "bytes")


@dataclass(frozen=True)
class Where:
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


@dataclass(frozen=True)
class Message:
    """One message. `parts`: strings, and media in between; `extra`: keys that go to the template as they are."""

    role: str
    parts: tuple[str | Media, ...]
    thinking: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def for_template(self, thinking_key: str | None) -> dict[str, Any]:
        """The message as chat templates expect it; content is a string wherever it is one piece of text."""
        content: Any = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind} for part in self.parts
        ]
        if not self.parts:
            content = ""
        elif len(self.parts) == 1 and isinstance(self.parts[0], str):
            content = self.parts[0]
        elif self.role in ("system", "developer"):
            # Published templates print a system turn's content as it is: a list would come out as Python.
            content = "".join(part for part in self.parts if isinstance(part, str))
        message = {"role": self.role, "content": content, **self.extra}
        if self.thinking and thinking_key is not None:
            message[thinking_key] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


@dataclass(frozen=True)
class Sample:
    """A checked record: `messages` with `tools`, or `text` (then there are no messages). `form`: of the record."""

    where: Where
    form: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None

    @property
    def media(self) -> tuple[Media, ...]:
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Media))


def parse_record(record: Any, where: Where) -> Sample:
    """Check a record: `messages` (and `tools`, `images`, `videos`, `audios`), `prompt` and `completion`, or `text`.

    Other columns are let be; inside messages an unknown key is an error. Raises DataError.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object, found {_kind(record)}")
    given = {key for key, value in record.items() if value is not None}
    forms = [name for name, keys in _FORMS.items() if given.intersection(keys)]
    if len(forms) != 1:
        hint = "; ShareGPT's 'conversations' have to be rewritten as messages" if "conversations" in given else ""
        what = "has none" if not forms else f"has {' and '.join(forms)}"
        raise DataError(f"{where}: {what} of messages, prompt and completion, text: exactly one is needed{hint}")
    if forms[0] == "text":
        return Sample(where, "text", text=_text(record["text"], f"{where}: text"))
    tools = _tools(record.get("tools"), where)
    if forms[0] == "prompt":
        for key in ("prompt", "completion"):
            if key not in given:
                raise DataError(f"{where}: has no {key}")
        prompt = _text(record["prompt"], f"{where}: prompt")
        completion = _text(record["completion"], f"{where}: completion")
        return Sample(where, "prompt", (Message("user", (prompt,)), Message("assistant", (completion,))), tools)
    messages = _messages(record, where)
    if messages[-1].role != "assistant":
        raise DataError(f"{where}: the last message is of role {messages[-1].role}; it has to be the assistant's")
    return Sample(where, "messages", messages, tools)


def parse_prompt(record: Any, where: Where) -> Sample:
    """Check what a model is asked: `messages` (and `tools`, media) that end before its turn, or a `prompt`.

    Other columns are let be. Raises DataError.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object, found {_kind(record)}")
    given = [key for key in ("messages", "prompt") if record.get(key) is not None]
    if len(given) != 1:
        raise DataError(f"{where}: has {' and '.join(given) or 'none'} of messages, prompt: exactly one is needed")
    tools = _tools(record.get("tools"), where)
    if given == ["prompt"]:
        return Sample(where, "prompt", (Message("user", (_text(record["prompt"], f"{where}: prompt"),)),), tools)
    messages = _messages(record, where)
    if messages[-1].role not in ("user", "tool"):
        raise DataError(f"{where}: the last message is of role {messages[-1].role}; the model answers a user or a tool")
    return Sample(where, "messages", messages, tools)


def _messages(record: Mapping[str, Any], where: Where) -> tuple[Message, ...]:
    rows = record["messages"]
    if not _is_list(rows) or not rows:
        raise DataError(f"{where}: messages: expected a list of messages, found {_kind(rows)}")
    columns = {kind: _media_column(record.get(f"{kind}s"), kind, f"{where}: {kind}s") for kind in MEDIA_KINDS}
    messages = tuple(_message(row, index, columns, f"{where}: messages[{index}]") for index, row in enumerate(rows))
    for kind, left in columns.items():
        if left:
            raise DataError(f"{where}: {kind}s: {len(left)} more than the messages have parts of type {kind}")
    _check_order(messages, where)
    return messages


def _check_order(messages: Sequence[Message], where: Where) -> None:
    previous: Message | None = None
    for index, message in enumerate(messages):
        at = f"{where}: messages[{index}]"
        if message.role in ("system", "developer") and index:
            raise DataError(f"{at}: a {message.role} message can only come first")
        if message.role == "tool" and (
            previous is None or (previous.role != "tool" and not (previous.role == "assistant" and previous.tool_calls))
        ):
            raise DataError(f"{at}: a tool message has to follow the assistant's tool call")
        previous = message


def _message(row: Any, index: int, columns: dict[str, list[Media]], at: str) -> Message:
    if not isinstance(row, Mapping):
        raise DataError(f"{at}: expected an object, found {_kind(row)}")
    row = {key: value for key, value in row.items() if value is not None}
    role = row.get("role")
    if role not in ROLES:
        raise DataError(f"{at}: unknown role {_short(role)} (one of {', '.join(ROLES)})")
    if unknown := sorted(str(key) for key in row.keys() - _MESSAGE_KEYS):
        raise DataError(f"{at}: unknown key {_short(unknown[0])} (one of {', '.join(sorted(_MESSAGE_KEYS))})")
    parts = _parts(row.get("content"), columns, f"{at}: content")
    thoughts = {key: row[key] for key in THINKING_KEYS if row.get(key) not in (None, "")}
    if len(thoughts) > 1:
        raise DataError(f"{at}: has both {' and '.join(thoughts)}")
    extra: dict[str, Any] = {
        key: _text(row[key], f"{at}: {key}") for key in ("name", "tool_call_id") if row.get(key) is not None
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
    thinking = _text(next(iter(thoughts.values())), f"{at}: {next(iter(thoughts))}") if thoughts else None
    return Message(role, parts, thinking, calls, extra)


def _parts(content: Any, columns: dict[str, list[Media]], at: str) -> tuple[str | Media, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (_text(content, at, empty=True),) if content else ()
    if not _is_list(content):
        raise DataError(f"{at}: expected a string or a list of parts, found {_kind(content)}")
    return tuple(_part(part, columns, f"{at}[{index}]") for index, part in enumerate(content))


def _part(part: Any, columns: dict[str, list[Media]], at: str) -> str | Media:
    if not isinstance(part, Mapping):
        raise DataError(f"{at}: expected an object, found {_kind(part)}")
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "text":
        _only_keys(part, {"type", "text"}, at)
        return _text(part.get("text"), f"{at}: text", empty=True)
    if kind not in MEDIA_KINDS:
        raise DataError(f"{at}: unknown type {_short(kind)} (one of text, {', '.join(MEDIA_KINDS)})")
    _only_keys(part, {"type", kind, *_SOURCE_KEYS} | ({"frames", "fps"} if kind == "video" else set()), at)
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
        if not _is_list(frames) or not frames:
            raise DataError(f"{at}: frames: expected a list of images, found {_kind(frames)}")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
            raise DataError(f"{at}: fps: frames need a positive number, found {_short(fps)}")
        blobs = tuple(_blob(frame, "path", f"{at}: frames[{index}]") for index, frame in enumerate(frames))
        return Media(kind, blobs, float(fps))
    if fps is not None:
        raise DataError(f"{at}: fps: only goes with frames")
    return Media(kind, (_blob(part[key], key, f"{at}: {key}"),))


def _blob(value: Any, key: str, at: str) -> Blob:
    if isinstance(value, Mapping):
        # What `datasets` and Parquet files make of an image: {"bytes": ..., "path": ...}; the bytes count.
        _only_keys(value, {"bytes", "path"}, at)
        if value.get("bytes") is not None:
            return _blob(value["bytes"], "bytes", f"{at}: bytes")
        return _blob(value.get("path"), "path", f"{at}: path")
    if isinstance(value, bytes | bytearray | memoryview):
        if not len(value):
            raise DataError(f"{at}: no bytes")
        return Blob(data=bytes(value))
    text = _text(value, at)
    if key == "base64":
        return Blob(data=_decoded(text, at))
    if text[:5].lower() == "data:":
        head, comma, body = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise DataError(f"{at}: a data URI has to be of the form data:<type>;base64,<data>")
        return Blob(data=_decoded(body, at))
    if _URL.match(text):
        if not text.lower().startswith(("http://", "https://")):
            raise DataError(f"{at}: {_short(text)}: only http and https URLs exist here")
        return Blob(url=text)
    if key == "url":
        raise DataError(f"{at}: {_short(text)} is not a URL")
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
    if column is None:
        return []
    if not _is_list(column):
        raise DataError(f"{at}: expected a list, found {_kind(column)}")
    return [Media(kind, (_blob(value, "path", f"{at}[{index}]"),)) for index, value in enumerate(column)]


def _tool_calls(calls: Any, at: str) -> tuple[Mapping[str, Any], ...]:
    if calls is None:
        return ()
    if not _is_list(calls):
        raise DataError(f"{at}: expected a list, found {_kind(calls)}")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f'{at}[{index}]: expected {{"function": {{"name": ..., "arguments": ...}}}}')
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"{at}[{index}]: arguments")
        if not isinstance(arguments, Mapping | None):
            raise DataError(f"{at}[{index}]: arguments: expected an object, found {_kind(arguments)}")
        _check_strings(call, f"{at}[{index}]")
        # The published templates take a mapping; a string they would print with its quotes escaped.
        checked.append({**call, "type": "function", "function": {**function, "arguments": dict(arguments or {})}})
    return tuple(checked)


def _tool_responses(responses: Any, at: str) -> list[Any]:
    if not _is_list(responses):
        raise DataError(f"{at}: expected a list, found {_kind(responses)}")
    for index, response in enumerate(responses):
        if not isinstance(response, Mapping) or "response" not in response:
            raise DataError(f'{at}[{index}]: expected {{"name": ..., "response": ...}}')
        _check_strings(response, f"{at}[{index}]")
    return list(responses)


def _tools(tools: Any, where: Where) -> tuple[Mapping[str, Any], ...]:
    at = f"{where}: tools"
    if isinstance(tools, str):
        tools = _json(tools, at) if tools.strip() else None
    if tools is None:
        return ()
    if not _is_list(tools):
        raise DataError(f"{at}: expected a list, found {_kind(tools)}")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f'{at}[{index}]: expected {{"type": "function", "function": {{"name": ...}}}}')
        _check_strings(tool, f"{at}[{index}]")
    return tuple(tools)


def _json(text: str, at: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{at}: not JSON ({error})") from None


def _text(value: Any, at: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{at}: expected a string, found {_kind(value)}")
    if not empty and not value.strip():
        raise DataError(f"{at}: empty")
    _check_unicode(value, at)
    return value


def _check_strings(value: Any, at: str) -> None:
    """Every string anywhere in `value` is Unicode that can be encoded. Values are as deep as JSON let them be."""
    stack = [value]
    while stack:
        top = stack.pop()
        if isinstance(top, str):
            _check_unicode(top, at)
        elif isinstance(top, Mapping):
            stack += [*top.keys(), *top.values()]
        elif _is_list(top):
            stack += top


def _check_unicode(text: str, at: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{at}: half of a surrogate pair at character {error.start + 1}") from None


def _only_keys(value: Mapping[str, Any], allowed: set[str], at: str) -> None:
    if unknown := sorted(str(key) for key in value.keys() - allowed):
        _unknown_key(unknown[0], allowed, at)


def _unknown_key(key: str, allowed: set[str], at: str) -> NoReturn:
    raise DataError(f"{at}: unknown key {_short(key)} (one of {', '.join(sorted(allowed))})")


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _kind(value: Any) -> str:
    names = {type(None): "nothing", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if _is_list(value):
        return "a list" if value else "an empty list"
    return "an object" if isinstance(value, Mapping) else names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
