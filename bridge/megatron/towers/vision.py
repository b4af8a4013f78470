"""The vision tower (transformers `Gemma4VisionModel`) on a packed sequence of real patches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from bridge.geometry import VisionGeometry
from bridge.megatron.activation import gated_gelu
from bridge.megatron.linear import ReplicatedLinear
from bridge.megatron.norm import RMSNorm, init_device, rms_norm
from bridge.megatron.rope import Rotary
from bridge.megatron.towers.linear import Layers, TowerContext, TowerLinear, TowerModule
from bridge.megatron.towers.packing import Images, PatchPack, pack_patches


class VisionTower(TowerModule):
    """Patches -> soft tokens: embedder, encoder, pooler, standardisation."""

    def __init__(self, context: TowerContext, geometry: VisionGeometry) -> None:
        super().__init__(context)
        self.geometry = geometry
        self.patch_embedder = PatchEmbedder(context, geometry)
        self.encoder = VisionEncoder(context, geometry)
        if geometry.standardize:
            options = {"dtype": context.config.params_dtype, "device": init_device(context.config)}
            self.register_buffer("std_bias", torch.zeros(geometry.hidden_size, **options))
            self.register_buffer("std_scale", torch.ones(geometry.hidden_size, **options))

    def forward(self, batches: Sequence[Images]) -> Tensor:
        """Images and frames, all at once -> soft tokens [n, hidden], in their order, row by row.

        Raises UsageError for shapes that disagree and images that do not pool.
        """
        geometry = self.geometry
        pack = pack_patches(batches, geometry.kernel, geometry.patch_values, geometry.position_embedding_size)
        pixels = [batch.pixels.flatten(0, 1) for batch in batches]
        hidden = self.patch_embedder((torch.cat(pixels) if len(pixels) > 1 else pixels[0])[pack.order], pack.positions)
        hidden = self.encoder(hidden, pack)
        # The mean is taken in float32 and rounded to the model's dtype; all that follows is float32 up to the cast.
        pooled = hidden.unflatten(0, (-1, geometry.kernel**2)).float().mean(dim=1).to(hidden.dtype)
        pooled = pooled[pack.restore].float() * geometry.hidden_size**0.5
        if geometry.standardize:
            pooled = (pooled - self.std_bias.float()) * self.std_scale.float()
        return pooled.to(hidden.dtype)


class PatchEmbedder(TowerModule):
    """A linear of the pixels, scaled to [-1, 1], plus a row of the x table and one of the y table."""

    def __init__(self, context: TowerContext, geometry: VisionGeometry) -> None:
        super().__init__(context)
        config = context.config
        self.input_proj = ReplicatedLinear(config, geometry.patch_values, geometry.hidden_size)
        self.position_embedding_table = torch.nn.Parameter(
            torch.ones(
                2,
                geometry.position_embedding_size,
                geometry.hidden_size,
                dtype=config.params_dtype,
                device=init_device(config),
            )
        )

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """[n, 3 * patch²] and (x, y) [n, 2] -> [n, hidden]."""
        scaled = 2 * (pixels - 0.5)
        table = self.position_embedding_table
        place = embedding(positions[:, 0], table[0]) + embedding(positions[:, 1], table[1])
        return self.input_proj(scaled.to(table.dtype)) + place


class VisionEncoder(TowerModule):
    """The layers; recomputed one by one in the backward pass where the decoder is recomputed in full."""

    def __init__(self, context: TowerContext, geometry: VisionGeometry) -> None:
        super().__init__(context)
        self.geometry = geometry
        self.layers = Layers(context, [VisionLayer(context, geometry) for _ in range(geometry.num_layers)])

    def forward(self, hidden: Tensor, pack: PatchPack) -> Tensor:
        """[n, hidden] -> the same."""
        cos, sin = axial_rotary(self.geometry, pack.positions, hidden.dtype)
        recompute = self.config.recompute_granularity == "full" and self.training
        for layer in self.layers.children():

            def run(hidden: Tensor, cos: Tensor, sin: Tensor, layer: torch.nn.Module = layer) -> Tensor:
                return layer(hidden, Rotary(cos, sin), pack.runs)

            # A checkpoint of what needs no gradient would cut off the trained layers behind it.
            if recompute and hidden.requires_grad:
                hidden = tensor_parallel.checkpoint(run, False, hidden, cos, sin)
            else:
                hidden = run(hidden, cos, sin)
        return hidden


class VisionLayer(TowerModule):
    """Attention and gated FFN, each between two norms (transformers `Gemma4VisionEncoderLayer`)."""

    def __init__(self, context: TowerContext, geometry: VisionGeometry) -> None:
        super().__init__(context)
        config, size, eps = context.config, geometry.hidden_size, geometry.rms_norm_eps
        self.input_layernorm = RMSNorm(config, size, eps)
        self.self_attn = VisionAttention(context, geometry)
        self.post_attention_layernorm = RMSNorm(config, size, eps)
        self.pre_feedforward_layernorm = RMSNorm(config, size, eps)
        self.mlp = VisionMlp(context, geometry)
        self.post_feedforward_layernorm = RMSNorm(config, size, eps)

    def forward(self, hidden: Tensor, rotary: Rotary, runs: tuple[tuple[int, int], ...]) -> Tensor:
        """[n, hidden] -> the same."""
        attention = self.self_attn(self.input_layernorm(hidden), rotary, runs)
        hidden = self.post_attention_layernorm(attention, residual=hidden)
        return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden)), residual=hidden)


class VisionMlp(TowerModule):
    """GeGLU of clipped linears (transformers `Gemma4VisionMLP`)."""

    def __init__(self, context: TowerContext, geometry: VisionGeometry) -> None:
        super().__init__(context)
        size, width, clipped = geometry.hidden_size, geometry.ffn_hidden_size, geometry.clipped
        self.gate_proj = TowerLinear(context, size, width, "column", clipped)
        self.up_proj = TowerLinear(context, size, width, "column", clipped)
        self.down_proj = TowerLinear(context, width, size, "row", clipped)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> the same."""
        return self.down_proj(gated_gelu(self.gate_proj(hidden), self.up_proj(hidden), self.config.kernels))


class VisionAttention(TowerModule):
    """Every patch sees its whole image: q/k/v norms, axial rotation, softmax scale 1 (`Gemma4VisionAttention`)."""

    def __init__(self, context: TowerContext, geometry: VisionGeometry) -> None:
        super().__init__(context)
        size, rows, clipped = geometry.hidden_size, geometry.q_size, geometry.clipped
        self.head_dim, self.eps = geometry.head_dim, geometry.rms_norm_eps
        self.q_proj = TowerLinear(context, size, rows, "column", clipped)
        self.k_proj = TowerLinear(context, size, rows, "column", clipped)
        self.v_proj = TowerLinear(context, size, rows, "column", clipped)
        self.o_proj = TowerLinear(context, rows, size, "row", clipped)
        self.q_norm = RMSNorm(context.config, geometry.head_dim, self.eps)
        self.k_norm = RMSNorm(context.config, geometry.head_dim, self.eps)

    def forward(self, hidden: Tensor, rotary: Rotary, runs: tuple[tuple[int, int], ...]) -> Tensor:
        """[n, hidden] -> the same."""
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        norm = partial(rms_norm, eps=self.eps, kernels=self.config.kernels)
        query = rotate_axially(norm(query, self.context.shared(self.q_norm())), rotary)
        key = rotate_axially(norm(key, self.context.shared(self.k_norm())), rotary)
        value = norm(value, None)
        return self.o_proj(attend_per_image(query, key, value, runs).flatten(1))


def attend_per_image(query: Tensor, key: Tensor, value: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """Softmax attention of scale 1 within each image of a packed sequence: [n, heads, d] three times -> the same."""
    outputs, start = [], 0
    for images, patches in runs:
        stop = start + images * patches
        q, k, v = (x[start:stop].unflatten(0, (images, patches)).transpose(1, 2) for x in (query, key, value))
        outputs.append(scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(outputs)


def axial_rotary(geometry: VisionGeometry, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """cos and sin [n, 1, head_dim] at (x, y) `positions` [n, 2]: half of a head turns with x, the other with y.

    Angles are float32 and cast before they rotate anything (transformers `Gemma4VisionRotaryEmbedding`).
    """
    half = geometry.head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half
    angles = positions[..., None].float() * (1.0 / geometry.rope_theta**exponents)
    x, y = angles[:, 0], angles[:, 1]
    angles = torch.cat((x, x, y, y), dim=-1)[:, None]
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate_axially(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the heads of `x` [n, heads, head_dim], each half by itself."""
    x1, x2, y1, y2 = x.chunk(4, dim=-1)
    return x * rotary.cos + torch.cat((-x2, x1, -y2, y1), dim=-1) * rotary.sin
