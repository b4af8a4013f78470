"""`gemma4-bridge plan`: parse, call, print."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bridge.cli_kit import JsonOption, wrote_json
from bridge.errors import BridgeError, UsageError

if TYPE_CHECKING:
    from recipes.memory.search import Proposal
    from recipes.simulate.plan import Question
    from recipes.simulate.run import Forecast


def register(app: typer.Typer) -> None:
    """Add the command of this module to the command line."""
    app.command(epilog="Example: `gemma4-bridge plan 26b-a4b --gpus 16 --gpu-memory 80 --seq-length 8192`")(plan)


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="e2b, e4b, 12b, 26b-a4b, 31b; a hub id or a folder; or a recipe.")
    ],
    gpus: Annotated[int, typer.Option(min=1, help="How many in all.")],
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, metavar="GB", help="Of each: 80 for an H100; by default the profile's.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(metavar="NAME", help="h100, h200, b200 or a YAML file; by default by --gpu-memory.")
    ] = None,
    seq_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a sequence [8192, or the recipe's].")] = None,
    global_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a step [64, or the recipe's].")
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences that go through at once [1, or the recipe's].")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters, not the model.")] = False,
    lora_rank: Annotated[int, typer.Option(min=1, help="With --lora.")] = 16,
    count: Annotated[int, typer.Option("-n", min=1, help="How many proposals.")] = 5,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Simulate a step of each, and order them by that; a minute or more.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --simulate: the best one's step as a picture, SVG.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Propose layouts that fit, best first, with what each needs of a GPU.

    Memory is estimated from the model's geometry, seconds of a step from its counts and a profile of the hardware;
    with --simulate both are counted on simulated ranks, and what is said of the best tells why it is. Nothing is run.
    """
    from recipes.simulate.hardware import load_hardware, nearest_hardware
    from recipes.simulate.plan import ask, proposals, recipe_of, simulated

    if hardware is None and gpu_memory is None:
        raise UsageError("give --hardware NAME (h100, h200, b200 or a YAML file) or --gpu-memory GB")
    if plot is not None and not simulate:
        raise UsageError("--plot shows a simulated step: add --simulate")
    profile = load_hardware(hardware) if hardware else nearest_hardware(round((gpu_memory or 0) * 1e9))
    sizes = {"seq_length": seq_length, "global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size}
    said: dict[str, Any] = {f"train.{key}": value for key, value in sizes.items()}
    if lora:
        said["lora.rank"] = lora_rank
    question = ask(recipe_of(model, said), gpus, profile, gpu_memory)
    found = proposals(question)[:count]
    title = f"{model} on {gpus} × {question.budget / 1e9:g} GB ({profile.name})"
    if simulate:
        _show_simulated(question, simulated(question, found), title, plot, json_file)
        return
    if not wrote_json(json_file, {"model": model, "gpus": gpus, "proposals": [_row(one) for one in found]}):
        _show(found, title)


def _row(one: Proposal) -> dict[str, Any]:
    from recipes.memory.estimate import RESERVE

    return {
        "overrides": one.overrides(),
        "gb": round((one.estimate.total + RESERVE) / 1e9, 2),
        "weights_gb": round(one.estimate.weights / 1e9, 2),
        "gradients_gb": round(one.estimate.gradients / 1e9, 2),
        "optimizer_gb": round(one.estimate.optimizer / 1e9, 2),
        "activations_gb": round(one.estimate.peak / 1e9, 2),
        "predicted_seconds": round(one.seconds, 3),
    }


def _show(found: Sequence[Proposal], title: str) -> None:
    from recipes.memory.estimate import RESERVE

    rows = []
    for one in found:
        of = one.estimate
        sizes = (of.total + RESERVE, of.weights, of.gradients, of.optimizer, of.peak)
        rows.append([*(f"{size / 1e9:.1f}" for size in sizes), f"{one.seconds:.2f}", shlex.join(one.overrides())])
    headings = ("all", "weights", "gradients", "optimizer", "at the peak", "s/step", "overrides")
    _print_table(f"{title}, GB of a GPU, predicted seconds of a step", headings, rows)


def _show_simulated(
    question: Question,
    found: Sequence[tuple[Proposal, Forecast]],
    title: str,
    plot: Path | None,
    json_file: str | None,
) -> None:
    from recipes.simulate.plan import as_json, explained
    from recipes.simulate.plot import plot as drawn

    if plot is not None:
        try:
            plot.write_text(drawn(found[0][1]), encoding="utf-8")
        except OSError as error:
            raise BridgeError(f"{plot}: cannot be written ({error.strerror})") from None
    proposals = [_row(one) | {"simulated": as_json(told, question.steps)} for one, told in found]
    if wrote_json(json_file, {"hardware": question.hardware.name, "gpus": question.gpus, "proposals": proposals}):
        return
    rows = [
        [
            f"{told.simulation.need / 1e9:.1f}{'' if told.simulation.need <= question.budget else ' too much'}",
            f"{told.seconds:.2f}",
            f"{told.tokens_per_s:,.0f}",
            f"{told.mfu:.1%}",
            f"{told.step.bubble:.1%}",
            shlex.join(one.overrides()),
        ]
        for one, told in found
    ]
    headings = ("GB", "s/step", "tokens/s", "MFU", "bubble", "overrides")
    _print_table(f"{title}, simulated, not run", headings, rows)
    for line in explained(question, found):
        print(line)


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    printed = Table(title=title)
    for heading in headings:
        printed.add_column(heading, justify="left" if heading == "overrides" else "right")
    for row in rows:
        printed.add_row(*row)
    # Wider than other tables: overrides are there to be copied.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(printed)
