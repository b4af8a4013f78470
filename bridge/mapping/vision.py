"""The vision tower (all but 12B) and its projector. Megatron keys are the names on disk without `model.`.

Projections stay apart, as on disk: each of q, k, v, gate and up has clip bounds of its own in E2B and E4B, on its input
and on its output, so that one matrix could not serve them.
"""

from __future__ import annotations

from bridge.geometry import Geometry, LayerGeometry, VisionGeometry
from bridge.mapping.table import Condition, LayerStack, Row
from bridge.mapping.transforms import copy, scalar

HAS_TOWER = Condition("vision tower", lambda g, layer: isinstance(g.vision, VisionGeometry))
HAS_VISION = Condition("vision", lambda g, layer: g.vision is not None)
CLIPPED = Condition(
    "vision tower with clipped linears", lambda g, layer: isinstance(g.vision, VisionGeometry) and g.vision.clipped
)
STANDARDIZED = Condition(
    "vision tower that standardizes", lambda g, layer: isinstance(g.vision, VisionGeometry) and g.vision.standardize
)


def _layers(geometry: Geometry) -> tuple[LayerGeometry | None, ...]:
    return (None,) * geometry.vision.num_layers if isinstance(geometry.vision, VisionGeometry) else ()


VISION_STACK = LayerStack("vision", _layers)
BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def tower_row(
    name: str,
    shape: tuple[str, ...],
    stack: LayerStack,
    when: Condition,
    shard: tuple[str | None, ...] | None = None,
    trainable: bool = True,
) -> Row:
    """A tensor of a tower, by the same name on both sides; replicated unless `shard` says otherwise."""
    return Row(
        name,
        (f"/model.{name}",),
        (shape,),
        transform=copy if shape else scalar,
        shard=shard or (None,) * max(1, len(shape)),
        when=when,
        trainable=trainable,
        stack=stack,
    )


def clipped_rows(
    name: str,
    shape: tuple[str, str],
    stack: LayerStack,
    has: Condition,
    clipped: Condition,
    shard: tuple[str | None, str | None] = (None, None),
) -> tuple[Row, ...]:
    """A linear of a tower with the bounds of its input and output, where the model clips."""
    return (
        tower_row(f"{name}.linear.weight", shape, stack, has, shard),
        *(tower_row(f"{name}.{bound}", (), stack, clipped, trainable=False) for bound in BOUNDS),
    )


_LAYER = "vision_tower.encoder.layers.{layer}."
_COLUMN, _ROW = ("tp", None), (None, "tp")


def _row(name: str, *shape: str) -> Row:
    return tower_row(name, shape, VISION_STACK, HAS_TOWER)


def _linear(name: str, out: str, into: str, shard: tuple[str | None, str | None]) -> tuple[Row, ...]:
    return clipped_rows(_LAYER + name, (out, into), VISION_STACK, HAS_TOWER, CLIPPED, shard)


VISION: tuple[Row, ...] = (
    _row("vision_tower.patch_embedder.input_proj.weight", "vision", "patch"),
    _row("vision_tower.patch_embedder.position_embedding_table", "2", "vision_positions", "vision"),
    tower_row("vision_tower.std_bias", ("vision",), VISION_STACK, STANDARDIZED, trainable=False),
    tower_row("vision_tower.std_scale", ("vision",), VISION_STACK, STANDARDIZED, trainable=False),
    *(
        _row(_LAYER + f"{norm}_layernorm.weight", "vision")
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    ),
    *_linear("self_attn.q_proj", "vision_q", "vision", _COLUMN),
    *_linear("self_attn.k_proj", "vision_q", "vision", _COLUMN),
    *_linear("self_attn.v_proj", "vision_q", "vision", _COLUMN),
    *_linear("self_attn.o_proj", "vision", "vision_q", _ROW),
    _row(_LAYER + "self_attn.q_norm.weight", "vision_head"),
    _row(_LAYER + "self_attn.k_norm.weight", "vision_head"),
    *_linear("mlp.gate_proj", "vision_ffn", "vision", _COLUMN),
    *_linear("mlp.up_proj", "vision_ffn", "vision", _COLUMN),
    *_linear("mlp.down_proj", "vision", "vision_ffn", _ROW),
    tower_row("embed_vision.embedding_projection.weight", ("hidden", "vision_soft"), VISION_STACK, HAS_VISION),
)


def vision_dimensions(geometry: Geometry) -> dict[str, int]:
    """The sizes that these rows speak of."""
    vision, sizes = geometry.vision, dict[str, int]()
    if vision is not None:
        sizes["patch"] = vision.patch_values
        sizes["vision_positions"] = vision.position_embedding_size
        sizes["vision_soft"] = vision.output_size
    if isinstance(vision, VisionGeometry):
        sizes |= {"vision": vision.hidden_size, "vision_ffn": vision.ffn_hidden_size}
        sizes |= {"vision_q": vision.q_size, "vision_head": vision.head_dim}
    return sizes
