"""Rewards by their names: metrics, those that are here, and a user's own, `module:function` of (answer, reference)."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path

from bridge.errors import UsageError
from recipes.metrics.named import METRICS, Metric, find_metrics

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class RewardOptions:
    """The rewards of a run, and what those of them that take one are given. Plain values, for JSON.

    `pattern`: of `regex`. `schema`: the JSON schema's file, of `json_schema`. `length`: characters, of `length`.
    """

    names: tuple[str, ...]
    pattern: str | None = None
    schema: str | None = None
    length: int | None = None


def number(answer: str, reference: str) -> float:
    """1 where the last numbers of both are equal, however they are written (1,000.0 and 1e3). ValueError: a reference
    without one."""
    wanted = _last_number(reference)
    if wanted is None:
        raise ValueError("the reference holds no number")
    return float(_last_number(answer) == wanted)


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _regex(pattern: re.Pattern[str], answer: str, reference: str) -> float:
    """1 where the pattern is found."""
    return float(pattern.search(answer) is not None)


def _length(limit: int, answer: str, reference: str) -> float:
    """1 up to so many characters, falling to 0 at twice as many."""
    return min(1.0, max(0.0, 2 - len(answer) / limit))


def _make_regex(options: RewardOptions) -> Callable[[str, str], float]:
    if options.pattern is None:
        raise UsageError("grpo.rewards: regex needs grpo.reward_pattern, what an answer has to hold")
    try:
        return partial(_regex, re.compile(options.pattern, re.DOTALL))
    except re.error as error:
        raise UsageError(f"grpo.reward_pattern={options.pattern}: no regular expression ({error})") from None


def _make_length(options: RewardOptions) -> Callable[[str, str], float]:
    if options.length is None or options.length < 1:
        raise UsageError("grpo.rewards: length needs grpo.reward_length, how many characters are not too many")
    return partial(_length, options.length)


def _make_schema(options: RewardOptions) -> Callable[[str, str], float]:
    if options.schema is None:
        raise UsageError("grpo.rewards: json_schema needs grpo.reward_schema, a file")
    if importlib.util.find_spec("jsonschema") is None:
        raise UsageError("grpo.rewards: json_schema needs the package jsonschema: pip install gemma4-bridge[rewards]")
    import jsonschema

    try:
        schema = json.loads(Path(options.schema).read_text(encoding="utf-8"))
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
    except (OSError, ValueError, RecursionError, jsonschema.SchemaError) as error:
        said = str(getattr(error, "message", error)).splitlines()[0]
        raise UsageError(f"grpo.reward_schema={options.schema}: no JSON schema ({said})") from None
    validator = kind(schema)

    def valid(answer: str, reference: str) -> float:
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return 0.0
        return float(validator.is_valid(value))

    return valid


# Those that a recipe's other keys say something of.
_MADE: dict[str, Callable[[RewardOptions], Callable[[str, str], float]]] = {
    "regex": _make_regex,
    "json_schema": _make_schema,
    "length": _make_length,
}
READY = tuple(dict.fromkeys(("exact_match", "number", *_MADE, *METRICS)))


def find_rewards(options: RewardOptions) -> tuple[Metric, ...]:
    """The rewards that are asked for, in their order. Raises UsageError that names what is not there."""
    twice = [name for name, count in Counter(options.names).items() if count > 1]
    if twice:
        raise UsageError(f"grpo.rewards: {twice[0]} is there twice")
    return tuple(_find(name, options) for name in options.names)


def _find(name: str, options: RewardOptions) -> Metric:
    if name in _MADE:
        return Metric(name, _MADE[name](options))
    if name == "number":
        return Metric(name, number)
    if name not in METRICS and ":" not in name:
        raise UsageError(f"grpo.rewards: {name!r} is no reward; there are {', '.join(READY)}, and module:function")
    return find_metrics((name,), "grpo.rewards")[0]


def check_names(names: Sequence[str], options: RewardOptions) -> None:
    """Raise UsageError where what another key says is of no reward."""
    for name, key, value in (
        ("regex", "grpo.reward_pattern", options.pattern),
        ("json_schema", "grpo.reward_schema", options.schema),
        ("length", "grpo.reward_length", options.length),
    ):
        if value is not None and name not in names:
            raise UsageError(f"{key}={value}: is for {name}, which grpo.rewards does not name")
