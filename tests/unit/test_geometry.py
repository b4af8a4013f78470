"""Geometry against transformers' own reading of the same config, and against the modules that it builds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bridge.errors import CheckpointError, GeometryError
from bridge.geometry import Geometry

VARIANTS = ("e2b", "e4b", "12b", "26b-a4b", "31b")
PUBLISHED = Path(__file__).parents[2] / "bridge" / "variants"
KINDS = {"sliding_attention": "sliding", "full_attention": "global"}
_TYPES = ["sliding_attention", "full_attention"] * 3

# Configs as they may be written: defaults left out, inputs that transformers drops, values that it corrects.
CONFIGS: dict[str, dict[str, Any]] = {
    "text, all defaults": {"model_type": "gemma4_text"},
    "unified text, all defaults": {"model_type": "gemma4_unified_text"},
    "multimodal, all defaults": {"model_type": "gemma4"},
    "unified, all defaults": {"model_type": "gemma4_unified", "text_config": {"model_type": "gemma4_unified_text"}},
    "text_config without a model_type": {"model_type": "gemma4", "text_config": {"num_hidden_layers": 6}},
    "global_head_dim": {"model_type": "gemma4_text", "global_head_dim": 128, "head_dim": 64, "num_hidden_layers": 12},
    "num_global_key_value_heads with K=V": {
        "model_type": "gemma4_text",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
    },
    "num_global_key_value_heads without K=V": {"model_type": "gemma4_text", "num_global_key_value_heads": 2},
    "the same, unified": {
        "model_type": "gemma4_unified_text",
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "global_head_dim": 96,
    },
    "per_layer_config wins over global_head_dim": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "global_head_dim": 64,
        "per_layer_config": {"05": {"head_dim": 128, "num_key_value_heads": 2}},
    },
    "an override equal to the global value": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "per_layer_config": {"05": {"head_dim": 256, "num_key_value_heads": 2}},
    },
    "per_layer_config null": {"model_type": "gemma4_text", "num_hidden_layers": 6, "per_layer_config": None},
    "per_layer_config empty": {"model_type": "gemma4_text", "num_hidden_layers": 6, "per_layer_config": {}},
    "last layer forced": {"model_type": "gemma4_text", "num_hidden_layers": 8},
    "last layer forced, named": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "layer_types": _TYPES[::-1],
    },
    "sharing": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "layer_types": _TYPES,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
    },
    "sharing of an odd number": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "layer_types": _TYPES,
        "num_kv_shared_layers": 3,
    },
    "all layers global": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 3,
        "layer_types": ["full_attention"] * 3,
        "num_kv_shared_layers": 1,
    },
    "one layer": {"model_type": "gemma4_text", "num_hidden_layers": 1},
    "no PLE": {"model_type": "gemma4_text", "num_hidden_layers": 6, "hidden_size_per_layer_input": 0},
    "experts": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "untied at the top": {"model_type": "gemma4", "tie_word_embeddings": False, "text_config": {}},
    "untied below, which counts for nothing": {"model_type": "gemma4", "text_config": {"tie_word_embeddings": False}},
    "untied text": {"model_type": "gemma4_text", "num_hidden_layers": 6, "tie_word_embeddings": False},
    "untied unified text": {"model_type": "gemma4_unified_text", "num_hidden_layers": 6, "tie_word_embeddings": False},
}


def published(variant: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((PUBLISHED / f"{variant}.json").read_text(encoding="utf-8"))
    return config


def published_text(variant: str) -> dict[str, Any]:
    text: dict[str, Any] = published(variant)["text_config"]
    return text


ALL = (
    CONFIGS
    | {f"{variant}, published": published(variant) for variant in VARIANTS}
    | {f"{variant}, published, text": published_text(variant) for variant in VARIANTS}
)


def parse(config: dict[str, Any]) -> Any:
    """What transformers makes of it."""
    config = copy.deepcopy(config)
    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)


def text_of(config: Any) -> Any:
    return getattr(config, "text_config", config)


@pytest.mark.parametrize("name", ALL)
def test_geometry_is_what_transformers_reads(name: str) -> None:
    geometry, config = Geometry.from_dict(ALL[name]), parse(ALL[name])
    text = text_of(config)
    modes = text.kv_sharing_modes
    assert geometry.num_layers == text.num_hidden_layers
    for layer in geometry.layers:
        own = text.per_layer_config[layer.index]
        kind = text.layer_types[layer.index]
        assert layer.kind == KINDS[kind]
        assert (layer.head_dim, layer.num_query_groups) == (own.head_dim, own.num_key_value_heads), layer
        assert layer.num_attention_heads == text.num_attention_heads
        assert layer.window == (text.sliding_window if kind == "sliding_attention" else None)
        assert layer.shares_kv == (modes[layer.index] == "reuse")
        if layer.shares_kv:
            assert modes[layer.kv_source] == "store"
            assert text.layer_types[layer.kv_source] == kind
        rope = text.rope_parameters[kind]
        assert layer.rope_theta == rope["rope_theta"]
        assert layer.rotary_fraction == rope.get("partial_rotary_factor", 1.0)
    assert geometry.hidden_size == text.hidden_size
    assert geometry.vocab_size == text.vocab_size
    assert geometry.rms_norm_eps == text.rms_norm_eps
    assert geometry.initializer_range == text.initializer_range
    assert geometry.logit_softcap == text.final_logit_softcapping
    assert geometry.max_position_embeddings == text.max_position_embeddings
    assert geometry.pad_token_id == text.pad_token_id
    assert geometry.bidirectional_vision == (text.use_bidirectional_attention == "vision")
    assert geometry.tied == config.tie_word_embeddings
    assert geometry.unified == config.model_type.startswith("gemma4_unified")
    assert geometry.multimodal == hasattr(config, "text_config")
    if getattr(text, "enable_moe_block", False):
        assert geometry.moe is not None
        assert geometry.moe.num_experts == text.num_experts
        assert geometry.moe.topk == text.top_k_experts
        assert geometry.moe.ffn_hidden_size == text.moe_intermediate_size
    else:
        assert geometry.moe is None
    if getattr(text, "hidden_size_per_layer_input", 0):
        assert geometry.ple is not None
        assert geometry.ple.dim == text.hidden_size_per_layer_input
        assert geometry.ple.vocab_size == text.vocab_size_per_layer_input
    else:
        assert geometry.ple is None


# transformers saves a config that had the null without the key, and so reads it back as another model.
@pytest.mark.parametrize("name", [name for name in ALL if name != "per_layer_config null"])
def test_a_config_object_and_its_saved_json_read_alike(name: str, tmp_path: Path) -> None:
    geometry, config = Geometry.from_dict(ALL[name]), parse(ALL[name])

    assert Geometry.from_config(config) == geometry
    config.save_pretrained(tmp_path)
    assert Geometry.from_folder(tmp_path) == geometry


@pytest.mark.parametrize("name", ALL)
def test_geometry_gives_the_shapes_of_the_modules(name: str) -> None:
    geometry, config = Geometry.from_dict(ALL[name]), text_of(parse(ALL[name]))
    # The architecture of the text model alone: towers are not what is compared here.
    architecture = "Gemma4UnifiedForCausalLM" if geometry.unified else "Gemma4ForCausalLM"
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    for layer, module in zip(geometry.layers, model.model.layers, strict=True):
        attention = module.self_attn
        assert tuple(attention.q_proj.weight.shape) == (layer.q_size, geometry.hidden_size)
        assert tuple(module.mlp.gate_proj.weight.shape) == (layer.ffn_hidden_size, geometry.hidden_size)
        assert hasattr(attention, "k_proj") != layer.shares_kv
        if not layer.shares_kv:
            assert tuple(attention.k_proj.weight.shape) == (layer.kv_size, geometry.hidden_size)
            assert (attention.v_proj is None) == layer.k_eq_v
        assert attention.is_sliding == (layer.kind == "sliding")
    assert hasattr(model.model, "embed_tokens_per_layer") == (geometry.ple is not None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_architecture_and_prefix(variant: str) -> None:
    geometry, text = Geometry.from_dict(published(variant)), Geometry.from_dict(published_text(variant))
    assert (geometry.multimodal, text.multimodal) == (True, False)
    assert (geometry.prefix, text.prefix) == ("model.language_model.", "model.")
    assert geometry.model_type == text.model_type == ("gemma4_unified" if variant == "12b" else "gemma4")
    family = "Gemma4Unified" if variant == "12b" else "Gemma4"
    assert geometry.architecture == f"{family}ForConditionalGeneration"
    assert text.architecture == f"{family}ForCausalLM"
    assert geometry.layers == text.layers
    assert (geometry.vision is not None, text.vision) == (True, None)
    assert (geometry.audio is not None) == (variant in ("e2b", "e4b", "12b"))


@pytest.mark.parametrize(
    ("variant", "sources"), [("e2b", {13, 14}), ("e4b", {22, 23}), ("12b", set()), ("26b-a4b", set()), ("31b", set())]
)
def test_shared_layers_read_the_last_producer_of_their_kind(variant: str, sources: set[int]) -> None:
    layers = Geometry.from_dict(published(variant)).layers
    assert {layer.kv_source for layer in layers if layer.shares_kv} == sources


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "attention dropout": ({"attention_dropout": 0.1}, "attention_dropout"),
    "all bidirectional": ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
    "activation": ({"hidden_activation": "silu"}, "hidden_activation"),
    "unknown layer type": ({"layer_types": ["chunked_attention"] * 6}, r"layer_types\[0\]"),
    "too few layer types": ({"layer_types": ["sliding_attention"] * 5}, "layer_types"),
    "layer types no list": ({"layer_types": "sliding_attention"}, "layer_types"),
    "window of 0": ({"sliding_window": 0}, "sliding_window"),
    "negative window": ({"sliding_window": -8}, "sliding_window"),
    "window no number": ({"sliding_window": "8"}, "sliding_window"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "absurd layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "absurd width": ({"hidden_size": 2**40}, "hidden_size"),
    "a boolean for a number": ({"hidden_size": True}, "hidden_size"),
    "heads that do not divide": ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 attention heads"),
    "odd head dim": ({"head_dim": 15}, "head_dim 15"),
    "all layers share": ({"num_kv_shared_layers": 6}, "num_kv_shared_layers"),
    "negative sharing": ({"num_kv_shared_layers": -1}, "num_kv_shared_layers"),
    "no producer": ({"num_kv_shared_layers": 1}, "layer 5 shares K/V"),
    "unequal layers of one kind": ({"per_layer_config": {"1": {"head_dim": 64}}}, "layer 1 has other heads"),
    "sharing between unequal layers": (
        {
            "layer_types": _TYPES,
            "num_kv_shared_layers": 2,
            "per_layer_config": {"5": {"head_dim": 64}},
        },
        "layer 5 has other heads than layer 1",
    ),
    "experts without a number": ({"enable_moe_block": True}, "num_experts"),
    "more active experts than experts": (
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 8, "moe_intermediate_size": 8},
        "top_k_experts 8",
    ),
    "override of another field": ({"per_layer_config": {"05": {"sliding_window": 4}}}, "sliding_window"),
    "override of no layer": ({"per_layer_config": {"17": {"head_dim": 64}}}, "'17'"),
    "override that is no number": ({"per_layer_config": {"last": {"head_dim": 64}}}, "'last'"),
    "overrides no object": ({"per_layer_config": [1]}, "per_layer_config"),
    "rope of another type": (
        {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "rope_theta": 1e4}}},
        "rope_parameters.sliding_attention",
    ),
    "rope without the global kind": (
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        "full_attention",
    ),
    "rope theta": ({"rope_parameters": {"sliding_attention": {"rope_theta": 0}}}, "rope_theta"),
    "a number for a flag": ({"use_double_wide_mlp": 1}, "use_double_wide_mlp"),
    "null for a flag": ({"attention_k_eq_v": None}, "attention_k_eq_v"),
    "tie no boolean": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    fields, message = REFUSED[name]
    config = {"model_type": "gemma4_text", "num_hidden_layers": 6, **fields}
    with pytest.raises(GeometryError, match=message):
        Geometry.from_dict(config)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(GeometryError, match=r"config\.json: .*" + message):
        Geometry.from_folder(tmp_path)


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4_vision", "gemma4_audio", None, 4])
def test_another_model_is_refused(model_type: Any) -> None:
    with pytest.raises(GeometryError, match="not a Gemma 4 model"):
        Geometry.from_dict({"model_type": model_type})


def test_text_config_of_another_family_is_refused() -> None:
    with pytest.raises(GeometryError, match=r"text_config\.model_type"):
        Geometry.from_dict({"model_type": "gemma4", "text_config": {"model_type": "gemma4_unified_text"}})
    with pytest.raises(GeometryError, match="text_config"):
        Geometry.from_dict({"model_type": "gemma4", "text_config": [1]})


def test_a_folder_without_a_readable_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        Geometry.from_folder(tmp_path)
    for content in (b"{", b"[1]", b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            Geometry.from_folder(tmp_path)


TOWERS_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "heads of keys": ("vision_config", {"num_key_value_heads": 4}, "num_key_value_heads"),
    "head dim": ("vision_config", {"head_dim": 62}, "head_dim is 62"),
    "activation": ("vision_config", {"hidden_activation": "silu"}, "hidden_activation"),
    "bias": ("vision_config", {"attention_bias": True}, "attention_bias"),
    "no pooling": ("vision_config", {"pooling_kernel_size": 1}, "pooling_kernel_size is 1"),
    "rope": ("vision_config", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0}}, "rope_parameters"),
    "clipping no boolean": ("vision_config", {"use_clipped_linears": "yes"}, "use_clipped_linears"),
    "vision no object": ("vision_config", [1], "vision_config is not an object"),  # type: ignore[dict-item]
    "right context": ("audio_config", {"attention_context_right": 2}, "attention_context_right"),
    "chunk": ("audio_config", {"attention_chunk_size": 16}, "attention_chunk_size"),
    "three convolutions": ("audio_config", {"subsampling_conv_channels": [8, 8, 8]}, "subsampling_conv_channels"),
    "heads of audio": ("audio_config", {"num_attention_heads": 7}, "7 heads"),
    "placeholder used twice": ("image_token_id", 258_881, "audio_token_id is 258881"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", TOWERS_REFUSED)
def test_towers_refused_by_name(name: str) -> None:
    section, fields, message = TOWERS_REFUSED[name]
    config = published("e2b")
    config[section] = config[section] | fields if isinstance(fields, dict) else fields
    with pytest.raises(GeometryError, match=message):
        Geometry.from_dict(config)


def test_the_encoder_free_width_must_be_one() -> None:
    config = published("12b")
    config["vision_config"] |= {"output_proj_dims": 128}
    with pytest.raises(GeometryError, match="output_proj_dims"):
        Geometry.from_dict(config)
