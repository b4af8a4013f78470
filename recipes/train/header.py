"""What a run is about to do, said before its first step: on the terminal, and for programs in `run.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bridge.megatron.fake_quant_schemes import fake_quantized
from recipes.memory.estimate import RESERVE, TrainingPlan, estimate
from recipes.memory.recipe import plan_of, teacher_bytes
from recipes.train.log import LOG_FILE
from recipes.train.setup import Run

RUN_FILE = "run.json"
# Of `model.fake_quant`, the preset of `export --quantize` that rounds so.
QUANTIZE = {"int4-g32": "w4a16", "fp8": "fp8-dynamic"}


def header(run: Run, data: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The facts of a run that goes on behind `step`. `data`: what `recipes.data.report` says."""
    recipe, world = run.recipe, dist.get_world_size()
    train, layout = recipe.train, run.provider.parallel
    plan = plan_of(recipe, world, run.bridge.table)
    rows = data.get("rows")
    return {
        "data": dict(data),
        "step": step,
        "steps": train.steps,
        "epochs": train.steps * train.global_batch_size / rows if rows else None,
        "global_batch_size": train.global_batch_size,
        "seq_length": train.seq_length,
        "trained_parameters": _trained(run, plan),
        "fake_quant": _fake_quant(run),
        "ranks": world,
        "dp": layout.dp(world),
        "parallel": asdict(layout),
        "estimated_memory_gb": round((estimate(run.bridge.table, plan).total + teacher_bytes(recipe)) / 1e9, 2),
        "log": str(Path(recipe.output) / LOG_FILE),
    }


def write(said: Mapping[str, Any], output: Path) -> None:
    """Into the folder of the run."""
    (output / RUN_FILE).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def lines(said: Mapping[str, Any]) -> Iterator[str]:
    """What it says beside the data, for people."""
    behind = f" (behind step {said['step']})" if said["step"] else ""
    batch = f"{said['global_batch_size']} rows of up to {said['seq_length']} tokens"
    epochs = "" if said["epochs"] is None else f", {said['epochs']:.3g} epochs of {said['data']['rows']} rows"
    yield f"{said['steps']} steps{behind} of {batch}{epochs}"
    sizes = [f"{name}={size}" for name, size in said["parallel"].items() if size not in (1, False)]
    layout = " ".join([f"{said['ranks']} rank(s)", f"dp={said['dp']}", *sizes])
    yield (
        f"{said['trained_parameters']:,} trained parameters on {layout}; about {said['estimated_memory_gb']:.2f} GB "
        f"each, estimated, and {RESERVE / 1e9:.1f} GB for CUDA and NCCL on a GPU"
    )
    if said["fake_quant"] is not None:
        yield from _rounding(said["fake_quant"])
    yield f"log: {said['log']}"


def _fake_quant(run: Run) -> dict[str, Any] | None:
    """What `model.fake_quant` rounds, and the keys of linears that its blocks do not divide."""
    scheme = run.recipe.model.fake_quant
    if scheme == "none":
        return None
    linears = [entry.key for entry in run.bridge.table.entries.values() if entry.is_layer_linear]
    rounded = {key for key, _, _ in fake_quantized(run.bridge.geometry, scheme)}
    left = [key for key in linears if key not in rounded]
    return {"scheme": scheme, "weights": len(rounded), "left": left, "adapters": run.lora is not None}


def _rounding(said: Mapping[str, Any]) -> Iterator[str]:
    scheme, count, left = said["scheme"], said["weights"], said["left"]
    export = QUANTIZE.get(scheme)
    later = "to be quantized so once exported" if export is None else f"for export --quantize {export}"
    if said["adapters"]:
        yield (
            f"model.fake_quant={scheme}: of {count} linears' weights the frozen ones are rounded, once; adapters are "
            f"for the base quantized so, and export.hf merges them into the base as it is"
        )
    else:
        yield (
            f"model.fake_quant={scheme}: {count} linears' weights are rounded in each forward pass, of evaluations "
            f"too; checkpoints and export.hf have them as they are, {later}"
        )
    if left:
        yield (
            f"model.fake_quant={scheme}: {len(left)} linears' weights are not rounded, since blocks do not divide "
            f"their columns: {left[0]}{', ...' if len(left) > 1 else ''}"
        )


def _trained(run: Run, plan: TrainingPlan) -> int:
    """How many elements are trained, over all ranks."""
    entries = [entry for entry in run.table.entries.values() if entry.row.trainable]
    if run.lora is None and not run.drafts_alone:
        entries = [entry for entry in entries if plan.trains(entry)]
    if run.drafting is not None and not run.drafting.frozen:
        entries += [entry for entry in run.drafting.bridge.table.entries.values() if entry.row.trainable]
    return sum(math.prod(entry.shape) for entry in entries)
