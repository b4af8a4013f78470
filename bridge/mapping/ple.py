"""Per-layer embeddings (E2B, E4B). The table and the projection are split by layers across pipeline stages."""

from __future__ import annotations

from bridge.mapping.table import Condition, Row

HAS_PLE = Condition("per-layer embeddings", lambda geometry, layer: geometry.ple is not None)

_LAYER = "decoder.layers.{layer}."

PLE: tuple[Row, ...] = (
    Row(
        "decoder.ple.embed_tokens.weight",
        ("embed_tokens_per_layer.weight",),
        (("ple_vocab", "layers*ple"),),
        shard=("tp", "pp"),
        when=HAS_PLE,
        embedding=True,
    ),
    Row(
        "decoder.ple.model_projection.weight",
        ("per_layer_model_projection.weight",),
        (("layers*ple", "hidden"),),
        shard=("pp", None),
        when=HAS_PLE,
    ),
    Row("decoder.ple.projection_norm.weight", ("per_layer_projection_norm.weight",), (("ple",),), when=HAS_PLE),
    Row(
        _LAYER + "per_layer_input_gate.weight",
        ("layers.{layer}.per_layer_input_gate.weight",),
        (("ple", "hidden"),),
        shard=(None, None),
        when=HAS_PLE,
    ),
    Row(
        _LAYER + "per_layer_projection.weight",
        ("layers.{layer}.per_layer_projection.weight",),
        (("hidden", "ple"),),
        shard=(None, None),
        when=HAS_PLE,
    ),
    Row(
        _LAYER + "post_per_layer_input_norm.weight",
        ("layers.{layer}.post_per_layer_input_norm.weight",),
        (("hidden",),),
        when=HAS_PLE,
    ),
)
