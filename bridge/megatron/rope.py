"""Rotary embeddings of Gemma 4: full for sliding layers, proportional for global ones.

Mathematics: transformers `Gemma4TextRotaryEmbedding` and `_compute_proportional_rope_parameters`. In a global layer the
first `fraction * head_dim / 2` frequencies are those of the whole head (the exponent divides by the full head_dim), the
rest are zero, and rotate_half pairs run across the whole head.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from bridge.geometry import Geometry, LayerGeometry, LayerKind


class _Tables(NamedTuple):
    cos: Tensor
    sin: Tensor


class Rotary(_Tables):
    """cos and sin [s, b, 1, head_dim] in the dtype of the activations."""

    @cached_property
    def signed_sin(self) -> Tensor:
        """sin, its first half negated: what halves that have changed places are multiplied by. Made once a batch."""
        first, second = self.sin.chunk(2, dim=-1)
        return torch.cat((-first, second), dim=-1)


def inverse_frequencies(layer: LayerGeometry, device: torch.device) -> Tensor:
    """[head_dim / 2] float32. Never a buffer: casting a model to bf16 must not round it."""
    turning = int(layer.rotary_fraction * layer.head_dim // 2)
    exponents = torch.arange(0, 2 * turning, 2, dtype=torch.int64, device=device).float() / layer.head_dim
    frequencies = torch.zeros(layer.head_dim // 2, dtype=torch.float32, device=device)
    frequencies[:turning] = 1.0 / (layer.rope_theta**exponents)
    return frequencies


def rotary_tables(geometry: Geometry, position_ids: Tensor, dtype: torch.dtype) -> dict[LayerKind, Rotary]:
    """The rotation of every layer kind at `position_ids` [b, s].

    Angles are float32; cos and sin are cast before they rotate anything, because bf16 parity needs that order.
    """
    tables: dict[LayerKind, Rotary] = {}
    for layer in geometry.layers:
        if layer.kind not in tables:
            angles = position_ids.t()[:, :, None, None].float() * inverse_frequencies(layer, position_ids.device)
            angles = torch.cat((angles, angles), dim=-1)
            tables[layer.kind] = Rotary(angles.cos().to(dtype), angles.sin().to(dtype))
    return tables


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the heads of `x` [s, b, heads, head_dim]."""
    return x * rotary.cos + x.roll(x.shape[-1] // 2, -1) * rotary.signed_sin
