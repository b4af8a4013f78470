"""What the processes of the GPU benchmarks leave behind, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import lines
from benchmarks.case import Case
from benchmarks.lines import append, rows_of
from benchmarks.workers import NO_TIME, ROOT, Request, Workers

CASE = Case("e2b", "lora", 48)


def test_a_row_is_what_its_lines_say(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    append(out, "a", "asked", recompute="none")
    append(out, "a", "step", seconds=9.0, loss=7.0)
    append(out, "a", "failed", status=lines.MEMORY)
    # Once more, with other options.
    append(out, "a", "start", recompute="full")
    append(out, "a", "step", seconds=3.0, loss=6.0, at=1.5)
    append(out, "a", "step", seconds=1.0, loss=5.0, at=2.5)
    assert rows_of(out)["a"] == {
        "status": "failed: it was cut short",
        "recompute": "full",
        "losses": [6.0, 5.0],
        "step_seconds": [3.0, 1.0],
    }
    append(out, "a", "measured", status="ok", seconds=1.0)
    append(out, "a", "killed", status="failed: not done after 9 s")
    append(out, "b", "left out", status="not run: x")
    found = rows_of(out)
    assert found["a"]["status"] == "ok" and found["a"]["not_profiled"] == "failed: not done after 9 s"
    assert lines.done(out) == found and lines.done(tmp_path / "none") == {}
    # What was killed while it wrote.
    with out.open("a", encoding="utf-8") as file:
        file.write('{"case": "b", "phase": "sta')
    assert rows_of(out) == found


def script(tmp_path: Path, after: str) -> tuple[str, ...]:
    """A process that is ready, reads its request into `asked`, and starts another."""
    program = f"""
import json, subprocess, sys, threading, os, signal, time
from benchmarks.lines import append
from pathlib import Path
other = subprocess.Popen(["sleep", "600"])
Path({str(tmp_path / "pids")!r}).write_text(f"{{os.getpid()}} {{other.pid}}")
print("imported\\nready", flush=True)
asked = json.loads(sys.stdin.readline())
{after}
"""
    return (sys.executable, "-c", program)


def ended(folder: Path) -> bool:
    """Whether the processes of `script` are gone, or wait to be buried."""
    for pid in (folder / "pids").read_text(encoding="utf-8").split():
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z":
            return False
    return True


def eventually(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    ("after", "status"),
    [
        ("time.sleep(600)", "failed: not done after 1 s"),
        ("sys.exit(3)", "failed: exit code 3; "),
        ("append(Path(asked['out']), asked['name'], 'measured', status='ok'); time.sleep(600)", "ok"),
        ("append(Path(asked['out']), asked['name'], 'failed', status='out of memory')", "out of memory"),
    ],
)
def test_a_case_ends_with_what_it_started(tmp_path: Path, after: str, status: str) -> None:
    out = tmp_path / "rows.jsonl"
    with Workers(tmp_path / "log", least=0.5, command=script(tmp_path, after)) as workers:
        assert workers.run(Request("x", CASE, out, 1.0)).startswith(status)
    assert eventually(lambda: ended(tmp_path))
    row = rows_of(out)["x"]
    assert row["status"].startswith(status) and row["variant"] == "e2b"
    assert ("not_profiled" in row) == (status == "ok")


def test_a_case_without_time_is_not_begun(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    with Workers(tmp_path / "log", time.monotonic() + 5, 20, script(tmp_path, "")) as workers:
        assert workers.run(Request("x", CASE, out)) == NO_TIME
    assert rows_of(out)["x"]["status"] == NO_TIME and not (tmp_path / "pids").exists()


def test_the_next_process_starts_with_the_case_before(tmp_path: Path) -> None:
    after = "append(Path(asked['out']), asked['name'], 'measured', status='ok')"
    with Workers(tmp_path / "log", command=script(tmp_path, after)) as workers:
        assert workers.run(Request("x", CASE, tmp_path / "rows.jsonl"), another=True) == "ok"
        spare = workers._spare
        assert spare is not None and spare.poll() is None
        assert workers.run(Request("y", CASE, tmp_path / "rows.jsonl")) == "ok" and workers._spare is None
        workers.prepare()
        assert eventually(lambda: (tmp_path / "pids").read_text(encoding="utf-8").split() != [])
    assert eventually(lambda: ended(tmp_path))


def test_nothing_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    """The process of a case itself, before it has imported what takes long."""
    program = f"""
import time
from pathlib import Path
from benchmarks.workers import Workers
workers = Workers(Path({str(tmp_path / "log")!r}))
workers.prepare()
Path({str(tmp_path / "pids")!r}).write_text(str(workers._spare.pid))
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        assert eventually(lambda: (tmp_path / "pids").exists() and bool((tmp_path / "pids").read_text("utf-8")))
        child = int((tmp_path / "pids").read_text(encoding="utf-8"))
        # A group of its own, in the session of whoever started all of it.
        assert os.getpgid(child) == child and os.getsid(child) == os.getsid(0)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert eventually(lambda: ended(tmp_path))


def test_a_request_is_a_line() -> None:
    request = Request("x", CASE, Path("a/b"), 12.5, False)
    assert Request.from_json(request.to_json()) == request and "\n" not in request.to_json()
    assert json.loads(Request("x", CASE, Path("a")).to_json())["seconds"] == 1e9
