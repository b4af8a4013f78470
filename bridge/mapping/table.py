"""What a mapping table is made of: its rows, and what they are for one model (`expansion.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from bridge.errors import MappingError
from bridge.geometry import Geometry, LayerGeometry
from bridge.mapping.transforms import RowBlock, Shape, Transform, copy

# What the keys of a drafter begin with that is trained in its model, as part of its last stage.
DRAFTER = "drafter."
ADAPTERS = (".lora_A", ".lora_B", ".lora_magnitude")

# One entry per axis of the Megatron tensor: the parallel group that splits it, or None.
Shard = tuple[str | None, ...]


@dataclass(frozen=True)
class Condition:
    """When a row applies. `label` is what docs/mapping.md prints."""

    label: str
    holds: Callable[[Geometry, LayerGeometry | None], bool]


ALWAYS = Condition("", lambda geometry, layer: True)


@dataclass(frozen=True)
class LayerStack:
    """A part of the model with layers of its own: what `{layer}` counts. Only the decoder's have a LayerGeometry."""

    name: str
    layers: Callable[[Geometry], tuple[LayerGeometry | None, ...]]


DECODER = LayerStack("decoder", lambda geometry: geometry.layers)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    `megatron` and `hf` are name patterns; `{layer}` stands for the number of a layer of `stack`. HF names are relative
    to the language model's prefix, unless they start with a slash (`model.` after it stands for `Geometry.base`).
    `shapes` gives each HF tensor's dimensions by the names of `dimensions()`. `shard` says which parallel group splits
    which axis of the Megatron tensor. A row without a Megatron name is *carried*: kept beside the checkpoint and
    written back, because the model does not use it. An `optional` row may be absent from a folder; when it has a
    Megatron name, it is another copy of what a row above fills (a tied head written out), checked to be equal when it
    is imported. `trainable` is False for buffers. An `integer` row holds numbers of tokens, which no dtype changes.
    `embedding` says that the tensor is looked up by row; every other matrix named `.weight` is that of a linear.
    """

    megatron: str | None
    hf: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]
    transform: Transform = copy
    shard: Shard = (None,)
    when: Condition = ALWAYS
    optional: bool = False
    trainable: bool = True
    stack: LayerStack = DECODER
    embedding: bool = False
    integer: bool = False

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.hf[0]


@dataclass(frozen=True)
class HfTensor:
    """A tensor of an HF folder: its on-disk name and shape."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Entry:
    """A row for one layer of one model: a Megatron key, its global shape, and where its rows come from."""

    key: str
    shape: Shape
    sources: tuple[HfTensor, ...]
    blocks: tuple[RowBlock, ...]
    row: Row
    layer: LayerGeometry | None = None

    @property
    def is_layer_linear(self) -> bool:
        """Whether it is a linear of attention, of the dense FFN or of the experts of a decoder layer."""
        return self.row.stack is DECODER and self.layer is not None and ".linear_" in self.key


@dataclass(frozen=True)
class Table:
    """Everything one model maps: entries by Megatron key, HF tensors that are carried, and copies (name -> entry)."""

    geometry: Geometry
    entries: Mapping[str, Entry]
    carried: Mapping[str, HfTensor]
    copies: Mapping[str, Entry]

    @cached_property
    def by_hf_name(self) -> Mapping[str, tuple[Entry, int]]:
        """HF name -> (entry, which of its sources)."""
        return {
            source.name: (entry, index) for entry in self.entries.values() for index, source in enumerate(entry.sources)
        }

    def copies_of(self, name: str) -> tuple[str, ...]:
        """What is the HF tensor `name` once more, whether or not a folder has it: a head that is tied to it."""
        found = self.by_hf_name.get(name)
        return tuple(copied for copied, entry in self.copies.items() if found is not None and entry is found[0])

    def is_integer(self, name: str) -> bool:
        """Whether an HF tensor holds numbers of tokens, which no dtype changes."""
        return name in self.by_hf_name and self.by_hf_name[name][0].row.integer

    def covers(self, key: str) -> bool:
        """Whether a key of a model is this table's to account for. Adapters have a table of their own, `lora.table`,
        and so has a drafter in its model."""
        return not key.startswith(DRAFTER) and not key.endswith(ADAPTERS)

    def is_carried(self, name: str) -> bool:
        """Whether an HF tensor is kept beside the Megatron checkpoint instead of in it."""
        return name in self.carried

    def check_folder(self, shapes: Mapping[str, Shape], folder: object) -> None:
        """Account for every tensor of an HF folder. Raises MappingError: unknown, missing or misshapen, by name."""
        known = self.by_hf_name
        unknown = [n for n in shapes if n not in known and n not in self.copies and not self.is_carried(n)]
        if unknown:
            raise MappingError(f"{folder}: {_some(unknown)} in no mapping table of this model")
        missing = [name for name in known if name not in shapes]
        if missing:
            raise MappingError(f"{folder}: {_some(missing)} missing; the model needs it")
        for name, shape in shapes.items():
            expected = self._expected_shape(name)
            if expected is not None and expected != shape:
                raise MappingError(f"{folder}: tensor {name} has shape {list(shape)}, expected {list(expected)}")

    def _expected_shape(self, name: str) -> Shape | None:
        if name in self.by_hf_name:
            entry, index = self.by_hf_name[name]
            return entry.sources[index].shape
        if name in self.copies:
            return self.copies[name].shape
        return self.carried[name].shape if name in self.carried else None

    def check_keys(self, keys: Mapping[str, Shape], where: object) -> None:
        """Account for every key of a Megatron checkpoint or model, like `check_folder`."""
        unknown = [key for key in keys if key not in self.entries]
        if unknown:
            raise MappingError(f"{where}: {_some(unknown)} in no mapping table of this model")
        missing = [key for key in self.entries if key not in keys]
        if missing:
            raise MappingError(f"{where}: {_some(missing)} missing; the model needs it")
        for key, shape in keys.items():
            if self.entries[key].shape != shape:
                raise MappingError(f"{where}: {key} has shape {list(shape)}, expected {list(self.entries[key].shape)}")


def _some(names: list[str]) -> str:
    listed = ", ".join(names[:3])
    kind = "tensor" if len(names) == 1 else f"{len(names)} tensors:"
    return f"{kind} {listed}{', ...' if len(names) > 3 else ''} {'is' if len(names) == 1 else 'are'}"
