"""A drafter and its target: which layers of the target the drafter's read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bridge.errors import GeometryError
from bridge.geometry.decoder import LayerGeometry, LayerKind
from bridge.geometry.model import Geometry


def producers(layers: Sequence[LayerGeometry]) -> dict[LayerKind, int]:
    """Of a target: the last layer of each kind that makes keys and values of its own, which a drafter reads."""
    return {layer.kind: layer.index for layer in layers if not layer.shares_kv}


def bound(drafter: Geometry, target: Geometry) -> Geometry:
    """`drafter` with the layers of `target` as the sources of its K/V. Raises GeometryError where it drafts another."""
    if drafter.drafter is None:
        raise GeometryError(f"{drafter.architecture} is no drafter")
    if target.drafter is not None:
        raise GeometryError(f"{target.architecture} is a drafter itself, and no target of one")
    sizes = [
        ("backbone_hidden_size", drafter.drafter.backbone_hidden_size, "hidden_size", target.hidden_size),
        ("vocab_size", drafter.vocab_size, "vocab_size", target.vocab_size),
    ]
    sources = producers(target.layers)
    for layer in drafter.layers:
        source = target.layers[sources[layer.kind]]
        sizes += [
            (f"head_dim of layer {layer.index}", layer.head_dim, "head_dim", source.head_dim),
            (f"K/V heads of layer {layer.index}", layer.num_query_groups, "K/V heads", source.num_query_groups),
        ]
    for name, ours, of, theirs in sizes:
        if ours != theirs:
            raise GeometryError(f"the drafter is of another model: its {name} is {ours}, the target's {of} {theirs}")
    layers = tuple(replace(layer, kv_source=sources[layer.kind]) for layer in drafter.layers)
    return replace(drafter, layers=layers)
