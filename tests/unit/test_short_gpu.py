"""The plan for a few minutes on one GPU: its rows and its commands. `scripts/gpu/rehearse.sh` runs them with toys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.case import RECOMPUTE
from benchmarks.cases import cases
from benchmarks.lines import MEMORY, append, rows_of
from benchmarks.short_gpu import ROW_SECONDS, parse, rows
from benchmarks.workers import LEAST_SECONDS, NO_TIME, Request, Workers
from bridge.errors import UsageError

KNOWN = {case.name: case for case in cases()}
SCRIPTS = Path(__file__).parents[2] / "scripts" / "gpu"


def test_a_row_is_a_case_by_its_name() -> None:
    row = parse("lora/12b/8192/ours+selective+profile=85", KNOWN)
    # Its lines are those of the case that has a bound.
    assert row.name == "lora/12b/8192/ours" and row.profile and row.seconds == 85.0
    assert [rung.recompute for rung in row.rungs] == ["selective", "full"]
    row = parse("lora/e4b/16384/ours+full", KNOWN)  # a case of its own
    assert row.name == "lora/e4b/16384/ours+full" and [rung.recompute for rung in row.rungs] == ["full"]
    row = parse("lora/26b-a4b/8192/ours+fp8 experts+none=60", KNOWN)
    assert row.rungs[0].fp8_experts and row.name == "lora/26b-a4b/8192/ours+fp8 experts" and not row.profile
    row = parse("lora/e4b/16384/liger", KNOWN)
    assert row.rungs == (KNOWN[row.name],) and row.seconds == ROW_SECONDS
    assert [rung.recompute for rung in parse("lora/31b/8192/ours", KNOWN).rungs] == list(RECOMPUTE)


@pytest.mark.parametrize(
    "text", ["lora/12b/8191/ours", "lora/12b/8192/ours+most", "lora/12b/8192/ours+profile+none", "lora/12b/8192/ours=x"]
)
def test_a_row_that_is_none_is_named(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        parse(text, KNOWN)


def test_rows_go_on_with_more_recompute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what could not be begun is no failure."""
    asked: list[Request] = []
    answers = iter([MEMORY, "ok", NO_TIME])

    def run(self: Workers, request: Request, another: bool = False) -> str:
        asked.append(request)
        status = next(answers)
        append(request.out, request.name, "start", recompute=request.case.recompute, status=status)
        return status

    monkeypatch.setattr(Workers, "run", run)
    monkeypatch.setattr(Workers, "prepare", lambda self: None)
    plan = [parse(text, KNOWN) for text in ("lora/12b/8192/ours+selective+profile", "lora/e4b/16384/transformers")]
    assert rows(tmp_path, 300, plan)
    assert [(request.case.recompute, request.profile) for request in asked] == [
        ("selective", True),
        ("full", True),
        ("auto", False),
    ]
    row = rows_of(tmp_path / "rows.jsonl")["lora/12b/8192/ours"]
    assert row["status"] == "ok" and row["recompute"] == "full"
    answers = iter(["failed: x"])
    assert not rows(tmp_path, 300, plan[1:])


@pytest.mark.parametrize("name", ["a.sh", "b.sh"])
def test_the_commands_ask_for_what_there_is(name: str) -> None:
    text = (SCRIPTS / name).read_text(encoding="utf-8")
    assert len(text) <= 2000
    asked = [row for row in re.findall(r'"?((?:lora|sft)/[^"\s)]+(?: experts\+\w+=\d+)?)"?', text) if "/48/" not in row]
    assert len(asked) > (10 if name == "b.sh" else 0)
    for row in asked:
        found = parse(row, KNOWN)
        assert "=" in row and found.seconds >= LEAST_SECONDS, row
    tests = (SCRIPTS.parents[1] / "tests" / "functional" / "test_gpu.py").read_text(encoding="utf-8")
    for test in re.findall(r"\$\{G\}(\w+)", text):
        assert f"def test_{test}(" in tests
