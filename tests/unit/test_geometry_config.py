"""Changes of a config, fifty kinds of them: read as transformers reads them, or refused by name; hostile files."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.errors import BridgeError
from bridge.geometry import Geometry, decoder, fields, towers
from bridge.toy.config import VARIANTS, toy_config

from .geometry_changes import CHANGES, as_first_published
from .geometry_facts import Config, Facts, ours, theirs

TOYS: dict[str, Config] = {variant: toy_config(variant).written for variant in VARIANTS}


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
@settings(max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
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
    as_first_published(lambda strategy: 320, config)
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
    "_post_init_done",
    "_rope_type_labels",
    "base_model",
    "chain_hidden_post_norm",
    "classifier_dropout",
    "compile_config",
    "embed_dim",
    "first_k_dense_replace",
    "gradient_checkpointing",
    "hidden_dropout",
    "init_std",
    "initializer_factor",
    "is_quantized",
    "kv_sharing_modes",
    "logits_mup_width_multiplier",
    "loss_type",
    "mlp_layer_types",
    "mtp_hidden_states_first",
    "mtp_layer_types",
    "mtp_mlp_layer_types",
    "mtp_per_layer_config",
    "num_heads",
    "num_mtp_layers",
    "number_of_conv_states",
    "original_max_position_embeddings",
    "quantization_method",
    "sep_token_id",
    "tie_last_hidden_states",
    "token_classification_bias",
    "unpadded_vocab_size",
    "validate",
}
SOURCES = [
    "masking_utils",
    "modeling_utils",
    "cache_utils",
    "utils/generic",
    "utils/output_capturing",
    "modeling_rope_utils",
    "quantizers/auto",
    "configuration_utils",
    "modeling_layers",
    "models/gemma4/modeling_gemma4",
    "models/gemma4_unified/modeling_gemma4_unified",
]


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
