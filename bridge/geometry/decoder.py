"""The layers of the decoder, read from the text section of a config.

Defaults are those of transformers (`configuration_gemma4.py`, `configuration_gemma4_unified.py`): a saved config may
leave out what equals them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bridge.errors import GeometryError
from bridge.geometry.fields import Fields, positive, rotary, short

LayerKind = Literal["sliding", "global"]
# `attention` is the old name of `full_attention`.
_KINDS: dict[str, LayerKind] = {
    "sliding_attention": "sliding",
    "full_attention": "global",
    "attention": "global",
}
_NAMES: dict[LayerKind, str] = {"sliding": "sliding_attention", "global": "full_attention"}

_DEFAULTS: dict[str, Any] = {
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
    "rope_parameters": None,
    "rope_scaling": None,
    "partial_rotary_factor": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": 512,
    "layer_types": None,
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
    "per_layer_config": None,
}
# The unified text class has no PLE and no MoE fields at all, and other defaults for some of the rest.
_UNIFIED_DEFAULTS = _DEFAULTS | {
    "max_position_embeddings": 262_144,
    "sliding_window": 1024,
    "use_bidirectional_attention": "vision",
    "hidden_size_per_layer_input": 0,
}
# In published configs, where they are null.
_IGNORED = ("expert_intermediate_size",)
_ROPE: dict[str, dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
# The `kv_source` of a drafter's layer, before it is known of which target (`drafter.bound`).
EXTERNAL = -1


@dataclass(frozen=True)
class LayerGeometry:
    """One decoder layer.

    `kv_source` is the layer whose normed keys and values this one reads; it equals `index` where the layer makes its
    own. Of a drafter (`external_kv`) it is a layer of the target, or `EXTERNAL`. `k_eq_v` says that values come from
    the key projection. `window` is in tokens, None on global layers.
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
    external_kv: bool = False

    @property
    def shares_kv(self) -> bool:
        """Whether the layer has no key and value projections and reads those of `kv_source`."""
        return self.external_kv or self.kv_source != self.index

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


def text_fields(name: str, section: Any, unified: bool, notices: list[str], also: dict[str, Any]) -> Fields:
    """The text section of a config; `also`: defaults of keys that only the caller reads. Raises GeometryError."""
    fields = Fields(name, section, (_UNIFIED_DEFAULTS if unified else _DEFAULTS) | also, notices, ignored=_IGNORED)
    if unified:
        fields.must("enable_moe_block", False)
        fields.must("hidden_size_per_layer_input", 0)
    fields.must("attention_bias", False, "no Gemma 4 model has one")
    fields.must("attention_dropout", 0.0, "no Gemma 4 model has one")
    fields.must("hidden_activation", "gelu_pytorch_tanh")
    if fields["use_bidirectional_attention"] not in (None, "vision"):
        given = short(fields["use_bidirectional_attention"])
        raise GeometryError(
            f"{fields.where('use_bidirectional_attention')}={given} is not supported (None or 'vision')"
        )
    return fields


def read_layers(fields: Fields, notices: list[str], *, external_kv: bool = False) -> tuple[LayerGeometry, ...]:
    """One row per layer; `external_kv`: all of them read another model's keys and values. Raises GeometryError."""
    names = _layer_types(fields, notices)
    kinds = [_KINDS[name] for name in names]
    overrides = _per_layer_overrides(fields, names, notices)
    sources = [EXTERNAL] * len(kinds) if external_kv else _kv_sources(fields, kinds)
    heads, window, ffn = (fields.positive(k) for k in ("num_attention_heads", "sliding_window", "intermediate_size"))
    k_eq_v, double_wide = fields.flag("attention_k_eq_v"), fields.flag("use_double_wide_mlp")
    rope = {kind: _rope(fields, kind) for kind in _NAMES if kind in kinds}
    layers: list[LayerGeometry] = []
    for index, kind in enumerate(kinds):
        head_fields = {key: overrides[index].get(key, fields[key]) for key in ("head_dim", "num_key_value_heads")}
        head_dim = positive(head_fields["head_dim"], f"{fields.where('head_dim')} of layer {index}")
        groups = positive(head_fields["num_key_value_heads"], f"{fields.where('num_key_value_heads')} of layer {index}")
        if heads % groups:
            raise GeometryError(f"layer {index}: {heads} attention heads do not divide into {groups} groups")
        if head_dim % 2:
            raise GeometryError(f"head_dim {head_dim} of the {kind} layers is odd: rotary pairs need an even one")
        theta, fraction = rope[kind]
        shared = sources[index] != index
        layers.append(
            LayerGeometry(
                index=index,
                kind=kind,
                head_dim=head_dim,
                num_attention_heads=heads,
                num_query_groups=groups,
                k_eq_v=k_eq_v and kind == "global" and not shared,
                kv_source=sources[index],
                external_kv=external_kv,
                window=window if kind == "sliding" else None,
                ffn_hidden_size=ffn * (2 if double_wide and shared else 1),
                rope_theta=theta,
                rotary_fraction=fraction,
            )
        )
        first = layers[kinds.index(kind)]
        if (head_dim, groups) != (first.head_dim, first.num_query_groups):
            raise GeometryError(f"layer {index} has other heads than layer {first.index}, of the same kind")
    return tuple(layers)


def read_moe(fields: Fields) -> MoeGeometry | None:
    """The experts, None where there are none. Raises GeometryError."""
    if not fields.flag("enable_moe_block"):
        return None
    sizes = (fields.positive(key) for key in ("num_experts", "top_k_experts", "moe_intermediate_size"))
    moe = MoeGeometry(*sizes)
    if moe.topk > moe.num_experts:
        raise GeometryError(f"top_k_experts {moe.topk} is more than num_experts {moe.num_experts}")
    return moe


def read_ple(fields: Fields) -> PleGeometry | None:
    """The per-layer embeddings, None where there are none. Raises GeometryError."""
    dim = fields.natural("hidden_size_per_layer_input")
    return PleGeometry(dim, fields.positive("vocab_size_per_layer_input")) if dim else None


def _layer_types(fields: Fields, notices: list[str]) -> list[str]:
    count, names = fields.positive("num_hidden_layers"), fields["layer_types"]
    where = fields.where("layer_types")
    if count > 4096:
        raise GeometryError(f"{fields.where('num_hidden_layers')} is {count}, which no model has")
    if names is None:
        names = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)]
    if not isinstance(names, list) or len(names) != count:
        raise GeometryError(f"{where} does not name {count} layers (num_hidden_layers)")
    for index, name in enumerate(names):
        if not isinstance(name, str) or name not in _KINDS:
            known = ", ".join(_NAMES.values())
            raise GeometryError(f"{where}[{index}] is {short(name)}, expected one of {known}")
    if names[-1] == "sliding_attention" and "layer_types" in fields.given:
        notices.append(f"{where}: the last layer is full_attention, as in transformers, whatever it says")
    return [*names[:-1], "full_attention"]


def _per_layer_overrides(fields: Fields, names: list[str], notices: list[str]) -> list[Mapping[str, Any]]:
    """What each layer overrides: from `per_layer_config`, or as `global_head_dim` and its sibling say."""
    per_layer, old = fields["per_layer_config"], ("global_head_dim", "num_global_key_value_heads")
    where = fields.where("per_layer_config")
    if "per_layer_config" not in fields.given:
        global_fields: dict[str, Any] = {"head_dim": fields["global_head_dim"]}
        if fields["num_global_key_value_heads"] is not None:
            if fields.flag("attention_k_eq_v"):
                global_fields["num_key_value_heads"] = fields["num_global_key_value_heads"]
            else:
                notices.append(f"{fields.where(old[1])} counts only with attention_k_eq_v")
        return [global_fields if name == "full_attention" else {} for name in names]
    # The older fields count only where the key is absent, even if it is null.
    notices.extend(f"{fields.where(key)} does not count beside per_layer_config" for key in old if key in fields.given)
    if per_layer is not None and not isinstance(per_layer, Mapping):
        raise GeometryError(f"{where} is not an object")
    overrides: list[Mapping[str, Any]] = [{} for _ in names]
    for key, value in (per_layer or {}).items():
        try:
            index = int(key)
        except (TypeError, ValueError):
            raise GeometryError(f"{where} has the key {short(key)}, expected a layer number") from None
        if not 0 <= index < len(names) or not isinstance(value, Mapping):
            raise GeometryError(f"{where}[{short(key)}] names no layer or holds no object")
        unknown = set(value) - {"head_dim", "num_key_value_heads"}
        if unknown:
            raise GeometryError(f"{where}[{short(key)}] overrides {short(min(unknown))}, which is not supported")
        overrides[index] = value
    return overrides


def _kv_sources(fields: Fields, kinds: list[LayerKind]) -> list[int]:
    num_shared = fields.natural("num_kv_shared_layers")
    if num_shared >= len(kinds):
        where = fields.where("num_kv_shared_layers")
        raise GeometryError(f"{where} is {num_shared}, expected 0 to {len(kinds) - 1}")
    first_shared = len(kinds) - num_shared
    sources = list(range(len(kinds)))
    for index in range(first_shared, len(kinds)):
        producers = [i for i in range(first_shared) if kinds[i] == kinds[index]]
        if not producers:
            raise GeometryError(f"layer {index} shares K/V, but no earlier {kinds[index]} layer makes any")
        sources[index] = producers[-1]
    return sources


def _rope(fields: Fields, kind: LayerKind) -> tuple[float, float]:
    """(theta, fraction of the frequencies that turns) of a layer kind.

    `rope_scaling`, the old name, replaces `rope_parameters` wherever it is given: transformers sets it afterwards.
    """
    key = "rope_scaling" if "rope_scaling" in fields.given else "rope_parameters"
    parameters = fields[key]
    if parameters is None and key == "rope_scaling":
        raise GeometryError(f"{fields.where(key)} is null, which transformers lets replace rope_parameters: remove it")
    parameters = _ROPE if parameters is None else parameters
    name = _NAMES[kind]
    where = f"{fields.where(key)}.{name}"
    if not isinstance(parameters, Mapping) or name not in parameters:
        raise GeometryError(f"{fields.where(key)} has no entry for {name}")
    others = set(parameters) - set(_NAMES.values())
    if others:
        raise GeometryError(f"{fields.where(key)} has the key {short(min(others))}, expected {' and '.join(_ROPE)}")
    factor = "partial_rotary_factor"
    rope_type, theta, entry = rotary(parameters[name], where, (factor, "factor"), {})
    beside = fields[factor] if rope_type == "proportional" and fields[factor] is not None else 1.0
    fraction = entry.get(factor, beside)
    if type(fraction) not in (int, float) or not 0 < fraction <= 1:
        raise GeometryError(f"{where}.partial_rotary_factor is {short(fraction)}, expected 0 to 1")
    if rope_type == "default":
        supported = fraction == 1.0
    else:
        supported = rope_type == "proportional" and type(entry.get("factor", 1.0)) is not bool
        supported = supported and entry.get("factor", 1.0) == 1.0
    if not supported:
        raise GeometryError(f"{where} {short(dict(entry))} is not supported (default, or proportional)")
    return theta, float(fraction)
