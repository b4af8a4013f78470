"""A function fits on a screen, a file holds one concept."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("bridge", "recipes", "integrations", "benchmarks", "scripts", "tests")
FUNCTION, FILE = 60, 420

_KERNEL = "one pass over one tile, behind a pointer and its strides for every tensor"
LONG_FUNCTIONS = {
    ("bridge/megatron/kernels/attention_backward.py", "attention_weights_kernel"): _KERNEL,
    ("bridge/megatron/kernels/attention_backward.py", "attention_d_key_value_kernel"): _KERNEL,
    ("bridge/megatron/kernels/qkv_norm_rope.py", "qkv_norm_rope_backward_kernel"): _KERNEL,
}


def functions(node: ast.AST) -> Iterator[tuple[str, int]]:
    """The functions in a tree, methods and inner ones too, and how many lines each has from its `def` on."""
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child.name, (child.end_lineno or child.lineno) - child.lineno + 1


def test_functions_fit_on_a_screen_and_files_hold_one_concept() -> None:
    sources = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    assert len(sources) > 500
    lines = {file: len(text.splitlines()) for file, text in sources.items()}
    assert {file: count for file, count in lines.items() if count > FILE} == {}
    long = {
        (file, name): count
        for file, text in sources.items()
        for name, count in functions(ast.parse(text))
        if count > FUNCTION
    }
    assert long.keys() == LONG_FUNCTIONS.keys(), long


def test_a_long_function_is_seen() -> None:
    """The check itself: a method, and a function in a function."""
    inner = "\n".join(f"            a{number} = 0" for number in range(70))
    tree = ast.parse(f"class C:\n    def f(self):\n        def g():\n{inner}\n        return g\n")
    assert dict(functions(tree)) == {"f": 73, "g": 71}
