"""Conversions for the tests: toys of every kind of dtypes, the command line, and folders compared byte by byte."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.toy import write_toy

KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float32 text": {"dtype": "float32", "text_only": True},
    "mixed untied": {"mixed_dtypes": True, "untied": True},
    "mixed untied text": {"mixed_dtypes": True, "untied": True, "text_only": True},
}
Make = Callable[..., Path]


def cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bridge.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def assert_refused(result: subprocess.CompletedProcess[str], *named: str) -> None:
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for text in named:
        assert text in lines[0], lines[0]


def assert_same_folder(ours: Path, theirs: Path) -> None:
    names = sorted(str(path.relative_to(theirs)) for path in theirs.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(ours)) for path in ours.rglob("*") if path.is_file()) == names
    _, different, missing = filecmp.cmpfiles(ours, theirs, names, shallow=False)
    assert not different and not missing


def toys(base: Path) -> Make:
    """`made(variant, kind)`: the folder of a toy, written once."""

    def get(variant: str, kind: str = "bfloat16") -> Path:
        folder = base / f"{variant}-{kind.replace(' ', '-')}"
        if not folder.exists():
            write_toy(variant, folder, **KINDS[kind])
        return folder

    return get
