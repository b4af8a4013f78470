"""How alike two JSON values are: one minus the normalised edit distance of their trees, as Donut measures CORD.

The distance is Zhang and Shasha's of ordered labelled trees: the least cost of deleting, inserting and renaming nodes.
What a value is as a tree, and what a step costs, is as in Kim et al., Donut (2022): an object has a node for each key,
in the order of the keys; an array a node for each object or array in it, and leaves for its other values. A leaf is a
text and costs as much as it has characters; every other node costs one. Texts become each other in Levenshtein's steps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Tree:
    """A node: a key, or, of a `leaf`, a text."""

    label: str
    leaf: bool = False
    children: tuple[Tree, ...] = ()

    @property
    def cost(self) -> int:
        """Of inserting or deleting it alone. An empty text costs one: it is not nothing."""
        return max(1, len(self.label)) if self.leaf else 1


def tree_of(value: Any, label: str = "") -> Tree:
    """A JSON value as a tree; numbers are texts too. Objects, and arrays, without anything in them have no children."""
    if isinstance(value, dict):
        # Sorted: an object has no order.
        return Tree(label, False, tuple(tree_of(value[key], key) for key in sorted(value)))
    if isinstance(value, list):
        return Tree(label, False, tuple(tree_of(v) if isinstance(v, dict | list) else _leaf(v) for v in value))
    return Tree(label, False, (_leaf(value),))


def _leaf(value: Any) -> Tree:
    return Tree(value.strip() if isinstance(value, str) else json.dumps(value), leaf=True)


def similarity(found: Any, wanted: Any) -> float:
    """From 0 to 1: 1 - distance / what it takes to make `wanted` out of nothing, and not less than 0.

    Of JSON values. Where nothing is wanted ({} or []) only the same is 1.
    """
    theirs, ours = tree_of(found), tree_of(wanted)
    whole = _weight(ours) - ours.cost  # both have a root
    if not whole:
        return float(theirs == ours)
    return max(0.0, 1.0 - distance(theirs, ours) / whole)


def _weight(tree: Tree) -> int:
    return tree.cost + sum(_weight(child) for child in tree.children)


def distance(first: Tree, second: Tree) -> int:
    """The edit distance of Zhang and Shasha (1989), in steps."""
    ours, theirs = _Numbered(first), _Numbered(second)
    found: dict[tuple[int, int], int] = {}
    for i in ours.roots:
        for j in theirs.roots:
            _between(ours, theirs, i, j, found)
    return found[len(ours.nodes) - 1, len(theirs.nodes) - 1]


class _Numbered:
    """The nodes of a tree, children before their parents; `first[i]` is the first node below i, or i itself.

    `roots`: of each `first` the last node that has it: the subtrees whose distances have to be computed apart.
    """

    def __init__(self, tree: Tree) -> None:
        self.nodes: list[Tree] = []
        self.first: list[int] = []
        self._add(tree)
        self.roots = sorted({first: node for node, first in enumerate(self.first)}.values())

    def _add(self, tree: Tree) -> int:
        firsts = [self._add(child) for child in tree.children]
        self.first.append(firsts[0] if firsts else len(self.nodes))
        self.nodes.append(tree)
        return self.first[-1]


def _between(a: _Numbered, b: _Numbered, i: int, j: int, found: dict[tuple[int, int], int]) -> None:
    """Distances of the subtrees along the first paths below i and j, by those of the forests left of each node."""
    left, top = a.first[i], b.first[j]
    # table[m][n]: between the m nodes of a from `left` on and the n nodes of b from `top` on, as forests.
    table = [[0] * (j - top + 2) for _ in range(i - left + 2)]
    for m in range(1, len(table)):
        table[m][0] = table[m - 1][0] + a.nodes[left + m - 1].cost
    for n in range(1, len(table[0])):
        table[0][n] = table[0][n - 1] + b.nodes[top + n - 1].cost
    for m in range(1, len(table)):
        for n in range(1, len(table[0])):
            x, y = left + m - 1, top + n - 1
            one, other = a.nodes[x], b.nodes[y]
            least = min(table[m - 1][n] + one.cost, table[m][n - 1] + other.cost)
            if a.first[x] == left and b.first[y] == top:  # both forests are whole trees
                table[m][n] = found[x, y] = min(least, table[m - 1][n - 1] + _rename(one, other))
            else:
                table[m][n] = min(least, table[a.first[x] - left][b.first[y] - top] + found[x, y])


def _rename(one: Tree, other: Tree) -> int:
    if one.leaf and other.leaf:
        return levenshtein(one.label, other.label)
    if one.leaf or other.leaf:
        return 1 + (one if one.leaf else other).cost
    return int(one.label != other.label)


@lru_cache(1 << 16)
def levenshtein(first: str, second: str) -> int:
    """Characters to insert, delete or change to make one text of the other."""
    row = list(range(len(second) + 1))
    for number, character in enumerate(first, 1):
        before, row[0] = row[0], number
        for place, wanted in enumerate(second, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (character != wanted))
    return row[-1]
