"""Metrics by their names: those that are here, and a user's own, `module:function`."""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bridge.errors import DataError, UsageError
from recipes.imported import imported_function
from recipes.metrics.tree import similarity

# (answer, reference) -> a number
Measure = Callable[[str, str], float]
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Metric:
    """`needs_json`: references have to be JSON."""

    name: str
    measure: Measure
    needs_json: bool = False

    def of(self, answer: str, reference: str, where: object) -> float:
        """Of one answer. Raises DataError that names a user's function, and `where` the record is, where it fails."""
        try:
            value = float(self.measure(answer, reference))
        except Exception as error:
            said = " ".join(str(error).split())
            raise DataError(
                f"{where}: {self.name} raises {type(error).__name__}{f': {said}' if said else ''}"
            ) from error
        if not math.isfinite(value):
            raise DataError(f"{where}: {self.name} gives {value}, which is no number to take a mean of")
        return value


def exact_match(answer: str, reference: str) -> float:
    """1 where they are the same, but for white space around them."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words, each as often as it is there, as SQuAD has it: in lower case, without punctuation and articles.

    Two texts without a word are the same.
    """
    found, wanted = _words(answer), _words(reference)
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def _words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return _ARTICLES.sub(" ", bare).split()


def json_valid(answer: str, reference: str) -> float:
    """1 where an answer is JSON from its beginning to its end."""
    return float(parsed(answer) is not None)


def json_tree(answer: str, reference: str) -> float:
    """How alike the JSON is (see `tree.py`); 0 where an answer is none. Raises DataError: a reference that is none."""
    found, wanted = parsed(answer), parsed(reference)
    if wanted is None:
        raise DataError("the reference is no JSON")
    try:
        return 0.0 if found is None else similarity(found[0], wanted[0])
    except RecursionError:  # brackets in brackets, as a model may write them
        return 0.0


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", exact_match),
        Metric("token_f1", token_f1),
        Metric("json_valid", json_valid),
        Metric("json_tree", json_tree, needs_json=True),
    )
}


def parsed(text: str) -> tuple[Any] | None:
    """The JSON value that a text is, in a tuple, numbers as they are written; None where it is none."""
    try:
        return (json.loads(text, parse_float=str, parse_int=str, parse_constant=_no_constant),)
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def find_metrics(names: Sequence[str], key: str) -> tuple[Metric, ...]:
    """The metrics of these names. `key`: the option that has them. Raises UsageError that names what is not there."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"{key}: {twice[0]} is there twice")
    return tuple(METRICS[name] if name in METRICS else _imported(name, key) for name in names)


def _imported(name: str, key: str) -> Metric:
    """A user's own."""
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise UsageError(f"{key}: {name!r} is no metric; there are {', '.join(METRICS)}, and module:function")
    return Metric(name, imported_function(name, f"{key}: {name}", "(answer, reference)"))
