"""A recipe as a Slurm job: facts, checked, and the script that they make.

Whatever a user wrote is quoted for the shell, or refused where no quoting exists (`#SBATCH` lines).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bridge.errors import UsageError

# Values in `#SBATCH` lines; Slurm reads quotes, blanks and, in paths, `%` there.
_PLAIN = re.compile(r"[\w.,:@/+=\[\]-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

RUNTIMES = ("pyxis", "apptainer")
LAUNCHERS = ("srun", "torchrun")


@dataclass(frozen=True)
class SweepPoint:
    """One task of a sweep: its overrides, the folder of its run, and the one that it exports to."""

    overrides: tuple[str, ...]
    output: str
    exported: str | None = None


@dataclass(frozen=True)
class Job:
    """`ranks` per node, one for every GPU where there are `gpus`; `cpus` per rank.

    `options`: further sbatch options by their long names (partition, account, time ...). `lead`: seconds before the
    time limit at which the run is told to save. `exports`: (name, value). `setup`: a shell file that is read first.
    `program`: words that start the command line on a node. `launcher`: who starts the ranks of one, srun, or torchrun
    by `python` (`recipes.slurm.torchrun`). `notes`: comments. `container`: an image, run by `runtime`.
    Raises UsageError for what cannot stand in a job script.
    """

    recipe: str
    output: str
    nodes: int
    ranks: int
    gpus: int = 0
    cpus: int = 1
    name: str = ""
    overrides: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    logs: str = ""
    lead: int = 300
    exports: tuple[tuple[str, str], ...] = ()
    setup: str = ""
    program: tuple[str, ...] = ("gemma4-bridge",)
    launcher: str = "srun"
    python: str = "python"
    container: str = ""
    runtime: str = "pyxis"
    mounts: tuple[str, ...] = ()
    sweep: tuple[SweepPoint, ...] = ()
    notes: tuple[str, ...] = ()
    command_line: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, number in (("nodes", self.nodes), ("ranks per node", self.ranks), ("cpus per rank", self.cpus)):
            if number < 1:
                raise UsageError(f"{name} is {number}: a job has at least one")
        for name, value in (("job name", self.job_name), ("log folder", self.log_folder), *self.options):
            if not _PLAIN.fullmatch(value):
                raise UsageError(f"{name} {value!r}: cannot stand in an #SBATCH line (letters, digits and .,:@/+=[]-_)")
        for name, _ in self.exports:
            if not _VARIABLE.fullmatch(name):
                raise UsageError(f"--export {name!r}: no name of a variable")
        limit = seconds(dict(self.options).get("time", "UNLIMITED"))
        if limit is not None and self.lead + 60 > limit:
            # Slurm may send the signal a minute early.
            raise UsageError(
                f"a signal {self.lead} s before the time limit leaves nothing of {limit:.0f} s; set --signal-lead"
            )
        if self.runtime not in RUNTIMES:
            raise UsageError(f"container runtime {self.runtime!r}: known are {', '.join(RUNTIMES)}")
        if self.launcher not in LAUNCHERS:
            raise UsageError(f"launcher {self.launcher!r}: known are {', '.join(LAUNCHERS)}")
        folders = {
            "output": [p.output for p in self.sweep],
            "export.hf": [p.exported for p in self.sweep if p.exported],
        }
        for key, names in folders.items():
            for name in names:
                if names.count(name) > 1:
                    raise UsageError(f"the sweep has two runs in {name}; give every line an {key}=... of its own")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks

    @property
    def job_name(self) -> str:
        """By default the recipe's: `sft/e4b` is `sft-e4b`, `my/own.yaml` is `own`."""
        if self.name:
            return self.name
        path = Path(self.recipe)
        return path.stem if path.suffix in (".yaml", ".yml") else self.recipe.replace("/", "-")

    @property
    def log_folder(self) -> str:
        """In the run's folder, unless said otherwise; of a sweep in the one that its runs' are named after."""
        return self.logs or f"{self.output}/slurm"

    @property
    def log(self) -> str:
        """The log's name as sbatch takes it: job name and number, and of a sweep the task's."""
        return f"{self.log_folder}/%x-{'%A_%a' if self.sweep else '%j'}.log"

    def render(self) -> str:
        """The job script."""
        import jinja2

        files = resources.files("recipes.slurm")
        template = jinja2.Environment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        ).from_string((files / "job.sbatch.jinja").read_text(encoding="utf-8"))
        options = self.options
        if self.sweep:
            options = (*options, ("array", f"0-{len(self.sweep) - 1}"))
        quoted = {
            # The two that stand in comments: only a line's end could leave one.
            "title": " ".join(self.recipe.split()),
            "command_line": " ".join(shlex.join(self.command_line).split()),
            "notes": [" ".join(note.split()) for note in self.notes],
            "recipe": shlex.quote(self.recipe),
            "name": self.job_name,
            "nodes": self.nodes,
            "ranks": self.ranks,
            "gpus": self.gpus,
            "cpus": self.cpus,
            "options": options,
            "log": self.log,
            "lead": self.lead,
            "exports": [(name, shlex.quote(value)) for name, value in self.exports],
            "setup": shlex.quote(self.setup) if self.setup else "",
            "output": shlex.quote(self.output),
            "overrides": shlex.join(self.overrides),
            "sweep": [
                {"output": shlex.quote(point.output), "overrides": shlex.join(point.overrides)} for point in self.sweep
            ],
            "container": self._container(),
            "program": shlex.join(self._program()),
            "task": "one rank" if self.launcher == "srun" else "one torchrun, with all ranks of its node",
            "tasks": self._tasks(),
        }
        environment = (files / "env.sh").read_text(encoding="utf-8")
        return template.render(job=quoted, environment=environment.rstrip() + "\n")

    def _tasks(self) -> str:
        """What of the job's resources a task of srun has."""
        if self.launcher == "srun":
            return '--cpus-per-task="$SLURM_CPUS_PER_TASK"'
        cpus = f'--cpus-per-task="$((SLURM_CPUS_PER_TASK * {self.ranks}))"'
        return f'--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 {cpus}'

    def _program(self) -> tuple[str, ...]:
        if self.launcher == "srun":
            return self.program
        return (self.python, "-m", "recipes.slurm.torchrun", str(self.ranks), *self.program)

    def _container(self) -> str:
        """What stands between srun and the program; it ends with a blank."""
        if not self.container:
            return ""
        if self.runtime == "pyxis":
            words = [f"--container-image={self.container}"]
            words += [f"--container-mounts={','.join(self.mounts)}"] if self.mounts else []
        else:
            words = ["apptainer", "exec", *(["--nv"] if self.gpus else [])]
            words += [word for mount in self.mounts for word in ("--bind", mount)]
            words.append(self.container)
        return shlex.join(words) + " "


def seconds(limit: str) -> float | None:
    """A time limit as sbatch reads it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None for what is none of these."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        return None
    days, *parts = (None if part is None else int(part) for part in match.groups())
    first, second, third = (part or 0 for part in parts)
    if days is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    if parts[2] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def read_sweep(lines: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of every line of a sweep's file; `#` begins a comment. Raises UsageError."""
    points = []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"line {number} of the sweep: {error}") from None
        if words:
            points.append(tuple(words))
    if not points:
        raise UsageError("the sweep has no lines")
    return points
