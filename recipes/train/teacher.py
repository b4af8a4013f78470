"""The teacher of a run: a frozen model in the same processes, and what it says of microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bridge import Gemma4Bridge
from bridge.convert.manifest import is_megatron_folder
from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.megatron.context_parallel import take
from bridge.megatron.distillation import (
    DistillationContext,
    Teacher,
    TopK,
    distillation_loss,
    top_k,
    whole_teacher,
)
from bridge.megatron.drafting import final_states
from bridge.megatron.loss import positions_with_labels
from bridge.token_ids import IGNORE
from recipes.config import Recipe
from recipes.losses.distill import DistillLoss
from recipes.train.passes import Batch, Passed, Prepared, prepare, through
from recipes.train.setup import DTYPES, BuiltModel, open_model


def open_teacher(recipe: Recipe) -> Gemma4Bridge:
    """Geometry and tables of a recipe's teacher. Raises a BridgeError where it cannot teach the recipe's model."""
    path, student = recipe.distill.teacher, open_model(recipe).geometry
    assert path is not None
    bridge = Gemma4Bridge.from_megatron(path) if is_megatron_folder(path) else Gemma4Bridge.from_hf(path)
    found = bridge.geometry
    key = f"distill.teacher={path}"
    if found.drafter is not None:
        raise UsageError(f"{key}: is a drafter")
    if found.vocab_size != student.vocab_size:
        raise UsageError(f"{key}: has {found.vocab_size} tokens, the model {student.vocab_size}; they must be the same")
    if not recipe.distill.top_k < found.vocab_size:
        raise UsageError(
            f"distill.top_k={recipe.distill.top_k}: the teacher has {found.vocab_size} tokens; 0 is all of them"
        )
    return bridge


def check_media(teacher: Geometry, student: Geometry, key: str) -> None:
    """Raise UsageError where a teacher cannot take the media tensors that are made for a student."""

    def of(geometry: Geometry) -> tuple[Any, ...]:
        vision = geometry.vision
        kind = None if vision is None else (type(vision).__name__, vision.patch_size, vision.kernel)
        return kind, geometry.placeholders

    if of(teacher) != of(student):
        raise UsageError(
            f"{key}: sees pictures otherwise than the model ({of(teacher)[0]}, {of(student)[0]}), and the data has some"
        )


def build_teacher(run: BuiltModel, bridge: Gemma4Bridge) -> BuiltModel:
    """The teacher with its weights, frozen, in the layout of the run; without experts in the dense part of it."""
    recipe, parallel = run.recipe, run.provider.parallel
    if bridge.geometry.moe is None:
        parallel = replace(parallel, ep=1, etp=1)
    model = recipe.model
    overrides: dict[str, Any] = {"perform_initialization": False, "kernels": model.kernels}
    overrides["vision_mask"] = model.vision_mask
    if bridge.geometry.moe is not None:
        overrides["moe_token_dispatcher_type"] = recipe.parallel.dispatcher
    provider = bridge.provider(
        parallel,
        DTYPES[model.dtype],
        overrides=overrides,
        attention_backends=dict(model.attention_backends),
        layer_spec=model.layer_spec,
    )
    models = provider.build(run.groups)
    bridge.load_hf_weights(models)
    for each in models:
        each.requires_grad_(False)
    return BuiltModel(recipe, run.groups, provider, models, models)


def taught(
    run: BuiltModel, objective: DistillLoss, batches: Sequence[Batch], microbatches: Sequence[Prepared]
) -> list[Prepared]:
    """Microbatches, with the teacher's distributions, whose losses are `objective`'s. Collective."""
    if run.teacher is not None:
        said = says(run.teacher, batches, objective)
    else:
        said = [_known(run, each) for each in microbatches]
    if not said:
        return list(microbatches)  # a stage that makes no losses
    return [
        each._replace(output=(distillation_loss, DistillationContext(of, objective.asked, each.label_positions)))
        for each, of in zip(microbatches, said, strict=True)
    ]


def says(teacher: BuiltModel, batches: Sequence[Batch], objective: DistillLoss) -> list[Teacher]:
    """What it says of every microbatch; on ranks of the last stage, nothing elsewhere. Collective."""
    held = [_prepared(teacher, batch) for batch in batches]
    total = partial(_said, teacher=teacher, count=objective.top_k, temperature=objective.asked.temperature)
    return [report["said"] for report in through(teacher, held, total, train=False)]


def _prepared(teacher: BuiltModel, batch: Batch) -> Prepared:
    if "input_features" in batch and teacher.config.geometry.audio is None:
        raise UsageError(f"distill.teacher={teacher.recipe.distill.teacher}: hears nothing, and the data has sounds")
    return prepare(batch, teacher, teacher.recipe.train.seq_length)._replace(output=(final_states, None))


def _said(
    states: Tensor, passed: Passed, teacher: BuiltModel, count: int, temperature: float
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    labels = take(passed.batch["labels"], teacher.groups.cp)
    said: Teacher = whole_teacher(states, teacher.models[-1])
    if count:
        assert not isinstance(said, TopK)
        said = top_k(said, positions_with_labels(labels), count, temperature)
    return states.sum(), torch.ones_like(labels[0, 0]), {"said": said}


def label_places(labels: Tensor, run: BuiltModel, positions: Tensor) -> Tensor:
    """Which of a microbatch's labels [b, s], counted row by row, those at `positions` of this rank's part are: [n]."""
    numbers = (labels != IGNORE).flatten().cumsum(0).view(labels.shape) - 1
    return take(numbers, run.groups.cp).t().flatten()[positions]


def _known(run: BuiltModel, microbatch: Prepared) -> TopK:
    """What the data brings."""
    batch = microbatch.batch
    places = label_places(batch["labels"], run, microbatch.label_positions)
    return TopK(batch["teacher_ids"][places].long(), batch["teacher_logps"][places])
