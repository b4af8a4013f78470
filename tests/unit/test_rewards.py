"""Rewards: what each is of, what is refused, and that one that fails costs its row alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bridge.errors import TrainingError, UsageError
from recipes.rewards.judge import Judged, Judges
from recipes.rewards.named import RewardOptions, check_names, find_rewards

MODULE = """
import os, time
calls = []
def good(answer, reference):
    print("said to whom it may concern")
    return len(answer)
def bad(answer, reference):
    if answer == "raise":
        raise KeyError("x")
    if answer == "hang":
        while True:
            time.sleep(1)
    if answer == "exit":
        os._exit(3)
    if answer == "nan":
        return float("nan")
    return 0.5
"""


def one(options: RewardOptions, answer: str, reference: str = "") -> float:
    (reward,) = find_rewards(options)
    return reward.of(answer, reference, "here")


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("so it is 1,000.0", "1e3", 1),
        ("-4", "4", 0),
        ("7 and then 8", "8", 1),
        ("8 and then 7", "8", 0),
        ("none", "8", 0),
        ("0.1", "#### .10 0.10", 1),
    ],
)
def test_number(answer: str, reference: str, value: float) -> None:
    assert one(RewardOptions(("number",)), answer, reference) == value


def test_pattern_and_length() -> None:
    assert one(RewardOptions(("regex",), pattern=r"^<a>.*</a>$"), "<a>\nx</a>") == 1
    assert one(RewardOptions(("regex",), pattern=r"^<a>.*</a>$"), "<a>x") == 0
    for length, value in ((0, 1), (10, 1), (15, 0.5), (20, 0), (30, 0)):
        assert one(RewardOptions(("length",), length=10), "x" * length) == value


def test_json_schema(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["total"], "properties": {"total": {"type": "number"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    options = RewardOptions(("json_schema",), schema=str(tmp_path / "schema.json"))
    for answer, value in (('{"total": 3}', 1), ('{"total": "3"}', 0), ("{}", 0), ("total: 3", 0), ("[" * 99999, 0)):
        assert one(options, answer) == value
    (tmp_path / "schema.json").write_text('{"type": "objekt"}')
    with pytest.raises(UsageError, match="no JSON schema"):
        find_rewards(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            RewardOptions(("exactmatch",)),
            "grpo.rewards: 'exactmatch' is no reward; there are exact_match, number, regex",
        ),
        (RewardOptions(("number", "number")), "grpo.rewards: number is there twice"),
        (RewardOptions(("regex",)), "regex needs grpo.reward_pattern"),
        (RewardOptions(("regex",), pattern="("), "grpo.reward_pattern=(: no regular expression"),
        (RewardOptions(("length",)), "length needs grpo.reward_length"),
        (RewardOptions(("json_schema",)), "json_schema needs grpo.reward_schema"),
        (RewardOptions(("nowhere:found",)), "nowhere:found cannot be imported"),
    ],
)
def test_what_is_not_there_is_named(options: RewardOptions, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_rewards(options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_of_no_reward_is_named() -> None:
    with pytest.raises(UsageError, match=r"grpo.reward_length=9: is for length, which grpo.rewards does not name"):
        check_names(("number",), RewardOptions(("number",), length=9))


def test_what_fails_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What raises, hangs, ends its process or gives no number; the rows around it have their rewards."""
    (tmp_path / "user_rewards.py").write_text(MODULE)
    (tmp_path / "json.py").write_text("raise SystemExit('not the module of that name')")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    answers = ["fine", "raise", "hang", "fine", "exit", "nan", "fine"]
    judges = Judges(RewardOptions(("user_rewards:good", "user_rewards:bad")), 5.0, 2, said.append)
    try:
        found = judges.values([Judged(answer, "r", f"file:{line}") for line, answer in enumerate(answers)])
    finally:
        judges.close()
    assert [row[0] for row in found] == [len(answer) for answer in answers]
    assert [math.isnan(row[1]) for row in found] == [answer != "fine" for answer in answers]
    assert len(said) == 1 and "user_rewards:bad" in said[0] and "file:" in said[0]


def test_each_failure_says_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    for answer, message in (
        ("raise", "file:3: user_rewards:bad raises KeyError: 'x'"),
        ("exit", "file:3: user_rewards:bad ends its process (code 3)"),
        ("hang", "file:3: user_rewards:bad takes more than 0.5 s (grpo.reward_timeout)"),
    ):
        said: list[str] = []
        judges = Judges(RewardOptions(("user_rewards:bad",)), 0.5 if answer == "hang" else 60.0, 1, said.append)
        assert math.isnan(judges.values([Judged(answer, "r", "file:3")])[0][0])
        judges.close()
        assert said == [f"{message}; such answers are not learnt from (said once; the log counts them)"]


def test_a_process_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    judges = Judges(RewardOptions(("nowhere:found",)), 5.0, 1)
    with pytest.raises(TrainingError, match=r"their process does not start .*nowhere:found cannot be imported"):
        judges.values([Judged("a", "b", "file:1")])
