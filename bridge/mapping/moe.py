"""The mixture of experts that every layer of 26B-A4B has beside its dense FFN."""

from __future__ import annotations

from bridge.mapping.table import Condition, Row

HAS_MOE = Condition("mixture of experts", lambda geometry, layer: geometry.moe is not None)

_LAYER = "decoder.layers.{layer}."

MOE: tuple[Row, ...] = (
    Row(
        _LAYER + "moe.router.weight",
        ("layers.{layer}.router.proj.weight",),
        (("experts", "hidden"),),
        shard=(None, None),
        when=HAS_MOE,
    ),
    Row(_LAYER + "moe.router.scale", ("layers.{layer}.router.scale",), (("hidden",),), when=HAS_MOE),
    Row(
        _LAYER + "moe.router.per_expert_scale",
        ("layers.{layer}.router.per_expert_scale",),
        (("experts",),),
        when=HAS_MOE,
    ),
    Row(
        _LAYER + "moe.pre_layernorm.weight",
        ("layers.{layer}.pre_feedforward_layernorm_2.weight",),
        (("hidden",),),
        when=HAS_MOE,
    ),
    # The doubled `experts.` is the key under which Megatron-Core stores sequential and grouped experts alike.
    Row(
        _LAYER + "moe.experts.experts.linear_fc1.weight",
        ("layers.{layer}.experts.gate_up_proj",),
        (("experts", "2*moe_ffn", "hidden"),),
        shard=("ep", "etp", None),
        when=HAS_MOE,
    ),
    Row(
        _LAYER + "moe.experts.experts.linear_fc2.weight",
        ("layers.{layer}.experts.down_proj",),
        (("experts", "hidden", "moe_ffn"),),
        shard=("ep", None, "etp"),
        when=HAS_MOE,
    ),
    Row(
        _LAYER + "post_dense_layernorm.weight",
        ("layers.{layer}.post_feedforward_layernorm_1.weight",),
        (("hidden",),),
        when=HAS_MOE,
    ),
    Row(
        _LAYER + "post_moe_layernorm.weight",
        ("layers.{layer}.post_feedforward_layernorm_2.weight",),
        (("hidden",),),
        when=HAS_MOE,
    ),
)
