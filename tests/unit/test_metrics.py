"""Metrics of generated answers, against values that were worked out by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import DataError, UsageError
from recipes.metrics.named import METRICS, exact_match, find_metrics, json_tree, json_valid, token_f1
from recipes.metrics.tree import Tree, distance, levenshtein, similarity, tree_of

RECEIPT: dict[str, Any] = {
    "menu": [{"nm": "TEA", "price": "4.50"}, {"nm": "PIE", "price": "3.00"}],
    "total": {"total_price": "7.50"},
}
# Keys: menu, 2 × (item, nm, price), total, total_price. Characters: 3 + 4 + 3 + 4 + 4.
WHOLE = 1 + 2 * 3 + 2 + 18


def changed(**what: Any) -> dict[str, Any]:
    return json.loads(json.dumps(RECEIPT)) | what


@pytest.mark.parametrize(
    ("found", "steps"),
    [
        (RECEIPT, 0),
        ({"total": RECEIPT["total"], "menu": RECEIPT["menu"]}, 0),  # an object has no order
        ({}, WHOLE),
        ([], WHOLE),
        (changed(total={"total_price": "7.40"}), 1),  # one digit
        (changed(total={"total": "7.50"}), 1),  # one key
        (changed(total="7.50"), 1),  # a level less
        (changed(total={}), 1 + 4),
        (changed(menu=RECEIPT["menu"][:1]), 3 + 3 + 4),  # an item, its keys and what they hold
        (changed(menu=RECEIPT["menu"] + [{"nm": "X"}]), 3),
        (changed(menu=RECEIPT["menu"][0]), 1 + 10),  # one item without its list: the node of the item goes too
        (changed(total={"total_price": 7.5}), 1),  # a number, written with a digit less
        (changed(more=None), 1 + len("null")),
    ],
)
def test_steps_of_trees(found: Any, steps: int) -> None:
    assert distance(tree_of(found), tree_of(RECEIPT)) == steps == distance(tree_of(RECEIPT), tree_of(found))
    assert similarity(found, RECEIPT) == max(0.0, 1 - steps / WHOLE)


def test_trees_that_share_nothing_are_not_below_zero() -> None:
    assert similarity({"a": "x" * 100}, RECEIPT) == 0.0
    assert similarity({}, {}) == similarity([], {}) == 1.0
    assert similarity({"a": "b"}, {}) == 0.0


def test_the_distance_that_zhang_and_shasha_show() -> None:
    """f(d(a c(b)) e) and f(c(d(a b)) e): two steps."""

    def node(label: str, *children: Tree) -> Tree:
        return Tree(label, False, children)

    a, b, e = node("a"), node("b"), node("e")
    assert distance(node("f", node("d", a, node("c", b)), e), node("f", node("c", node("d", a, b)), e)) == 2


def by_definition(first: tuple[Tree, ...], second: tuple[Tree, ...]) -> int:
    """The distance of two forests: the last root goes, comes, or becomes the other's last root."""
    if not first or not second:
        return sum(tree.cost + by_definition(tree.children, ()) for tree in (*first, *second))
    *left, one = first
    *top, other = second
    rename = (
        levenshtein(one.label, other.label)
        if one.leaf and other.leaf
        else 1 + (one if one.leaf else other).cost
        if one.leaf or other.leaf
        else int(one.label != other.label)
    )
    return min(
        by_definition((*left, *one.children), second) + one.cost,
        by_definition(first, (*top, *other.children)) + other.cost,
        by_definition(tuple(left), tuple(top)) + by_definition(one.children, other.children) + rename,
    )


JSON = st.recursive(
    st.sampled_from(["", "a", "b", "ab", "abc", 1, None, True]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xy"), inner, max_size=2),
    max_leaves=4,
)


@given(JSON, JSON)
@settings(max_examples=60, deadline=None)
def test_the_distance_is_that_of_the_definition(found: Any, wanted: Any) -> None:
    one, other = tree_of(found), tree_of(wanted)
    assert distance(one, other) == by_definition((one,), (other,))
    assert 0.0 <= similarity(found, wanted) <= 1.0 == similarity(found, found)


@pytest.mark.parametrize(
    ("first", "second", "steps"), [("kitten", "sitting", 3), ("", "abc", 3), ("4.50", "4,5", 2), ("a", "a", 0)]
)
def test_steps_of_texts(first: str, second: str, steps: int) -> None:
    assert levenshtein(first, second) == levenshtein(second, first) == steps


def test_words() -> None:
    assert token_f1("The cat sat.", "a cat sat") == 1.0
    assert token_f1("cat cat", "cat sat mat") == pytest.approx(2 * 1 / 5)  # one word of two is of three
    assert token_f1("dog", "cat") == token_f1("", "cat") == 0.0
    assert token_f1("the", "!") == 1.0
    assert exact_match(" a b\n", "a b") == 1.0 and exact_match("a  b", "a b") == exact_match("A b", "a b") == 0.0


def test_what_is_json() -> None:
    for text in ('{"a": 1}', " [1, 2]\n", '"a"', "null"):
        assert json_valid(text, "") == 1.0
    for text in ("", "{'a': 1}", '{"a": 1', '{"a": NaN}', '{"a": 1} and', "[" * 10**5):
        assert json_valid(text, "") == 0.0 and json_tree(text, "{}") == 0.0
    assert json_tree("null", "null") == 1.0
    deep = "[" * 400 + "]" * 400
    assert json_tree(deep, deep) in (0.0, 1.0)
    with pytest.raises(DataError, match="the reference is no JSON"):
        json_tree("{}", "a receipt")


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own is found in the folder that one stands in, and named, with the row, where it fails."""
    (tmp_path / "digits.py").write_text(
        "def same(answer, reference):\n    return len(answer) == len(reference)\n"
        "def broken(answer, reference):\n    return 1 / len(answer)\n"
        "def nothing(answer, reference):\n    return float('nan')\n"
        "constant = 1\n"
    )
    (tmp_path / "unfinished.py").write_text("def same(\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere", *itertools.islice(__import__("sys").path, 1, None)])
    same, f1 = find_metrics(["digits:same", "token_f1"], "eval.metrics")
    assert same.of("ab", "cd", "rows.jsonl:3") == 1.0 and f1 is METRICS["token_f1"]
    broken, nothing = find_metrics(["digits:broken", "digits:nothing"], "eval.metrics")
    assert broken.of("ab", "", "rows.jsonl:3") == 0.5
    with pytest.raises(DataError, match=r"rows.jsonl:3: digits:broken raises ZeroDivisionError: division by zero"):
        broken.of("", "", "rows.jsonl:3")
    with pytest.raises(DataError, match=r"rows.jsonl:3: digits:nothing gives nan"):
        nothing.of("", "", "rows.jsonl:3")
    for name, message in (
        ("json_three", "'json_three' is no metric; there are exact_match, token_f1, json_valid, json_tree, and"),
        ("digits:", "is no metric"),
        ("digits:other", "digits:other cannot be imported .AttributeError"),
        ("absent:other", "absent:other cannot be imported .ModuleNotFoundError"),
        ("unfinished:same", "unfinished:same cannot be imported .SyntaxError"),
        ("digits:constant", "is no function"),
    ):
        with pytest.raises(UsageError, match=f"eval.metrics: .*{message}"):
            find_metrics([name], "eval.metrics")
    with pytest.raises(UsageError, match="token_f1 is there twice"):
        find_metrics(["token_f1", "token_f1"], "eval.metrics")
