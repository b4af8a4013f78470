"""A real run that is told to stop before its first step: it ends, with the code that the job script goes by, and what
was tokenised is there at the next start."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.toy import write_toy
from recipes.train.signals import STOPPED
from tests.functional.command_server import CommandServer

RECORDS = 6_000


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupts") / "toy"
    write_toy("e2b", folder, dtype="float32")
    return folder


class Started:
    """A training run as a process of its own; its lines as they come."""

    def __init__(self, commands: CommandServer, folder: Path, toy: Path, data: Path, *overrides: str) -> None:
        command = ["train", "sft/smoke", f"model.hf={toy}", f"data.path={data}", f"output={folder / 'run'}"]
        self.process = subprocess.Popen(
            [commands.bin / "gemma4-bridge", *command, f"data.cache={folder / 'cache'}", *overrides],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.text = ""

    def until(self, pattern: str) -> None:
        assert self.process.stderr is not None
        while not re.search(pattern, self.text):
            line = self.process.stderr.readline()
            assert line, f"{pattern!r} never came:\n{self.text}"
            self.text += line

    def ended(self, number: int, after: float = 0.0) -> tuple[int, float]:
        """The exit code, and the seconds that it took, of a process that is told."""
        time.sleep(after)
        started = time.monotonic()
        self.process.send_signal(number)
        self.text += self.process.communicate(timeout=120)[1]
        return self.process.returncode, time.monotonic() - started


@pytest.fixture
def started(tmp_path: Path, toy: Path, commands: CommandServer) -> Iterator[Any]:
    runs: list[Started] = []

    def start(data: Path, *overrides: str) -> Started:
        runs.append(Started(commands, tmp_path, toy, data, *overrides))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()


def test_while_data_is_hashed(tmp_path: Path, started: Any, record_property: Any) -> None:
    with (tmp_path / "data.jsonl").open("wb") as file:
        file.truncate(1 << 40)  # of zeros that take no room
    run = started(tmp_path / "data.jsonl")
    run.until("reading 1099.5 GB")
    code, seconds = run.ended(signal.SIGTERM, after=1)
    record_property("seconds", seconds)
    assert code == STOPPED and "stopped by a signal; the same command goes on" in run.text
    assert not (tmp_path / "run").exists()


def test_while_data_is_tokenised_and_a_model_built(tmp_path: Path, started: Any, record_property: Any) -> None:
    """Every start goes on behind the last, and in the end nothing is missing."""
    answer = " ".join(f"word {number}" for number in range(60))
    rows = [json.dumps({"prompt": f"say {number}", "completion": answer}) for number in range(RECORDS)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    overrides = [
        "optimizer.warmup=1",
        "train.seq_length=1024",
        "train.global_batch_size=2",
        "train.micro_batch_size=1",
        "data.workers=1",
    ]
    endless = "train.steps=1000"  # the run that is told to stop is never through before it hears of it
    run = started(tmp_path / "data.jsonl", *overrides, endless)
    run.until("tokenising")
    code, seconds = run.ended(signal.SIGTERM, after=0.5)
    record_property("tokenising", seconds)
    assert code == STOPPED, run.text
    parts = [json.loads(path.read_text())["records"] for path in (tmp_path / "cache").glob(".*.parts/*/meta.json")]
    assert 0 < sum(parts) < RECORDS and not (tmp_path / "run").exists()
    run = started(tmp_path / "data.jsonl", *overrides, endless)
    run.until("building the model")
    assert f"behind the {sum(parts)} records of an interrupted run" in run.text
    code, seconds = run.ended(signal.SIGUSR1)
    record_property("building", seconds)
    assert code == STOPPED, run.text
    # On a loaded machine the run may have come to its steps before it heard: then what it did is saved, and said.
    saved = re.findall(r"saved .*(iter_\d+)", run.text)[-1:]
    assert [path.name for path in sorted((tmp_path / "run").glob("iter_*"))][-1:] == saved, run.text
    run = started(tmp_path / "data.jsonl", *overrides, "train.steps=2", f"output={tmp_path / 'last'}")
    run.text += run.process.communicate(timeout=300)[1]
    assert run.process.returncode == 0 and f"{RECORDS} records read, {RECORDS} kept, none dropped" in run.text
    said = json.loads((tmp_path / "last" / "run.json").read_text())
    assert (said["data"]["read"], said["data"]["kept"], said["steps"]) == (RECORDS, RECORDS, 2)
    assert said["data"]["files"] == [str(tmp_path / "data.jsonl")] and said["epochs"] == pytest.approx(4 / RECORDS)
    assert said["log"] == str(tmp_path / "last" / "log.jsonl") and said["trained_parameters"] > 100_000
    for line in (
        f"2 steps of 2 rows of up to 1024 tokens, {4 / RECORDS:.3g} epochs",
        "trained parameters on 1 rank(s)",
    ):
        assert line in run.text
