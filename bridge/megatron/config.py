"""The TransformerConfig of a Gemma 4 model: Megatron's own, plus the geometry."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.megatron import kernels
from bridge.megatron.visibility import GENERATE, check_vision_mask


def gelu_tanh(x: Tensor) -> Tensor:
    """The activation of every Gemma 4 FFN (gelu_pytorch_tanh)."""
    return torch.nn.functional.gelu(x, approximate="tanh")


@dataclass
class Gemma4TransformerConfig(TransformerConfig):
    """Megatron's config for one Gemma 4 model.

    `pipeline_payload` is how many hidden-size slots travel between pipeline stages (see `pipeline.py`): callers of
    Megatron's schedules pass `seq_length * pipeline_payload`. `layer_spec`: see `parts.py`; `fp8_experts`: whether
    experts multiply in FP8 (`fp8_experts.py`); `fake_quant`: what weights are rounded to (`fake_quant.py`). `kernels`
    says who computes what `bridge.megatron.kernels` has kernels for. Raises UsageError where it names nobody.
    `every_gradient`: a backward pass gives every trained parameter a gradient, zeros where the batch had no use for it;
    what Megatron's overlapped gradient reduction waits for, and a copy in vain for any other. `published_kv`: layers
    whose K/V another model, a drafter, reads on the last stage (`Gemma4Block.published`). `vision_mask`: see
    `visibility.mask_rule`.
    """

    geometry: Geometry = None  # type: ignore[assignment]
    pipeline_payload: int = 1
    attention_backends: tuple[tuple[str, str], ...] = (("sliding", "auto"), ("global", "auto"))
    kernels: str = "auto"
    vision_mask: str = GENERATE
    layer_spec: str = "local"
    published_kv: tuple[int, ...] = ()
    every_gradient: bool = True
    fp8_experts: bool = False
    fake_quant: str = "none"
    # Layers differ in head dim, groups and FFN width: each gets its own config and its own checkpoint keys.
    heterogeneous_block_specs: bool = True
    # `per_layer_projection_norm` lives on every pipeline stage; this makes Megatron sum its gradient over them.
    has_cond_embedder: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_dropout", "attention_dropout"):
            # Megatron's hidden dropout would act on the embeddings alone, and that of attention on nothing.
            if getattr(self, name):
                raise UsageError(f"{name}={getattr(self, name)}: no Gemma 4 model has dropout, and no layer here")
        check_vision_mask(self.geometry, self.vision_mask)
        if self.kernels not in kernels.NAMES:
            raise UsageError(f"kernels={self.kernels}: known are {', '.join(kernels.NAMES)}")
        if self.kernels == "triton" and not kernels.installed():
            raise UsageError("kernels=triton: the package triton is not installed")

    def get_config_for_layer(self, layer_number: int) -> Gemma4TransformerConfig:
        """The config of layer `layer_number` (1-based), as Megatron's block asks for it."""
        layer = self.geometry.layers[layer_number - 1]
        config = copy.copy(self)
        config.kv_channels = layer.head_dim
        config.num_query_groups = layer.num_query_groups
        config.ffn_hidden_size = layer.ffn_hidden_size
        return config
