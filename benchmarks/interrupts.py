"""How long a training run takes to end after a signal, in every phase.

    python benchmarks/interrupts.py                       # a toy with a large table: about 2 GB of memory, a CPU
    python benchmarks/interrupts.py --ranks 2 --moments 0.5 --signals SIGTERM

First a run is left alone, for how long each phase takes. Then, for each phase and signal, others are started and told
at moments of the phase, which are parts of its time. All ranks are told, as Slurm does; the seconds are until the last
of them has ended. A step is finished and saved before the run ends, and so is an evaluation broken off: their seconds
contain a checkpoint, which is as large as the model (`--table-rows 512`: next to nothing).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
# A phase begins with a call of this function, and lasts to the next beginning or end of one. The second step: the first
# one is longer. The last is of a run that goes on.
PHASES = {
    "starting": ("recipes/launch.py", "_run", 1),
    "data preparation": ("recipes/data/training.py", "prepared", 1),
    "building": ("recipes/train/setup.py", "assemble", 1),
    "loading": ("bridge/api.py", "Gemma4Bridge.load_hf_weights", 1),
    "training step": ("recipes/train/loop.py", "_Loop._step", 2),
    "evaluation": ("recipes/train/evaluate.py", "evaluate", 1),
    "saving": ("recipes/train/saver.py", "Saver.save", 1),
    "export": ("recipes/train/export.py", "export", 1),
    "resuming": ("recipes/train/checkpoint.py", "load", 1),
}
STEPS, RECORDS, EVALUATED = 4, 12_000, 400
_MARK, _ROOT = "phase: ", f"{Path(__file__).resolve().parents[1]}/"


def child(arguments: Sequence[str]) -> None:
    """The command line, with a line on standard error where a phase begins and where it ends."""
    # Who starts processes in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watched = {(file, function): name for name, (file, function, _) in PHASES.items()}
    calls, names = dict.fromkeys(PHASES, 0), dict[CodeType, str]()
    monitoring, tool, events = sys.monitoring, sys.monitoring.PROFILER_ID, sys.monitoring.events

    def say(name: str, event: str) -> None:
        if calls[name] == PHASES[name][2]:
            os.write(2, f"{_MARK}{json.dumps([name, event, time.monotonic()])}\n".encode())

    def begins(code: CodeType, _: int) -> object:
        name = watched.get((code.co_filename.removeprefix(_ROOT), code.co_qualname))
        if name is None:
            return monitoring.DISABLE
        names[code] = name
        monitoring.set_local_events(tool, code, events.PY_RETURN)
        calls[name] += 1
        say(name, "begins")
        return None

    def ends(code: CodeType, *_: object) -> None:
        say(names[code], "ends")

    monitoring.use_tool_id(tool, "interrupts")
    monitoring.register_callback(tool, events.PY_START, begins)
    monitoring.register_callback(tool, events.PY_RETURN, ends)
    monitoring.set_events(tool, events.PY_START)
    from bridge.cli import main

    sys.argv = ["gemma4-bridge", *arguments]
    main()


@dataclass
class Place:
    """What all runs share: a model, data and its cache; a finished run of `STEPS` steps, once there is one."""

    folder: Path
    ranks: int
    table_rows: int
    finished: Path | None = None
    runs: int = 0

    def make(self) -> None:
        from bridge.toy import write_toy

        write_toy("e2b", self.folder / "toy", dtype="float32", ple_vocab_size=self.table_rows)
        answer = " ".join(f"word {number}" for number in range(60))
        rows = [json.dumps({"prompt": f"say {number}", "completion": answer}) + "\n" for number in range(RECORDS)]
        (self.folder / "data.jsonl").write_text("".join(rows))
        (self.folder / "eval.jsonl").write_text("".join(rows[:EVALUATED]))

    def start(self, phase: str) -> Run:
        """A run that gets to a phase."""
        self.runs += 1
        folder = self.folder / f"run{self.runs}"
        folder.mkdir()
        steps = STEPS
        if phase == "resuming":
            assert self.finished is not None
            shutil.copytree(self.finished, folder / "run")
            steps += 1
        said = {
            "model.hf": self.folder / "toy",
            "output": folder / "run",
            "export.hf": folder / "hf",
            "data.path": self.folder / "data.jsonl",
            "data.eval": self.folder / "eval.jsonl",
            "data.cache": (folder if phase == "data preparation" else self.folder) / "cache",
            "data.workers": 1,
            "train.steps": steps,
            "train.seq_length": 512,
            "train.micro_batch_size": 2,
            "train.global_batch_size": 8,
            "train.eval_every": 2,
            "optimizer.warmup": 1,
            "checkpoint.every": 3,
        }
        return Run(["train", "sft/smoke", *(f"{key}={value}" for key, value in said.items())], self.ranks)


@dataclass
class Run:
    """A run of so many processes; what rank 0 says, phase after phase."""

    arguments: list[str]
    ranks: int
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.ranks):
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            if self.ranks > 1:
                env |= {"RANK": str(rank), "WORLD_SIZE": str(self.ranks), "LOCAL_RANK": str(rank)}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            command = [sys.executable, __file__, "child", *self.arguments]
            err = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            self.processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, text=True, env=env))

    def marks(self) -> Iterator[tuple[str, str, float]]:
        """(phase, begins or ends, when), as they come."""
        stream = self.processes[0].stderr
        assert stream is not None
        for line in stream:
            self.text += line
            if line.startswith(_MARK):
                name, event, at = json.loads(line.removeprefix(_MARK))
                yield name, event, at

    def told(self, number: int) -> tuple[list[int], float, float]:
        """Exit codes, the seconds until the last process has ended, and those until a checkpoint was written (or 0)."""
        started = time.monotonic()
        for process in self.processes:
            process.send_signal(number)
        rest = self.processes[0].communicate()[1]
        codes = [process.wait() for process in self.processes]
        seconds, saved = time.monotonic() - started, 0.0
        for line in rest.splitlines():
            if line.startswith(_MARK):
                name, event, at = json.loads(line.removeprefix(_MARK))
                saved = at - started if (name, event) == ("saving", "ends") else saved
        return codes, seconds, saved


@dataclass(frozen=True)
class Figure:
    """Seconds to end, by the moments (parts of the phase's time) at which a signal came, and the exit codes.

    `saved`: by when, of those seconds, a checkpoint was written; 0 where none was.
    """

    phase: str
    signal: str
    phase_seconds: float
    seconds: tuple[float, ...]
    saved: tuple[float, ...]
    codes: tuple[tuple[int, ...], ...]


def durations(run: Run) -> dict[str, float]:
    """Of a run that is left alone: how long each phase was."""
    marks = list(run.marks())
    codes = [process.wait() for process in run.processes]
    if any(codes):
        raise SystemExit(f"a run that was left alone ended with {codes}:\n{run.text}")
    following = itertools.pairwise(marks)
    return {name: after - at for (name, event, at), (_, _, after) in following if event == "begins"}


def measure(place: Place, phase: str, name: str, length: float, moments: Sequence[float]) -> Figure:
    """Tell a run of each moment."""
    seconds, until_saved, codes = [], [], []
    for moment in moments:
        run = place.start(phase)
        began = next(at for found, event, at in run.marks() if (found, event) == (phase, "begins"))
        time.sleep(max(0.0, began + moment * length - time.monotonic()))
        ended, took, saved = run.told(signal.Signals[name])
        seconds.append(round(took, 2))
        until_saved.append(round(saved, 2))
        codes.append(tuple(ended))
        shutil.rmtree(place.folder / f"run{place.runs}")
    return Figure(phase, name, round(length, 2), tuple(seconds), tuple(until_saved), tuple(codes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=SIGNALS)
    parser.add_argument("--moments", nargs="+", type=float, default=(0.1, 0.6), help="parts of a phase's time")
    parser.add_argument("--table-rows", type=int, default=400_000, help="of 448 bytes, and as much twice for Adam")
    parser.add_argument("--workdir", type=Path, help="where a model and runs are written (about 5 GB)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="interrupts-", dir=options.workdir) as folder:
        place = Place(Path(folder), options.ranks, options.table_rows)
        place.make()
        lengths = durations(place.start("data preparation"))
        durations(place.start(""))  # which fills the cache
        place.finished = Path(folder) / "run2" / "run"
        lengths |= {"resuming": durations(place.start("resuming"))["resuming"]}
        print({name: round(length, 2) for name, length in lengths.items()}, flush=True)
        for phase in options.phases:
            for name in options.signals:
                figures.append(measure(place, phase, name, lengths[phase], options.moments))
                print(figures[-1], flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2:])
    else:
        main()
