"""An adapter somewhere on a disk, whatever the format: what it adapts, and its tensors when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bridge.errors import CheckpointError
from bridge.lora.spec import LoraSpec, Part, Target
from bridge.mapping import Table


@dataclass(frozen=True)
class Adapter:
    """An open adapter of the model that `table` is of.

    `value(target, part)` reads one canonical tensor, of the shape `target.shape_of(part)` and the dtype
    `dtype(target, part)` (a safetensors name); asked for in the order of `targets` and their `parts`, nothing is read
    twice.
    `files` are those it is read from. `base` is where the model is that it adapts, if that is known: a Hugging Face
    folder or hub id, or a Megatron folder.
    """

    path: Path
    table: Table
    spec: LoraSpec
    targets: tuple[Target, ...]
    value: Callable[[Target, Part], Tensor]
    dtype: Callable[[Target, Part], str]
    files: tuple[Path, ...]
    base: str | None

    def common_dtype(self) -> str:
        """The dtype of all but whole weights. Raises CheckpointError where they differ: an adapter here has one."""
        adapted = [target for target in self.targets if target.kind != "saved"]
        kinds = {self.dtype(target, part): target.name for target in adapted for part in target.parts}
        if len(kinds) != 1:
            listed = ", ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
            raise CheckpointError(f"{self.path}: tensors of several dtypes, {listed}; an adapter here has one")
        return next(iter(kinds))
