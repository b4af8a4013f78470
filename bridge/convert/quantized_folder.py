"""An HF folder with quantized weights, presented as the plain folder that it stands for, a few rows at a time.

Names, shapes and dtypes are those of the folder before it was quantized: scales and packed codes are gone, experts
that are stored one by one are stacked again. Rows are dequantized as they are read, so import, live load, merge and
comparison need to know nothing of it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge.convert.dequantize import STORED, Bytes, Floats, apply, decode, decode_rows, to_float, words
from bridge.convert.dtypes import FLOATS, convert
from bridge.errors import CheckpointError
from bridge.hf.folder import HfFolder, TensorInfo
from bridge.hf.json_file import read_object
from bridge.hf.quantization import ACTIVATION_SCALES, MODELOPT_FILE, Quantization, Scheme, read_quantization
from bridge.hf.tensors import ITEM_SIZES, TensorLike, TensorSpec, as_bytes, check_rows, num_rows, printable, row_bytes

# Values dequantized at once: the arrays of one step stay within the cache.
_BLOCK = 1 << 16
_SUFFIXES = ("_packed", "_scale_inv", "_scale_2", "_global_scale", "_scale", "_zero_point", "_shape", "_g_idx")
# Written beside quantized weights, wrong beside plain ones.
_RECIPES = (MODELOPT_FILE, "recipe.yaml")
# How tools name experts that they quantize one by one; the stacked names are transformers'.
_EXPERT = re.compile(r"(.*?\.)(?:moe\.)?experts\.(\d{1,5})\.(gate_proj|up_proj|down_proj)\.weight")
_TORCH_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
Read = Callable[[str, int, int, Any], None]


@dataclass(frozen=True)
class Matrix:
    """A part of a presented tensor, as rows [rows, columns]; as it is stored where `scheme` is None.

    `codes` and `companions` (suffix -> tensor) name what is stored; the matrix begins at row `code_row` and
    `scale_row` of them: a stack of experts is one stored tensor and several matrices.
    """

    name: str
    rows: int
    columns: int
    codes: TensorInfo
    scheme: Scheme | None
    companions: Mapping[str, TensorInfo]
    code_row: int = 0
    scale_row: int = 0

    @property
    def dtype(self) -> str:
        """What the values are rounded to before anything else."""
        if self.scheme is None:
            return self.codes.dtype
        return self.scheme.computed or self.companions[self.scheme.scale].dtype

    def fill(self, read: Read, start: int, stop: int, out: memoryview, dtype: str) -> None:
        """Rows [start, stop) in `dtype`; `read` reads stored rows of matrices."""
        count = (stop - start) * self.columns
        if self.scheme is None:
            data = np.empty(count * ITEM_SIZES[self.codes.dtype], dtype=np.uint8)
            read(self.codes.name, self.code_row + start, self.code_row + stop, data)
            convert(memoryview(data), self.codes.dtype, out, dtype)
            return
        values = np.ascontiguousarray(self._values(self.scheme, read, start, stop))
        view = memoryview(values).cast("B")
        if self.dtype != "F32" and self.dtype != dtype:
            rounded = memoryview(np.empty(count * ITEM_SIZES[self.dtype], dtype=np.uint8))
            convert(view, "F32", rounded, self.dtype)
            convert(rounded, self.dtype, out, dtype)
        else:
            convert(view, "F32", out, dtype)

    def _values(self, scheme: Scheme, read: Read, start: int, stop: int) -> Floats:
        """Rows [start, stop): float32, not yet rounded."""
        height, width = scheme.block
        data = _rows(read, self.codes, self.code_row + start, self.code_row + stop)
        values = decode(scheme.kind, data, self.columns)
        scale = self._grid(read, scheme.scale, start, stop)
        if scheme.global_scale:
            scale = scale / self._global_scale(scheme, read)
        with np.errstate(all="ignore"):
            if scheme.zero_point:
                apply(np.subtract, values, self._zero_points(scheme, read, start, stop), width, height, start)
            apply(np.multiply, values, scale, width, height, start)
        return values

    def _grid(self, read: Read, suffix: str, start: int, stop: int) -> Floats:
        """The rows of a grid of scales that rows [start, stop) need."""
        info, (low, high) = self.companions[suffix], self._grid_rows(start, stop)
        low, high = low + self.scale_row, high + self.scale_row
        columns = info.shape[-1] if info.shape else 1
        return to_float(_rows(read, info, low, high), info.dtype, (high - low, columns))

    def _grid_rows(self, start: int, stop: int) -> tuple[int, int]:
        assert self.scheme is not None
        height = self.scheme.block[0]
        return (0, 1) if height is None else (start // height, -(-stop // height))

    def _zero_points(self, scheme: Scheme, read: Read, start: int, stop: int) -> Floats:
        info = self.companions[scheme.zero_point]
        low, high = self._grid_rows(start, stop)
        if info.dtype == "I8":
            return decode("I8", _rows(read, info, low, high), info.shape[-1] if info.shape else 1)
        per_word = 32 // STORED[scheme.kind][0]
        data = _rows(read, info, low // per_word, -(-high // per_word))
        return decode_rows(scheme.kind, data, low % per_word, high - low)

    def _global_scale(self, scheme: Scheme, read: Read) -> np.float32:
        info = self.companions[scheme.global_scale]
        found = to_float(_rows(read, info, 0, 1), info.dtype, (1,))[0]
        if not np.isfinite(found) or found <= 0:
            raise CheckpointError(f"tensor {printable(info.name)} is {found}: no scale")
        return np.float32(1) / found if scheme.reciprocal else found


def _rows(read: Read, info: TensorInfo, start: int, stop: int) -> Bytes:
    """Rows of a stored tensor, counted along all axes but the last, as bytes [rows, bytes of one]."""
    width = (info.shape[-1] if info.shape else 1) * ITEM_SIZES[info.dtype]
    data = np.empty((stop - start, width), dtype=np.uint8)
    read(info.name, start, stop, data)
    return data


@dataclass(frozen=True)
class _View:
    """A presented tensor and its matrices, one below the other."""

    spec: TensorSpec
    parts: tuple[Matrix, ...]


class DequantizedFolder(HfFolder):
    """See the module. `dtype` (a safetensors name): of what is dequantized; by default the one that config.json names.

    `storage`: what the folder is, a line each, for people. `notices`: what was left out. Raises CheckpointError that
    names the tensor: a scale is missing, one has nothing to scale, a shape or dtype does not fit.
    """

    def __init__(self, path: str | Path, quantization: Quantization, dtype: str | None = None) -> None:
        super().__init__(path)
        try:
            self._quantization, self._dtype = quantization, dtype
            config = read_object(self.path / "config.json")
            self._dtype = dtype or _TORCH_NAMES.get(str(config.get("dtype", config.get("torch_dtype"))))
            self.config = {key: value for key, value in config.items() if key != "quantization_config"}
            self.ignored = sorted([*self.ignored, *(asset for asset in self.assets if str(asset) in _RECIPES)])
            self.assets = [asset for asset in self.assets if str(asset) not in _RECIPES]
            self._views: dict[str, _View] = {}
            self._matrices_by_weight: dict[str, Matrix] = {}
            self._presented: dict[str, TensorLike] = {}
            self._present()
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> Mapping[str, TensorLike]:
        """The tensors of the plain folder."""
        return self._presented

    def _present(self) -> None:
        parts: dict[str, dict[str, TensorInfo]] = {}
        self.notices: list[str] = []
        left = 0
        for name, info in self._stored.items():
            if name.rpartition(".")[2] in ACTIVATION_SCALES:
                left += 1
                continue
            plain, suffix = _split(name, self._stored)
            parts.setdefault(plain, {})[suffix] = info
        if left:
            self.notices.append(f"{self.path}: left behind: {left} scales of activations, which only an engine uses")
        schemes: Counter[str] = Counter()
        stacks: dict[str, dict[tuple[int, str], Matrix]] = {}
        for plain, stored in parts.items():
            found = self._matrices(plain, stored)
            if found and found[0].scheme is not None:
                schemes[found[0].scheme.name] += 1
            expert = _EXPERT.fullmatch(plain)
            if len(found) == 1 and found[0].scheme is not None:
                weight = plain if expert is None else f"{expert[1]}experts.{expert[2]}.{expert[3]}.weight"
                self._matrices_by_weight[weight] = found[0]
            if expert is not None and found:
                kind = "down_proj" if expert[3] == "down_proj" else "gate_up_proj"
                stack = f"{expert[1]}experts.{kind}"
                stacks.setdefault(stack, {})[int(expert[2]), expert[3]] = found[0]
                self._presented.setdefault(stack, self._stored[found[0].codes.name])
            elif found and found[0].scheme is not None:
                shape = (*found[0].codes.shape[:-2], found[0].rows, found[0].columns)
                self._add(plain, shape, found)
            else:
                self._presented[plain] = stored[""]
        for name, experts in stacks.items():
            self._stack(name, experts)
        self.storage = tuple(
            f"{self._quantization.method}: {name}: {count} tensors" for name, count in sorted(schemes.items())
        )

    def _matrices(self, plain: str, stored: Mapping[str, TensorInfo]) -> tuple[Matrix, ...]:
        """The matrices of one weight; () for what is no matrix. Raises CheckpointError."""
        where = f"{printable(self.path)}: tensor {printable(plain)}"
        only = stored.get("")
        if only is not None and len(stored) == 1:
            if only.dtype not in FLOATS:
                raise CheckpointError(
                    f"{where} is {only.dtype}, and has no scale: quantized, or no weight of a Gemma 4"
                )
            if len(only.shape) != 2:
                return ()
            return (Matrix(plain, only.shape[0], only.shape[1], only, None, {}),)
        try:
            scheme = self._quantization.scheme_of(plain.removesuffix(".weight"))
        except CheckpointError as error:
            raise CheckpointError(f"{printable(self.path)}: {error}") from None
        for suffix in (scheme.codes, *scheme.companions):
            if suffix not in stored:
                raise CheckpointError(f"{where}{suffix} is missing: {scheme.name} needs it")
        for suffix in stored:
            if suffix not in (scheme.codes, *scheme.companions):
                raise CheckpointError(f"{where}{suffix} is no part of {scheme.name}")
        codes = stored[scheme.codes]
        companions = {suffix: stored[suffix] for suffix in scheme.companions}
        return self._checked(plain, scheme, codes, companions)

    def _checked(
        self, plain: str, scheme: Scheme, codes: TensorInfo, companions: Mapping[str, TensorInfo]
    ) -> tuple[Matrix, ...]:
        """Hold dtypes and shapes against each other. Raises CheckpointError."""
        stacked = len(codes.shape) == 3 and not scheme.codes and scheme.scale == "_scale_inv"
        if len(codes.shape) != 2 and not stacked:
            raise self._misfit(codes, f"{scheme.name} has matrices")
        if codes.dtype != STORED[scheme.kind][1]:
            raise self._misfit(codes, f"{scheme.name} has {STORED[scheme.kind][1]}")
        rows, columns = codes.shape[-2], self._columns(scheme, codes, companions)
        height, width = scheme.block
        if width is not None and columns % width and height == 1:
            raise self._misfit(codes, f"{columns} columns are no groups of {width}")
        grid = (1 if height is None else -(-rows // height), 1 if width is None else -(-columns // width))
        scale = companions[scheme.scale]
        flat = (height, width) == (None, None) and math.prod(scale.shape) == 1
        if scale.shape != (*codes.shape[:-2], *grid) and not flat:
            raise self._misfit(scale, f"{scheme.name} of {rows} x {columns} has {list(grid)}")
        allowed = ("F8_E4M3",) if scheme.global_scale else ("BF16", "F16", "F32")
        if scale.dtype not in allowed:
            raise self._misfit(scale, f"{scheme.name} has {' or '.join(allowed)}")
        if scheme.global_scale:
            info = companions[scheme.global_scale]
            if info.dtype != "F32" or math.prod(info.shape) != 1 or len(info.shape) > 1:
                raise self._misfit(info, "a global scale is one F32")
        if scheme.zero_point:
            info = companions[scheme.zero_point]
            packed = scheme.codes == "_packed"
            expected = (words(scheme.kind, grid[0]), grid[1]) if packed else scale.shape
            if info.dtype != ("I32" if packed else "I8") or info.shape != expected:
                raise self._misfit(info, f"{scheme.name} has {'I32' if packed else 'I8'} {list(expected)}")
        return tuple(
            Matrix(plain, rows, columns, codes, scheme, companions, number * rows, number * grid[0])
            for number in range(math.prod(codes.shape[:-2]))
        )

    def _columns(self, scheme: Scheme, codes: TensorInfo, companions: Mapping[str, TensorInfo]) -> int:
        """How many values a row has, which a packed tensor says apart. Raises CheckpointError."""
        bits, _, nbytes = STORED[scheme.kind]
        if not scheme.shape:
            return codes.shape[-1] * nbytes * 8 // bits
        info = companions[scheme.shape]
        if info.dtype not in ("I64", "I32") or info.shape != (2,):
            raise self._misfit(info, "expected two whole numbers")
        data = np.empty(2 * ITEM_SIZES[info.dtype], dtype=np.uint8)
        super().read_rows(info.name, 0, 2, data)
        rows, columns = (int(size) for size in data.view(np.int64 if info.dtype == "I64" else np.int32))
        if rows != codes.shape[0] or columns < 0 or words(scheme.kind, columns) != codes.shape[1]:
            raise self._misfit(info, f"it says [{rows}, {columns}], {printable(codes.name)} is {list(codes.shape)}")
        return columns

    def _misfit(self, info: TensorInfo, why: str) -> CheckpointError:
        return CheckpointError(
            f"{printable(self.path)}: tensor {printable(info.name)} is {info.dtype} {list(info.shape)}: {why}"
        )

    def _add(self, name: str, shape: tuple[int, ...], parts: tuple[Matrix, ...]) -> None:
        dtype = self._dtype or parts[0].dtype
        spec = TensorSpec(name, dtype, shape)
        self._views[name] = _View(spec, parts)
        self._presented[name] = spec

    def _stack(self, name: str, experts: Mapping[tuple[int, str], Matrix]) -> None:
        """Experts that are stored one by one as [experts, rows, columns], gate above up. Raises CheckpointError."""
        if name in self._stored:
            raise CheckpointError(
                f"{printable(self.path)}: tensor {printable(name)} is there as a stack and expert by expert"
            )
        projections = ("down_proj",) if name.endswith("down_proj") else ("gate_proj", "up_proj")
        count = 1 + max(number for number, _ in experts)
        parts = []
        for number in range(count):
            for kind in projections:
                part = experts.get((number, kind))
                if part is None:
                    prefix = name.rpartition(".")[0]
                    raise CheckpointError(f"{printable(self.path)}: tensor {prefix}.{number}.{kind}.weight is missing")
                first = experts[0, projections[0]]
                if (part.rows, part.columns) != (first.rows, first.columns):
                    raise self._misfit(part.codes, f"expert 0 is {first.rows} x {first.columns}")
                parts.append(part)
        self._add(name, (count, len(projections) * parts[0].rows, parts[0].columns), tuple(parts))

    def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
        """See `HfFolder`."""
        view = self._views.get(name)
        if view is None:
            self._check_presented(name)
            super().read_rows(name, start, stop, out)
            return
        data = as_bytes(out)
        check_rows(name, view.spec, start, stop, len(data))
        per_row = math.prod(view.spec.shape[1:-1])
        self._fill(view, start * per_row, stop * per_row, data)

    def matrix(self, weight: str) -> Matrix | None:
        """How a weight is stored; that of an expert by the name `…experts.3.gate_proj.weight`. None: not quantized."""
        return self._matrices_by_weight.get(weight)

    def fill(self, matrix: Matrix, start: int, stop: int, out: memoryview, dtype: str) -> None:
        """Rows [start, stop) of a matrix, dequantized, in `dtype`. Raises CheckpointError."""
        matrix.fill(self._read_matrix, start, stop, out, dtype)

    def read_stored(self, name: str, start: int, stop: int, out: Any) -> None:
        """Rows of a tensor as it is stored, codes and scales. Raises CheckpointError."""
        super().read_rows(name, start, stop, out)

    def read_columns(self, name: str, start: int, stop: int, first: int, last: int, out: Any) -> None:
        """See `HfFolder`: whole rows of matrices are dequantized, a bounded number at a time."""
        view = self._views.get(name)
        if view is None:
            self._check_presented(name)
            super().read_columns(name, start, stop, first, last, out)
            return
        item, columns = ITEM_SIZES[view.spec.dtype], view.spec.shape[-1]
        per_row, elements = math.prod(view.spec.shape[1:-1]), math.prod(view.spec.shape[1:])
        data = as_bytes(out)
        width = (last - first) * item
        inside = 0 <= start <= stop <= num_rows(view.spec.shape) and 0 <= first < last <= elements
        if not inside or len(data) != (stop - start) * width:
            raise CheckpointError(f"tensor {printable(name)}: rows {start} to {stop}, elements {first} to {last}")
        # Rows of matrices that hold the elements of one row: all of them are that row where it is one matrix row.
        low, high = first // columns, -(-last // columns)
        step = max(1, _BLOCK // ((high - low) * columns)) if per_row == 1 else 1
        for row in range(start, stop, step):
            count = min(step, stop - row)
            whole = np.empty((count, (high - low) * columns * item), dtype=np.uint8)
            begin = row * per_row + low
            self._fill(view, begin, begin + count * (high - low), memoryview(whole).cast("B"))
            skip = (first - low * columns) * item
            target = np.frombuffer(data, dtype=np.uint8)[(row - start) * width : (row - start + count) * width]
            target.reshape(count, width)[:] = whole[:, skip : skip + width]

    def _check_presented(self, name: str) -> None:
        if name not in self._presented:
            raise CheckpointError(f"{printable(self.path)}: has no tensor {printable(name)}")

    def _fill(self, view: _View, start: int, stop: int, out: memoryview) -> None:
        """Rows of the matrices of a tensor, counted through all of them; they are of one size."""
        size, columns = view.parts[0].rows, view.spec.shape[-1]
        width, row = columns * ITEM_SIZES[view.spec.dtype], start
        step = max(1, _BLOCK // max(1, columns))
        while row < stop and width:
            part, first = view.parts[row // size], row % size
            last = min(size, first + stop - row, first + step)
            target = out[(row - start) * width : (row - start + last - first) * width]
            part.fill(self._read_matrix, first, last, target, view.spec.dtype)
            row += last - first

    def _read_matrix(self, name: str, start: int, stop: int, out: Any) -> None:
        """Stored rows counted along all axes but the last."""
        info = self._stored[name]
        if len(info.shape) <= 2:
            super().read_rows(name, start, stop, out)
            return
        inner, width = info.shape[1], info.shape[2]
        data, size = as_bytes(out), row_bytes(info) // inner
        done = 0
        for row in range(start // inner, -(-stop // inner)):
            low, high = max(start, row * inner) - row * inner, min(stop, (row + 1) * inner) - row * inner
            part = data[done : done + (high - low) * size]
            super().read_columns(name, row, row + 1, low * width, high * width, part)
            done += len(part)


def _split(name: str, stored: Mapping[str, TensorInfo]) -> tuple[str, str]:
    """The weight that a stored tensor belongs to, and the suffix that says what of it: "" for the weight itself."""
    for suffix in _SUFFIXES:
        plain = name.removesuffix(suffix)
        if plain != name and (plain.endswith(".weight") or plain in stored):
            return plain, suffix
    return name, ""


def open_hf_folder(path: str | Path, dtype: str | None = None) -> HfFolder:
    """An HF model folder; of quantized weights the plain folder that they stand for, those in `dtype`.

    Raises CheckpointError: what is wrong with the folder, a way of quantizing that is not read.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise CheckpointError(f"{printable(folder / 'config.json')}: vanished while the folder was being read")
    config = read_object(folder / "config.json").get("quantization_config") if folder.is_dir() else None
    modelopt = folder / MODELOPT_FILE
    quantization = read_quantization(config, read_object(modelopt) if modelopt.exists() else None)
    if quantization is None:
        return HfFolder(path)
    return DequantizedFolder(path, quantization, dtype)
