"""`gemma4-bridge launch`: parse, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.errors import UsageError

if TYPE_CHECKING:
    from recipes.slurm.launch import LaunchOptions


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command(epilog="Example: `gemma4-bridge launch sft/e4b --nodes 2 --gpus-per-node 8 --time 08:00:00 --submit`")(
        launch
    )


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A name under recipes/configs, or a YAML file.")]
NodesOption = Annotated[int, typer.Option(min=1, help="How many nodes.")]
GpusOption = Annotated[int, typer.Option(min=0, help="GPUs of each, one rank per GPU; 0: ranks on CPUs.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.steps=200; cluster=8x141 for its layout there."),
]
SubmitOption = Annotated[bool, typer.Option("--submit", help="Submit it; else it is printed.")]
RanksOption = Annotated[int | None, typer.Option(min=1, help="Without GPUs: ranks of each node.")]
CpusOption = Annotated[int, typer.Option(min=1, help="Cores for the threads that read data.")]
SbatchOption = Annotated[str | None, typer.Option(help="As sbatch takes it.")]
TimeOption = Annotated[str | None, typer.Option(help="Limit, as sbatch takes it: HH:MM:SS.")]
MemoryOption = Annotated[str | None, typer.Option("--mem", help="Of a node, as sbatch takes it: 64G.")]
JobNameOption = Annotated[str, typer.Option(help="Instead of the recipe's name.")]
LogsOption = Annotated[str, typer.Option(metavar="DIR", help="Instead of OUTPUT/slurm.")]
SignalLeadOption = Annotated[int, typer.Option(min=1, help="Seconds before the limit at which the run saves.")]
LauncherOption = Annotated[str, typer.Option(help="Who starts the ranks of a node: srun or torchrun.")]
VenvOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="The environment on the nodes; by default this one.")
]
SetupOption = Annotated[str, typer.Option(metavar="FILE", help="Shell lines that come first: modules to load.")]
ContainerOption = Annotated[str, typer.Option(metavar="IMAGE", help="Run in it, instead of an environment.")]
RuntimeOption = Annotated[str, typer.Option(help="pyxis (enroot) or apptainer")]
MountOption = Annotated[list[str] | None, typer.Option(metavar="SRC:DST", help="Into the container; repeatable.")]
ExportOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable of the job; repeatable.")
]
SweepOption = Annotated[Path | None, typer.Option(metavar="FILE", help="A job array: one task per line of key=value.")]
GpuMemoryOption = Annotated[float | None, typer.Option(min=1, metavar="GB", help="Of a GPU: refuse what does not fit.")]


def launch(
    recipe: RecipeArgument,
    nodes: NodesOption,
    gpus_per_node: GpusOption,
    overrides: OverridesArgument = None,
    submit: SubmitOption = False,
    ranks_per_node: RanksOption = None,
    cpus_per_rank: CpusOption = 4,
    partition: SbatchOption = None,
    account: SbatchOption = None,
    qos: SbatchOption = None,
    time: TimeOption = None,
    memory: MemoryOption = None,
    job_name: JobNameOption = "",
    logs: LogsOption = "",
    signal_lead: SignalLeadOption = 300,
    launcher: LauncherOption = "srun",
    venv: VenvOption = None,
    setup: SetupOption = "",
    container: ContainerOption = "",
    container_runtime: RuntimeOption = "pyxis",
    mount: MountOption = None,
    export: ExportOption = None,
    sweep: SweepOption = None,
    gpu_memory: GpuMemoryOption = None,
) -> None:
    """Print the Slurm job of a recipe, or submit it.

    The recipe is checked against the number of ranks first. The job saves before its time limit or when it is
    preempted, goes back into the queue, and goes on where it was.
    """
    from recipes.slurm.launch import LaunchOptions

    options = {"partition": partition, "account": account, "qos": qos, "time": time, "mem": memory}
    wanted = LaunchOptions(
        recipe,
        tuple(overrides or ()),
        nodes=nodes,
        gpus=gpus_per_node,
        ranks=_ranks_of_a_node(gpus_per_node, ranks_per_node),
        cpus=cpus_per_rank,
        options=tuple((name, value) for name, value in options.items() if value is not None),
        name=job_name,
        logs=logs,
        lead=signal_lead,
        launcher=launcher,
        venv=venv,
        setup=setup,
        container=container,
        runtime=container_runtime,
        mounts=tuple(mount or ()),
        exports=tuple(export or ()),
        sweep=sweep,
        gpu_memory=gpu_memory,
        command_line=("gemma4-bridge", *sys.argv[1:]),
    )
    _print_or_submit(wanted, submit)


def _ranks_of_a_node(gpus: int, ranks: int | None) -> int:
    if gpus and ranks not in (None, gpus):
        raise UsageError("--ranks-per-node is for CPUs: with GPUs there is one rank for each")
    return gpus or ranks or 1


def _print_or_submit(wanted: LaunchOptions, submit: bool) -> None:
    from recipes.slurm.launch import make_job
    from recipes.slurm.submit import submit as hand_over

    job = make_job(wanted)
    if not submit:
        sys.stdout.write(job.render())
        return
    for line in job.notes:
        print(line)
    done = hand_over(job)
    print(f"job {done.number} submitted: {done.script}")
    for log in done.logs:
        print(f"log {log}")


def dry_run(recipe: str, overrides: list[str], ranks: int | None, gpu_memory: float | None) -> None:
    """`train --dry-run`: check the recipe and print its memory estimate; exit code 1 where it does not fit."""
    from recipes.config import load_recipe
    from recipes.memory.recipe import report

    loaded = load_recipe(recipe, overrides)
    lines, fits = report(loaded, ranks or loaded.parallel.layout().world_size, gpu_memory)
    for line in lines:
        print(line)
    if not fits:
        raise typer.Exit(1)
