"""One section of a Hugging Face config, read strictly: what a key must be, and what becomes of one that is not read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bridge.errors import GeometryError

# Keys that every transformers config may have and that change nothing of what a model computes.
_IGNORED = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation",
        "_name_or_path", "architectures", "attn_implementation", "bos_token_id", "chunk_size_feed_forward",
        "eos_token_id", "experts_implementation", "id2label", "initializer_range", "label2id", "model_type",
        "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
        "return_dict", "transformers_version", "use_cache",
    }
)  # fmt: skip
# Keys that a config class does not declare, and that transformers obeys all the same; the values that mean nothing.
_OBEYED: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (None,),
    "attribute_map": ({},),
    "configuration_files": (),
    "distributed_config": (None,),
    "fusion_config": (None,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "layer_types": (None,),
    "per_layer_config": (None,),
    "quantization_config": (None, {}),
    "sliding_window": (None,),
    "sub_configs": (),
    "sub_configs_defaults": (),
    "transformers_weights": (None,),
}
_DTYPES = (None, "bfloat16", "float16", "float32", "float64")


class Fields:
    """A section over its defaults; every reading names the section and the key in its error.

    `aliases` are keys that set another one, as properties of the config class do. `ignored` are keys of this section
    that change nothing of the model. Any other key is refused where transformers is known to obey it, and else told in
    `notices`, once: transformers keeps it as an attribute that nothing reads. Raises GeometryError.
    """

    def __init__(
        self,
        name: str,
        section: Any,
        defaults: Mapping[str, Any],
        notices: list[str],
        *,
        aliases: Mapping[str, str] | None = None,
        ignored: Sequence[str] = (),
    ) -> None:
        if not isinstance(section, Mapping):
            raise GeometryError(f"{name or 'the config'} is not an object")
        self._prefix = f"{name}." if name else ""
        self.given = frozenset(section)
        self._values = dict(defaults)
        unknown, renamed = [], {}
        for key, value in section.items():
            if not isinstance(key, str):
                raise GeometryError(f"{self._prefix}{key!r} is a key that is no text")
            if key in defaults:
                self._values[key] = value
            elif aliases is not None and key in aliases:
                renamed[aliases[key]] = value
            elif key in _OBEYED:
                if not any(type(value) is type(none) and value == none for none in _OBEYED[key]):
                    raise GeometryError(f"{self._prefix}{key} is {short(value)}, which is not supported")
            elif key in ("dtype", "torch_dtype"):
                self._check_dtype(key, value)
            elif key not in _IGNORED and key not in ignored:
                if key.startswith("_"):
                    raise GeometryError(f"{self._prefix}{key} is a private key, which is not supported")
                unknown.append(key)
        self._values |= renamed
        if unknown:
            listed = ", ".join(short(key) for key in sorted(unknown)[:8]) + (", ..." if len(unknown) > 8 else "")
            notices.append(f"{name or 'the config'} has keys that no part of the model reads: {listed}")

    def _check_dtype(self, key: str, value: Any) -> None:
        if not any(value is None if name is None else value == name for name in _DTYPES):
            raise GeometryError(f"{self._prefix}{key} is {short(value)}, expected one of float32, bfloat16, float16")

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def where(self, key: str) -> str:
        """How errors call a key."""
        return self._prefix + key

    def positive(self, key: str) -> int:
        """A size: 1 to 2**31."""
        return positive(self[key], self.where(key))

    def natural(self, key: str) -> int:
        """0 to 2**31."""
        value = self[key]
        return 0 if type(value) is int and value == 0 else positive(value, self.where(key), "0 or a positive integer")

    def number(self, key: str) -> float:
        """A finite number above 0. transformers takes no integer where it expects a float, and neither does this."""
        value = self[key]
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise GeometryError(f"{self.where(key)} is {short(value)}, expected a positive finite number such as 1.0")
        return value

    def flag(self, key: str) -> bool:
        value = self[key]
        if not isinstance(value, bool):
            raise GeometryError(f"{self.where(key)} is {short(value)}, expected true or false")
        return value

    def token(self, key: str) -> int | None:
        """A token id, or None."""
        value = self[key]
        if value is not None and (type(value) is not int or not 0 <= value <= 2**31):
            raise GeometryError(f"{self.where(key)} is {short(value)}, expected a token id")
        return value

    def must(self, key: str, value: Any, why: str = "") -> None:
        """Refuse any other value than the one that is supported. A null means the default of nothing special."""
        given = self[key]
        same = given == value and isinstance(given, bool) == isinstance(value, bool)
        if given is not None and not same:
            hint = f" ({why})" if why else ""
            raise GeometryError(f"{self.where(key)} is {short(given)}; only {value!r}{hint} is supported")


def positive(value: Any, where: str, expected: str = "a positive integer") -> int:
    """`value`, if it is a size that a model may have. Raises GeometryError."""
    if type(value) is not int or value <= 0:
        raise GeometryError(f"{where} is {short(value)}, expected {expected}")
    if value > 2**31:
        raise GeometryError(f"{where} is {short(value)}, which no model has")
    return value


def rotary(
    entry: Any, where: str, known: Sequence[str], defaults: Mapping[str, Any]
) -> tuple[str, float, dict[str, Any]]:
    """(rope_type, theta, the whole entry) of one set of rotary parameters, in which `type` is the old `rope_type`.

    `defaults` are the section's own keys, which count where the entry lacks them. Raises GeometryError.
    """
    if not isinstance(entry, Mapping):
        raise GeometryError(f"{where} has no entry that is an object")
    unknown = set(entry) - {"rope_type", "type", "rope_theta", *known}
    if unknown:
        raise GeometryError(f"{where} has the key {short(min(map(str, unknown)))}, which is not supported")
    whole = {**defaults, **entry}
    theta: Any = whole.get("rope_theta")
    rope_type = whole.get("rope_type", whole.get("type", "default"))
    if not isinstance(rope_type, str):
        raise GeometryError(f"{where}.rope_type is {short(rope_type)}, expected a name")
    if type(theta) not in (int, float) or not 1 < theta < math.inf:
        raise GeometryError(f"{where}.rope_theta is {short(theta)}, expected a number above 1")
    return rope_type, float(theta), whole


def short(value: Any) -> str:
    """A value of a config as a few printable characters."""
    if type(value) is int and abs(value) > 10**30:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else text[:77] + "..."
