"""What a run says while it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.config import resolve
from recipes.train.log import LOG_FILE, Log, remaining


def test_the_rest_of_a_run_takes_as_long_a_step_as_what_was() -> None:
    assert remaining(30.0, done=10, left=1200) == "1:00:00"
    assert remaining(0.4, done=4, left=0) == "0:00:00"
    assert remaining(86_400.0, done=100, left=150) == "1 day, 12:00:00"


def test_who_watches_sees_when_a_resumed_run_will_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of steps of this process alone; the file has only what was measured."""
    log = Log(resolve({"output": str(tmp_path), "model": {"hf": "toy"}, "train": {"steps": 30}}), resumed_at=20)
    log._start -= 7200.0
    log.write(22, {"loss": 1.5})
    log.write(22, {"eval_loss": 1.25})
    log.close()
    trained, evaluated = capsys.readouterr().err.splitlines()
    assert trained.startswith("step 22/30  loss 1.5  eta 8:00:0") and evaluated == "step 22/30  eval_loss 1.25"
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert lines == [{"step": 22, "loss": 1.5}, {"step": 22, "eval_loss": 1.25}]
