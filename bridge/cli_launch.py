"""`gemma4-bridge launch` and `plan`: parse, call, print."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bridge.cli_kit import JsonOption, wrote_json
from bridge.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command(epilog="Example: `gemma4-bridge launch sft/e4b --nodes 2 --gpus-per-node 8 --time 08:00:00 --submit`")(
        launch
    )
    app.command(epilog="Example: `gemma4-bridge plan 26b-a4b --gpus 16 --gpu-memory 80 --seq-length 8192`")(plan)


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


def plan(
    model: Annotated[str, typer.Argument(metavar="VARIANT", help="e2b, e4b, 12b, 26b-a4b, 31b; a hub id or a folder.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many in all.")],
    gpu_memory: Annotated[float, typer.Option(min=1, metavar="GB", help="Of each: 80 for an H100.")],
    seq_length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 8192,
    global_batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 64,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Sequences that go through at once.")] = 1,
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters, not the model.")] = False,
    lora_rank: Annotated[int, typer.Option(min=1, help="With --lora.")] = 16,
    count: Annotated[int, typer.Option("-n", min=1, help="How many proposals.")] = 5,
    json_file: JsonOption = None,
) -> None:
    """Propose layouts that fit, best first, with what each needs of a GPU.

    Memory is estimated from the model's geometry. The order follows rules of thumb on speed, which have not been
    measured.
    """
    from rich.table import Table

    from bridge.mapping import table_for
    from bridge.megatron.parallel import Parallel
    from recipes.memory.activations import Load
    from recipes.memory.estimate import RESERVE, Plan, estimate
    from recipes.memory.recipe import geometry_of
    from recipes.memory.search import search

    table = table_for(geometry_of(model))
    wanted = Plan(Parallel(), gpus, Load(micro_batch_size, seq_length), lora_rank=lora_rank if lora else 0)
    found = search(table, wanted, round(gpu_memory * 1e9), global_batch_size)[:count]
    if not found:
        from recipes.memory.search import layouts

        least = min(
            estimate(table, replace(wanted, parallel=parallel, load=replace(wanted.load, recompute="full"))).total
            for parallel in layouts(table, gpus)
        )
        raise UsageError(
            f"{model} on {gpus} × {gpu_memory:g} GB: nothing fits; the least is {(least + RESERVE) / 1e9:.0f} GB a GPU"
            f"{'' if lora else ' (--lora needs less)'}"
        )
    if json_file is not None:
        rows = [
            {
                "overrides": one.overrides(),
                "gb": round((one.estimate.total + RESERVE) / 1e9, 2),
                "weights_gb": round(one.estimate.weights / 1e9, 2),
                "gradients_gb": round(one.estimate.gradients / 1e9, 2),
                "optimizer_gb": round(one.estimate.optimizer / 1e9, 2),
                "activations_gb": round(one.estimate.peak / 1e9, 2),
                "cost": round(one.cost, 3),
            }
            for one in found
        ]
        wrote_json(json_file, {"model": model, "gpus": gpus, "proposals": rows})
        return
    shown = Table(title=f"{model} on {gpus} × {gpu_memory:g} GB, GB of a GPU")
    for heading in ("all", "weights", "gradients", "optimizer", "at the peak", "cost", "overrides"):
        shown.add_column(heading, justify="left" if heading == "overrides" else "right")
    for one in found:
        of = one.estimate
        figures = (of.total + RESERVE, of.weights, of.gradients, of.optimizer, of.peak)
        shown.add_row(*(f"{size / 1e9:.1f}" for size in figures), f"{one.cost:.2f}", shlex.join(one.overrides()))
    # Wider than other tables: overrides are there to be copied.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(shown)


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
