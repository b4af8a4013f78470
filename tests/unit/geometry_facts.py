"""What a config says of a model, as transformers reads it and as `bridge.geometry` does."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding, Gemma4VisionRotaryEmbedding

from bridge.geometry import AudioGeometry, Geometry, UnifiedAudioGeometry, UnifiedVisionGeometry, VisionGeometry

Config = dict[str, Any]
Facts = dict[str, Any]
KINDS = {"sliding_attention": "sliding", "full_attention": "global"}


def theirs(config: Config) -> Facts:
    """What transformers makes of a config: its attributes as the modules read them, frequencies as it computes them."""
    raw = copy.deepcopy(config)
    whole = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    text = getattr(whole, "text_config", whole)
    modes = text.kv_sharing_modes
    rotary = Gemma4TextRotaryEmbedding(text)
    layers = []
    for index, kind in enumerate(text.layer_types):
        own, shared = text.per_layer_config[index], modes[index] == "reuse"
        store = [i for i, mode in enumerate(modes) if mode == "store" and text.layer_types[i] == kind]
        layers.append(
            (
                KINDS[kind],
                own.head_dim,
                text.num_attention_heads,
                own.num_key_value_heads,
                text.attention_k_eq_v and kind == "full_attention" and not shared,
                store[0] if shared else index,
                text.sliding_window if kind == "sliding_attention" else None,
                text.intermediate_size * (2 if text.use_double_wide_mlp and shared else 1),
                getattr(rotary, f"{kind}_inv_freq").tolist(),
            )
        )
    moe = getattr(text, "enable_moe_block", False)
    ple = getattr(text, "hidden_size_per_layer_input", 0) if hasattr(text, "vocab_size_per_layer_input") else 0
    ple = 0 if whole.model_type.startswith("gemma4_unified") else ple
    moe = False if whole.model_type.startswith("gemma4_unified") else moe
    facts = {
        "layers": layers,
        "sizes": (text.hidden_size, text.vocab_size, text.max_position_embeddings, text.pad_token_id),
        "numbers": (text.rms_norm_eps, text.final_logit_softcapping, text.initializer_range),
        "moe": (text.num_experts, text.top_k_experts, text.moe_intermediate_size) if moe else None,
        "ple": (ple, text.vocab_size_per_layer_input) if ple else None,
        "tied": whole.tie_word_embeddings,
        "vision mask": text.use_bidirectional_attention == "vision",
        "is_causal": getattr(text, "is_causal", True),
        "constants": (text.hidden_activation, bool(text.attention_bias), text.attention_dropout or 0.0),
        "elsewhere": ("configuration_files" in raw, getattr(whole, "transformers_weights", None)),
        "attribute_map": whole.attribute_map or text.attribute_map,
        "quantized": bool(getattr(whole, "quantization_config", None) or getattr(text, "quantization_config", None)),
    }
    if whole is not text:
        facts["placeholders"] = (whole.image_token_id, whole.video_token_id, whole.audio_token_id)
        facts["vision"] = None if whole.vision_config is None else _their_vision(whole.vision_config)
        facts["audio"] = None if whole.audio_config is None else _their_audio(whole.audio_config)
    return facts


def _their_vision(c: Any) -> Any:
    if "unified" in c.model_type:
        return (c.model_patch_size, c.mm_posemb_size, c.mm_embed_dim, c.output_proj_dims, c.rms_norm_eps)
    frequencies = Gemma4VisionRotaryEmbedding(c).inv_freq.tolist()
    sizes = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads)
    rest = (c.head_dim, c.patch_size, c.pooling_kernel_size, c.position_embedding_size, c.rms_norm_eps)
    return (*sizes, *rest, c.use_clipped_linears, c.standardize, c.hidden_activation, frequencies)


def _their_audio(c: Any) -> Any:
    if "unified" in c.model_type:
        return (c.audio_embed_dim, c.rms_norm_eps)
    return (
        c.hidden_size,
        c.num_hidden_layers,
        c.num_attention_heads,
        tuple(c.subsampling_conv_channels),
        c.conv_kernel_size,
        c.attention_context_left - 1,
        c.attention_chunk_size,
        c.attention_context_right,
        c.attention_logit_cap,
        c.attention_invalid_logits_value,
        c.residual_weight,
        c.gradient_clipping,
        c.use_clipped_linears,
        c.rms_norm_eps,
        c.output_proj_dims,
        c.hidden_act,
    )


def ours(geometry: Geometry) -> Facts:
    """The same facts of a geometry."""
    facts: Facts = {
        "layers": [
            (
                layer.kind,
                layer.head_dim,
                layer.num_attention_heads,
                layer.num_query_groups,
                layer.k_eq_v,
                layer.kv_source,
                layer.window,
                layer.ffn_hidden_size,
                _frequencies(layer.rope_theta, layer.rotary_fraction, layer.head_dim),
            )
            for layer in geometry.layers
        ],
        "sizes": (geometry.hidden_size, geometry.vocab_size, geometry.max_position_embeddings, geometry.pad_token_id),
        "numbers": (geometry.rms_norm_eps, geometry.logit_softcap, geometry.initializer_range),
        "moe": None,
        "ple": None if geometry.ple is None else (geometry.ple.dim, geometry.ple.vocab_size),
        "tied": geometry.tied,
        "vision mask": geometry.bidirectional_vision,
        "is_causal": True,
        "constants": ("gelu_pytorch_tanh", False, 0.0),
        "elsewhere": (False, None),
        "attribute_map": {},
        "quantized": False,
    }
    if geometry.moe is not None:
        facts["moe"] = (geometry.moe.num_experts, geometry.moe.topk, geometry.moe.ffn_hidden_size)
    if geometry.placeholders is not None:
        p, vision, audio = geometry.placeholders, geometry.vision, geometry.audio
        facts["placeholders"] = (p.image, p.video, p.audio)
        facts["vision"], facts["audio"] = _our_vision(vision), _our_audio(audio)
    return facts


def _our_vision(vision: VisionGeometry | UnifiedVisionGeometry | None) -> Any:
    if isinstance(vision, VisionGeometry):
        return (
            vision.hidden_size,
            vision.ffn_hidden_size,
            vision.num_layers,
            vision.num_heads,
            vision.num_heads,
            vision.head_dim,
            vision.patch_size,
            vision.kernel,
            vision.position_embedding_size,
            vision.rms_norm_eps,
            vision.clipped,
            vision.standardize,
            "gelu_pytorch_tanh",
            _frequencies(vision.rope_theta, 1.0, vision.head_dim // 2),
        )
    if vision is None:
        return None
    width = vision.output_size
    return (vision.patch_size, vision.position_embedding_size, width, width, vision.rms_norm_eps)


def _our_audio(audio: AudioGeometry | UnifiedAudioGeometry | None) -> Any:
    if isinstance(audio, AudioGeometry):
        return (
            audio.hidden_size,
            audio.num_layers,
            audio.num_heads,
            audio.channels,
            audio.conv_kernel,
            audio.window,
            audio.window,
            0,
            audio.logit_cap,
            -1e9,
            audio.residual_weight,
            audio.activation_limit,
            audio.clipped,
            audio.rms_norm_eps,
            audio.output_size,
            "silu",
        )
    return None if audio is None else (audio.output_size, audio.rms_norm_eps)


def _frequencies(theta: float, fraction: float, dim: int) -> list[float]:
    turning = int(fraction * dim // 2)
    turns = 1.0 / theta ** (torch.arange(0, 2 * turning, 2, dtype=torch.float) / dim)
    return [*turns.tolist(), *[0.0] * (dim // 2 - turning)]
