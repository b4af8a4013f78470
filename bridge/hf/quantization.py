"""What a folder says of its quantized weights: `quantization_config` of config.json, ModelOpt's hf_quant_config.json.

Three dialects are read: compressed-tensors (FP8 and int8 by tensor, channel, group or block, packed int4 and int8,
NVFP4), ModelOpt's NVFP4, and FP8 with the block scales of DeepSeek and transformers. All say the same thing: a weight
is `(code - zero point) * scale` of its block. Whatever is not understood is refused by name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bridge.errors import CheckpointError
from bridge.hf.tensors import printable

# ModelOpt writes it beside config.json, older versions of it instead of `quantization_config`.
MODELOPT_FILE = "hf_quant_config.json"
# Scales of activations and of the cache of keys and values: an engine's affair, no part of a weight.
ACTIVATION_SCALES = frozenset(
    f"{what}_{kind}" for what in ("input", "output", "q", "k", "v") for kind in ("scale", "zero_point", "global_scale")
)
_READ = "compressed-tensors (FP8, int8, int4, NVFP4), ModelOpt NVFP4, FP8 with block scales"
_INSTEAD = f"take the checkpoint that is not quantized, or one of those that are read: {_READ}"
_MAX_PATTERN = 1000


@dataclass(frozen=True)
class Scheme:
    """How a weight X [rows, columns] is stored: its codes under X + `codes`, a scale for each block under X + `scale`.

    `name`: for people. `kind`: F8_E4M3, I8, int4, int8 (packed into int32 along the columns), e2m1 (two in a byte).
    `block`: how many rows and how many columns share a scale, None for all of them. `zero_point`, `shape`,
    `global_scale`: suffixes like `scale`, "" where there is no such tensor; the scale is divided by the global one, of
    which a `reciprocal` is stored. `computed`: the dtype that the product is rounded to, "" for that of the scale.
    """

    name: str
    kind: str
    block: tuple[int | None, int | None]
    codes: str = ""
    scale: str = "_scale"
    zero_point: str = ""
    shape: str = ""
    global_scale: str = ""
    reciprocal: bool = False
    computed: str = ""

    @property
    def companions(self) -> tuple[str, ...]:
        """Suffixes of the tensors that belong to the codes."""
        return tuple(filter(None, (self.scale, self.zero_point, self.shape, self.global_scale)))


@dataclass(frozen=True)
class Quantization:
    """`groups`: schemes, and the modules that each is for. `ignore`: modules that are stored as they are.

    Both name modules as compressed-tensors does: a whole name, `re:` and an expression, or a class; those of ModelOpt
    are patterns with `*`.
    """

    method: str
    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...] = ()
    patterns: bool = False
    notices: tuple[str, ...] = field(default=())

    def scheme_of(self, module: str) -> Scheme:
        """The scheme of a module that has scales. Raises CheckpointError: it should have none, or which is unknown."""
        if any(self._matches(pattern, module) for pattern in self.ignore):
            raise CheckpointError(
                f"{printable(module)} has scales, but quantization_config says that it is not quantized"
            )
        if len(self.groups) == 1:
            return self.groups[0][1]
        targets = [(target, scheme) for targets, scheme in self.groups for target in targets]
        # A whole name counts more than an expression, and that more than a class.
        for kind in ("name", "expression", "class"):
            for target, scheme in targets:
                if _target_kind(target) == kind and self._matches(target, module):
                    return scheme
        raise CheckpointError(f"{printable(module)} has scales, but no group of quantization_config is for it")

    def _matches(self, target: str, module: str) -> bool:
        if self.patterns:
            return fnmatch.fnmatchcase(module, target)
        kind = _target_kind(target)
        if kind == "expression":
            return _expression(target).match(module) is not None
        if kind == "class":
            return (target == "Embedding") == module.rpartition(".")[2].startswith("embed_tokens")
        return target == module


def _target_kind(target: str) -> str:
    if target.startswith("re:"):
        return "expression"
    return "class" if target[:1].isupper() and target.isidentifier() else "name"


def _expression(target: str) -> re.Pattern[str]:
    """Raises CheckpointError: none, or one that may not come to an end (a repeated group)."""
    text = target.removeprefix("re:")
    if len(text) > _MAX_PATTERN or re.search(r"(?<!\\)\)[*+{]", text):
        raise CheckpointError(f"quantization_config: the expression {printable(text)} is too long or repeats a group")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"quantization_config: {printable(text)} is no expression ({printable(str(error))})"
        ) from None


def is_marker(config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config only says what 16-bit weights were trained for: Google's q4_0 without a method."""
    return config.get("quant_type") == "q4_0" and not {"quant_method", "load_in_4bit", "load_in_8bit"} & set(config)


def read_quantization(config: Any, modelopt: Mapping[str, Any] | None = None) -> Quantization | None:
    """What config.json's `quantization_config` says, or, where it has none, what hf_quant_config.json does.

    None: weights that are not quantized. Raises CheckpointError: a method, format or scheme that is not read.
    """
    if config is None or config == {} or (isinstance(config, Mapping) and is_marker(config)):
        return None if modelopt is None else _modelopt(_section(modelopt, "quantization", MODELOPT_FILE))
    if not isinstance(config, Mapping):
        raise CheckpointError("quantization_config is not an object")
    method = config.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    if method == "modelopt":
        return _modelopt(config)
    if method == "fp8":
        return _fp8(config)
    if method == "bitsandbytes" or any(str(key).startswith(("load_in_", "bnb_")) for key in config):
        raise CheckpointError(
            "quantization_config.quant_method is bitsandbytes, whose 4-bit weights no other program reads; "
            f"such weights are made while loading: {_INSTEAD}"
        )
    raise CheckpointError(f"quantization_config.quant_method is {printable(method)}, which is not read; {_INSTEAD}")


def _section(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = config.get(key)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where}: {key} is not an object")
    return found


def _texts(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = config.get(key) or []
    if not isinstance(found, Sequence) or isinstance(found, str) or not all(isinstance(item, str) for item in found):
        raise CheckpointError(f"quantization_config.{key} is not a list of names")
    return tuple(found)


# --- compressed-tensors ---


def _compressed_tensors(config: Mapping[str, Any]) -> Quantization:
    for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        if config.get(key):
            raise CheckpointError(f"quantization_config.{key} is set: sparse or rotated weights are not read")
    groups = []
    for name, group in _section(config, "config_groups", "quantization_config").items():
        where = f"quantization_config.config_groups.{printable(name)}"
        if not isinstance(group, Mapping):
            raise CheckpointError(f"{where} is not an object; a preset by its name is not read")
        if group.get("weights") is None:
            continue  # activations alone: an engine's affair
        scheme = _weights(_section(group, "weights", where), group.get("format") or config.get("format"), where)
        groups.append((_texts(group, "targets"), scheme))
    if not groups:
        raise CheckpointError("quantization_config.config_groups quantizes no weights")
    for pattern in (*_texts(config, "ignore"), *(target for targets, _ in groups for target in targets)):
        if _target_kind(pattern) == "expression":
            _expression(pattern)
    return Quantization("compressed-tensors", tuple(groups), _texts(config, "ignore"))


_WEIGHTS_KEYS = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
}
# (type, bits) -> the format that stores it plainly, and its codes
_PLAIN = {("float", 8): ("float-quantized", "F8_E4M3", "FP8"), ("int", 8): ("int-quantized", "I8", "int8")}


def _weights(weights: Mapping[str, Any], format_name: Any, where: str) -> Scheme:
    """The scheme that QuantizationArgs of weights and a format mean. Raises CheckpointError."""
    for key in sorted(map(str, set(weights) - _WEIGHTS_KEYS)):
        raise CheckpointError(f"{where}.weights has the unknown key {printable(key)}")
    if weights.get("dynamic") or weights.get("actorder") in ("group", "dynamic", True):
        key = "dynamic" if weights.get("dynamic") else "actorder"
        raise CheckpointError(f"{where}.weights.{key} is {weights[key]}: such weights are not read; {_INSTEAD}")
    bits, number, symmetric = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("symmetric", True)
    block, words = _block(weights, where)
    if format_name in (None, "mixed-precision", "naive-quantized"):
        format_name = "nvfp4-pack-quantized" if (number, bits) == ("float", 4) else None
        format_name = format_name or (_PLAIN.get((number, bits)) or ("pack-quantized",))[0]
    if format_name == "nvfp4-pack-quantized" and (number, bits, block, symmetric) == ("float", 4, (1, 16), True):
        return Scheme(
            "NVFP4, groups of 16", "e2m1", block, codes="_packed", global_scale="_global_scale", computed="BF16"
        )
    if format_name == "pack-quantized" and number == "int" and bits in (4, 8) and (symmetric or block != (None, None)):
        zero = "" if symmetric else "_zero_point"
        label = f"int{bits} packed, {words}{'' if symmetric else ', asymmetric'}"
        return Scheme(label, f"int{bits}", block, codes="_packed", shape="_shape", zero_point=zero)
    plain = _PLAIN.get((number, bits))
    if plain is not None and format_name == plain[0] and (symmetric or number == "int"):
        label = f"{plain[2]}, {words}{'' if symmetric else ', asymmetric'}"
        return Scheme(label, plain[1], block, zero_point="" if symmetric else "_zero_point")
    raise CheckpointError(
        f"{where}: {printable(format_name)} of {printable(str(bits))}-bit {printable(number)}, {words}"
        f"{'' if symmetric else ', asymmetric'}, is not read; {_INSTEAD}"
    )


def _block(weights: Mapping[str, Any], where: str) -> tuple[tuple[int | None, int | None], str]:
    """Rows and columns that share a scale, and that in words."""
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if strategy == "tensor":
        return (None, None), "a scale per tensor"
    if strategy == "channel":
        return (1, None), "a scale per channel"
    if strategy in ("group", "tensor_group") and _positive(group):
        return (1, group), f"groups of {group}"
    shape = weights.get("block_structure")
    if isinstance(shape, str):
        shape = [int(size) if size.isdecimal() else 0 for size in shape.split("x")]
    if strategy == "block" and isinstance(shape, list) and len(shape) == 2 and all(map(_positive, shape)):
        return (shape[0], shape[1]), f"blocks of {shape[0]} x {shape[1]}"
    raise CheckpointError(
        f"{where}.weights: strategy {printable(strategy)} with group_size {printable(str(group))} is not read; "
        f"{_INSTEAD}"
    )


def _positive(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


# --- ModelOpt, and FP8 as DeepSeek's ---


def _modelopt(config: Mapping[str, Any]) -> Quantization:
    algorithm, group = config.get("quant_algo"), config.get("group_size", 16)
    for inner in (config.get("config_groups") or {}).values() if isinstance(config.get("config_groups"), dict) else ():
        group = inner.get("weights", {}).get("group_size", group) if isinstance(inner, Mapping) else group
    if algorithm != "NVFP4" or group != 16:
        raise CheckpointError(
            f"ModelOpt's quant_algo {printable(algorithm)} with groups of {printable(str(group))} is not read; "
            f"{_INSTEAD}"
        )
    scheme = Scheme("NVFP4, groups of 16", "e2m1", (1, 16), global_scale="_scale_2", reciprocal=True, computed="BF16")
    ignore = _texts(config, "exclude_modules") or _texts(config, "ignore")
    return Quantization("ModelOpt", (((), scheme),), ignore, patterns=True)


def _fp8(config: Mapping[str, Any]) -> Quantization:
    size = config.get("weight_block_size")
    if config.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"quantization_config.fmt is {printable(config['fmt'])}, expected e4m3")
    if config.get("scale_fmt") not in (None, "float"):
        raise CheckpointError(f"quantization_config.scale_fmt is {printable(config['scale_fmt'])}, which is not read")
    if not isinstance(size, Sequence) or len(size) != 2 or not all(map(_positive, size)):
        raise CheckpointError(
            f"quantization_config: FP8 whose weight_block_size is {printable(str(size))} is not read; {_INSTEAD}"
        )
    rows, columns = size
    scheme = Scheme(
        f"FP8, blocks of {rows} x {columns}", "F8_E4M3", (rows, columns), scale="_scale_inv", computed="F32"
    )
    # Parts of names here, of modules that have no scales: that they have none is all there is to check.
    return Quantization("FP8 with block scales", (((), scheme),))
