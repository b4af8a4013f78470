"""Self-attention of Gemma 4 on Megatron-Core's parallel linears (transformers `Gemma4TextAttention`)."""

from __future__ import annotations

from typing import NamedTuple

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import get_pg_rank
from torch import Tensor

from bridge.geometry import LayerGeometry
from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.norm import rms_norm
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
        visibility: Visibility,
        shared_kv: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """[s (/tp), b, h] -> the same, and the keys and values used. `shared_kv` is what a KV-shared layer reads."""
        query, key, value = self._project(hidden_states)
        query = rotate(self.q_layernorm(query), rotary)
        if key is None:
            assert shared_kv is not None
            kv = shared_kv
        else:
            # Where there is no v_proj, V is the raw key projection, normed without a weight.
            value = rms_norm(key if value is None else value, None, self.config.layernorm_epsilon)
            kv = KeyValue(rotate(self.k_layernorm(key), rotary), value)

        def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.core_attention(query, key, value, visibility)

        if self.checkpoint_core_attention and self.training:
            context = tensor_parallel.checkpoint(core, False, query, kv.key, kv.value)
        else:
            context = core(query, kv.key, kv.value)
        output, _ = self.linear_proj(context)
        return output, kv

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """q [s, b, heads / tp, d], and k and v [s, b, local groups, d] as far as the layer has them."""
        layer, tp_size = self.layer, self.world_size
        mixed, _ = self.linear_qkv(hidden_states)
        if layer.shares_kv:
            return mixed.unflatten(-1, (-1, layer.head_dim)), None, None
        heads_per_group = layer.num_attention_heads // layer.num_query_groups
        ranks_per_group = max(1, tp_size // layer.num_query_groups)
        if ranks_per_group > 1:
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=self.pg_collection.tp)
            group = get_pg_rank(self.pg_collection.tp) // ranks_per_group
            mixed = mixed.chunk(layer.num_query_groups, dim=-1)[group]
        kinds = 1 if layer.k_eq_v else 2
        mixed = mixed.unflatten(-1, (-1, heads_per_group + kinds, layer.head_dim))
        query, *rest = mixed.split([heads_per_group, *[1] * kinds], dim=3)
        query = query.flatten(2, 3)
        if ranks_per_group > 1:
            query = query.chunk(ranks_per_group, dim=2)[get_pg_rank(self.pg_collection.tp) % ranks_per_group]
        key = rest[0].squeeze(3)
        return query, key, None if layer.k_eq_v else rest[1].squeeze(3)
