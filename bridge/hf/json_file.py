"""JSON objects from files that nobody vouches for: a regular file of bounded size, text, no key twice, not too deep."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from bridge.errors import CheckpointError
from bridge.hf.tensors import open_regular, pread_bytes, printable

# Of a config or a manifest; the largest published index has half a megabyte.
MAX_JSON = 100_000_000
_MAX_DEPTH = 64
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_object(path: Path, max_bytes: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a file.

    Raises CheckpointError that names the file: absent, no regular file (a pipe or a device is not waited for), too
    large, no JSON object; what `parse_object` raises.
    """
    fd, size = open_regular(path)
    try:
        if size > max_bytes:
            raise CheckpointError(
                f"{printable(path)}: {size} bytes, more than the {max_bytes} that such a file may have"
            )
        return parse_object(pread_bytes(fd, size, 0, path), path)
    finally:
        os.close(fd)


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object out of bytes. Raises CheckpointError.

    A key twice at any depth, objects nested deeper than 64, a lone surrogate (which is no text: it can be written to no
    other file, and safetensors refuses it), a number of thousands of digits.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{printable(path)}: the key {printable(twice)} occurs twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except RecursionError:
        raise CheckpointError(f"{printable(path)}: JSON nested too deep") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{printable(path)}: not UTF-8") from None
    except ValueError as error:
        raise CheckpointError(f"{printable(path)}: not JSON ({printable(str(error))})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{printable(path)}: not a JSON object")
    _check_values(value, path, surrogates=_SURROGATE_ESCAPE.search(data) is not None)
    return value


def _check_values(value: dict[str, Any], path: Path, surrogates: bool) -> None:
    """Depth, and text that is none, without recursion."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
                if surrogates:
                    below.extend(item)
            elif isinstance(item, list):
                below.extend(item)
            elif surrogates and isinstance(item, str) and not _is_text(item):
                raise CheckpointError(f"{printable(path)}: {printable(item)} holds a lone surrogate, which is no text")
        level = [item for item in below if isinstance(item, dict | list) or (surrogates and isinstance(item, str))]
        if not level:
            return
    raise CheckpointError(f"{printable(path)}: JSON nested too deep")


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
