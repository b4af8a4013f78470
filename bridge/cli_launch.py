"""`gemma4-bridge launch`: parse, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bridge.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command(epilog="Example: `gemma4-bridge launch sft/e4b --nodes 2 --gpus-per-node 8 --time 08:00:00 --submit`")(
        launch
    )


def launch(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name under recipes/configs, or a YAML file.")],
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes.")],
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each, one rank per GPU; 0: ranks on CPUs.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.steps=200.")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it; else it is printed.")] = False,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Without GPUs: ranks of each node.")] = None,
    cpus_per_rank: Annotated[int, typer.Option(min=1, help="Cores for the threads that read data.")] = 4,
    partition: Annotated[str | None, typer.Option(help="As sbatch takes it.")] = None,
    account: Annotated[str | None, typer.Option(help="As sbatch takes it.")] = None,
    qos: Annotated[str | None, typer.Option(help="As sbatch takes it.")] = None,
    time: Annotated[str | None, typer.Option(help="Limit, as sbatch takes it: HH:MM:SS.")] = None,
    memory: Annotated[str | None, typer.Option("--mem", help="Of a node, as sbatch takes it: 64G.")] = None,
    job_name: Annotated[str, typer.Option(help="Instead of the recipe's name.")] = "",
    logs: Annotated[str, typer.Option(metavar="DIR", help="Instead of OUTPUT/slurm.")] = "",
    signal_lead: Annotated[int, typer.Option(min=1, help="Seconds before the limit at which the run saves.")] = 300,
    launcher: Annotated[str, typer.Option(help="Who starts the ranks of a node: srun or torchrun.")] = "srun",
    venv: Annotated[
        str | None, typer.Option(metavar="DIR", help="The environment on the nodes; by default this one.")
    ] = None,
    setup: Annotated[str, typer.Option(metavar="FILE", help="Shell lines that come first: modules to load.")] = "",
    container: Annotated[str, typer.Option(metavar="IMAGE", help="Run in it, instead of an environment.")] = "",
    container_runtime: Annotated[str, typer.Option(help="pyxis (enroot) or apptainer")] = "pyxis",
    mount: Annotated[list[str] | None, typer.Option(metavar="SRC:DST", help="Into the container; repeatable.")] = None,
    export: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable of the job; repeatable.")
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A job array: one task per line of key=value.")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, metavar="GB", help="Of a GPU: refuse what does not fit.")
    ] = None,
) -> None:
    """Print the Slurm job of a recipe, or submit it.

    The recipe is checked against the number of ranks first. The job saves before its time limit or when it is
    preempted, goes back into the queue, and goes on where it was.
    """
    from recipes.slurm.launch import Wanted, make_job
    from recipes.slurm.submit import submit as hand_over

    if gpus_per_node and ranks_per_node not in (None, gpus_per_node):
        raise UsageError("--ranks-per-node is for CPUs: with GPUs there is one rank for each")
    options = {"partition": partition, "account": account, "qos": qos, "time": time, "mem": memory}
    job = make_job(
        Wanted(
            recipe,
            tuple(overrides or ()),
            nodes=nodes,
            gpus=gpus_per_node,
            ranks=gpus_per_node or ranks_per_node or 1,
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
    )
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
    from bridge.megatron.silence import silence_warnings
    from recipes.config import load_recipe
    from recipes.memory.recipe import report

    silence_warnings()
    loaded = load_recipe(recipe, overrides)
    lines, fits = report(loaded, ranks or loaded.parallel.layout().world_size, gpu_memory)
    for line in lines:
        print(line)
    if not fits:
        raise typer.Exit(1)
