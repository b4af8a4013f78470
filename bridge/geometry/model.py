"""What a Gemma 4 checkpoint is made of, read once from its config.

This and `towers.py` are the only readers of Hugging Face config fields; everything else asks the frozen
`Geometry`. They read plain JSON, so that a conversion need not import transformers. `tests/unit/test_geometry.py` holds
their reading against that of the transformers classes (`configuration_gemma4.py`, `configuration_gemma4_unified.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from bridge.errors import CheckpointError, GeometryError
from bridge.geometry.towers import Audio, Placeholders, Vision, read_audio, read_placeholders, read_vision

LayerKind = Literal["sliding", "global"]
_KINDS: dict[str, LayerKind] = {"sliding_attention": "sliding", "full_attention": "global"}

# model_type of a multimodal config -> (its architecture, model_type of its text part, the text part's own architecture)
_MULTIMODAL = {
    "gemma4": ("Gemma4ForConditionalGeneration", "gemma4_text", "Gemma4ForCausalLM"),
    "gemma4_unified": ("Gemma4UnifiedForConditionalGeneration", "gemma4_unified_text", "Gemma4UnifiedForCausalLM"),
}
_TEXT = {text: (wrapper, architecture) for wrapper, (_, text, architecture) in _MULTIMODAL.items()}

# Defaults of transformers' text configs, for the keys read here. A saved config may leave out what equals them.
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": 512,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": None,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
}
# The unified text class has no PLE and no MoE fields at all, and other defaults for two of the rest.
_UNIFIED_TEXT_DEFAULTS = _TEXT_DEFAULTS | {
    "max_position_embeddings": 262_144,
    "sliding_window": 1024,
    "use_bidirectional_attention": "vision",
    "hidden_size_per_layer_input": 0,
}
_ROPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


class HasToDict(Protocol):
    """What of a transformers config object is used: its dictionary."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LayerGeometry:
    """One decoder layer.

    `kv_source` is the layer whose normed keys and values this one reads; it equals `index` where the layer makes its
    own. `k_eq_v` says that values come from the key projection. `window` is in tokens, None on global layers.
    """

    index: int
    kind: LayerKind
    head_dim: int
    num_attention_heads: int
    num_query_groups: int
    k_eq_v: bool
    kv_source: int
    window: int | None
    ffn_hidden_size: int
    rope_theta: float
    rotary_fraction: float

    @property
    def shares_kv(self) -> bool:
        """Whether the layer has no key and value projections and reads those of `kv_source`."""
        return self.kv_source != self.index

    @property
    def q_size(self) -> int:
        """Rows of q_proj."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj (and of v_proj, where there is one); of a layer that shares K/V, those it would have."""
        return self.num_query_groups * self.head_dim


@dataclass(frozen=True)
class MoeGeometry:
    """The mixture of experts that every layer has beside its dense FFN."""

    num_experts: int
    topk: int
    ffn_hidden_size: int


@dataclass(frozen=True)
class PleGeometry:
    """Per-layer embeddings: a table [vocab_size, num_layers * dim] and a projection of the input embeddings."""

    dim: int
    vocab_size: int


@dataclass(frozen=True)
class Geometry:
    """A Gemma 4 model. `prefix` starts the on-disk name of every language-model tensor but `lm_head.weight`."""

    model_type: str
    architecture: str
    multimodal: bool
    prefix: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerGeometry, ...]
    moe: MoeGeometry | None
    ple: PleGeometry | None
    tied: bool
    rms_norm_eps: float
    initializer_range: float
    logit_softcap: float | None
    max_position_embeddings: int
    pad_token_id: int | None
    bidirectional_vision: bool
    placeholders: Placeholders | None
    vision: Vision | None
    audio: Audio | None

    @property
    def placeholder_ids(self) -> frozenset[int]:
        """Ids of the tokens that soft tokens replace; none in the text classes."""
        return frozenset() if self.placeholders is None else self.placeholders.ids

    @property
    def unified(self) -> bool:
        """Whether this is the encoder-free family (12B)."""
        return self.model_type == "gemma4_unified"

    @property
    def text_architecture(self) -> str:
        """The transformers class of the text model alone."""
        return _MULTIMODAL[self.model_type][2]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Geometry:
        """Read `config.json` of an HF folder. Raises CheckpointError (no such file, no JSON) and GeometryError."""
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not found; a Hugging Face model folder has one") from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not JSON ({error})") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: holds no JSON object")
        try:
            return cls.from_dict(config)
        except GeometryError as error:
            raise GeometryError(f"{path}: {error}") from None

    @classmethod
    def from_config(cls, config: HasToDict) -> Geometry:
        """Read a transformers config object (Gemma4Config, Gemma4TextConfig and the two Unified ones)."""
        return cls.from_dict(config.to_dict())

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Geometry:
        """Read a config as a dictionary. Raises GeometryError that names the field."""
        model_type = config.get("model_type")
        quantization = config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
            raise GeometryError(f"quantization_config is {method!r}; take the checkpoint that is not quantized")
        if model_type in _MULTIMODAL:
            architecture, text_type, _ = _MULTIMODAL[model_type]
            text = config.get("text_config") or {}
            if not isinstance(text, Mapping):
                raise GeometryError("text_config is not an object")
            if text.get("model_type", text_type) != text_type:
                raise GeometryError(f"text_config.model_type is {text['model_type']!r}, expected {text_type!r}")
            # The multimodal classes obey the top-level value, whatever text_config says.
            tied = _typed(config, "tie_word_embeddings", bool, True)
            geometry = cls._read(text, model_type, architecture, "model.language_model.", tied)
            unified = geometry.unified
            return replace(
                geometry,
                placeholders=read_placeholders(config),
                vision=read_vision(config.get("vision_config"), unified),
                audio=read_audio(config.get("audio_config"), unified),
            )
        if model_type in _TEXT:
            wrapper, architecture = _TEXT[model_type]
            tied = _typed(config, "tie_word_embeddings", bool, True)
            return cls._read(config, wrapper, architecture, "model.", tied)
        known = ", ".join([*_MULTIMODAL, *_TEXT])
        raise GeometryError(f"model_type is {model_type!r}, not a Gemma 4 model (one of {known})")

    @classmethod
    def _read(
        cls,
        text: Mapping[str, Any],
        model_type: str,
        architecture: str,
        prefix: str,
        tied: bool,
    ) -> Geometry:
        defaults = _UNIFIED_TEXT_DEFAULTS if model_type == "gemma4_unified" else _TEXT_DEFAULTS
        fields = defaults | {key: value for key, value in text.items() if key in defaults}

        def positive(key: str) -> int:
            return _positive(fields[key], key)

        _refuse_unsupported(fields)
        num_layers = positive("num_hidden_layers")
        kinds = _layer_kinds(text.get("layer_types"), num_layers)
        per_layer = text.get("per_layer_config")
        if per_layer is None and "per_layer_config" in text:
            per_layer = {}  # the older fields count only where the key is absent
        overrides = _per_layer_overrides(per_layer, fields, kinds)
        sources = _kv_sources(kinds, fields["num_kv_shared_layers"])
        rope = _ROPE_DEFAULTS if text.get("rope_parameters") is None else text["rope_parameters"]
        heads, window = positive("num_attention_heads"), positive("sliding_window")

        layers = []
        for index, kind in enumerate(kinds):
            head_dim = _positive(overrides[index].get("head_dim", fields["head_dim"]), f"head_dim of layer {index}")
            groups = _positive(
                overrides[index].get("num_key_value_heads", fields["num_key_value_heads"]),
                f"num_key_value_heads of layer {index}",
            )
            if heads % groups:
                raise GeometryError(f"layer {index}: {heads} attention heads do not divide into {groups} groups")
            theta, fraction = _rope(rope, kind, head_dim)
            shared = sources[index] != index
            layers.append(
                LayerGeometry(
                    index=index,
                    kind=kind,
                    head_dim=head_dim,
                    num_attention_heads=heads,
                    num_query_groups=groups,
                    k_eq_v=bool(fields["attention_k_eq_v"]) and kind == "global" and not shared,
                    kv_source=sources[index],
                    window=window if kind == "sliding" else None,
                    ffn_hidden_size=positive("intermediate_size")
                    * (2 if fields["use_double_wide_mlp"] and shared else 1),
                    rope_theta=theta,
                    rotary_fraction=fraction,
                )
            )
        for layer in layers:
            first = layers[kinds.index(layer.kind)]
            if (layer.head_dim, layer.num_query_groups) != (first.head_dim, first.num_query_groups):
                raise GeometryError(f"layer {layer.index} has other heads than layer {first.index}, of the same kind")

        moe = ple = None
        if fields["enable_moe_block"]:
            moe = MoeGeometry(positive("num_experts"), positive("top_k_experts"), positive("moe_intermediate_size"))
            if moe.topk > moe.num_experts:
                raise GeometryError(f"top_k_experts {moe.topk} is more than num_experts {moe.num_experts}")
        if fields["hidden_size_per_layer_input"]:
            ple = PleGeometry(positive("hidden_size_per_layer_input"), positive("vocab_size_per_layer_input"))
        softcap = fields["final_logit_softcapping"]
        return cls(
            model_type=model_type,
            architecture=architecture,
            multimodal=prefix == "model.language_model.",
            prefix=prefix,
            hidden_size=positive("hidden_size"),
            vocab_size=positive("vocab_size"),
            layers=tuple(layers),
            moe=moe,
            ple=ple,
            tied=tied,
            rms_norm_eps=float(fields["rms_norm_eps"]),
            initializer_range=float(fields["initializer_range"]),
            logit_softcap=None if softcap is None else float(softcap),
            max_position_embeddings=positive("max_position_embeddings"),
            pad_token_id=fields["pad_token_id"],
            bidirectional_vision=fields["use_bidirectional_attention"] == "vision",
            placeholders=None,
            vision=None,
            audio=None,
        )


def _typed(config: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = config.get(key, default)
    if not isinstance(value, kind):
        raise GeometryError(f"{key} is {value!r}, expected {kind.__name__}")
    return value


def _positive(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise GeometryError(f"{key} is {value!r}, expected a positive integer")
    if value > 2**31:
        raise GeometryError(f"{key} is {value}, which no model has")
    return value


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    if fields["attention_bias"]:
        raise GeometryError("attention_bias is not supported: no Gemma 4 model has one")
    if fields["attention_dropout"]:
        raise GeometryError("attention_dropout is not supported: no Gemma 4 model has one")
    if fields["use_bidirectional_attention"] not in (None, "vision"):
        raise GeometryError(
            f"use_bidirectional_attention={fields['use_bidirectional_attention']!r} is not supported (None or 'vision')"
        )
    if fields["hidden_activation"] != "gelu_pytorch_tanh":
        raise GeometryError(f"hidden_activation {fields['hidden_activation']!r} is not supported (gelu_pytorch_tanh)")


def _layer_kinds(layer_types: Any, num_layers: int) -> list[LayerKind]:
    if num_layers > 4096:
        raise GeometryError(f"num_hidden_layers is {num_layers}, which no model has")
    if layer_types is None:
        layer_types = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(num_layers)]
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise GeometryError(f"layer_types does not name {num_layers} layers (num_hidden_layers)")
    for index, name in enumerate(layer_types):
        if name not in _KINDS:
            raise GeometryError(f"layer_types[{index}] is {name!r}, expected one of {', '.join(_KINDS)}")
    # transformers forces the last layer to full attention, and so does every published model.
    return [*(_KINDS[name] for name in layer_types[:-1]), "global"]


def _per_layer_overrides(
    per_layer: Any, fields: Mapping[str, Any], kinds: list[LayerKind]
) -> dict[int, Mapping[str, Any]]:
    """What each layer overrides: from `per_layer_config`, or as `global_head_dim` and its sibling say."""
    overrides: dict[int, Mapping[str, Any]] = {index: {} for index in range(len(kinds))}
    if per_layer is None:
        own: dict[str, Any] = {"head_dim": fields["global_head_dim"]}
        if fields["attention_k_eq_v"] and fields["num_global_key_value_heads"] is not None:
            own["num_key_value_heads"] = fields["num_global_key_value_heads"]
        return {index: own if kind == "global" else {} for index, kind in enumerate(kinds)}
    if not isinstance(per_layer, Mapping):
        raise GeometryError("per_layer_config is not an object")
    for key, value in per_layer.items():
        try:
            index = int(key)
        except (TypeError, ValueError):
            raise GeometryError(f"per_layer_config has the key {key!r}, expected a layer number") from None
        if index not in overrides or not isinstance(value, Mapping):
            raise GeometryError(f"per_layer_config[{key!r}] names no layer or holds no object")
        unknown = set(value) - {"head_dim", "num_key_value_heads"}
        if unknown:
            raise GeometryError(f"per_layer_config[{key!r}] overrides {sorted(unknown)}, which is not supported")
        overrides[index] = value
    return overrides


def _kv_sources(kinds: list[LayerKind], num_shared: Any) -> list[int]:
    if isinstance(num_shared, bool) or not isinstance(num_shared, int) or not 0 <= num_shared < len(kinds):
        raise GeometryError(f"num_kv_shared_layers is {num_shared!r}, expected 0 to {len(kinds) - 1}")
    first_shared = len(kinds) - num_shared
    sources = list(range(len(kinds)))
    for index in range(first_shared, len(kinds)):
        producers = [i for i in range(first_shared) if kinds[i] == kinds[index]]
        if not producers:
            raise GeometryError(f"layer {index} shares K/V, but no earlier {kinds[index]} layer makes any")
        sources[index] = producers[-1]
    return sources


def _rope(parameters: Any, kind: LayerKind, head_dim: int) -> tuple[float, float]:
    """(theta, fraction of the head that turns) of a layer kind."""
    name = {"sliding": "sliding_attention", "global": "full_attention"}[kind]
    entry = parameters.get(name) if isinstance(parameters, Mapping) else None
    if not isinstance(entry, Mapping):
        raise GeometryError(f"rope_parameters has no entry for {name}")
    rope_type = entry.get("rope_type", "default")
    theta = entry.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 1:
        raise GeometryError(f"rope_parameters.{name}.rope_theta is {theta!r}, expected a number above 1")
    if rope_type == "default" and entry.get("partial_rotary_factor", 1.0) == 1.0:
        fraction = 1.0
    elif rope_type == "proportional" and entry.get("factor", 1.0) == 1.0:
        fraction = entry.get("partial_rotary_factor", 1.0)
    else:
        raise GeometryError(f"rope_parameters.{name} {dict(entry)} is not supported (default, or proportional)")
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise GeometryError(f"rope_parameters.{name}.partial_rotary_factor is {fraction!r}, expected 0 to 1")
    if head_dim % 2:
        raise GeometryError(f"head_dim {head_dim} of the {kind} layers is odd: rotary pairs need an even one")
    return float(theta), float(fraction)
