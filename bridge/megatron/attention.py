"""Self-attention of Gemma 4 on Megatron-Core's parallel linears (transformers `Gemma4TextAttention`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import get_pg_rank
from torch import Tensor

from bridge.geometry import LayerGeometry
from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.kernels import fused
from bridge.megatron.kv_cache import CachedStep
from bridge.megatron.norm import rms_norm
from bridge.megatron.qkv_norm_rope import QkvNormRope
from bridge.megatron.rope import Rotary, rotate
from bridge.megatron.visibility import Visibility


class KeyValue(NamedTuple):
    """Normed, rotated keys and normed values [s, b, groups of this rank, head_dim]: what other layers may read."""

    key: Tensor
    value: Tensor


def qkv_rows(layer: LayerGeometry) -> int:
    """Rows of the fused projection: only those that exist. No V where it is K, neither where both are shared."""
    if layer.shares_kv:
        return layer.q_size
    return layer.q_size + layer.kv_size * (1 if layer.k_eq_v else 2)


def local_query_groups(layer: LayerGeometry, tp_size: int) -> int:
    """Query groups whose K/V one rank holds; with more ranks than groups each has one, several ranks the same."""
    return max(1, layer.num_query_groups // tp_size)


def norm_and_rotate(
    mixed_qkv: Tensor,
    query_rows: range,
    kv_rows: int,
    query_weight: Tensor,
    key_weight: Tensor | None,
    rotary: Rotary,
    eps: float,
    kernels: str,
) -> tuple[Tensor, ...]:
    """`mixed_qkv` [s, b, groups, rows, d] -> query [s, b, groups * len(query_rows), d], key, value [s, b, groups, d].

    The last `kv_rows` rows of a group are no queries: k and v (2), k from which v is made too (1), none (0; then
    there is no key and value). Of its queries those in `query_rows` are wanted. q and k are normed with a weight [d]
    and rotated, v is normed without one.
    """
    if fused(kernels, mixed_qkv):
        from bridge.megatron.kernels.qkv_norm_rope import qkv_norm_rope

        return qkv_norm_rope(mixed_qkv, query_rows, kv_rows, query_weight, key_weight, *rotary, eps)
    if not torch.is_inference_mode_enabled():
        tables = rotary.cos, rotary.signed_sin
        made: tuple[Tensor, ...] = QkvNormRope.apply(
            mixed_qkv, query_weight, key_weight, *tables, query_rows, kv_rows, eps
        )
        return made
    query, *rest = mixed_qkv.split([mixed_qkv.shape[3] - kv_rows, *[1] * kv_rows], dim=3)
    # Groups are joined after the norm, which keeps its input: before, that would be a copy.
    query = rms_norm(query[:, :, :, query_rows.start : query_rows.stop], query_weight, eps, kernels=kernels)
    query = rotate(query.flatten(2, 3), rotary)
    if not kv_rows:
        return (query,)
    # Where there is no v_proj, V is the raw key projection.
    key, value = rest[0].squeeze(3), rest[-1].squeeze(3)
    key = rotate(rms_norm(key, key_weight, eps, kernels=kernels), rotary)
    return query, key, rms_norm(value, None, eps, kernels=kernels)


class Gemma4Attention(SelfAttention):
    """Projection, q/k/v norms, rotation, core attention, output projection.

    The fused projection is [q ... q k v] per query group. With more tensor-parallel ranks than groups its rows are
    split evenly all the same, the output is gathered, and each rank takes its group: the checkpoint stays a plain
    axis-0 split.
    """

    def __init__(
        self,
        config: Gemma4TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        **kwargs: object,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type=AttnMaskType.causal, **kwargs)
        self.layer = config.geometry.layers[layer_number - 1]

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Rotary,
        visibility: Visibility | CachedStep,
        shared_kv: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """[s (/tp), b, h] -> the same, and the keys and values used. `shared_kv` is what a KV-shared layer reads."""
        mixed_qkv, query_rows = self._project(hidden_states)
        weights = self.q_layernorm(), self.k_layernorm() if self._kv_rows else None
        query, *made = norm_and_rotate(
            mixed_qkv, query_rows, self._kv_rows, *weights, rotary, self.config.layernorm_epsilon, self.config.kernels
        )
        if made:
            kv = KeyValue(*made)
        else:
            assert shared_kv is not None
            kv = shared_kv

        def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.core_attention(query, key, value, visibility)

        if self.checkpoint_core_attention and self.training:
            context = tensor_parallel.checkpoint(core, False, query, kv.key, kv.value)
        else:
            context = core(query, kv.key, kv.value)
        output, _ = self.linear_proj(context)
        return output, kv

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, range]:
        """[s, b, local groups, rows of a group, d], and which of a group's query rows are this rank's."""
        layer, tp_size = self.layer, self.world_size
        mixed_qkv, _ = self.linear_qkv(hidden_states)
        if layer.shares_kv:
            mixed_qkv = mixed_qkv.unflatten(-1, (1, -1, layer.head_dim))
            return mixed_qkv, range(mixed_qkv.shape[3])
        heads_per_group = layer.num_attention_heads // layer.num_query_groups
        ranks_per_group = max(1, tp_size // layer.num_query_groups)
        if ranks_per_group > 1:
            mixed_qkv = all_gather_last_dim_from_tensor_parallel_region(mixed_qkv, group=self.pg_collection.tp)
            group = get_pg_rank(self.pg_collection.tp) // ranks_per_group
            mixed_qkv = mixed_qkv.chunk(layer.num_query_groups, dim=-1)[group]
        query_rows = heads_per_group // ranks_per_group
        first = get_pg_rank(self.pg_collection.tp) % ranks_per_group * query_rows
        return mixed_qkv.unflatten(-1, (-1, heads_per_group + self._kv_rows, layer.head_dim)), range(
            first, first + query_rows
        )

    @property
    def _kv_rows(self) -> int:
        """Rows of a group that are no queries."""
        return 0 if self.layer.shares_kv else 1 if self.layer.k_eq_v else 2
