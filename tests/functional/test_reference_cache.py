"""The file of a reference's log-probabilities that cannot be read, or written: the same on every rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from bridge.errors import BridgeError
from bridge.ranks import RankPool

from .conftest import Toy

WORLD, LABELLED = 2, {"loss": "sigmoid", "reference": "start"}


class Samples:
    fingerprint = "answers"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 6


def reference(said: dict[str, Any], folder: Path) -> tuple[list[float] | str, int]:
    """On every rank: the values of six answers (or what is wrong), and how often they were computed."""
    import torch

    from bridge.megatron.parallel import Parallel, initialize
    from recipes.config import resolve
    from recipes.train import start
    from recipes.train.data import AnswerBatches, Streams

    initialize(Parallel())
    computed: list[tuple[int, int]] = []

    def values(run: Any, answers: Any, shape: tuple[int, int]) -> torch.Tensor:
        computed.append(shape)
        return torch.arange(6, dtype=torch.float64).view(shape) / 3

    samples: Any = Samples(folder)
    unused: Any = None
    streams = Streams(unused, answers=(AnswerBatches(samples, unused),))
    run: Any = SimpleNamespace(recipe=resolve(said), device=torch.device("cpu"))
    with mock.patch.object(start, "_computed", values):
        try:
            start.start_logps(run, streams, None, lambda line: None)
        except BridgeError as error:
            return str(error), len(computed)
    return streams.ref_logps["answers"][0].tolist(), len(computed)


def test_a_file_that_cannot_be_read_or_written(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    said = {"output": "run", "model": {"hf": str(toy("e2b")), "dtype": "float32"}, "preference": LABELLED}
    good = [value / 3 for value in range(6)]

    def of(expected: tuple[Any, int]) -> None:
        assert ranks.run(reference, said, tmp_path, world_size=WORLD) == [expected] * WORLD

    of((good, 1))
    (path,) = tmp_path.glob("ref_logps-*.npy")
    whole = path.read_bytes()
    of((good, 0))
    for broken in (whole[:-9], b"", b"\x93NUMPY", whole.replace(b"<f8", b"<i8"), whole.replace(b"(1, 6)", b"(6, 1)")):
        path.write_bytes(broken)
        of((good, 1))
        assert path.read_bytes() == whole
    # No rank can rename a file to where a folder stands, not even root's.
    path.unlink()
    path.mkdir()
    of((f"{path}: cannot be written (Is a directory)", 1))
    assert [each.name for each in tmp_path.iterdir()] == [path.name], "nothing is left"
    path.rmdir()
    absent = tmp_path / "absent" / path.name
    assert (
        ranks.run(reference, said, absent.parent, world_size=WORLD)
        == [(f"{absent}: cannot be written (No such file or directory)", 1)] * WORLD
    )
