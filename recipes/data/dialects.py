"""How others write a conversation -> as `recipes.data.sample` checks it: roles, keys, parts of content, media.

Nothing is checked here that is checked there: what is not understood is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bridge.errors import DataError
from bridge.geometry.towers import SOFT_TOKEN_KINDS
from recipes.data.checks import is_list, kind_of, parsed_json, short, text_of

MEDIA_KINDS = SOFT_TOKEN_KINDS
ROLES = ("system", "developer", "user", "assistant", "tool")
# The role, whatever its case -> what it is called here. `_CALL` says a tool call and nothing else.
_CALL = "call"
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "model", "gpt", "chatgpt", "bot", "chatbot", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), _CALL),
    "system": "system",
    "developer": "developer",
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
# Whether a message is learnt: 1 or 0 (OpenAI's `weight`), or true or false.
_TRAIN_KEYS = ("train", "training", "loss", "weight")
# Parts of content as OpenAI's APIs have them -> the kind, and where in the part its source is.
_PARTS = {
    "image_url": ("image", "url"),
    "input_image": ("image", "url"),
    "video_url": ("video", "url"),
    "audio_url": ("audio", "url"),
    "input_audio": ("audio", "data"),
}
_TEXT_PARTS = ("input_text", "output_text")
# What parts may have that says nothing of what they are.
_PART_NOTES = ("index", "detail", "cache_control")
# Tags of LLaVA and of what came after it.
_TAGS = re.compile("|".join(f"<{kind}>" for kind in MEDIA_KINDS))


def conversation(
    rows: Any, at: str, media: Mapping[str, Sequence[Any]], *, role: str | None = None, content: str | None = None
) -> Any:
    """Messages of any dialect as `role`, `content` and the keys that are ours, `media` at their tags.

    `role`, `content`: how the messages themselves call these. `rows` may be a string of JSON. Raises DataError.
    """
    if isinstance(rows, str) and rows.lstrip()[:1] == "[":
        rows = parsed_json(rows, at)
    if not is_list(rows):
        return rows
    role_keys, content_keys = (role,) if role else _ROLE_KEYS, (content,) if content else _CONTENT_KEYS
    rows = [
        row if is_plain(row) else _message(row, f"{at}[{index}]", role_keys, content_keys)
        for index, row in enumerate(rows)
    ]
    return _with_media(rows, media) if media else rows


def is_plain(row: Any) -> bool:
    """Whether a message is a role that there is here, and a text that says something."""
    if type(row) is not dict or len(row) != 2:
        return False
    role, content = row.get("role"), row.get("content")
    return type(content) is str and role in ROLES and content != "" and not content.isspace()


def _message(row: Any, at: str, role_keys: Sequence[str], content_keys: Sequence[str]) -> Any:
    if not isinstance(row, Mapping):
        return row
    row = {key: value for key, value in row.items() if value is not None}
    for name, keys in (("role", role_keys), ("content", content_keys)):
        theirs = next((key for key in keys if key in row), None)
        if theirs is not None:
            row[name] = row.pop(theirs)
    if isinstance(row.get("role"), str):
        row["role"] = _ROLES.get(row["role"].lower(), row["role"])
    if isinstance(row.get("content"), list | tuple):
        row["content"] = [_part(part, f"{at}: content[{index}]") for index, part in enumerate(row["content"])]
    if row.get("role") == _CALL:
        row |= {"role": "assistant", "tool_calls": _calls(row.pop("content", None), at)}
    elif row.get("function_call"):
        # OpenAI's, before there was more than one tool.
        row["tool_calls"] = [{"type": "function", "function": row.pop("function_call")}]
    given = {key: _trained(row.pop(key), f"{at}: {key}") for key in _TRAIN_KEYS if key in row}
    if len(set(given.values())) > 1:
        raise DataError(f"{at}: {' and '.join(given)} say different things of whether it is learnt")
    return row | ({"train": next(iter(given.values()))} if given else {})


def _trained(value: Any, at: str) -> bool:
    if value not in (0, 1):  # true and false are 1 and 0
        raise DataError(f"{at}: a message is learnt (true, 1) or not (false, 0), found {short(value)}")
    return bool(value)


def _calls(text: Any, at: str) -> list[Any]:
    """ShareGPT's `function_call`: its value is JSON of one call, or of several."""
    value = parsed_json(text_of(text, f"{at}: value"), f"{at}: value")
    return [{"type": "function", "function": call} for call in (value if is_list(value) else [value])]


def _part(part: Any, at: str) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        return part
    part = {key: value for key, value in part.items() if key not in _PART_NOTES}
    kind = part.get("type")
    if kind in _TEXT_PARTS:
        return {**part, "type": "text"}
    if kind not in _PARTS:
        return part
    name, key = _PARTS[kind]
    source = part.get(kind, part.get("image_url"))
    if isinstance(source, Mapping):
        source = source.get(key)
    if not isinstance(source, str):
        raise DataError(f'{at}: expected {{"{kind}": {{"{key}": ...}}}}, found {kind_of(source)}')
    return {"type": name, "base64" if key == "data" else name: source}


def _with_media(rows: list[Any], media: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Tags become parts, of the kinds that the record has columns of. What nothing in the conversation asks for stands
    before the first thing that the user says, as TRL has it."""
    kinds = [kind for kind in MEDIA_KINDS if media.get(kind)]
    if not kinds:
        return rows
    rows = [_tagged(row, kinds) for row in rows]
    asked = {part.get("type") for row in rows if isinstance(row, Mapping) for part in _mappings(row.get("content"))}
    first = next((row for row in rows if isinstance(row, Mapping) and row.get("role") == "user"), None)
    ahead = [{"type": kind} for kind in kinds if kind not in asked for _ in media[kind]]
    if ahead and first is not None:
        content = first.get("content")
        rest = [{"type": "text", "text": content}] if isinstance(content, str) and content else content
        assert isinstance(first, dict)
        first["content"] = [*ahead, *(rest if isinstance(rest, list) else [])]
    return rows


def _tagged(row: Any, kinds: Sequence[str]) -> Any:
    if not isinstance(row, Mapping):
        return row
    content = row.get("content")
    if isinstance(content, str):
        return {**row, "content": _content_parts(content, kinds)}
    if is_list(content):
        parts: list[Any] = []
        for part in content or ():
            text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            pieces = _content_parts(text, kinds) if isinstance(text, str) else text
            parts += pieces if isinstance(pieces, list) else [part]
        return {**row, "content": parts}
    return dict(row)


def _content_parts(text: str, kinds: Sequence[str]) -> str | list[dict[str, Any]]:
    """Text between tags, without the white space at them, and parts in their place; the text, where it has none."""
    pieces: list[dict[str, Any]] = []
    at = 0
    for tag in _TAGS.finditer(text):
        kind = tag.group()[1:-1]
        if kind in kinds:
            pieces += [{"type": "text", "text": text[at : tag.start()].strip()}, {"type": kind}]
            at = tag.end()
    if not pieces:
        return text
    pieces.append({"type": "text", "text": text[at:].strip()})
    return [piece for piece in pieces if piece.get("text") != ""]


def _mappings(content: Any) -> list[Mapping[str, Any]]:
    return [part for part in content if isinstance(part, Mapping)] if is_list(content) else []


def tools_of(tools: Any, functions: Any, at: str) -> Any:
    """The column `tools`, or OpenAI's older `functions`. Raises DataError."""
    if tools is not None or functions is None:
        return tools
    functions = parsed_json(functions, at) if isinstance(functions, str) else functions
    if not is_list(functions):
        raise DataError(f"{at}: expected a list, found {kind_of(functions)}")
    return [{"type": "function", "function": function} for function in functions]
