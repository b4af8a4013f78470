"""The audio tower (E2B, E4B) and its projector. Megatron keys are the names on disk without `model.`."""

from __future__ import annotations

from bridge.geometry import AudioGeometry, Geometry, LayerGeometry
from bridge.mapping.table import Condition, LayerStack, Row
from bridge.mapping.vision import clipped_rows, tower_row

HAS_TOWER = Condition("audio tower", lambda g, layer: isinstance(g.audio, AudioGeometry))
HAS_AUDIO = Condition("audio", lambda g, layer: g.audio is not None)
CLIPPED = Condition(
    "audio tower with clipped linears", lambda g, layer: isinstance(g.audio, AudioGeometry) and g.audio.clipped
)


def _layers(geometry: Geometry) -> tuple[LayerGeometry | None, ...]:
    return (None,) * geometry.audio.num_layers if isinstance(geometry.audio, AudioGeometry) else ()


AUDIO_STACK = LayerStack("audio", _layers)
_FRONT = "audio_tower.subsample_conv_projection."
_LAYER = "audio_tower.layers.{layer}."
_COLUMN, _ROW, _WHOLE = ("tp", None), (None, "tp"), (None, None)


def _row(name: str, *shape: str) -> Row:
    return tower_row(name, shape, AUDIO_STACK, HAS_TOWER)


def _linear(name: str, out: str, into: str, shard: tuple[str | None, str | None]) -> tuple[Row, ...]:
    return clipped_rows(_LAYER + name, (out, into), AUDIO_STACK, HAS_TOWER, CLIPPED, shard)


def _feed_forward(name: str) -> tuple[Row, ...]:
    return (
        _row(_LAYER + f"{name}.pre_layer_norm.weight", "audio"),
        *_linear(f"{name}.ffw_layer_1", "audio_ffn", "audio", _COLUMN),
        *_linear(f"{name}.ffw_layer_2", "audio", "audio_ffn", _ROW),
        _row(_LAYER + f"{name}.post_layer_norm.weight", "audio"),
    )


AUDIO: tuple[Row, ...] = (
    _row(_FRONT + "layer0.conv.weight", "channels0", "1", "3", "3"),
    _row(_FRONT + "layer0.norm.weight", "channels0"),
    _row(_FRONT + "layer1.conv.weight", "channels1", "channels0", "3", "3"),
    _row(_FRONT + "layer1.norm.weight", "channels1"),
    _row(_FRONT + "input_proj_linear.weight", "audio", "audio_conv"),
    *_feed_forward("feed_forward1"),
    _row(_LAYER + "norm_pre_attn.weight", "audio"),
    *_linear("self_attn.q_proj", "audio", "audio", _COLUMN),
    *_linear("self_attn.k_proj", "audio", "audio", _COLUMN),
    *_linear("self_attn.v_proj", "audio", "audio", _COLUMN),
    tower_row(_LAYER + "self_attn.relative_k_proj.weight", ("audio", "audio"), AUDIO_STACK, HAS_TOWER, _COLUMN),
    _row(_LAYER + "self_attn.per_dim_scale", "audio_head"),
    *_linear("self_attn.post", "audio", "audio", _ROW),
    _row(_LAYER + "norm_post_attn.weight", "audio"),
    _row(_LAYER + "lconv1d.pre_layer_norm.weight", "audio"),
    *_linear("lconv1d.linear_start", "2*audio", "audio", _WHOLE),
    _row(_LAYER + "lconv1d.depthwise_conv1d.weight", "audio", "1", "audio_kernel"),
    _row(_LAYER + "lconv1d.conv_norm.weight", "audio"),
    *_linear("lconv1d.linear_end", "audio", "audio", _WHOLE),
    *_feed_forward("feed_forward2"),
    _row(_LAYER + "norm_out.weight", "audio"),
    _row("audio_tower.output_proj.weight", "audio_soft", "audio"),
    _row("audio_tower.output_proj.bias", "audio_soft"),
    tower_row("embed_audio.embedding_projection.weight", ("hidden", "audio_soft"), AUDIO_STACK, HAS_AUDIO),
)


def audio_dimensions(geometry: Geometry) -> dict[str, int]:
    """The sizes that these rows speak of."""
    audio, sizes = geometry.audio, dict[str, int]()
    if audio is not None:
        sizes["audio_soft"] = audio.output_size
    if isinstance(audio, AudioGeometry):
        sizes |= {"audio": audio.hidden_size, "2*audio": 2 * audio.hidden_size, "audio_ffn": audio.ffn_hidden_size}
        sizes |= {"audio_head": audio.head_dim, "audio_kernel": audio.conv_kernel, "audio_conv": audio.conv_values}
        sizes |= {"channels0": audio.channels[0], "channels1": audio.channels[1]}
    return sizes
