"""Checks of values that came out of somebody's file. Every DataError begins with the place that is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from bridge.errors import DataError


def text_of(value: Any, at: str, *, empty: bool = False) -> str:
    """A string that can be encoded; `empty`: it may say nothing. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"{at}: expected a string, found {kind_of(value)}")
    if not empty and not value.strip():
        raise DataError(f"{at}: empty")
    check_unicode(value, at)
    return value


def parsed_json(text: str, at: str) -> Any:
    """Raises DataError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{at}: not JSON ({error})") from None


def check_strings(value: Any, at: str) -> None:
    """Every string anywhere in `value` is Unicode that can be encoded. Values are as deep as JSON let them be."""
    stack = [value]
    while stack:
        top = stack.pop()
        if isinstance(top, str):
            check_unicode(top, at)
        elif isinstance(top, Mapping):
            stack += [*top.keys(), *top.values()]
        elif is_list(top):
            stack += top


def check_unicode(text: str, at: str) -> None:
    """Raises DataError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{at}: half of a surrogate pair at character {error.start + 1}") from None


def is_unicode(text: str) -> bool:
    """Whether it can be encoded."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def only_keys(value: Mapping[str, Any], allowed: set[str], at: str) -> None:
    """Raises DataError that names the first key that is not allowed."""
    if unknown := sorted(str(key) for key in value.keys() - allowed):
        unknown_key(unknown[0], allowed, at)


def unknown_key(key: str, allowed: set[str], at: str) -> NoReturn:
    """Raises DataError."""
    raise DataError(f"{at}: unknown key {short(key)} (one of {', '.join(sorted(allowed))})")


def is_list(value: Any) -> bool:
    """As JSON, Parquet and Python functions have lists."""
    return isinstance(value, list | tuple)


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    names = {type(None): "nothing", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if is_list(value):
        return "a list" if value else "an empty list"
    return "an object" if isinstance(value, Mapping) else names.get(type(value), type(value).__name__)


def short(value: Any) -> str:
    """As Python writes it, cut."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
