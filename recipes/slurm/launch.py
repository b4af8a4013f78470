"""From what a user asks for to a checked job."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import BridgeError, UsageError
from recipes.check import check_startable
from recipes.config import Recipe, load_recipe
from recipes.memory.recipe import geometry_of, report
from recipes.slurm.job import Job, SweepPoint, read_sweep


@dataclass(frozen=True)
class LaunchOptions:
    """The options of `gemma4-bridge launch`; see there. `exports` are NAME=VALUE."""

    recipe: str
    overrides: tuple[str, ...]
    nodes: int
    gpus: int
    ranks: int
    cpus: int
    options: tuple[tuple[str, str], ...]
    name: str
    logs: str
    lead: int
    launcher: str
    venv: str | None
    setup: str
    container: str
    runtime: str
    mounts: tuple[str, ...]
    exports: tuple[str, ...]
    sweep: Path | None
    gpu_memory: float | None
    command_line: tuple[str, ...]


def make_job(wanted: LaunchOptions) -> Job:
    """Check the recipe, and every point of a sweep, against the ranks of the job. Raises a BridgeError."""
    world_size = wanted.nodes * wanted.ranks
    recipe = _check(wanted.recipe, wanted.overrides, world_size)
    points = []
    if wanted.sweep is not None:
        for number, line in enumerate(_sweep_lines(wanted.sweep)):
            for key, folder in (("output", recipe.output), ("export.hf", recipe.export.hf)):
                if folder is not None and not any(word.startswith(f"{key}=") for word in line):
                    line = (*line, f"{key}={folder}-{number}")
            one = _check(wanted.recipe, (*wanted.overrides, *line), world_size)
            points.append(SweepPoint(line, one.output, one.export.hf))
    if wanted.setup and not Path(wanted.setup).is_file():
        raise UsageError(f"--setup {wanted.setup}: no such file")
    return Job(
        recipe=wanted.recipe,
        output=recipe.output,
        nodes=wanted.nodes,
        ranks=wanted.ranks,
        gpus=wanted.gpus,
        cpus=wanted.cpus,
        name=wanted.name,
        overrides=wanted.overrides,
        options=wanted.options,
        logs=wanted.logs,
        lead=wanted.lead,
        exports=tuple(_export(said) for said in wanted.exports),
        setup=wanted.setup,
        program=_program(wanted),
        launcher=wanted.launcher,
        python="python" if wanted.container else str(_environment(wanted) / "python"),
        container=wanted.container,
        runtime=wanted.runtime,
        mounts=wanted.mounts,
        sweep=tuple(points),
        notes=_memory(wanted, recipe, world_size),
        command_line=wanted.command_line,
    )


def _check(name: str, overrides: tuple[str, ...], world_size: int) -> Recipe:
    """A recipe that these ranks can run."""
    recipe = load_recipe(name, overrides)
    check_startable(recipe, world_size)
    return recipe


def _memory(wanted: LaunchOptions, recipe: Recipe, world_size: int) -> tuple[str, ...]:
    """What a GPU needs, as far as the model is known here. Raises UsageError where it has less."""
    if not wanted.gpus:
        return ()
    model = recipe.model.hf or recipe.model.megatron or ""
    try:
        geometry_of(model)
    except BridgeError as error:
        if wanted.gpu_memory is not None:
            raise
        return (f"memory not estimated: {error}",)
    lines, fits = report(recipe, world_size, wanted.gpu_memory)
    if not fits:
        raise UsageError("; ".join(line.strip() for line in (lines[0], *lines[4:])))
    return tuple(lines)


def _sweep_lines(path: Path) -> list[tuple[str, ...]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--sweep {path}: cannot be read ({error})") from None
    try:
        return read_sweep(lines)
    except UsageError as error:
        raise UsageError(f"--sweep {path}: {error}") from None


def _export(said: str) -> tuple[str, str]:
    name, separator, value = said.partition("=")
    if not separator:
        # Its value, a key perhaps, would stand in the script.
        raise UsageError(f"--export {said}: say NAME=VALUE; what is set where you submit is passed on by Slurm itself")
    return name, value


def _program(wanted: LaunchOptions) -> tuple[str, ...]:
    """A container brings its own `gemma4-bridge`; an environment is the one named, or this one."""
    if wanted.container:
        return ("gemma4-bridge",)
    program = _environment(wanted) / "gemma4-bridge"
    if not program.is_file():
        raise UsageError(f"{program}: no such file; --venv DIR names the environment that has it")
    return (str(program),)


def _environment(wanted: LaunchOptions) -> Path:
    folder = Path(wanted.venv) if wanted.venv is not None else Path(sys.prefix)
    return folder.absolute() / "bin"
