"""How a toy is derived from a published config: one table of smaller numbers.

Everything that makes a model what it is (layer pattern, heads, sharing, K=V, experts, rope, clipping, pooling, softcap)
stays as published, because nothing here mentions it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from bridge.errors import UsageError

Config = dict[str, Any]
Smaller = int | list[int] | Callable[[Mapping[str, Any]], int]

# Global heads are twice as wide, as in the published models. Other widths are for kernels that have a smallest one.
HEAD_DIM, TOWER_HEAD_DIM = 16, 8
WINDOW, WINDOW_OF_OTHER_HEADS = 8, 16

# How many soft tokens an image has at most, as published configs say it: transformers asks its processor alone, and
# engines this field. The processors' smallest is 70.
_BUDGET_FIELD = {"gemma4_vision": "default_output_length", "gemma4_unified_vision": "num_soft_tokens"}
_BUDGET, SMALLEST_BUDGET = 280, 70

# Per variant: layers, and how many of them share K/V. Two periods of the published pattern; the shared layers are the
# second period, so that they are of both types and both producers lie in the first.
_LAYERS: dict[str, dict[str, int]] = {
    "e2b": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "e4b": {"num_hidden_layers": 12, "num_kv_shared_layers": 6},
    "12b": {"num_hidden_layers": 12},
    "26b-a4b": {"num_hidden_layers": 12},
    "31b": {"num_hidden_layers": 12},
}
VARIANTS: tuple[str, ...] = tuple(_LAYERS)

# Section and field -> smaller value. It is used where the published config has the field and a value in it. Where one
# width has to equal another in the models but not in the code (a tower's output and the text width), the toys differ,
# so that a mix-up shows.
_SMALLER: dict[str, dict[str, Smaller]] = {
    "text_config": {
        "vocab_size": 512,
        "vocab_size_per_layer_input": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": HEAD_DIM,
        "hidden_size_per_layer_input": 16,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 24,
        "sliding_window": WINDOW,
    },
    "vision_config": {
        "num_hidden_layers": 2,
        "head_dim": TOWER_HEAD_DIM,
        "hidden_size": lambda published: published["num_attention_heads"] * TOWER_HEAD_DIM,
        "intermediate_size": 160,
        "patch_size": 4,
        # The longest strip of 70 soft tokens, the smallest budget that the image processor takes, is 210 patches.
        "position_embedding_size": 256,
        "mm_embed_dim": 80,
        "output_proj_dims": 80,
        "mm_posemb_size": 128,
    },
    "audio_config": {
        "num_hidden_layers": 2,
        "hidden_size": lambda published: published["num_attention_heads"] * TOWER_HEAD_DIM,
        "output_proj_dims": 80,
        # The first of the two is also the number of mel bins: the model multiplies it into its projection's width.
        "subsampling_conv_channels": [32, 16],
    },
}

# The placeholders and their brackets sit at the end of the published vocabulary, so a small one has to move them.
_SMALL_TOKEN_IDS: dict[str, int] = {
    "boi_token_id": 502,
    "boa_token_id": 503,
    "image_token_id": 504,
    "audio_token_id": 505,
    "eoi_token_id": 506,
    "eoa_token_index": 507,
    "video_token_id": 508,
}


# Of a drafter, as E2B's: its layers, and its other sizes made small. The FFN's width is no other size of a toy.
_DRAFTER_LAYERS = ["sliding_attention"] * 3 + ["full_attention"]
_DRAFTER_HEADS = 4
_DRAFTER_SMALLER: Config = {"hidden_size": 32, "intermediate_size": 72}
_CENTROIDS: Config = {"num_centroids": 32, "centroid_intermediate_top_k": 6}
# As published, of the one whose sizes are all known.
_DRAFTER_PUBLISHED: dict[str, Config] = {"e2b": {"hidden_size": 256, "intermediate_size": 2048}}
_CENTROIDS_PUBLISHED: Config = {"num_centroids": 2048, "centroid_intermediate_top_k": 32}
# Published drafters whose head computes the logits of a part of the vocabulary only.
_ORDERED = ("e2b", "e4b")


@dataclass(frozen=True)
class ToyConfig:
    """The configs of one toy: the multimodal one, and which class and sub-config are written, or a drafter's."""

    multimodal: Config
    text_only: bool
    untied: bool
    drafter: Config | None = None

    @property
    def model_type(self) -> str:
        return str(self.written["model_type"])

    @property
    def written(self) -> Config:
        """The config whose class is written. That class obeys the `tie_word_embeddings` at the top of it."""
        chosen = self.multimodal["text_config"] if self.text_only else self.multimodal
        chosen = chosen if self.drafter is None else self.drafter
        return {**chosen, "tie_word_embeddings": not self.untied}


def published(variant: str) -> Config:
    """The published multimodal config of a variant. Raises UsageError for an unknown name."""
    if variant not in VARIANTS:
        raise UsageError(f"unknown variant {variant!r}, expected one of {', '.join(VARIANTS)}")
    text = resources.files("bridge").joinpath("variants", f"{variant}.json").read_text(encoding="utf-8")
    config: Config = json.loads(text)
    return config


def image_budget(config: Mapping[str, Any]) -> int:
    """Of a toy's multimodal config."""
    vision = config["vision_config"]
    return int(vision[_BUDGET_FIELD[vision["model_type"]]])


def shrink(config: Config, variant: str, head_dim: int | None = None) -> Config:
    """A published multimodal config, made small in every dimension. `head_dim`: of sliding layers, if another."""
    small = {**config, **_SMALL_TOKEN_IDS}
    for section, table in _SMALLER.items():
        values = config.get(section)
        if values is None:
            continue
        given = {field: value for field, value in table.items() if values.get(field)}
        small[section] = values | {field: value(values) if callable(value) else value for field, value in given.items()}
    small = _first_layers(small, _LAYERS[variant])
    text = small["text_config"]
    if head_dim is not None:
        text |= {"head_dim": head_dim, "sliding_window": WINDOW_OF_OTHER_HEADS}
    text["per_layer_config"] = {
        layer: overrides | {"head_dim": 2 * text["head_dim"]} for layer, overrides in text["per_layer_config"].items()
    }
    return small


def shallow(variant: str) -> Config:
    """The published config with a toy's number of layers, half of them where none share K/V: every width is real."""
    layers = dict(_LAYERS[variant])
    if "num_kv_shared_layers" not in layers:
        layers["num_hidden_layers"] //= 2
    return _first_layers(published(variant), layers)


def _first_layers(config: Config, layers: Config) -> Config:
    """The first layers of the decoder of a multimodal config."""
    text = config["text_config"] | layers
    count = text["num_hidden_layers"]
    overrides = {layer: values for layer, values in text["per_layer_config"].items() if int(layer) < count}
    return {**config, "text_config": text | {"layer_types": text["layer_types"][:count], "per_layer_config": overrides}}


def toy_config(
    variant: str,
    *,
    text_only: bool = False,
    full_size: bool = False,
    untied: bool = False,
    vocab_size: int | None = None,
    ple_vocab_size: int | None = None,
    head_dim: int | None = None,
    drafter: bool = False,
    ordered: bool | None = None,
) -> ToyConfig:
    """The config of a toy, or of the published size; of `drafter` that of the toy's drafter.

    `ordered`: whether a drafter's head knows clusters of tokens, None: as the published one of the variant.
    `vocab_size` is that of all tables; `ple_vocab_size` of the per-layer one, where that is to be another. `head_dim`
    is that of sliding layers, global ones have twice as much.

    Raises UsageError for an unknown variant, a head dim that cannot be, or options that exclude each other.
    """
    for name, size in (("vocab_size", vocab_size), ("ple_vocab_size", ple_vocab_size)):
        if size is not None and size < 1:
            raise UsageError(f"{name} {size}: a table has a row or more")
    if drafter and text_only:
        raise UsageError("a drafter has text alone: leave text_only out")
    if drafter and full_size and variant not in _DRAFTER_PUBLISHED:
        known = ", ".join(_DRAFTER_PUBLISHED)
        raise UsageError(f"{variant}: not all sizes of its published drafter are known here, only those of {known}")
    if ordered is not None and not drafter:
        raise UsageError("ordered embeddings are a drafter's")
    config = published(variant)
    if head_dim is not None and (full_size or head_dim < 4 or head_dim % 4):
        raise UsageError(
            f"head_dim {head_dim}: it is a toy's, and a multiple of 4 (a quarter of a global head is rotated)"
        )
    config = config if full_size else shrink(config, variant, head_dim)
    text = dict(config["text_config"])
    for field, size in (("vocab_size", vocab_size), ("vocab_size_per_layer_input", ple_vocab_size or vocab_size)):
        if size is not None and text.get(field):
            text[field] = size
    vision = config["vision_config"]
    budget = _BUDGET if full_size else SMALLEST_BUDGET
    whole = {**config, "text_config": text, "vision_config": vision | {_BUDGET_FIELD[vision["model_type"]]: budget}}
    ordered = variant in _ORDERED if ordered is None else ordered
    sizes, centroids = _DRAFTER_SMALLER, _CENTROIDS
    if full_size and drafter:
        sizes, centroids = _DRAFTER_PUBLISHED[variant], _CENTROIDS_PUBLISHED
    return ToyConfig(
        whole, text_only, untied, _drafter(whole, sizes, centroids if ordered else {}) if drafter else None
    )


def _drafter(target: Config, sizes: Config, centroids: Config) -> Config:
    """The config of a drafter of `target`, a multimodal config: its K/V, window, rotation and vocabulary.

    `sizes` are its own; `centroids`: of ordered embeddings, {} without.
    """
    text = target["text_config"]
    global_overrides = next(iter(text["per_layer_config"].values()))
    groups = max(text["num_key_value_heads"], global_overrides.get("num_key_value_heads", 0))
    target_keys = ("model_type", "vocab_size", "head_dim", "num_key_value_heads", "rope_parameters", "sliding_window")
    decoder = {key: text[key] for key in (*target_keys, "rms_norm_eps", "initializer_range", "max_position_embeddings")}
    count = len(_DRAFTER_LAYERS)
    decoder |= sizes | {
        "num_attention_heads": max(_DRAFTER_HEADS, groups),
        "num_hidden_layers": count,
        "num_kv_shared_layers": count,
        "layer_types": _DRAFTER_LAYERS,
        "per_layer_config": {
            str(i): global_overrides for i, kind in enumerate(_DRAFTER_LAYERS) if kind == "full_attention"
        },
        "attention_k_eq_v": text.get("attention_k_eq_v", False),
        "final_logit_softcapping": None,
        "use_bidirectional_attention": None,
    }
    unified = target["model_type"] == "gemma4_unified"
    if not unified:
        decoder |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    return {
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "backbone_hidden_size": text["hidden_size"],
        "use_ordered_embeddings": bool(centroids),
        "text_config": decoder,
        **centroids,
    }
