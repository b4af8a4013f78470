"""The encoder-free vision front of the 12B (transformers `Gemma4UnifiedVisionEmbedder`), and the projectors of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bridge.geometry import UnifiedVisionGeometry
from bridge.megatron.linear import ReplicatedLinear
from bridge.megatron.norm import init_device, rms_norm
from bridge.megatron.towers.linear import TowerContext, TowerModule
from bridge.megatron.towers.packing import Images, pack_patches
from bridge.megatron.visibility import send


class UnifiedVisionEmbedder(TowerModule):
    """One soft token from each patch: norm, linear, norm, positions, norm. The norms are LayerNorms with eps 1e-5."""

    def __init__(self, context: TowerContext, geometry: UnifiedVisionGeometry) -> None:
        super().__init__(context)
        self.geometry = geometry
        config, size = context.config, geometry.output_size
        options = {"dtype": config.params_dtype, "device": init_device(config)}
        self.patch_ln1 = torch.nn.LayerNorm(geometry.patch_values, **options)
        self.patch_dense = ReplicatedLinear(config, geometry.patch_values, size, bias=True)
        self.patch_ln2 = torch.nn.LayerNorm(size, **options)
        self.pos_embedding = torch.nn.Parameter(torch.zeros(geometry.position_embedding_size, 2, size, **options))
        self.pos_norm = torch.nn.LayerNorm(size, **options)

    def forward(self, batches: Sequence[Images]) -> Tensor:
        """Images and frames, pixels raw in [0, 1] -> soft tokens [n, size] in their order.

        Raises UsageError like `VisionTower.forward`.
        """
        geometry = self.geometry
        # Nothing attends or pools here, so that the order of the batch can stay; only what is no image is refused.
        pack_patches(batches, geometry.kernel, geometry.patch_values, geometry.position_embedding_size)
        device = batches[0].pixels.device
        real = [(batch.places != -1).all(dim=-1).flatten().nonzero().squeeze(1) for batch in batches]
        pairs = list(zip(batches, real, strict=True))
        pixels = torch.cat([batch.pixels.flatten(0, 1).index_select(0, send(rows, device)) for batch, rows in pairs])
        x, y = send(torch.cat([batch.places.flatten(0, 1)[rows] for batch, rows in pairs]), device).unbind(-1)
        hidden = self.patch_ln2(self.patch_dense(self.patch_ln1(pixels.to(self.pos_embedding.dtype))))
        return self.pos_norm(hidden + (self.pos_embedding[x, 0] + self.pos_embedding[y, 1]))


class Projector(TowerModule):
    """Soft tokens into the decoder's width: norm without weight, linear (`Gemma4MultimodalEmbedder`)."""

    def __init__(self, context: TowerContext, input_size: int, eps: float) -> None:
        super().__init__(context)
        self.eps = eps
        self.embedding_projection = ReplicatedLinear(context.config, input_size, context.config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, input_size] -> [n, hidden of the decoder]."""
        return self.embedding_projection(rms_norm(tokens, None, self.eps, kernels=self.config.kernels))
