"""One decoder layer (transformers `Gemma4TextDecoderLayer`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from bridge.geometry import Geometry, LayerGeometry
from bridge.megatron.activation import Gemma4MLP, gated_gelu
from bridge.megatron.attention import Gemma4Attention, KeyValue, qkv_rows
from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.core_attention import CoreAttention
from bridge.megatron.kv_cache import CachedStep
from bridge.megatron.layer_options import LayerLinears
from bridge.megatron.linear import ReplicatedLinear
from bridge.megatron.moe import Gemma4MoE
from bridge.megatron.norm import RMSNorm, init_device
from bridge.megatron.rope import Rotary
from bridge.megatron.visibility import MaskRule, Visibility


def _qkv_linear(
    input_size: int, output_size: int, /, *, layer: LayerGeometry, linear: type[torch.nn.Module], **kwargs: Any
) -> torch.nn.Module:
    """Megatron asks for q, k and v of every layer; this builds the rows that the layer has."""
    return linear(input_size, qkv_rows(layer), **kwargs)


# What makes a part of a layer: (config) -> module.
Builder = Callable[[Gemma4TransformerConfig], torch.nn.Module]


@dataclass
class Gemma4LayerSubmodules(TransformerLayerSubmodules):
    """Megatron's submodules and those that it has no place for; None: the model has none."""

    post_attention_layernorm: LayerNormBuilder = RMSNorm
    post_mlp_layernorm: LayerNormBuilder = RMSNorm
    # Experts, beside the dense FFN.
    moe: type[Gemma4MoE] | None = None
    post_dense_layernorm: LayerNormBuilder | None = None
    post_moe_layernorm: LayerNormBuilder | None = None
    # The per-layer input.
    per_layer_input_gate: Builder | None = None
    per_layer_projection: Builder | None = None
    post_per_layer_input_norm: LayerNormBuilder | None = None


def layer_spec(
    geometry: Geometry, layer: LayerGeometry, rule: MaskRule, backend: str, parts: LayerLinears
) -> ModuleSpec:
    """The Megatron spec of one layer, from its geometry, its mask and the classes of its linears."""
    attention = ModuleSpec(
        module=Gemma4Attention,
        submodules=SelfAttentionSubmodules(
            linear_qkv=partial(_qkv_linear, layer=layer, linear=parts.column),
            core_attention=partial(CoreAttention, rule=rule, backend=backend, source=layer.kv_source),
            linear_proj=parts.row,
            q_layernorm=RMSNorm,
            k_layernorm=IdentityOp if layer.shares_kv else RMSNorm,
        ),
    )
    mlp = partial(
        Gemma4MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row),
        ffn_hidden_size=layer.ffn_hidden_size,
    )
    submodules = Gemma4LayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=attention,
        self_attn_bda=IdentityFuncOp,
        post_attention_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        mlp=mlp,
        mlp_bda=IdentityFuncOp,
        post_mlp_layernorm=RMSNorm,
    )
    if geometry.moe is not None:
        submodules.moe = Gemma4MoE
        submodules.post_dense_layernorm = submodules.post_moe_layernorm = RMSNorm
    if geometry.ple is not None:
        hidden_size, dim = geometry.hidden_size, geometry.ple.dim
        submodules.per_layer_input_gate = partial(ReplicatedLinear, in_features=hidden_size, out_features=dim)
        submodules.per_layer_projection = partial(ReplicatedLinear, in_features=dim, out_features=hidden_size)
        submodules.post_per_layer_input_norm = RMSNorm
    return ModuleSpec(module=Gemma4Layer, submodules=submodules)


class Gemma4Layer(TransformerLayer):
    """Attention, dense FFN, experts beside it where the model has them, per-layer input, layer scalar."""

    def __init__(
        self,
        config: Gemma4TransformerConfig,
        submodules: Gemma4LayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection=pg_collection, vp_stage=vp_stage, **kwargs)
        self.layer = config.geometry.layers[self.layer_number - 1]

        def norm(builder: LayerNormBuilder) -> Any:
            return builder(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

        self.post_attention_layernorm = norm(submodules.post_attention_layernorm)
        self.post_mlp_layernorm = norm(submodules.post_mlp_layernorm)
        self.moe: Gemma4MoE | None = None
        if submodules.moe is not None:
            assert submodules.post_dense_layernorm is not None and submodules.post_moe_layernorm is not None
            self.moe = submodules.moe(config, self.layer_number, self.pg_collection)
            self.post_dense_layernorm = norm(submodules.post_dense_layernorm)
            self.post_moe_layernorm = norm(submodules.post_moe_layernorm)
        self.has_ple = submodules.per_layer_input_gate is not None
        if submodules.per_layer_input_gate is not None:
            assert submodules.per_layer_projection is not None and submodules.post_per_layer_input_norm is not None
            self.per_layer_input_gate = submodules.per_layer_input_gate(config)
            self.per_layer_projection = submodules.per_layer_projection(config)
            self.post_per_layer_input_norm = norm(submodules.post_per_layer_input_norm)
        self.register_buffer("layer_scalar", torch.ones(1, dtype=config.params_dtype, device=init_device(config)))

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Rotary,
        visibility: Visibility | CachedStep,
        per_layer_input: Tensor | None = None,
        shared_kv: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """[s (/tp), b, h] -> the same, and the layer's keys and values for the layers that share them."""
        attention, kv = self.self_attention(self.input_layernorm(hidden_states), rotary, visibility, shared_kv)
        hidden_states = self.post_attention_layernorm(attention, residual=hidden_states)

        hidden_states = self.post_mlp_layernorm(self._feed_forward(hidden_states), residual=hidden_states)

        if self.has_ple:
            assert per_layer_input is not None
            gate = self.per_layer_input_gate(hidden_states)
            gated = gated_gelu(gate, per_layer_input, self.config.kernels)
            hidden_states = self.post_per_layer_input_norm(self.per_layer_projection(gated), residual=hidden_states)

        return hidden_states * self.layer_scalar, kv

    def _feed_forward(self, residual: Tensor) -> Tensor:
        normed = self.pre_mlp_layernorm(residual)
        if self.recompute_mlp and self.training:
            dense = tensor_parallel.checkpoint(lambda x: self.mlp(x)[0], False, normed)
        else:
            dense, _ = self.mlp(normed)
        if self.moe is None:
            return dense
        routed, _ = self.moe(residual)
        return self.post_moe_layernorm(routed, residual=self.post_dense_layernorm(dense))
