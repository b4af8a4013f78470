"""What all functional tests share: one pool of ranks, the toys, and what transformers computes for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.geometry import Geometry
from bridge.ranks import PRELOAD, RankPool
from bridge.toy import write_toy
from bridge.verify.on_ranks import run_reference
from bridge.verify.sample import VerificationSample, random_sample
from tests.functional.command_server import CommandServer

Toy = Callable[..., Path]

# What most of them use. Ranks that a test kills, or that raise, are replaced: the new ones need not import it again.
PRELOADED = ("recipes.train.loop", "recipes.data.training", "bridge.verify.task", "bridge.lora.source", "peft")

# Files that wait for other processes more than they compute: first, while unit tests use the cores (see the Makefile).
WAITING = ("test_slurm.py", "test_interrupts.py", "test_killed.py", "test_seams.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in WAITING)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Importing torch and Megatron takes longer than most tests: it is done once."""
    with RankPool(4, preload=(*PRELOAD, *PRELOADED)) as pool:
        yield pool


@pytest.fixture(scope="session")
def commands() -> Iterator[CommandServer]:
    with CommandServer() as server:
        yield server


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """`toy(variant, **options)`: a folder of `write_toy`, float32 unless asked otherwise; made once."""
    base, made = tmp_path_factory.mktemp("toys"), {}

    def get(variant: str, **options: Any) -> Path:
        options = {"dtype": "float32", **options}
        key = "-".join([variant, *(f"{name}={value}" for name, value in sorted(options.items()))])
        if key not in made:
            write_toy(variant, base / key, **options)
            made[key] = base / key
        return made[key]

    return get


class References:
    """What transformers gives for a folder, computed once for each dtype."""

    def __init__(self, ranks: RankPool, base: Path) -> None:
        self._ranks, self._base = ranks, base
        self._made: dict[tuple[Path, torch.dtype], Path] = {}
        self._samples: dict[Path, VerificationSample] = {}

    def sample(self, folder: Path) -> VerificationSample:
        if folder not in self._samples:
            self._samples[folder] = random_sample(Geometry.from_folder(folder), seed=0)
        return self._samples[folder]

    def file(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        if (folder, dtype) not in self._made:
            path = self._base / f"{len(self._made)}.safetensors"
            self._ranks.run(run_reference, folder, self.sample(folder), dtype, True, path, world_size=1)
            self._made[folder, dtype] = path
        return self._made[folder, dtype]


@pytest.fixture(scope="session")
def references(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(ranks, tmp_path_factory.mktemp("references"))
