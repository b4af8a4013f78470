"""Kinds of changes: each changes a config in place, out of drawn values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from .geometry_facts import Config

Change = Callable[[Any, Config], None]
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
    text["per_layer_config"] = (
        made
        if draw(st.booleans()) or not isinstance(made, dict)
        else made | {key: {"head_dim": 64} for key in text["per_layer_config"]}
    )


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


def as_first_published(draw: Any, config: Config) -> None:
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
    "text: bidirectional": put(
        "text_config", "use_bidirectional_attention", values=st.sampled_from(["all", "vision", None, "none", True])
    ),
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
        "text_config",
        "n_embd",
        "num_layers",
        "n_head",
        "num_experts_per_tok",
        "num_local_experts",
        "hidden_act",
        "sliding_window_pattern",
        "cache_implementation",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
    ),
    "text alone": _causal_lm,
    "text section": put(None, "text_config", values=st.sampled_from([None, {}, [], "x", 3, {"hidden_size": 64}])),
    "top: tied": put(None, "tie_word_embeddings"),
    "top: placeholders": put(None, "image_token_id", "video_token_id", "audio_token_id"),
    "top: rope": build(None, "rope_scaling", rope),
    "top: text keys": _moved_to_the_top,
    "top: dtype": put(
        None,
        "dtype",
        "torch_dtype",
        values=st.sampled_from(["bfloat16", "float32", "float16", None, "zzz", 16, {}, []]),
    ),
    "top: quantization": put(
        None,
        "quantization_config",
        values=st.sampled_from([None, {}, {"quant_method": "gptq"}, {"load_in_4bit": True}, {"bits": 4}, [], "x"]),
    ),
    "top: other files": put(
        None,
        "configuration_files",
        "transformers_weights",
        values=st.sampled_from([None, [], ["config.5.0.0.json"], "other.safetensors", ""]),
    ),
    "top: attribute_map": put(
        None, "attribute_map", values=st.sampled_from([{}, {"image_token_id": "audio_token_id"}, None])
    ),
    "text: attribute_map": put(
        "text_config", "attribute_map", values=st.sampled_from([{}, {"pad_token_id": "bos_token_id"}])
    ),
    "text: quantization": put(
        "text_config", "quantization_config", values=st.sampled_from([None, {}, {"quant_method": "gptq"}, {"bits": 4}])
    ),
    "vision: section": put(None, "vision_config", values=st.sampled_from([None, {}, [], "x", {"hidden_size": 64}])),
    "vision: sizes": put(
        "vision_config",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "patch_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "pooling_kernel_size",
        "position_embedding_size",
        "mm_embed_dim",
        "mm_posemb_size",
        "output_proj_dims",
        "model_patch_size",
    ),
    "vision: rope_parameters": build("vision_config", "rope_parameters", entry),
    "vision: rope_scaling": build("vision_config", "rope_scaling", entry),
    "vision: rope_theta": put("vision_config", "rope_theta", "partial_rotary_factor", values=THETA),
    "vision: flags": put(
        "vision_config",
        "use_clipped_linears",
        "standardize",
        "attention_bias",
        "attention_dropout",
        "hidden_activation",
        "rms_norm_eps",
    ),
    "audio: section": put(None, "audio_config", values=st.sampled_from([None, {}, [], "x", {"hidden_size": 64}])),
    "audio: sizes": put(
        "audio_config",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "conv_kernel_size",
        "output_proj_dims",
        "audio_embed_dim",
        "audio_samples_per_token",
        values=NUMBERS,
    ),
    "audio: constants": put(
        "audio_config",
        "attention_chunk_size",
        "attention_context_left",
        "attention_logit_cap",
        "attention_context_right",
        "hidden_act",
        "attention_invalid_logits_value",
        "residual_weight",
        "gradient_clipping",
        "use_clipped_linears",
        "rms_norm_eps",
        "subsampling_conv_channels",
    ),
    "keys left out": _removed,
    "as first published": as_first_published,
    "unknown keys": put("vision_config", "unsloth_fixed", "_hidden", "per_layer_config", "layer_types"),
}
