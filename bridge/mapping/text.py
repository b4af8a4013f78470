"""The decoder that every Gemma 4 model has: embedding, attention, dense FFN, norms, head."""

from __future__ import annotations

from bridge.mapping.table import Condition, Row
from bridge.mapping.transforms import interleave_groups, stack

UNTIED = Condition("untied head", lambda geometry, layer: not geometry.tied)
TIED = Condition("tied head (a copy on disk)", lambda geometry, layer: geometry.tied)
OWN_KV = Condition("layer has its own K and V", lambda g, layer: layer is not None and not layer.shares_kv)
SEPARATE_V = Condition(
    "layer has q, k and v", lambda g, layer: layer is not None and not layer.shares_kv and not layer.k_eq_v
)
K_IS_V = Condition("V is K (no v_proj)", lambda g, layer: layer is not None and layer.k_eq_v)
SHARED_KV = Condition("layer reads another layer's K and V", lambda g, layer: layer is not None and layer.shares_kv)

_LAYER = "decoder.layers.{layer}."
_ATTN = "layers.{layer}.self_attn."
_MLP = "layers.{layer}.mlp."


def _norm(megatron: str, hf: str, when: Condition | None = None, size: str = "hidden") -> Row:
    """The weight of a norm: replicated on every rank."""
    row = Row(megatron, (hf,), ((size,),))
    return row if when is None else Row(megatron, (hf,), ((size,),), when=when)


TEXT: tuple[Row, ...] = (
    Row(
        "embedding.word_embeddings.weight",
        ("embed_tokens.weight",),
        (("vocab", "hidden"),),
        shard=("tp", None),
        embedding=True,
    ),
    Row("output_layer.weight", ("/lm_head.weight",), (("vocab", "hidden"),), shard=("tp", None), when=UNTIED),
    Row("embedding.word_embeddings.weight", ("/lm_head.weight",), (("vocab", "hidden"),), when=TIED, optional=True),
    _norm("decoder.final_layernorm.weight", "norm.weight"),
    _norm(_LAYER + "input_layernorm.weight", "layers.{layer}.input_layernorm.weight"),
    Row(
        _LAYER + "self_attention.linear_qkv.weight",
        (_ATTN + "q_proj.weight", _ATTN + "k_proj.weight", _ATTN + "v_proj.weight"),
        (("q", "hidden"), ("kv", "hidden"), ("kv", "hidden")),
        transform=interleave_groups,
        shard=("tp", None),
        when=SEPARATE_V,
    ),
    Row(
        _LAYER + "self_attention.linear_qkv.weight",
        (_ATTN + "q_proj.weight", _ATTN + "k_proj.weight"),
        (("q", "hidden"), ("kv", "hidden")),
        transform=interleave_groups,
        shard=("tp", None),
        when=K_IS_V,
    ),
    Row(
        _LAYER + "self_attention.linear_qkv.weight",
        (_ATTN + "q_proj.weight",),
        (("q", "hidden"),),
        shard=("tp", None),
        when=SHARED_KV,
    ),
    _norm(_LAYER + "self_attention.q_layernorm.weight", _ATTN + "q_norm.weight", size="head_dim"),
    _norm(_LAYER + "self_attention.k_layernorm.weight", _ATTN + "k_norm.weight", OWN_KV, "head_dim"),
    Row(
        _LAYER + "self_attention.linear_proj.weight",
        (_ATTN + "o_proj.weight",),
        (("hidden", "q"),),
        shard=(None, "tp"),
    ),
    _norm(_LAYER + "post_attention_layernorm.weight", "layers.{layer}.post_attention_layernorm.weight"),
    _norm(_LAYER + "pre_mlp_layernorm.weight", "layers.{layer}.pre_feedforward_layernorm.weight"),
    Row(
        _LAYER + "mlp.linear_fc1.weight",
        (_MLP + "gate_proj.weight", _MLP + "up_proj.weight"),
        (("ffn", "hidden"), ("ffn", "hidden")),
        transform=stack,
        shard=("tp", None),
    ),
    Row(_LAYER + "mlp.linear_fc2.weight", (_MLP + "down_proj.weight",), (("hidden", "ffn"),), shard=(None, "tp")),
    _norm(_LAYER + "post_mlp_layernorm.weight", "layers.{layer}.post_feedforward_layernorm.weight"),
    Row(_LAYER + "layer_scalar", ("layers.{layer}.layer_scalar",), (("1",),), trainable=False),
    # Published E2B and E4B files hold these for layers that never use them; transformers ignores and drops them.
    Row(None, (_ATTN + "k_proj.weight",), (("kv", "hidden"),), when=SHARED_KV, optional=True),
    Row(None, (_ATTN + "v_proj.weight",), (("kv", "hidden"),), when=SHARED_KV, optional=True),
    Row(None, (_ATTN + "k_norm.weight",), (("head_dim",),), when=SHARED_KV, optional=True),
)
