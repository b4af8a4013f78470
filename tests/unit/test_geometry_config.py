"""Changes of a config, fifty kinds of them: read as transformers reads them, or refused by name; hostile files."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding, Gemma4VisionRotaryEmbedding

from bridge.errors import BridgeError
from bridge.geometry import AudioGeometry, Geometry, UnifiedVisionGeometry, VisionGeometry, decoder, fields, towers
from bridge.toy.config import VARIANTS, toy_config

Config = dict[str, Any]
Facts = dict[str, Any]
Change = Callable[[Any, Config], None]
TOYS: dict[str, Config] = {variant: toy_config(variant).written for variant in VARIANTS}
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
        c.hidden_size, c.num_hidden_layers, c.num_attention_heads, tuple(c.subsampling_conv_channels),
        c.conv_kernel_size, c.attention_context_left - 1, c.attention_chunk_size, c.attention_context_right,
        c.attention_logit_cap, c.attention_invalid_logits_value, c.residual_weight, c.gradient_clipping,
        c.use_clipped_linears, c.rms_norm_eps, c.output_proj_dims, c.hidden_act,
    )  # fmt: skip


def ours(geometry: Geometry) -> Facts:
    """The same facts of a geometry."""
    facts: Facts = {
        "layers": [
            (
                layer.kind, layer.head_dim, layer.num_attention_heads, layer.num_query_groups, layer.k_eq_v,
                layer.kv_source, layer.window, layer.ffn_hidden_size,
                _frequencies(layer.rope_theta, layer.rotary_fraction, layer.head_dim),
            )
            for layer in geometry.layers
        ],
        "sizes": (
            geometry.hidden_size, geometry.vocab_size, geometry.max_position_embeddings, geometry.pad_token_id
        ),
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
    }  # fmt: skip
    if geometry.moe is not None:
        facts["moe"] = (geometry.moe.num_experts, geometry.moe.topk, geometry.moe.ffn_hidden_size)
    if geometry.placeholders is not None:
        p, vision, audio = geometry.placeholders, geometry.vision, geometry.audio
        facts["placeholders"] = (p.image, p.video, p.audio)
        facts["vision"] = facts["audio"] = None
        if isinstance(vision, VisionGeometry):
            facts["vision"] = (
                vision.hidden_size, vision.ffn_hidden_size, vision.num_layers, vision.num_heads, vision.num_heads,
                vision.head_dim, vision.patch_size, vision.kernel, vision.position_embedding_size, vision.rms_norm_eps,
                vision.clipped, vision.standardize, "gelu_pytorch_tanh",
                _frequencies(vision.rope_theta, 1.0, vision.head_dim // 2),
            )  # fmt: skip
        elif isinstance(vision, UnifiedVisionGeometry):
            width = vision.output_size
            positions = vision.position_embedding_size
            facts["vision"] = (vision.patch_size, positions, width, width, vision.rms_norm_eps)
        if isinstance(audio, AudioGeometry):
            facts["audio"] = (
                audio.hidden_size, audio.num_layers, audio.num_heads, audio.channels, audio.conv_kernel, audio.window,
                audio.window, 0, audio.logit_cap, -1e9, audio.residual_weight, audio.activation_limit, audio.clipped,
                audio.rms_norm_eps, audio.output_size, "silu",
            )  # fmt: skip
        elif audio is not None:
            facts["audio"] = (audio.output_size, audio.rms_norm_eps)
    return facts


def _frequencies(theta: float, fraction: float, dim: int) -> list[float]:
    turning = int(fraction * dim // 2)
    turns = 1.0 / theta ** (torch.arange(0, 2 * turning, 2, dtype=torch.float) / dim)
    return [*turns.tolist(), *[0.0] * (dim // 2 - turning)]


# --- Kinds of changes: each changes a config in place, out of drawn values. ---

NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 7, 8, 16, 64, 1000, 0.0, 0.5, 1.0, 2.0, 30.0, 1e-6, -1e-6])
ODD: st.SearchStrategy[Any] = st.one_of(
    NUMBERS,
    st.sampled_from([None, True, False, "", "8", "yes", [], [1], {}, {"a": 1}, float("nan"), float("inf"), "é\n"]),
    st.just({"__float__": "NaN"}),
)
THETA = st.sampled_from([10_000.0, 10_000, 5e3, 2e6, 1.0, 0.0, -5.0, None, "1e4", True])
FRACTION = st.sampled_from([0.25, 0.5, 1.0, 1, 0.3, 0.0, 2.0, None, "0.5"])
ROPE_TYPE = st.sampled_from(["default", "proportional", "linear", "yarn", "axial", None, 3])


def entry(draw: Any) -> Any:
    """The rotary parameters of a layer type, maybe short of some, maybe by old names."""
    if draw(st.integers(0, 9)) == 0:
        return draw(ODD)
    made = {
        draw(st.sampled_from(["rope_type", "type"])): draw(ROPE_TYPE),
        "rope_theta": draw(THETA),
        "partial_rotary_factor": draw(FRACTION),
        "factor": draw(st.sampled_from([1.0, 1, 8.0])),
    }
    for key in draw(st.sets(st.sampled_from(list(made)), max_size=3)):
        made.pop(key)
    return made


def rope(draw: Any) -> Any:
    shape = draw(st.integers(0, 9))
    if shape == 0:
        return draw(ODD)
    made = {"sliding_attention": {"rope_type": "default", "rope_theta": 5e3}, "full_attention": entry(draw)}
    if shape == 1:
        made.pop(draw(st.sampled_from(list(made))))
    if shape == 2:
        return entry(draw)
    if shape == 3:
        made["rope_theta"] = draw(THETA)
    if shape in (4, 5):
        made["sliding_attention"] = entry(draw)
    if shape in (6, 7, 8):
        made["full_attention"] = {"rope_type": "proportional", "rope_theta": 2e6, "partial_rotary_factor": 0.5}
    return made


def put(section: str | None, *keys: str, values: st.SearchStrategy[Any] = ODD) -> Change:
    def change(draw: Any, config: Config) -> None:
        target = config if section is None else config.get(section)
        if isinstance(target, dict):
            target[draw(st.sampled_from(keys))] = draw(values)

    return change


def build(section: str | None, key: str, make: Callable[[Any], Any]) -> Change:
    def change(draw: Any, config: Config) -> None:
        target = config if section is None else config.get(section)
        if isinstance(target, dict):
            target[key] = make(draw)

    return change


def _layer_types(draw: Any, config: Config) -> None:
    names = ["sliding_attention", "full_attention", "attention", "chunked_attention", "linear_attention", None, []]
    text = config["text_config"]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text["layer_types"]) - 1))
        text["layer_types"][at] = draw(st.sampled_from([*names[:3], *names]))


def _old_attention(draw: Any, config: Config) -> None:
    text = config["text_config"]
    text["layer_types"] = [name.removeprefix("full_") for name in text["layer_types"]]
    if draw(st.booleans()):
        text.pop("per_layer_config")


def _fewer_layers(draw: Any, config: Config) -> None:
    text = config["text_config"]
    count = draw(st.integers(0, len(text["layer_types"]) + 1))
    text["num_hidden_layers"] = count
    if draw(st.booleans()):
        text["layer_types"] = text["layer_types"][:count]
    if draw(st.booleans()):
        text.pop("layer_types")


def _per_layer(draw: Any, config: Config) -> None:
    text = config["text_config"]
    keys = st.sampled_from(["5", "05", "4", "9", "11", " 5 ", "0", "-1", "x", "5.0", "99"])
    own = st.dictionaries(
        st.sampled_from(["head_dim", "num_key_value_heads", "sliding_window", "skip", "intermediate_size"]),
        st.sampled_from([16, 32, 8, 2, 1, 0, None, [], "32"]),
        max_size=2,
    )
    made = draw(st.one_of(st.dictionaries(keys, own, max_size=3), st.sampled_from([None, {}, [], "x"])))
    text["per_layer_config"] = made if draw(st.booleans()) or not isinstance(made, dict) else made | {
        key: {"head_dim": 64} for key in text["per_layer_config"]
    }  # fmt: skip


def _old_globals(draw: Any, config: Config) -> None:
    text = config["text_config"]
    if draw(st.booleans()):
        text.pop("per_layer_config")
    text["global_head_dim"] = draw(st.sampled_from([32, 64, 16, 15, 0, None, "32"]))
    text["num_global_key_value_heads"] = draw(st.sampled_from([1, 2, 4, 3, 0, None]))
    text["attention_k_eq_v"] = draw(st.sampled_from([True, False, None, 1]))


def _causal_lm(draw: Any, config: Config) -> None:
    text = config.pop("text_config")
    key, value = draw(st.sampled_from(list(text))), draw(ODD)
    config.clear()
    config |= text | {"tie_word_embeddings": draw(st.booleans())}
    if draw(st.booleans()) and key != "model_type":
        config[key] = value


def _moved_to_the_top(draw: Any, config: Config) -> None:
    text = config["text_config"]
    for key in draw(st.sets(st.sampled_from([key for key in text if key != "model_type"]), min_size=1, max_size=4)):
        config[key] = text.pop(key)


def _removed(draw: Any, config: Config) -> None:
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    section = draw(st.sampled_from(sections))
    for key in draw(st.sets(st.sampled_from([key for key in section if key != "model_type"]), max_size=3)):
        section.pop(key)


def _any_key(draw: Any, config: Config) -> None:
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    section = draw(st.sampled_from(sections))
    key = draw(st.sampled_from([key for key in section if section is not config or key != "model_type"]))
    section[key] = draw(ODD)


def _as_first_published(draw: Any, config: Config) -> None:
    """The names and types of the first releases."""
    text, vision, audio = config["text_config"], config["vision_config"], config.get("audio_config")
    own = next(iter(text.pop("per_layer_config").values()))
    text["global_head_dim"] = own["head_dim"]
    text["num_global_key_value_heads"] = own.get("num_key_value_heads")
    text["expert_intermediate_size"] = None
    config |= {"vision_soft_tokens_per_image": 280, "eoa_token_id": 507, "torch_dtype": "bfloat16"}
    if "unified" in config["model_type"]:
        vision |= {"model_patch_size": vision["patch_size"] * vision["pooling_kernel_size"], "num_soft_tokens": 280}
        size = draw(st.sampled_from([audio["audio_embed_dim"], 320]))
        audio |= {"hidden_size": size, "audio_samples_per_token": size, "output_proj_dims": size}
    else:
        vision["rope_parameters"] = {"rope_theta": 100.0, "rope_type": "default"}
        vision |= {"default_output_length": 280, "global_head_dim": vision["head_dim"]}


CHANGES: dict[str, Change] = {
    "text: a size": put("text_config", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    "text: heads": put("text_config", "num_key_value_heads", "head_dim", "num_attention_heads"),
    "text: context": put("text_config", "max_position_embeddings", "sliding_window"),
    "text: eps": put("text_config", "rms_norm_eps", "initializer_range"),
    "text: softcap": put("text_config", "final_logit_softcapping"),
    "text: K=V": put("text_config", "attention_k_eq_v", values=st.sampled_from([True, False, None, 1, "true"])),
    "text: wide FFN": put("text_config", "use_double_wide_mlp", values=st.sampled_from([True, False, None, 1, 0])),
    "text: shared K/V": put("text_config", "num_kv_shared_layers", values=st.sampled_from([0, 1, 2, 5, 12, -1, "1"])),
    "text: window": put("text_config", "sliding_window", values=st.sampled_from([1, 4, 8, 0, None, 4.0, 10**12])),
    "text: bidirectional": put("text_config", "use_bidirectional_attention", values=st.sampled_from(
        ["all", "vision", None, "none", True])),
    "text: is_causal": put("text_config", "is_causal", values=st.sampled_from([True, False, None, 0])),
    "text: chunks": put("text_config", "attention_chunk_size", values=st.sampled_from([None, 8, 0])),
    "text: constants": put("text_config", "attention_bias", "attention_dropout", "hidden_activation"),
    "text: experts": put("text_config", "enable_moe_block", "num_experts", "top_k_experts", "moe_intermediate_size"),
    "text: experts on": build("text_config", "enable_moe_block", lambda draw: True),
    "text: PLE": put("text_config", "hidden_size_per_layer_input", "vocab_size_per_layer_input"),
    "text: pad": put("text_config", "pad_token_id", values=st.sampled_from([0, 1, 511, 512, 10**9, -1, None, "0"])),
    "text: layer types": _layer_types,
    "text: layer types by the old name": _old_attention,
    "text: number of layers": _fewer_layers,
    "text: per_layer_config": _per_layer,
    "text: global_head_dim and its sibling": _old_globals,
    "text: rope_parameters": build("text_config", "rope_parameters", rope),
    "text: rope_scaling": build("text_config", "rope_scaling", rope),
    "text: rope_theta": put("text_config", "rope_theta", values=THETA),
    "text: partial_rotary_factor": put("text_config", "partial_rotary_factor", values=FRACTION),
    "text: rope of Gemma 3": put("text_config", "rope_local_base_freq", values=THETA),
    "text: tied below": put("text_config", "tie_word_embeddings"),
    "text: its model_type": put("text_config", "model_type", values=st.sampled_from(["gemma3_text", None, []])),
    "text: any key": _any_key,
    "text: aliases of other models": put(
        "text_config", "n_embd", "num_layers", "n_head", "num_experts_per_tok", "num_local_experts", "hidden_act",
        "sliding_window_pattern", "cache_implementation", "query_pre_attn_scalar", "attn_logit_softcapping"),
    "text alone": _causal_lm,
    "text section": put(None, "text_config", values=st.sampled_from([None, {}, [], "x", 3, {"hidden_size": 64}])),
    "top: tied": put(None, "tie_word_embeddings"),
    "top: placeholders": put(None, "image_token_id", "video_token_id", "audio_token_id"),
    "top: rope": build(None, "rope_scaling", rope),
    "top: text keys": _moved_to_the_top,
    "top: dtype": put(None, "dtype", "torch_dtype", values=st.sampled_from(
        ["bfloat16", "float32", "float16", None, "zzz", 16, {}, []])),
    "top: quantization": put(None, "quantization_config", values=st.sampled_from(
        [None, {}, {"quant_method": "gptq"}, {"load_in_4bit": True}, {"bits": 4}, [], "x"])),
    "top: other files": put(None, "configuration_files", "transformers_weights", values=st.sampled_from(
        [None, [], ["config.5.0.0.json"], "other.safetensors", ""])),
    "top: attribute_map": put(None, "attribute_map", values=st.sampled_from(
        [{}, {"image_token_id": "audio_token_id"}, None])),
    "text: attribute_map": put("text_config", "attribute_map", values=st.sampled_from(
        [{}, {"pad_token_id": "bos_token_id"}])),
    "text: quantization": put("text_config", "quantization_config", values=st.sampled_from(
        [None, {}, {"quant_method": "gptq"}, {"bits": 4}])),
    "vision: section": put(None, "vision_config", values=st.sampled_from([None, {}, [], "x", {"hidden_size": 64}])),
    "vision: sizes": put("vision_config", "hidden_size", "intermediate_size", "num_hidden_layers", "patch_size",
        "num_attention_heads", "num_key_value_heads", "head_dim", "pooling_kernel_size", "position_embedding_size",
        "mm_embed_dim", "mm_posemb_size", "output_proj_dims", "model_patch_size"),
    "vision: rope_parameters": build("vision_config", "rope_parameters", entry),
    "vision: rope_scaling": build("vision_config", "rope_scaling", entry),
    "vision: rope_theta": put("vision_config", "rope_theta", "partial_rotary_factor", values=THETA),
    "vision: flags": put("vision_config", "use_clipped_linears", "standardize", "attention_bias", "attention_dropout",
        "hidden_activation", "rms_norm_eps"),
    "audio: section": put(None, "audio_config", values=st.sampled_from([None, {}, [], "x", {"hidden_size": 64}])),
    "audio: sizes": put("audio_config", "hidden_size", "num_hidden_layers", "num_attention_heads", "conv_kernel_size",
        "output_proj_dims", "audio_embed_dim", "audio_samples_per_token", values=NUMBERS),
    "audio: constants": put("audio_config", "attention_chunk_size", "attention_context_left", "attention_logit_cap",
        "attention_context_right", "hidden_act", "attention_invalid_logits_value", "residual_weight",
        "gradient_clipping", "use_clipped_linears", "rms_norm_eps", "subsampling_conv_channels"),
    "keys left out": _removed,
    "as first published": _as_first_published,
    "unknown keys": put("vision_config", "unsloth_fixed", "_hidden", "per_layer_config", "layer_types"),
}  # fmt: skip


def read_both(config: Config) -> tuple[Facts | None, Facts | None, str]:
    """(transformers' facts, ours), None where it is refused, and our error. What is no BridgeError goes through."""
    try:
        their = theirs(config)
    except Exception:
        their = None
    before = copy.deepcopy(config)
    try:
        geometry = Geometry.from_dict(config)
    except BridgeError as error:
        assert "\n" not in str(error) and len(str(error)) < 400, str(error)
        return their, None, str(error)
    assert json.dumps(config) == json.dumps(before), "the config was changed"
    return their, ours(geometry), ""


def check_kind(kind: str, draw: Any) -> dict[str, int]:
    """One change of a kind for every variant; how often it was read alike, refused, or read where they refuse."""
    counts = {"alike": 0, "refused": 0, "only here": 0}
    for variant in VARIANTS:
        config = copy.deepcopy(TOYS[variant])
        CHANGES[kind](draw, config)
        their, our, _ = read_both(config)
        if our is None:
            counts["refused"] += 1
        elif their is None:
            counts["only here"] += 1
        else:
            assert our == their, f"{kind} of {variant}"
            counts["alike"] += 1
    return counts


@pytest.mark.parametrize("kind", CHANGES)
@settings(
    max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip
@given(data=st.data())
def test_a_changed_config_is_read_as_transformers_reads_it_or_refused(kind: str, data: Any) -> None:
    check_kind(kind, data.draw)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_config_many_times(kind: str) -> None:
    total: dict[str, int] = {}

    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def many(data: Any) -> None:
        for name, count in check_kind(kind, data.draw).items():
            total[name] = total.get(name, 0) + count

    many()
    print(f"{kind}: {total}")


# --- What must be read, not refused: names that published and older folders have. ---


def changed(variant: str, section: str | None, **values: Any) -> Config:
    config = copy.deepcopy(TOYS[variant])
    (config if section is None else config[section]).update(values)
    return config


ROPE = {
    "sliding_attention": {"type": "default", "rope_theta": 5e3},
    "full_attention": {"type": "proportional", "rope_theta": 2e6},
}
OLD_NAMES: dict[str, Config] = {
    "rope_scaling replaces rope_parameters": changed("e2b", "text_config", rope_scaling=ROPE),
    "attention for full_attention": changed(
        "31b",
        "text_config",
        layer_types=[name.removeprefix("full_") for name in TOYS["31b"]["text_config"]["layer_types"]],
    ),
    "a fraction beside them": changed("e2b", "text_config", rope_parameters=ROPE, partial_rotary_factor=0.5),
    "rope_scaling of a tower": changed("e2b", "vision_config", rope_scaling={"rope_theta": 50.0}),
    "the tower's rope is axial, whatever it says": changed(
        "31b", "vision_config", rope_parameters={"rope_theta": 100.0, "rope_type": "default"}
    ),
    "rope_theta of a tower": changed("31b", "vision_config", rope_parameters=None, rope_theta=50.0),
    "sizes of raw audio": changed("12b", "audio_config", hidden_size=320),
    "another class's name below": changed("12b", "vision_config", model_patch_size=12, num_soft_tokens=280),
    "torch_dtype": changed("12b", None, torch_dtype="bfloat16"),
    "text alone, rope_scaling": {**TOYS["e4b"]["text_config"], "rope_scaling": ROPE},
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_old_names_are_read(name: str) -> None:
    their, our, error = read_both(OLD_NAMES[name])
    assert their is not None and our == their, error


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_published_configs_are_read_without_a_notice(variant: str) -> None:
    config = copy.deepcopy(TOYS[variant])
    _as_first_published(lambda strategy: 320, config)
    their, our, error = read_both(config)
    assert their is not None and our == their, error
    assert Geometry.from_dict(config).notices == ()


@pytest.mark.parametrize(
    ("section", "values", "notice"),
    [
        (None, {"unsloth_fixed": True}, "the config has keys that no part of the model reads: 'unsloth_fixed'"),
        ("text_config", {"n_embd": 5}, "text_config has keys that no part of the model reads: 'n_embd'"),
        ("text_config", {"tie_word_embeddings": False}, "text_config.tie_word_embeddings does not count"),
        ("text_config", {"global_head_dim": 64}, "text_config.global_head_dim does not count beside per_layer_config"),
        ("text_config", {"rope_theta": 5.0}, "text_config has keys that no part of the model reads: 'rope_theta'"),
        (None, {"quantization_config": {"quant_type": "q4_0"}}, "what the weights were trained for"),
    ],
)
def test_what_does_not_count_is_said(section: str | None, values: Config, notice: str) -> None:
    notices = Geometry.from_dict(changed("e2b", section, **values)).notices
    assert len(notices) == 1 and notice in notices[0], notices


# --- Keys that no config class declares, and that transformers looks for all the same. ---

# Names that it looks for in a config and that change nothing of what a model of these classes computes: other tasks'
# heads, MTP and classification; what a loaded model is told, not its file; attributes that cannot be set from a file.
HARMLESS = {
    "_post_init_done", "_rope_type_labels", "base_model", "chain_hidden_post_norm", "classifier_dropout",
    "compile_config", "embed_dim", "first_k_dense_replace", "gradient_checkpointing", "hidden_dropout", "init_std",
    "initializer_factor", "is_quantized", "kv_sharing_modes", "logits_mup_width_multiplier", "loss_type",
    "mlp_layer_types", "mtp_hidden_states_first", "mtp_layer_types", "mtp_mlp_layer_types", "mtp_per_layer_config",
    "num_heads", "num_mtp_layers", "number_of_conv_states", "original_max_position_embeddings", "quantization_method",
    "sep_token_id", "tie_last_hidden_states", "token_classification_bias", "unpadded_vocab_size", "validate",
}  # fmt: skip
SOURCES = [
    "masking_utils", "modeling_utils", "cache_utils", "utils/generic", "utils/output_capturing",
    "modeling_rope_utils", "quantizers/auto", "configuration_utils", "modeling_layers",
    "models/gemma4/modeling_gemma4", "models/gemma4_unified/modeling_gemma4_unified",
]  # fmt: skip


def test_every_key_that_transformers_looks_for_is_known() -> None:
    """A new version that obeys another key fails here, before a config with that key is read otherwise in silence."""
    root, looked_for = Path(transformers.__file__).parent, set[str]()
    for name in SOURCES:
        holder = r"(?:self\.)?\w*config" + ("|self" if name in ("configuration_utils", "modeling_rope_utils") else "")
        pattern = rf'(?:getattr|hasattr)\(\s*(?:{holder})(?:\.get_text_config\([^)]*\))?,\s*"(\w+)"'
        looked_for |= set(re.findall(pattern, (root / f"{name}.py").read_text()))
    families = [f"Gemma4{u}{part}Config" for u in ("", "Unified") for part in ("", "Text", "Vision", "Audio")]
    declared = {field.name for name in families for field in dataclasses.fields(getattr(transformers, name))}
    known = declared | fields._IGNORED | set(fields._OBEYED) | {"dtype", "torch_dtype"}
    known |= set(decoder._DEFAULTS) | set(towers._VISION_DEFAULTS)
    assert {"is_causal", "attention_chunk_size", "transformers_weights", "partial_rotary_factor"} <= looked_for
    assert looked_for - known - HARMLESS == set()
