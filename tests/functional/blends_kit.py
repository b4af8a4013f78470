"""What ranks run for the tests of several sources: real runs on them, and what each of their batches was."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bridge.geometry import Geometry


class Watched:
    """A `BatchStream` that notes the tokens of every microbatch in a file of its rank, and dies before one of them.

    A line: the number of the microbatch from the beginning of the run, and its tokens and labels.
    """

    def __init__(self, stream: Any, path: Path, kill: int | None) -> None:
        self._stream, self._path, self._kill, self._taken = stream, path, kill, 0

    def __next__(self) -> dict[str, Tensor]:
        if self._taken == self._kill:
            os.kill(os.getpid(), signal.SIGKILL)
        batch: dict[str, Tensor] = next(self._stream)
        said = [self._taken, batch["input_ids"].tolist(), batch["labels"].tolist(), batch["source_ids"][:, 0].tolist()]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(said) + "\n")
        self._taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken, "stream": self._stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._taken = state["taken"]
        self._stream.load_state_dict(state["stream"])


def train_watched(said: dict[str, Any], kill: int | None, victim: int) -> int:
    """A run on the recipe's own data, each of whose microbatches is noted; rank `victim` is killed before number
    `kill`. Runs on every rank."""
    from recipes.config import Recipe, resolve
    from recipes.data.training import prepared
    from recipes.train.data import Streams
    from recipes.train.loop import train

    recipe, factory = prepared(resolve(said))

    def data(recipe: Recipe, geometry: Geometry, dp_rank: int, dp_size: int) -> Streams:
        streams = factory(recipe, geometry, dp_rank, dp_size)
        path = Path(recipe.output).with_suffix(f".rank{dp_rank}.jsonl")
        return replace(streams, train=Watched(streams.train, path, kill if dp_rank == victim else None))

    return train(recipe, data).step


def noted(output: Path, rank: int) -> list[list[Any]]:
    """What `Watched` wrote of a run; the last line may be cut off."""
    lines = output.with_suffix(f".rank{rank}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
