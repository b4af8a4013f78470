"""What a run makes of the signals that a queue sends, to it and to everything that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge.errors import CheckpointError, UsageError
from recipes.train.signals import STOP_SIGNALS, StopSignal, held_back
from recipes.train.sole import sole_run

SLEEP = [sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_the_old_handler_comes_back(number: int) -> None:
    before = signal.getsignal(number)
    with StopSignal() as signalled:
        assert not signalled
        os.kill(os.getpid(), number)
        assert signalled
    assert signal.getsignal(number) == before


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "one"
    with sole_run(output, 0), sole_run(output, 1):
        (output / "log.jsonl").write_text("")
        with pytest.raises(UsageError, match=r"output=.*/one: another run is writing it"), sole_run(output, 0):
            pass
    with sole_run(output, 0), sole_run(tmp_path / "unused", 0):
        pass
    assert [path.name for path in output.iterdir()] == ["log.jsonl"] and not (tmp_path / "unused").exists()
    with pytest.raises(CheckpointError, match=r"log\.jsonl"), sole_run(output / "log.jsonl", 0):
        pass


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_what_is_started_while_signals_are_held_back_outlives_them(number: int) -> None:
    with StopSignal() as signalled:
        with held_back():
            os.kill(os.getpid(), number)
            protected = subprocess.Popen(SLEEP, stdout=subprocess.PIPE)
        assert signalled, "it comes when the block is left"
        unprotected = subprocess.Popen(SLEEP, stdout=subprocess.PIPE)
        try:
            for child in (protected, unprotected):
                assert child.stdout is not None and child.stdout.readline() == b"\n"
                child.send_signal(number)
            assert unprotected.wait(10) == -number
            time.sleep(0.1)
            assert protected.poll() is None
        finally:
            for child in (protected, unprotected):
                child.kill()
                child.wait()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_process_that_is_about_to_end_keeps_its_exit_code(number: int) -> None:
    program = (
        "import os, sys, time; from recipes.train.signals import StopSignal\n"
        "class Slow:\n"
        "    def __del__(self, write=os.write, sleep=time.sleep):\n        write(1, b'going\\n'); sleep(1)\n"
        "with StopSignal() as stop:\n    stop.ignore_from_now_on()\n"
        "sys.slow = Slow()\n"  # goes with the interpreter, after its handlers
        "sys.exit(75)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"going\n"
    process.send_signal(number)
    assert process.wait(10) == 75


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupt_where_nothing_can_be_raised_is_not_lost(number: str) -> None:
    """Python prints what a destructor raises and goes on; so do libraries written in C."""
    code = (
        "import os, signal, time, bridge.cli\n"
        "class Last:\n"
        f"    def __del__(self): os.kill(os.getpid(), signal.{number}); sum(range(100))\n"
        "def app(*_, **__):\n"
        "    last = Last()\n"
        "    del last\n"
        "    for _ in range(1000): time.sleep(0.01)\n"
        "    print('went on')\n"
        "bridge.cli.app = app\n"
        "bridge.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert "Traceback" not in done.stderr and "interrupted: nothing is left half-written" in done.stderr
