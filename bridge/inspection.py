"""`inspect`: what a checkpoint is, and whether the tables account for all of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bridge.convert.folders import open_source
from bridge.convert.manifest import MegatronFolder, is_megatron_folder
from bridge.convert.quantized_folder import DequantizedFolder
from bridge.geometry import Geometry, LayerGeometry
from bridge.hf.folder import HfFolder
from bridge.hf.tensors import ITEM_SIZES, TensorLike
from bridge.mapping import table_for
from bridge.token_ids import tokens_without_rows
from bridge.torch_dist.reader import DistReader


@dataclass(frozen=True)
class LayerRow:
    """All layers of one make: their numbers, and one of them to speak for all."""

    layers: tuple[int, ...]
    example: LayerGeometry


@dataclass(frozen=True)
class Inspection:
    """What `inspect` prints. Coverage counts tensors: mapped, carried beside, not used; a gap is raised as an error.

    `unknown_tokens`: (id, token, table) of the tokenizer beside the model that the table has no row for.
    `storage`: how quantized weights are stored, a line each; sizes and dtypes are then those of the plain tensors.
    `notices`: what of the config is not followed, and the files that are no part of the model.
    """

    path: Path
    format: str
    geometry: Geometry
    rows: tuple[LayerRow, ...]
    tensors: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    mapped: int
    carried: int
    files: int
    unknown_tokens: tuple[tuple[int, str, str], ...]
    notices: tuple[str, ...]
    storage: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        g = self.geometry
        return {
            "path": str(self.path),
            "format": self.format,
            "architecture": g.architecture,
            "hidden_size": g.hidden_size,
            "vocab_size": g.vocab_size,
            "num_layers": g.num_layers,
            "tied": g.tied,
            "experts": None if g.moe is None else {"num": g.moe.num_experts, "topk": g.moe.topk},
            "per_layer_embedding_dim": None if g.ple is None else g.ple.dim,
            "drafter": None if g.drafter is None else asdict(g.drafter),
            "layer_kinds": [
                {
                    "layers": list(row.layers),
                    "kind": row.example.kind,
                    "head_dim": row.example.head_dim,
                    "num_attention_heads": row.example.num_attention_heads,
                    "num_query_groups": row.example.num_query_groups,
                    "window": row.example.window,
                    "ffn_hidden_size": row.example.ffn_hidden_size,
                    "k_eq_v": row.example.k_eq_v,
                    "shares_kv_of": _source(row.example),
                }
                for row in self.rows
            ],
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dtypes": dict(self.dtypes),
            "tokens_without_rows": [
                {"id": number, "token": token, "table": table} for number, token, table in self.unknown_tokens
            ],
            "notices": list(self.notices),
            "quantized": list(self.storage),
            "coverage": {"mapped": self.mapped, "carried": self.carried, "unaccounted": 0},
        }


def inspect_folder(path: str | Path) -> Inspection:
    """Read the headers of an HF or a Megatron checkpoint and hold them against the tables.

    Raises MappingError naming what the tables do not account for, and whatever opening the folder raises.
    """
    path = Path(path)
    storage: tuple[str, ...] = ()
    with ExitStack() as stack:
        if is_megatron_folder(path):
            checkpoint = MegatronFolder.open(path)
            reader = stack.enter_context(DistReader(checkpoint.weights))
            geometry, table = checkpoint.geometry, table_for(checkpoint.geometry)
            table.check_keys({key: tensor.shape for key, tensor in reader.tensors.items()}, checkpoint.weights)
            stored: dict[str, TensorLike] = dict(reader.tensors)
            carried, notices = 0, tuple(f"{path}: config.json: {notice}" for notice in geometry.notices)
            if checkpoint.carried is not None:
                beside = stack.enter_context(HfFolder(checkpoint.carried))
                carried = len(beside.tensors)
                stored |= beside.tensors
            beside_weights = checkpoint.hf
            files = len({chunk.file for tensor in reader.tensors.values() for chunk in tensor.chunks})
            kind = "Megatron torch_dist"
        else:
            source = open_source(stack, path)
            geometry, table, notices = source.geometry, source.table, source.notices
            table.check_folder({name: tensor.shape for name, tensor in source.folder.tensors.items()}, path)
            stored = dict(source.folder.tensors)
            carried = sum(table.is_carried(name) for name in stored)
            files, kind = len(source.folder.files), "Hugging Face safetensors"
            beside_weights = source.folder.path
            if isinstance(source.folder, DequantizedFolder):
                storage = source.folder.storage
                kind += f" of quantized weights ({'; '.join(storage)})"
    sizes = {name: math.prod(tensor.shape) for name, tensor in stored.items()}
    return Inspection(
        path,
        kind,
        geometry,
        _rows(geometry),
        len(stored),
        sum(sizes.values()),
        sum(sizes[name] * ITEM_SIZES[tensor.dtype] for name, tensor in stored.items()),
        Counter(tensor.dtype for tensor in stored.values()),
        len(stored) - carried,
        carried,
        files,
        tokens_without_rows(beside_weights, geometry),
        notices,
        storage,
    )


def _source(layer: LayerGeometry) -> int | str | None:
    return "target" if layer.external_kv else layer.kv_source if layer.shares_kv else None


def _rows(geometry: Geometry) -> tuple[LayerRow, ...]:
    """Layers grouped by everything but their number."""
    groups: dict[tuple[Any, ...], list[LayerGeometry]] = {}
    for layer in geometry.layers:
        source = layer.kv_source if layer.shares_kv else None
        key = (layer.kind, layer.head_dim, layer.num_query_groups, layer.ffn_hidden_size, layer.k_eq_v, source)
        groups.setdefault(key, []).append(layer)
    return tuple(LayerRow(tuple(layer.index for layer in layers), layers[0]) for layers in groups.values())


def short_range(numbers: tuple[int, ...]) -> str:
    """0-3, 5-8, 10."""
    parts, start = [], 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            first, last = numbers[start], numbers[i - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = i
    return ", ".join(parts)
