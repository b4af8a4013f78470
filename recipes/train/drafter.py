"""A run that trains a drafter: its frozen target, what that leaves for it, and the losses of its drafts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from bridge import Gemma4Bridge
from bridge.convert.manifest import is_megatron_folder
from bridge.errors import GeometryError, UsageError
from bridge.geometry import bound
from bridge.mapping import table_for
from bridge.megatron.draft_loss import DraftLoss, draft_loss
from bridge.megatron.drafter import Gemma4Drafter, TargetEmbedding
from bridge.megatron.drafting import TargetPass, run_target
from bridge.megatron.layout import check_layout, drafter_layout
from bridge.megatron.model import Gemma4Model
from bridge.megatron.provider import Gemma4Provider
from bridge.megatron.visibility import Visibility
from recipes.config import Recipe


@dataclass(frozen=True)
class Target:
    """The frozen model of a run whose drafter is trained. `drafter`: folder, geometry and table of that."""

    model: Gemma4Model
    embed: TargetEmbedding
    loss: DraftLoss
    drafter: Gemma4Bridge

    def losses(
        self,
        drafter: torch.nn.Module,
        batch: Mapping[str, Tensor],
        packed: PackedSeqParams | None,
        visibility: Visibility,
        **media: Any,
    ) -> Tensor:
        """Of a microbatch, float32 [b, s / cp]: see `draft_loss`."""
        passed = run_target(
            self.model,
            batch["input_ids"],
            batch.get("position_ids"),
            batch.get("attention_mask"),
            packed,
            batch.get("mm_token_type_ids"),
            visibility=visibility,
            **media,
        )
        assert isinstance(passed, TargetPass)
        return draft_loss(drafter, self.embed, self.model, passed, batch["labels"], self.loss)


def with_drafter(
    recipe: Recipe,
    bridge: Gemma4Bridge,
    provider: Gemma4Provider,
    models: list[Gemma4Model],
    groups: ProcessGroupCollection,
    load: bool,
) -> tuple[Target, Gemma4Provider, list[Gemma4Model]]:
    """The target, and what builds its drafter, and that. `load`: its weights too. Raises a BridgeError."""
    said = recipe.drafter
    assert said.path is not None
    found = open_drafter(said.path, bridge)
    layout = drafter_layout(provider.parallel)
    check_layout(found.geometry, layout)
    overrides = {
        key: value for key, value in provider.overrides.items() if key in ("perform_initialization", "kernels")
    }
    own = found.provider(layout, provider.dtype, overrides=overrides)
    (drafter,) = own.build(groups)
    assert isinstance(drafter, Gemma4Drafter)
    if load:
        found.load_hf_weights([drafter])
    (model,) = models
    model.requires_grad_(False)
    model.eval()
    asked = DraftLoss(said.steps, said.cross_entropy, said.kl, said.centroids)
    if drafter.masked_embedding is not None and not said.centroids:
        drafter.masked_embedding.requires_grad_(False)
    return Target(model, TargetEmbedding(models), asked, found), own, [drafter]


def open_drafter(path: str, target: Gemma4Bridge) -> Gemma4Bridge:
    """The drafter of a recipe, bound to its target. Raises a BridgeError."""
    opened = Gemma4Bridge.from_megatron(path) if is_megatron_folder(path) else Gemma4Bridge.from_hf(path)
    if opened.geometry.drafter is None:
        raise UsageError(f"drafter.path={path}: is no drafter ({opened.geometry.architecture})")
    try:
        geometry = bound(opened.geometry, target.geometry)
    except GeometryError as error:
        raise GeometryError(f"drafter.path={path}: {error}") from None
    return replace(opened, geometry=geometry, table=table_for(geometry))
