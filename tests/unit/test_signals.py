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
from recipes.train.signals import INTERRUPTED, STOP_SIGNALS, STOPPED, Stopped, StopSignal, held_back
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


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_at_once_or_noted(number: int) -> None:
    """Where there is nothing to save a signal raises, once; what is cleaned up then is not cut off by the next one."""
    with StopSignal() as signalled:
        with signalled.at_once():
            with signalled.noted():
                os.kill(os.getpid(), number)
            assert signalled
            with pytest.raises(Stopped):
                os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)


ENDLESS = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
STUCK = {
    "in a call that does not come back": ENDLESS,
    "where everything is caught": "while True:\n            try: time.sleep(9)\n            except BaseException: pass",
    "in what it cleans up": f"try: time.sleep(60)\n        finally: {ENDLESS}",
    "in a thread that is waited for": "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)",
}


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGINT])
@pytest.mark.parametrize("work", STUCK.values(), ids=STUCK)
def test_what_does_not_stop_is_ended(work: str, number: int) -> None:
    program = (
        "import hashlib, os, sys, threading, time; from recipes.train.signals import *\n"
        "with StopSignal(0.2) as stop:\n    with stop.at_once():\n"
        f"        print(flush=True)\n        {work}"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(30) == (INTERRUPTED if number == signal.SIGINT else STOPPED)


def test_a_step_is_never_cut_off() -> None:
    program = (
        "import sys, time; from recipes.train.signals import *\n"
        "with StopSignal(0.2) as stop:\n    with stop.at_once(), stop.noted():\n"
        "        print(flush=True)\n"
        "        while not stop: time.sleep(0.05)\n"
        "        time.sleep(1)\n        sys.exit(3)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 3


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


def test_a_signal_while_megatron_reads_a_checkpoint_is_no_broken_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch hands what is raised on a rank to all ranks, as a failure to read."""
    from torch.distributed.checkpoint.api import CheckpointException

    from recipes.train import checkpoint

    for cause, expected in (
        (Stopped(), Stopped),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError("x"), CheckpointError),
    ):

        def load(*_: object, cause: BaseException = cause) -> None:
            raise CheckpointException("read", {1: (cause, None)})  # type: ignore[dict-item]

        monkeypatch.setattr(checkpoint.dist_checkpointing, "load", load)
        with pytest.raises(expected):
            checkpoint._loaded({}, tmp_path)
