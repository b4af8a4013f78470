"""A plain model, presented as the quantized one that is to be written: what `export --quantize` copies from.

The linears of decoder layers are quantized, as the tables know them: one tensor of Megatron is what an engine fuses,
and its parts share a global scale. Everything else is as it was. Experts are stored one by one, as engines read them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.convert.dequantize import Bytes, Floats, to_float
from bridge.convert.dtypes import convert
from bridge.convert.quantize import encode, global_scale, group_scales, scales
from bridge.errors import CheckpointError, UsageError
from bridge.hf.tensors import ITEM_SIZES, RowReader, TensorLike, TensorSpec, as_bytes, check_rows, printable
from bridge.mapping import Table
from bridge.mapping.table import DECODER, Entry
from bridge.mapping.unified import in_memory

_BLOCK = 1 << 18
# The format and version of compressed-tensors that the files follow.
_VERSION = "0.20.0"


@dataclass(frozen=True)
class Preset:
    """A way of quantizing by llm-compressor's name. `group`: columns that share a scale, None for all of them.

    `weights`, `inputs`: what config.json says of them. `stored`: dtype of the codes, `suffix` of their tensor.
    """

    name: str
    kind: str
    group: int | None
    format: str
    stored: str
    suffix: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None


def _args(bits: int, kind: str, strategy: str, group: int | None = None, dynamic: bool = False) -> dict[str, Any]:
    return {
        "num_bits": bits, "type": kind, "symmetric": True, "group_size": group, "strategy": strategy,
        "dynamic": dynamic,
    }  # fmt: skip


# 32 columns: the width of a block of q4_0, for which Google's QAT checkpoints are trained, and one that divides every
# published width; 128, llm-compressor's own preset, does not divide those of 26B-A4B.
PRESETS = {
    "fp8-dynamic": Preset(
        "FP8_DYNAMIC", "F8_E4M3", None, "float-quantized", "F8_E4M3", "weight",
        _args(8, "float", "channel"), _args(8, "float", "token", dynamic=True),
    ),
    "w4a16": Preset("W4A16", "int4", 32, "pack-quantized", "I32", "weight_packed", _args(4, "int", "group", 32)),
    "nvfp4": Preset(
        "NVFP4A16", "e2m1", 16, "nvfp4-pack-quantized", "U8", "weight_packed",
        _args(4, "float", "tensor_group", 16) | {"scale_dtype": "torch.float8_e4m3fn"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Module:
    """A linear that is quantized: rows from `row` on of the matrices of `source`.

    `fused`: the same for those that share a global scale.
    """

    name: str
    source: str
    row: int
    rows: int
    columns: int
    fused: str


class QuantizedReader:
    """The tensors of a quantized folder, quantized as they are read. As thread-safe as `base`.

    `left`: linears that a group does not divide, left as they are; `dropped`: tensors that no model uses. Raises
    UsageError: an unknown preset; CheckpointError: a weight that is no number, a dtype that cannot be quantized.
    """

    def __init__(self, base: RowReader, table: Table, preset: str) -> None:
        if preset not in PRESETS:
            raise UsageError(f"--quantize {preset}: expected one of {', '.join(PRESETS)}")
        self.preset = PRESETS[preset]
        self._base, self._table = base, table
        self.tensors: dict[str, TensorLike] = {}
        self._parts: dict[str, tuple[_Module, str]] = {}
        self._fused: dict[str, list[_Module]] = {}
        self._globals: dict[str, np.float32] = {}
        self._lock = threading.Lock()
        self.left: list[str] = []
        self.dropped: list[str] = []
        for name, tensor in base.tensors.items():
            if name in table.carried and ".self_attn." in name and name.startswith(table.geometry.prefix):
                self.dropped.append(name)
                continue
            modules = self._modules(name, tuple(tensor.shape))
            if not modules:
                self.tensors[name] = tensor
            for module in modules:
                self._add(module, tensor.dtype)

    def _modules(self, name: str, shape: tuple[int, ...]) -> tuple[_Module, ...]:
        """The linears that a tensor holds; () for what is not quantized."""
        found = self._table.by_hf_name.get(name)
        if found is None or not _is_linear(found[0]):
            return ()
        entry, columns = found[0], shape[-1]
        if columns % (self.preset.group or 1):
            self.left.append(name)
            return ()
        if len(shape) == 2:
            return (_Module(name.removesuffix(".weight"), name, 0, *shape, entry.key),)
        prefix, _, kind = name.rpartition(".")
        kinds = ("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj")
        rows = shape[1] // len(kinds)
        return tuple(
            _Module(
                f"{prefix}.{expert}.{part}", name, expert * shape[1] + i * rows, rows, columns, f"{entry.key} {expert}"
            )
            for expert in range(shape[0])
            for i, part in enumerate(kinds)
        )

    def _add(self, module: _Module, dtype: str) -> None:
        preset, rows, columns = self.preset, module.rows, module.columns
        if dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError(f"tensor {printable(module.source)} is {dtype}, which is not quantized")
        groups = columns // preset.group if preset.group else 1
        width = {"F8_E4M3": columns, "int4": -(-columns // 8), "e2m1": columns // 2}[preset.kind]
        self._put(module, preset.suffix, preset.stored, (rows, width))
        self._put(module, "weight_scale", "F8_E4M3" if preset.kind == "e2m1" else dtype, (rows, groups))
        if preset.kind == "int4":
            self._put(module, "weight_shape", "I64", (2,))
        if preset.kind == "e2m1":
            self._put(module, "weight_global_scale", "F32", (1,))
            self._fused.setdefault(module.fused, []).append(module)

    def _put(self, module: _Module, suffix: str, dtype: str, shape: tuple[int, ...]) -> None:
        name = f"{module.name}.{suffix}"
        self.tensors[name] = TensorSpec(name, dtype, shape)
        self._parts[name] = (module, suffix)

    def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
        """See `RowReader`."""
        part = self._parts.get(name)
        if part is None:
            self._base.read_rows(name, start, stop, out)
            return
        module, suffix = part
        data = np.frombuffer(as_bytes(out), dtype=np.uint8)
        check_rows(name, self.tensors[name], start, stop, len(data))
        if suffix == "weight_shape":
            data[:] = np.array([module.rows, module.columns], dtype=np.int64)[start:stop].view(np.uint8)
        elif suffix == "weight_global_scale":
            data[:] = np.full(stop - start, self._global(module), dtype=np.float32).view(np.uint8)
        else:
            done = 0
            for values in self._blocks(module, start, stop):
                made = (self._scale if suffix == "weight_scale" else self._codes)(module, values).reshape(-1)
                data[done : done + len(made)] = made
                done += len(made)

    def _blocks(self, module: _Module, start: int, stop: int) -> Iterator[Floats]:
        """Rows [start, stop) of a module as float32, a bounded number at a time. Raises CheckpointError."""
        source = self._base.tensors[module.source]
        shape, item = tuple(source.shape), ITEM_SIZES[source.dtype]
        width = module.columns * item
        # Of a stack one expert is read as a whole.
        step = max(1, _BLOCK // module.columns) if len(shape) == 2 else module.rows
        for low in range(start, stop, step):
            high = min(low + step, stop)
            if len(shape) == 2:
                data = np.empty((high - low) * width, dtype=np.uint8)
                self._base.read_rows(module.source, module.row + low, module.row + high, data)
            else:
                expert, first = divmod(module.row, shape[1])
                whole = np.empty(shape[1] * width, dtype=np.uint8)
                self._base.read_rows(module.source, expert, expert + 1, whole)
                data = whole[(first + low) * width : (first + high) * width]
            values = to_float(data, source.dtype, (high - low, module.columns))
            if not np.isfinite(values).all():
                raise CheckpointError(f"tensor {printable(module.source)} has a value that is no number or infinite")
            yield values

    def _largest(self, values: Floats) -> Floats:
        """The largest absolute value of each group [rows, groups]."""
        return np.abs(values).reshape(len(values), -1, self.preset.group or values.shape[1]).max(axis=2)

    def _group_scales(self, module: _Module, values: Floats) -> Bytes:
        return group_scales(self._largest(values), self._global(module), self._dtype(module))

    def _scale(self, module: _Module, values: Floats) -> Bytes:
        """Scales as they are stored."""
        if self.preset.kind == "e2m1":
            return self._group_scales(module, values)
        dtype = self._dtype(module)
        scale = scales(self._largest(values), self.preset.kind, dtype)
        out = np.empty(scale.size * ITEM_SIZES[dtype], dtype=np.uint8)
        convert(memoryview(np.ascontiguousarray(scale)).cast("B"), "F32", memoryview(out), dtype)
        return out

    def _codes(self, module: _Module, values: Floats) -> Bytes:
        dtype = self._dtype(module)
        if self.preset.kind == "e2m1":
            codes = self._group_scales(module, values)
            scale = to_float(codes, "F8_E4M3", codes.shape) / self._global(module)
        else:
            scale = scales(self._largest(values), self.preset.kind, dtype)
        return np.ascontiguousarray(encode(values, scale, self.preset.kind, dtype))

    def _dtype(self, module: _Module) -> str:
        return self._base.tensors[module.source].dtype

    def _global(self, module: _Module) -> np.float32:
        """The global scale of a module and of those that an engine fuses with it; found once, in a pass of its own."""
        with self._lock:
            if module.fused not in self._globals:
                fused = self._fused[module.fused]
                largest = [np.abs(values).max() for each in fused for values in self._blocks(each, 0, each.rows)]
                self._globals[module.fused] = global_scale(np.float32(max(largest)), self._dtype(module))
            return self._globals[module.fused]

    def config(self, plain: Mapping[str, Any], notify: Callable[[str], None] | None = None) -> dict[str, Any]:
        """config.json of the quantized folder; `notify` gets what was quantized and what was not."""
        modules = len({module.name for module, _ in self._parts.values()})
        said = [f"{modules} linears of decoder layers are quantized ({self.preset.name}), everything else is as it was"]
        if self.left:
            said.append(
                f"{len(self.left)} tensors of linears stay as they are, since groups of {self.preset.group} do not "
                f"divide their columns: {_first(self.left)}"
            )
        if self.dropped:
            said.append(f"{len(self.dropped)} tensors that no model uses are left out: {_first(self.dropped)}")
        if notify is not None:
            for line in said:
                notify(line)
        group = {
            "targets": ["Linear"],
            "weights": dict(self.preset.weights),
            "input_activations": None if self.preset.inputs is None else dict(self.preset.inputs),
            "output_activations": None,
            "format": self.preset.format,
        }
        quantization = {
            "quant_method": "compressed-tensors",
            "format": self.preset.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": self.ignored(),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
            "version": _VERSION,
        }
        return {**plain, "quantization_config": quantization}

    def ignored(self) -> list[str]:
        """Modules with a matrix that is not quantized, by their names on disk and in transformers' memory."""
        names = {"lm_head"}
        for name, tensor in self.tensors.items():
            if name not in self._parts and name.endswith(".weight") and len(tensor.shape) == 2:
                names |= {found.removesuffix(".weight") for found in (name, in_memory(name, self._table.geometry))}
        return sorted(names)


def _is_linear(entry: Entry) -> bool:
    return entry.row.part is DECODER and entry.layer is not None and ".linear_" in entry.key


def _first(names: list[str]) -> str:
    return names[0] + (", ..." if len(names) > 1 else "")
