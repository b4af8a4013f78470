"""A function fits on a screen, a file holds one concept, and links lead to files of the tree."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from .source_trees import ROOT, text_of, tree_of

PACKAGES = ("bridge", "recipes", "integrations", "benchmarks", "scripts", "tests")
FUNCTION, FILE = 60, 420

_KERNEL = "one pass over one tile, behind a pointer and its strides for every tensor"
LONG_FUNCTIONS = {
    ("bridge/megatron/kernels/attention_backward.py", "attention_weights_kernel"): _KERNEL,
    ("bridge/megatron/kernels/attention_backward.py", "attention_d_key_value_kernel"): _KERNEL,
    ("bridge/megatron/kernels/qkv_norm_rope.py", "qkv_norm_rope_backward_kernel"): _KERNEL,
}


def functions(body: Sequence[ast.AST]) -> Iterator[tuple[str, int]]:
    """The functions in statements, methods and inner ones too, and how many lines each has from its `def` on."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, name, ())
            yield from functions(inner if isinstance(inner, list) else ())


def test_functions_fit_on_a_screen_and_files_hold_one_concept() -> None:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 500
    names = {file: str(file.relative_to(ROOT)) for file in files}
    lines = {names[file]: len(text_of(file).splitlines()) for file in files}
    assert {file: count for file, count in lines.items() if count > FILE} == {}
    long = {
        (names[file], name): count
        for file in files
        for name, count in functions(tree_of(file).body)
        if count > FUNCTION
    }
    assert long.keys() == LONG_FUNCTIONS.keys(), long


def test_a_long_function_is_seen() -> None:
    """The check itself: a method, and a function in a function."""
    inner = "\n".join(f"            a{number} = 0" for number in range(70))
    tree = ast.parse(f"class C:\n    def f(self):\n        def g():\n{inner}\n        return g\n")
    assert dict(functions(tree.body)) == {"f": 73, "g": 71}


def test_a_class_has_its_name_alone() -> None:
    """A public class of the product means one thing: no two are called the same."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES[:3]:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in tree_of(file).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


def test_links_lead_into_the_tree() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not (names := listed.split("\n")[:-1]):
        pytest.skip("not a clone")
    links = [ROOT / name for name in names if (ROOT / name).is_symlink()]
    assert links, "scripts/slurm/env.sh is one"
    assert [link for link in links if not link.exists() or not link.resolve().is_relative_to(ROOT.resolve())] == []
