"""A drafter (transformers `Gemma4AssistantForCausalLM`) beside its target: one step of a draft, and its head.

It lies on the target's last pipeline stage, split by tensor parallelism as the target is, and reads the keys and values
of two of the target's layers there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from bridge.errors import GeometryError
from bridge.geometry import LayerKind
from bridge.megatron.attention import KeyValue
from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.embedding import require_rows
from bridge.megatron.kv_cache import CachedStep
from bridge.megatron.linear import ReplicatedLinear
from bridge.megatron.model import Gemma4Model
from bridge.megatron.norm import init_device
from bridge.megatron.rope import Rotary
from bridge.megatron.visibility import Visibility


class MaskedEmbedding(torch.nn.Module):
    """Clusters of the vocabulary: which tokens' logits the head computes. Every tensor-parallel rank holds all of it.

    No gradient reaches the centroids through the choice of clusters.
    """

    token_ordering: Tensor

    def __init__(self, config: Gemma4TransformerConfig, num_centroids: int, topk: int) -> None:
        super().__init__()
        self.topk = topk
        self.centroids = ReplicatedLinear(config, config.hidden_size, num_centroids)
        vocab_size = config.geometry.vocab_size
        self.register_buffer("token_ordering", torch.arange(vocab_size, device=init_device(config)))

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, h] -> the tokens whose logits count, int64 [n, topk clusters x tokens of one]."""
        clusters = self.token_ordering.view(self.centroids.out_features, -1)
        return clusters[self.centroids(hidden).topk(self.topk, dim=-1).indices].flatten(1)


class Gemma4Drafter(Gemma4Model):
    """All layers of a drafter on one rank's stage; its geometry is `bound` to a target's.

    Under pipeline parallelism its groups are those of `drafter_groups`.
    """

    def __init__(
        self,
        config: Gemma4TransformerConfig,
        layers: range,
        pre_process: bool,
        post_process: bool,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config, layers, pre_process, post_process, pg_collection, vp_stage)
        geometry = config.geometry
        drafter = geometry.drafter
        assert drafter is not None
        if any(layer.kv_source < 0 for layer in geometry.layers):
            raise GeometryError("a drafter is built for a target: bridge.geometry.bound() says which layers it reads")
        self.pre_projection = ReplicatedLinear(config, 2 * drafter.backbone_hidden_size, geometry.hidden_size)
        self.post_projection = ReplicatedLinear(config, geometry.hidden_size, drafter.backbone_hidden_size)
        self.masked_embedding: MaskedEmbedding | None = None
        if drafter.num_centroids is not None:
            self.masked_embedding = MaskedEmbedding(config, drafter.num_centroids, drafter.topk)

    def forward(  # type: ignore[override]
        self,
        embeddings: Tensor,
        states: Tensor,
        *,
        rotary: dict[LayerKind, Rotary],
        visibility: Visibility | CachedStep,
        kv: dict[int, KeyValue],
    ) -> tuple[Tensor, Tensor]:
        """One step: the target's scaled embeddings of the last tokens, and states, [s (/tp), b, H] each.

        States are the target's, behind its final norm, or what the step before returned. `rotary` and `visibility`
        are of the queries, `kv` of the target's layers, by their numbers. Returns the hidden states [s (/tp), b, h]
        of which `logits` are made, and the states [s (/tp), b, H] of the next step.
        """
        inputs = self.pre_projection(torch.cat([embeddings, states], dim=-1))
        hidden = self.decoder(inputs, input_ids=None, rotary=rotary, visibility=visibility, external_kv=kv)
        return hidden, self.post_projection(hidden)

    @property
    def head(self) -> Tensor:
        """This rank's rows of the head [V / tp, h]."""
        weight = self.output_layer.weight
        return self.shared_embedding_or_output_weight() if weight is None else weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, h], whole on every rank, -> [n, vocab] float32 on every rank; -inf for tokens of no chosen cluster."""
        group, vocab_size = self.pg_collection.tp, self.config.geometry.vocab_size
        if self.masked_embedding is None:
            return gather_from_tensor_model_parallel_region(hidden @ self.head.t(), group=group)[:, :vocab_size].float()
        tokens = self.masked_embedding(hidden)
        local = tokens - get_pg_rank(group) * len(self.head)
        here = (local >= 0) & (local < len(self.head))
        rows = self.head[torch.where(here, local, 0)]
        chosen = torch.where(here, (rows @ hidden[:, :, None])[..., 0], 0.0)
        chosen = reduce_from_tensor_model_parallel_region(chosen, group=group).float()
        return chosen.new_full((len(hidden), vocab_size), -torch.inf).scatter(1, tokens, chosen)


def drafter_groups(groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """The groups of a model that one pipeline stage holds all of. Collective."""
    if groups.pp.size() == 1:
        return groups
    single_rank, _ = dist.new_subgroups(group_size=1)
    found = ProcessGroupCollection()
    for name in vars(groups):
        setattr(found, name, getattr(groups, name))
    for name in ("pp", "embd", "pos_embd"):
        setattr(found, name, single_rank)
    found.mp = groups.tp
    return found


class TargetEmbedding:
    """The scaled embeddings that a drafter is given, on the last stage of its target: a tied head is the table."""

    def __init__(self, chunks: Sequence[Gemma4Model]) -> None:
        """`chunks`: of the last stage. Raises GeometryError where it has no copy of the embeddings."""
        model = chunks[-1]
        self._config, self._geometry = model.config, model.config.geometry
        self._group = model.pg_collection.tp
        if chunks[0].pre_process:
            self._weight = chunks[0].embedding.word_embeddings.weight
        elif self._geometry.tied:
            self._weight = model.shared_embedding_or_output_weight()
        else:
            raise GeometryError("a drafter of an untied model with pp > 1: the last stage holds no embeddings")

    def __call__(self, ids: Tensor) -> Tensor:
        """[b, s] -> [s, b, H], whole on every tensor-parallel rank, without a gradient. A placeholder is padding."""
        geometry, weight = self._geometry, self._weight.detach()
        for placeholder in geometry.placeholder_ids:
            ids = ids.masked_fill(ids == placeholder, geometry.pad_token_id or 0)
        require_rows(ids, geometry.vocab_size, "embed_tokens")
        local = ids.t() - get_pg_rank(self._group) * len(weight)
        here = (local >= 0) & (local < len(weight))
        rows = torch.where(here[..., None], weight[torch.where(here, local, 0)], 0.0)
        if get_pg_size(self._group) > 1:
            dist.all_reduce(rows, group=self._group)
        # As `scale_embeddings`: the factor is rounded to the dtype of the rows.
        return rows * torch.tensor(geometry.hidden_size**0.5, dtype=torch.float32).to(rows.dtype).item()
