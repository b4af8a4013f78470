"""The memory estimate of a recipe: which model, which layout, and a few lines that say whether it fits."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from bridge.convert.manifest import MegatronFolder
from bridge.errors import UsageError
from bridge.generate.memory import MAX_ROWS
from bridge.geometry import Geometry
from bridge.mapping import Table, table_for
from bridge.mapping.table import Entry
from bridge.megatron.fake_quant_schemes import check_fake_quant
from bridge.megatron.layer_options import check_fp8_experts
from bridge.megatron.layout import check_layout
from bridge.toy.config import VARIANTS, published
from recipes.check import check_recipe
from recipes.config import Recipe
from recipes.groups import FREEZABLE, compiled
from recipes.losses.names import ANSWERS, loss_names
from recipes.memory.activations import Load
from recipes.memory.estimate import RESERVE, Estimate, TrainingPlan, advice, estimate
from recipes.memory.parameters import count, everything, nothing

_PUBLISHED = re.compile(r"(?:google/)?gemma-4-(.+?)(?:-it)?", re.IGNORECASE)


def geometry_of(model: str) -> Geometry:
    """Of a variant's name, a published hub id, or a folder, Hugging Face or Megatron. Reads no weights, no network.

    Raises UsageError for anything else.
    """
    match = _PUBLISHED.fullmatch(model)
    variant = (match[1] if match else model).lower()
    if variant in VARIANTS:
        return Geometry.from_dict(published(variant))
    folder = Path(model)
    if (folder / "config.json").is_file():
        return Geometry.from_folder(folder)
    if folder.is_dir():
        return MegatronFolder.open(folder).geometry
    raise UsageError(f"{model}: neither a folder here nor a published model ({', '.join(VARIANTS)})")


def plan_of(recipe: Recipe, world_size: int, table: Table) -> TrainingPlan:
    """What the recipe asks of `world_size` ranks, for the model of `table`. Raises a BridgeError."""
    microbatches = check_recipe(recipe, world_size)
    parallel, optimizer = recipe.parallel, recipe.optimizer
    if recipe.model.fp8_experts:
        check_fp8_experts(table.geometry, parallel.layout(), recipe.model.dtype)
    model = recipe.model
    check_fake_quant(table.geometry, parallel.layout(), model.fake_quant, model.layer_spec, model.fp8_experts)
    e = 2 if recipe.model.dtype == "bfloat16" else 4
    # A float32 model is its own float32 copy.
    moments = 12 if e == 2 else 8
    if optimizer.precision_aware:
        moments = 2 + (4 if optimizer.moments_dtype == "bfloat16" else 8)
    length = recipe.train.seq_length
    adapters, rank, whole = _adapted(recipe, table)
    names = loss_names(recipe.preference)
    # Unpacked, each answer of a pair is a row.
    rows = 2 if names and names[0] not in ANSWERS and not recipe.data.packing else 1
    load = Load(
        rows * recipe.train.micro_batch_size,
        length,
        e,
        parallel.recompute,
        tuple(parallel.recompute_modules),
        fp8=recipe.model.fp8 != "none",
        fp8_experts=model.fp8_experts,
        fake_quant=model.fake_quant != "none" and not rank,
    )
    return TrainingPlan(
        parallel.layout(),
        world_size,
        load,
        microbatches,
        optimizer_bytes=moments,
        lora_rank=rank,
        adapters=adapters,
        whole=whole,
        trained=nothing if recipe.drafter.path and recipe.drafter.target == "frozen" else _trained(recipe.model.freeze),
        answers=_answers(recipe),
    )


def teacher_bytes(recipe: Recipe) -> int:
    """The frozen weights of a recipe's teacher, on the rank that holds the most; 0 without one. Raises a BridgeError.

    Its activations, a forward pass's without gradients, are not counted: those of the student's are larger.
    """
    if recipe.distill.teacher is None:
        return 0
    table, layout = table_for(geometry_of(recipe.distill.teacher)), recipe.parallel.layout()
    if table.geometry.moe is None:
        layout = replace(layout, ep=1, etp=1)
    check_layout(table.geometry, layout)
    counts = [count(table, layout, rank, nothing) for rank in range(layout.pp)]
    return (2 if recipe.model.dtype == "bfloat16" else 4) * max(each.parameters + each.buffers for each in counts)


def _answers(recipe: Recipe) -> tuple[int, int]:
    """Rows that are answered at once, at evaluations or to be trained on, and their tokens at most, prompt and answer;
    (0, 0): none."""
    longest = max(
        recipe.train.sample_tokens if recipe.train.samples else 0,
        recipe.eval.metric_tokens if recipe.eval.metrics else 0,
    )
    evaluated = (MAX_ROWS, recipe.train.seq_length + longest) if longest else (0, 0)
    sampled = (recipe.grpo.max_rows, recipe.train.seq_length) if recipe.grpo.rewards else (0, 0)
    on_policy = (recipe.distill.max_rows, recipe.train.seq_length) if recipe.distill.lmbda else (0, 0)
    return max(evaluated, sampled, on_policy, key=math.prod)


def _adapted(recipe: Recipe, table: Table) -> tuple[Table | None, int, frozenset[str]]:
    """The table of the recipe's adapters, their rank (0: there are none), and the keys of what is trained whole."""
    if not recipe.lora.rank and recipe.lora.adapter is None:
        return None, 0, frozenset()
    # Torch is needed for that, and by none of the rest.
    from bridge.lora.table import adapter_table
    from bridge.lora.targets import resolve
    from recipes.train.lora import spec_of

    spec = spec_of(recipe.lora)
    if spec is None:
        return None, 0, frozenset()
    adapters = adapter_table(table, resolve(spec, table))
    return adapters.factors(), spec.rank, frozenset(key for key in adapters.entries if key in table.entries)


def _trained(freeze: list[str]) -> Callable[[Entry], bool]:
    """What is left to train: all but what `model.freeze` names."""
    if not freeze:
        return everything
    patterns = compiled("model.freeze", freeze, FREEZABLE)
    return lambda entry: not any(pattern.search(entry.key) for pattern in patterns)


def report(recipe: Recipe, world_size: int, gpu_memory: float | None) -> tuple[list[str], bool]:
    """Lines for people, and whether it fits `gpu_memory` [GB] (True where that is not given)."""
    model = recipe.model.hf or recipe.model.megatron
    assert model is not None
    table = table_for(geometry_of(model))
    plan = plan_of(recipe, world_size, table)
    found = estimate(table, plan)
    lines, teacher = list(describe(found, plan)), teacher_bytes(recipe)
    if teacher:
        until = ", until it has been asked" if recipe.distill.cache else ""
        lines.append(f"  and the teacher's weights: {teacher / 1e9:.2f} GB{until}")
    if gpu_memory is None:
        return lines, True
    budget = round(gpu_memory * 1e9) - teacher
    need = found.total + RESERVE
    if need <= budget:
        return [*lines, f"fits into {gpu_memory:g} GB, {(budget - need) / 1e9:.1f} GB to spare"], True
    lines.append(f"does not fit into {gpu_memory:g} GB: {(need - budget) / 1e9:.1f} GB too much")
    lines += [f"would fit: {change}" for change in advice(table, plan, budget)]
    from recipes.memory.search import search

    others = search(table, replace(plan, world_size=world_size), budget, plan.microbatches * _dp_rows(plan))
    if others:
        lines.append(f"would fit: {shlex.join(others[0].overrides(recipe.parallel))}")
    return lines, False


def _dp_rows(plan: TrainingPlan) -> int:
    """Sequences that go through at once, over all replicas."""
    return plan.load.rows * plan.parallel.dp(plan.world_size)


def describe(found: Estimate, plan: TrainingPlan) -> Iterator[str]:
    """An estimate, line by line; GB are 10⁹ bytes."""

    def gb(size: int) -> str:
        return f"{size / 1e9:.2f}"

    moment = max(found.peaks, key=lambda name: found.peaks[name])
    yield (
        f"memory of a GPU, estimated, of pipeline rank {found.pp_rank} ({plan.parallel}, "
        f"{plan.world_size} ranks): {gb(found.total)} GB, and about {gb(RESERVE)} GB for CUDA and NCCL"
    )
    yield (
        f"  weights {gb(found.weights)}, gradients {gb(found.gradients)}, optimizer {gb(found.optimizer)}; "
        f"{found.counts.parameters / 1e9:.3f} B parameters, {found.trained / 1e9:.3f} B trained"
    )
    by_kind = ", ".join(f"{kind} {gb(size)}" for kind, size in found.activations.most_common())
    yield f"  activations: {by_kind}"
    yield f"  worst moment: {moment}, {gb(found.peak)} with its activations"
