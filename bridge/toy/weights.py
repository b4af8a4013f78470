"""What is in a toy's tensors: a table of distributions by name, and the same numbers however they are chunked.

Weights are random but tell mistakes apart: no norm weight is one, no scalar is one, clip bounds clip, and the spreads
keep activations near one and logits within a few units.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bridge.errors import MappingError

Shape = tuple[int, ...]

# A tensor longer than this repeats a block. The length is prime, so that no two rows of such a tensor start at the same
# place of the block before it has been read as often as a row is wide: a swapped row or shard still shows.
_BLOCK = 262_139
_CHUNK = 1 << 23

_FLOAT32 = [
    re.compile(pattern)
    for pattern in (
        r"norm",
        r"\.router\.(scale|per_expert_scale)$",
        r"layers\.\d*[03]\.self_attn\.k_proj\.",
        r"layers\.\d*[14]\.self_attn\.v_proj\.",
        r"layers\.\d*[14]\.mlp\.up_proj\.",
        r"layers\.\d*2\.mlp\.down_proj\.",
        r"layers\.\d*2\.experts\.down_proj$",
    )
]


def _one(_shape: Shape) -> float:
    return 1.0


def _fan_in(shape: Shape) -> float:
    """Inputs of a convolution [out, in, kernel...] to the power -1/2."""
    return math.prod(shape[1:]) ** -0.5


def _width(shape: Shape) -> float:
    """Inputs of a linear [.., out, in], or the width of a table's rows, to the power -1/2."""
    return shape[-1] ** -0.5


def _head(shape: Shape) -> float:
    """For q_norm and k_norm [head_dim]: the attention has no other scale, so their product stands for head_dim^-1/2."""
    return shape[0] ** -0.25


@dataclass(frozen=True)
class Fill:
    """A tensor's values: `scale(shape) * (centre + spread * x)`, x standard normal, or uniform in -1..1.

    Of a `permutation` the numbers of its places, in another order.
    """

    centre: float
    spread: float
    scale: Callable[[Shape], float] = _one
    uniform: bool = False
    permutation: bool = False


# First match wins.
_FILLS: list[tuple[re.Pattern[str], Fill]] = [
    (re.compile(pattern), fill)
    for pattern, fill in [
        (r"\.layer_scalar$", Fill(1.0, 0.2, uniform=True)),
        (r"\.router\.proj\.weight$", Fill(0.0, 3.0)),
        (r"\.router\.scale$", Fill(1.0, 0.2)),
        (r"\.router\.per_expert_scale$", Fill(1.0, 0.5, uniform=True)),
        # One value in a thousand is clipped. Where the gradient of a clamp jumps, float noise decides of a value at the
        # bound on which side it is: closer bounds meet millions of values of a few images, and some lie that near.
        (r"\.(input|output)_min$", Fill(-3.5, 0.5, uniform=True)),
        (r"\.(input|output)_max$", Fill(3.5, 0.5, uniform=True)),
        (r"\.std_bias$", Fill(0.0, 0.5)),
        (r"\.std_scale$", Fill(1.0, 0.5, uniform=True)),
        (r"\.per_dim_scale$", Fill(0.0, 0.3)),
        (r"\.(q_norm|k_norm)\.weight$", Fill(1.5, 0.15, _head)),
        # What a decoder layer adds is smaller than the residual, as in a trained model: otherwise float noise grows by
        # a third a layer and says nothing about mistakes.
        (r"model\.layers\..*\.post_(attention|feedforward)_layernorm\.weight$", Fill(0.4, 0.05)),
        # Centred on zero: with a tied head, a positive one makes every token the most likely successor of itself.
        (r"model\.norm\.weight$", Fill(0.0, 0.5)),
        (r"\.post_per_layer_input_norm\.weight$", Fill(0.4, 0.05)),
        (r"(norm|norm_1|norm_2|norm_(pre|post)_attn|norm_out|patch_ln1|patch_ln2)\.weight$", Fill(1.0, 0.1)),
        (r"\.layer\d\.norm\.weight$", Fill(1.0, 0.1)),
        (r"\.bias$", Fill(0.0, 0.1)),
        (r"\.embed_tokens_per_layer\.weight$", Fill(0.0, 0.2)),
        (r"(\.embed_tokens|^lm_head)\.weight$", Fill(0.0, 2.0, _width)),
        (r"\.token_ordering$", Fill(0.0, 0.0, permutation=True)),
        (r"\.centroids\.weight$", Fill(0.0, 1.0, _width)),
        (r"\.(position_embedding_table|pos_embedding)$", Fill(0.0, 0.4)),
        (r"\.(conv|depthwise_conv1d)\.weight$", Fill(0.0, 1.4, _fan_in)),
        (r"\.experts\.(gate_up_proj|down_proj)$", Fill(0.0, 1.0, _width)),
        (r"(_proj|_projection|_linear|_gate|\.linear|\.patch_dense)\.weight$", Fill(0.0, 1.0, _width)),
    ]
]


def is_integer(name: str) -> bool:
    """Whether a tensor holds numbers of tokens, whatever the dtype of the weights."""
    return fill_of(name).permutation


def is_float32_in_mixed(name: str) -> bool:
    """Whether a checkpoint of mixed dtypes keeps this tensor in float32: norms, router scales, some projections."""
    return any(pattern.search(name) for pattern in _FLOAT32)


def fill_of(name: str) -> Fill:
    """The distribution of a tensor by its on-disk name. Raises MappingError for a name that no row matches."""
    for pattern, fill in _FILLS:
        if pattern.search(name):
            return fill
    raise MappingError(f"{name}: the toy has no rule for this tensor")


def block(name: str, shape: Shape, dtype: str, variant: str, seed: int) -> np.ndarray:
    """What a tensor repeats from its first value on, or all of a shorter one: flat, of its dtype ("BF16", "F32").

    float32, or int16 that holds bfloat16, as in `chunks`; all of a permutation, int64.
    """
    fill = fill_of(name)
    digest = hashlib.sha256(f"{variant}/{seed}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    if fill.permutation:
        return generator.permutation(math.prod(shape)).astype(np.int64)
    count = min(math.prod(shape), _BLOCK)
    if fill.uniform:
        values = generator.random(count, dtype=np.float32) * 2 - 1
    else:
        values = generator.standard_normal(count, dtype=np.float32)
    values = np.float32(fill.scale(shape)) * (np.float32(fill.centre) + np.float32(fill.spread) * values)
    if dtype == "F32":
        return values
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()


def chunks(name: str, shape: Shape, dtype: str, variant: str, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor's values as (first row, array of rows [rows, ...]), in order, a few megabytes at a time.

    Values depend on variant, seed, name, shape and dtype only. Arrays are float32, int16 that hold bfloat16, or int64;
    they are views of a shared buffer, valid until the next one is asked for.
    """
    values = block(name, shape, dtype, variant, seed)
    if len(values) == math.prod(shape):
        yield 0, values.reshape(shape)
        return
    width = math.prod(shape[1:])
    rows = max(1, _CHUNK // width)
    tiled = np.resize(values, _BLOCK + min(rows, shape[0]) * width)
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        offset = start * width % _BLOCK
        yield start, tiled[offset : offset + count * width].reshape(count, *shape[1:])
