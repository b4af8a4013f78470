"""A plain model, presented as the quantized one that is to be written: what `export --quantize` copies from.

The linears of decoder layers are quantized, as the tables know them: one tensor of Megatron is what an engine fuses,
and its parts share a global scale. Everything else is as it was. Experts are stored one by one, as engines read them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge.convert.dequantize import Bytes, Floats, to_float
from bridge.convert.dtypes import convert
from bridge.convert.quantize import encode, global_scale, group_scales, scales
from bridge.convert.quantized_folder import DequantizedFolder, Matrix, open_hf_folder
from bridge.convert.threads import parallel
from bridge.errors import CheckpointError, UsageError
from bridge.hf.folder import TensorInfo
from bridge.hf.quantization import Scheme
from bridge.hf.tensors import ITEM_SIZES, RowReader, TensorLike, TensorSpec, as_bytes, check_rows, printable
from bridge.mapping import Table
from bridge.mapping.unified import in_memory

# Values quantized at once: what is made of them on the way stays within the cache, and within memory that a process
# keeps, which one that is given back and asked for again costs more than the arithmetic.
_BLOCK = 1 << 17
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

    def stores(self, scheme: Scheme | None) -> bool:
        """Whether a weight of `scheme` is stored as this preset stores it, but for how its scales were chosen."""
        if scheme is None or scheme.zero_point or scheme.reciprocal:
            return False
        return (scheme.kind, scheme.block, f"weight{scheme.codes}") == (self.kind, (1, self.group), self.suffix)


def _args(bits: int, kind: str, strategy: str, group: int | None = None, dynamic: bool = False) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "group_size": group,
        "strategy": strategy,
        "dynamic": dynamic,
    }


# 32 columns: the width of a block of q4_0, for which Google's QAT checkpoints are trained, and one that divides every
# published width; 128, llm-compressor's own preset, does not divide those of 26B-A4B.
PRESETS = {
    "fp8-dynamic": Preset(
        "FP8_DYNAMIC",
        "F8_E4M3",
        None,
        "float-quantized",
        "F8_E4M3",
        "weight",
        _args(8, "float", "channel"),
        _args(8, "float", "token", dynamic=True),
    ),
    "w4a16": Preset("W4A16", "int4", 32, "pack-quantized", "I32", "weight_packed", _args(4, "int", "group", 32)),
    "nvfp4": Preset(
        "NVFP4A16",
        "e2m1",
        16,
        "nvfp4-pack-quantized",
        "U8",
        "weight_packed",
        _args(4, "float", "tensor_group", 16) | {"scale_dtype": "torch.float8_e4m3fn"},
    ),
}


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

    `origin`: a quantized folder; linears whose weights are still, bit for bit, what it stands for keep its codes and
    scales, if they are stored as the preset would, and all of those that share a global scale.

    `left`: linears that a group does not divide, left as they are; `dropped`: tensors that no model uses. Raises
    UsageError: an unknown preset; CheckpointError: a weight that is no number, a dtype that cannot be quantized.
    """

    def __init__(
        self,
        base: RowReader,
        table: Table,
        preset: str,
        origin: DequantizedFolder | None = None,
        workers: int = 2,
    ) -> None:
        if preset not in PRESETS:
            raise UsageError(f"--quantize {preset}: expected one of {', '.join(PRESETS)}")
        self.preset = PRESETS[preset]
        self._base, self._table, self._origin = base, table, origin
        self._reused: dict[str, Matrix] = {}
        self.tensors: dict[str, TensorLike] = {}
        self._parts: dict[str, tuple[_Module, str]] = {}
        self._fused: dict[str, list[_Module]] = {}
        self._globals: dict[str, np.float32] = {}
        self._of_rows: dict[str, Floats] = {}
        self._lock = threading.Lock()
        self.left: list[str] = []
        self.dropped: list[str] = []
        found: list[tuple[str, TensorLike, tuple[_Module, ...]]] = []
        for name, tensor in base.tensors.items():
            if name in table.carried and ".self_attn." in name and name.startswith(table.geometry.prefix):
                self.dropped.append(name)
                continue
            modules = self._modules(name, tuple(tensor.shape))
            found.append((name, tensor, modules))
            for module in modules:
                self._fused.setdefault(module.fused, []).append(module)
        if origin is not None:
            self._reused = self._unchanged(origin, workers)
        for name, tensor, modules in found:
            if not modules:
                self.tensors[name] = tensor
            for module in modules:
                self._add(module, tensor.dtype)

    def _modules(self, name: str, shape: tuple[int, ...]) -> tuple[_Module, ...]:
        """The linears that a tensor holds; () for what is not quantized."""
        found = self._table.by_hf_name.get(name)
        if found is None or not found[0].is_layer_linear:
            return ()
        entry, columns = found[0], shape[-1]
        if columns % (self.preset.group or 1):
            self.left.append(name)
            return ()
        if len(shape) == 2:
            return (_Module(name.removesuffix(".weight"), name, 0, *shape, entry.key),)
        prefix, _, kind = name.rpartition(".")
        projections = ("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj")
        rows = shape[1] // len(projections)
        return tuple(
            _Module(
                f"{prefix}.{expert}.{part}", name, expert * shape[1] + i * rows, rows, columns, f"{entry.key} {expert}"
            )
            for expert in range(shape[0])
            for i, part in enumerate(projections)
        )

    def _add(self, module: _Module, dtype: str) -> None:
        preset, rows, columns = self.preset, module.rows, module.columns
        reused = self._reused.get(module.name)
        if reused is not None:
            for suffix, info in _stored(reused).items():
                self._put(module, suffix, info.dtype, tuple(info.shape))
            return
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
        reused = self._reused.get(module.name)
        if reused is not None and self._origin is not None:
            self._origin.read_stored(_stored(reused)[suffix].name, start, stop, data)
        elif suffix == "weight_shape":
            data[:] = np.array([module.rows, module.columns], dtype=np.int64)[start:stop].view(np.uint8)
        elif suffix == "weight_global_scale":
            data[:] = np.full(stop - start, self._global(module), dtype=np.float32).view(np.uint8)
        else:
            done = 0
            for low, values in self._blocks(module, start, stop):
                make = self._scale if suffix == "weight_scale" else self._codes
                made = make(module, values, low).reshape(-1)
                data[done : done + len(made)] = made
                done += len(made)

    def _unchanged(self, origin: DequantizedFolder, workers: int) -> dict[str, Matrix]:
        """The modules that keep their codes and scales, and how `origin` stores each."""

        def same(module: _Module) -> tuple[str, Matrix | None]:
            stored, dtype, low = origin.matrix(f"{module.name}.weight"), self._dtype(module), 0
            if stored is None or not self.preset.stores(stored.scheme):
                return module.name, None
            if (stored.rows, stored.columns) != (module.rows, module.columns):
                return module.name, None
            for data in self._rows(module, 0, module.rows):
                there, high = np.empty_like(data), low + len(data) // (module.columns * ITEM_SIZES[dtype])
                origin.fill(stored, low, high, memoryview(there), dtype)
                if not np.array_equal(data, there):
                    return module.name, None
                low = high
            return module.name, stored

        modules = [module for fused in self._fused.values() for module in fused]
        found = {name: stored for name, stored in parallel(modules, lambda: same, workers) if stored is not None}
        if self.preset.kind == "e2m1":
            whole = [fused for fused in self._fused.values() if all(module.name in found for module in fused)]
            found = {module.name: found[module.name] for fused in whole for module in fused}
        return found

    def _blocks(self, module: _Module, start: int, stop: int) -> Iterator[tuple[int, Floats]]:
        """Rows [start, stop) of a module as float32, a bounded number at a time, each with its first row."""
        dtype, low = self._dtype(module), start
        for data in self._rows(module, start, stop):
            values = to_float(data, dtype, (len(data) // (module.columns * ITEM_SIZES[dtype]), module.columns))
            yield low, values
            low += len(values)

    def _rows(self, module: _Module, start: int, stop: int) -> Iterator[Bytes]:
        """Rows [start, stop) of a module as they are stored, a bounded number at a time. Raises CheckpointError."""
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
            yield data

    def _largest(self, module: _Module, values: Floats) -> Floats:
        """The largest absolute value of each group [rows, groups]. Raises CheckpointError: it is no number."""
        group = self.preset.group
        if group is None:
            largest = np.abs(values).max(axis=1, keepdims=True)
        else:
            # Turned, so that the maximum is of long rows.
            largest = np.ascontiguousarray(np.abs(values).reshape(-1, group).T).max(axis=0).reshape(len(values), -1)
        if not np.isfinite(largest).all():
            raise CheckpointError(f"tensor {printable(module.source)} has a value that is no number or infinite")
        return largest

    def _group_scales(self, module: _Module, values: Floats) -> Bytes:
        return group_scales(self._largest(module, values), self._global(module), self._dtype(module))

    def _float_scales(self, module: _Module, values: Floats, low: int) -> Floats:
        """Scales without a global one, of rows from `low` on. Those of rows, which are few, are found once."""
        if self.preset.group is not None:
            return scales(self._largest(module, values), self.preset.kind, self._dtype(module))
        # No scale is 0: that is one not found yet.
        whole = self._of_rows.setdefault(module.name, np.zeros((module.rows, 1), dtype=np.float32))
        part = whole[low : low + len(values)]
        if not part.all():
            part[:] = scales(self._largest(module, values), self.preset.kind, self._dtype(module))
        return part

    def _scale(self, module: _Module, values: Floats, low: int) -> Bytes:
        """Scales as they are stored."""
        if self.preset.kind == "e2m1":
            return self._group_scales(module, values)
        dtype = self._dtype(module)
        scale = self._float_scales(module, values, low)
        out = np.empty(scale.size * ITEM_SIZES[dtype], dtype=np.uint8)
        convert(memoryview(np.ascontiguousarray(scale)).cast("B"), "F32", memoryview(out), dtype)
        return out

    def _codes(self, module: _Module, values: Floats, low: int) -> Bytes:
        dtype = self._dtype(module)
        if self.preset.kind == "e2m1":
            codes = self._group_scales(module, values)
            scale = to_float(codes, "F8_E4M3", codes.shape) / self._global(module)
        else:
            scale = self._float_scales(module, values, low)
        return np.ascontiguousarray(encode(values, scale, self.preset.kind, dtype))

    def _dtype(self, module: _Module) -> str:
        return self._base.tensors[module.source].dtype

    def _global(self, module: _Module) -> np.float32:
        """The global scale of a module and of those that an engine fuses with it; found once, in a pass of its own."""
        with self._lock:
            if module.fused not in self._globals:
                fused = self._fused[module.fused]
                blocks = ((each, values) for each in fused for _, values in self._blocks(each, 0, each.rows))
                largest = [self._largest(each, values).max() for each, values in blocks]
                self._globals[module.fused] = global_scale(np.float32(max(largest)), self._dtype(module))
            return self._globals[module.fused]

    def config(self, plain: Mapping[str, Any], notify: Callable[[str], None] | None = None) -> dict[str, Any]:
        """config.json of the quantized folder; `notify` gets what was quantized and what was not."""
        modules = len({module.name for module, _ in self._parts.values()})
        said = [f"{modules} linears of decoder layers are quantized ({self.preset.name}), everything else is as it was"]
        if self._origin is not None:
            said.append(
                f"{len(self._reused)} of them keep the codes and scales of {self._origin.path}, since their weights "
                "are those that it stands for"
            )
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


def _stored(matrix: Matrix) -> dict[str, TensorInfo]:
    """The tensors of a module by their names in it."""
    assert matrix.scheme is not None
    return {
        f"weight{suffix}": info for suffix, info in {matrix.scheme.codes: matrix.codes, **matrix.companions}.items()
    }


def open_origin(stack: ExitStack, path: str | Path | None) -> DequantizedFolder | None:
    """The folder whose bytes are to be kept. Raises UsageError: its weights are not quantized; CheckpointError."""
    if path is None:
        return None
    folder = stack.enter_context(open_hf_folder(path))
    if not isinstance(folder, DequantizedFolder):
        raise UsageError(f"--unchanged-from {path}: its weights are not quantized")
    return folder


def _first(names: list[str]) -> str:
    return names[0] + (", ..." if len(names) > 1 else "")
