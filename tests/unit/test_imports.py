"""Imports only point down: no module needs, however late or only for its types, one that needs it."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from .source_trees import ROOT, tree_of

PACKAGES = ("bridge", "recipes", "integrations")


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of this project that a file imports: at its top, within functions, and for type checking."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # `from package import module` is of the module alone.
            found |= {name if (name := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
    return found & known.keys()


def test_no_circles() -> None:
    known = modules()
    assert len(known) > 200
    graph = {name: imported(file, known) - {name} for name, file in known.items()}
    assert sum(map(len, graph.values())) > 800
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_a_circle_is_seen(tmp_path: Path) -> None:
    """The check itself: a late import, and one for types."""
    known = {"a.b": tmp_path / "b.py", "a.c": tmp_path / "c.py"}
    known["a.b"].write_text("def f():\n    from a import c\n")
    known["a.c"].write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.b import f\n")
    graph = {name: imported(file, known) for name, file in known.items()}
    assert graph == {"a.b": {"a.c"}, "a.c": {"a.b"}}
