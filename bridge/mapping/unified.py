"""The encoder-free vision front of the 12B. Its projectors, vision and audio, are rows of `vision.py` and `audio.py`.

On disk the front is `model.vision_embedder`; in transformers' memory it is a part of `embed_vision`.
"""

from __future__ import annotations

from bridge.geometry import Geometry, UnifiedVisionGeometry
from bridge.mapping.table import Condition, Row
from bridge.mapping.vision import VISION_STACK, tower_row

ENCODER_FREE = Condition("encoder-free vision", lambda g, layer: isinstance(g.vision, UnifiedVisionGeometry))


def _row(name: str, *shape: str) -> Row:
    return tower_row(f"vision_embedder.{name}", shape, VISION_STACK, ENCODER_FREE)


# Beginnings of names: on disk, and in transformers' memory.
_RENAMED = (
    ("model.embed_vision.", "model.embed_vision.multimodal_embedder."),
    ("model.vision_embedder.", "model.embed_vision."),
)


def in_memory(name: str, geometry: Geometry) -> str:
    """The name that a tensor on disk has in transformers' memory (its state dict)."""
    name = geometry.in_class(name)
    if isinstance(geometry.vision, UnifiedVisionGeometry):
        for disk, memory in _RENAMED:
            if name.startswith(disk):
                return memory + name.removeprefix(disk)
    return name


UNIFIED: tuple[Row, ...] = (
    _row("patch_ln1.weight", "patch"),
    _row("patch_ln1.bias", "patch"),
    _row("patch_dense.weight", "vision_soft", "patch"),
    _row("patch_dense.bias", "vision_soft"),
    _row("patch_ln2.weight", "vision_soft"),
    _row("patch_ln2.bias", "vision_soft"),
    _row("pos_embedding", "vision_positions", "2", "vision_soft"),
    _row("pos_norm.weight", "vision_soft"),
    _row("pos_norm.bias", "vision_soft"),
)
