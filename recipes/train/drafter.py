"""A run that trains a drafter in its model: on the last pipeline stage, as a part of that stage's chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor

from bridge import Gemma4Bridge
from bridge.convert.manifest import is_megatron_folder
from bridge.errors import GeometryError, UsageError
from bridge.generate.speculative import Speculator
from bridge.geometry import bound
from bridge.mapping import table_for
from bridge.megatron.draft_loss import DraftLoss, draft_loss
from bridge.megatron.drafter import Gemma4Drafter, TargetEmbedding, drafter_groups
from bridge.megatron.drafting import run_target
from bridge.megatron.layout import check_layout, drafter_layout
from bridge.megatron.loss import LossContext
from bridge.megatron.model import Gemma4Model
from bridge.megatron.provider import Gemma4Provider
from bridge.megatron.visibility import Visibility
from bridge.together import together
from recipes.config import Recipe
from recipes.training_config import DrafterConfig


@dataclass(frozen=True)
class Drafting:
    """How a run trains the drafter of its model. `bridge`: folder, geometry and table of that.

    `drafter` and `embed` are there on the ranks of the last stage. `frozen`: the model is, and only drafts have losses;
    else it has its own beside them, which `detach` keeps apart from those of drafts.
    """

    bridge: Gemma4Bridge
    drafter: Gemma4Drafter | None
    embed: TargetEmbedding | None
    loss: DraftLoss
    frozen: bool
    detach: bool

    @property
    def held(self) -> list[Gemma4Model]:
        """The drafter, where it is."""
        return [] if self.drafter is None else [self.drafter]

    def losses(
        self,
        chunk: torch.nn.Module,
        batch: Mapping[str, Tensor],
        packed: PackedSeqParams | None,
        visibility: Visibility,
        model_losses: LossContext,
        **given: Any,
    ) -> Tensor:
        """Of a microbatch: a payload, on the last stage float32 [b, s / cp] of drafts, see `draft_loss`; where the
        model is trained [2, b, s / cp], its own and those. `model_losses`: how its own are made."""
        if not self.frozen:
            given |= {"labels": batch["labels"], "loss": model_losses}
        passed = run_target(
            chunk,
            batch["input_ids"],
            batch.get("position_ids"),
            batch.get("attention_mask"),
            packed,
            batch.get("mm_token_type_ids"),
            visibility=visibility,
            **given,
        )
        if isinstance(passed, Tensor):
            return passed
        assert self.drafter is not None and self.embed is not None
        (model,) = unwrap_model([chunk])
        seen = passed.detached() if self.detach else passed
        drafts = draft_loss(self.drafter, self.embed, model, seen, batch["labels"], self.loss)
        return drafts if passed.losses is None else torch.stack([passed.losses, drafts])

    def speculator(self, models: list[Gemma4Model], groups: ProcessGroupCollection) -> Speculator:
        """What proposes tokens while the model answers. Raises ParallelError where its last stage cannot."""
        return Speculator(self.drafter, models, groups, self.loss.steps)


def with_drafter(
    recipe: Recipe,
    bridge: Gemma4Bridge,
    provider: Gemma4Provider,
    models: list[Gemma4Model],
    groups: ProcessGroupCollection,
    load: bool,
) -> Drafting:
    """Give the model its drafter, in its last chunk, under the name `drafter`. `load`: its weights too. Collective.

    Raises a BridgeError, on every rank.
    """
    said = recipe.drafter
    assert said.path is not None
    found = open_drafter(said.path, bridge)
    layout = drafter_layout(provider.parallel)
    check_layout(found.geometry, layout)
    frozen = said.target == "frozen"
    if frozen:
        for model in models:
            model.requires_grad_(False)
    overrides = {
        key: value for key, value in provider.overrides.items() if key in ("perform_initialization", "kernels")
    }
    drafter_provider, single_rank = found.provider(layout, provider.dtype, overrides=overrides), drafter_groups(groups)
    drafter, embed, last = None, None, models[-1]
    with together():
        if last.post_process:
            drafter, embed = _built(drafter_provider, single_rank, said), TargetEmbedding(models)
            if load:
                found.load_hf_weights([drafter])
    asked = DraftLoss(said.steps, said.cross_entropy, said.kl, said.centroids)
    drafting = Drafting(found, drafter, embed, asked, frozen, said.detach)
    if recipe.train.samples is not None or recipe.eval.metrics:
        with together():
            # Said before the first step, and not at the first evaluation.
            drafting.speculator(models, groups)
    if drafter is not None:
        last.drafter = drafter
    return drafting


def _built(provider: Gemma4Provider, single_rank: ProcessGroupCollection, said: DrafterConfig) -> Gemma4Drafter:
    (drafter,) = provider.build(single_rank)
    assert isinstance(drafter, Gemma4Drafter)
    if drafter.masked_embedding is not None and not said.centroids:
        drafter.masked_embedding.requires_grad_(False)
    return drafter


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
