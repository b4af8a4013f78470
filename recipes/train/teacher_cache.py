"""What a teacher says of the data, asked once: its likeliest tokens of every label, in files beside the tokens.

They are named by all they depend on: the samples, the teacher's files, how many tokens, the temperature. The
log-probabilities' file is renamed last: where it is, all is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist

from bridge import Gemma4Bridge
from bridge.convert.manifest import is_megatron_folder
from bridge.errors import DataError
from bridge.hf.hub import resolve
from bridge.megatron.distillation import TopK
from bridge.together import together
from recipes.config import Recipe
from recipes.data.batches import first_labels
from recipes.losses.distill import DistillLoss, distill_loss
from recipes.train.data import AnswerBatches, Streams
from recipes.train.passes import Batch, in_groups, prepare
from recipes.train.setup import BuiltModel, Run
from recipes.train.start import files_fingerprint
from recipes.train.teacher import build_teacher, label_places, says

Say = Callable[[str], None]
# ids int32 [labels, k], log-probabilities float32 [labels, k + 1]
Arrays = tuple[np.ndarray, np.ndarray]


def ask_once(run: Run, bridge: Gemma4Bridge, streams: Streams, say: Say) -> None:
    """Fill `streams.taught`, from files where they are there; else with a teacher that is gone again afterwards.

    Collective. Raises DataError where the files cannot be written, or are not there for every rank.
    """
    teacher: BuiltModel | None = None
    model, count = _fingerprint(run.recipe), run.recipe.distill.top_k
    for answers in streams.answers:
        samples = answers.samples
        if samples.fingerprint in streams.taught:
            continue
        labels = int(first_labels(samples)[-1])
        digest = hashlib.sha256(f"{samples.fingerprint} {model}".encode()).hexdigest()[:24]
        paths = (samples.folder / f"teacher-{digest}.ids.npy", samples.folder / f"teacher-{digest}.logps.npy")
        there = [dist.get_rank() == 0 and _read(paths, labels, count) is not None]
        dist.broadcast_object_list(there, src=0)
        if not there[0]:
            teacher = teacher or build_teacher(run, bridge)
            say(f"distill.teacher: {count} tokens and the rest of each of {labels} labels, once, into {paths[1]}")
            _ask(teacher, answers, labels, paths)
        with together():
            found = _read(paths, labels, count)
            if found is None:
                raise DataError(f"{paths[1]}: is not there for rank {dist.get_rank()}; data.cache is one for all ranks")
        streams.taught[samples.fingerprint] = found


def _ask(teacher: BuiltModel, answers: AnswerBatches, labels: int, paths: tuple[Path, Path]) -> None:
    """Write both files, on rank 0. Collective."""
    objective = distill_loss(teacher.recipe.distill)
    count, dtypes = objective.top_k, (np.dtype(np.int32), np.dtype(np.float32))
    held: list[np.memmap] = []
    partials = [path.with_name(f".{path.name}.{os.getpid()}.partial") for path in paths]
    try:
        with together():
            if dist.get_rank() == 0:
                for path, kind, width in zip(partials, dtypes, (count, count + 1), strict=True):
                    held.append(_allocated(path, kind, (labels, width)))
        for group in in_groups(teacher, answers.batches()):
            for found in _gathered(teacher, group, objective):
                for numbers, *values in found if held else ():
                    for array, value in zip(held, values, strict=True):
                        array[numbers] = value
        with together():
            for array, partial, path in zip(held, partials, paths, strict=False):
                _finish(array, partial, path)
    finally:
        held.clear()
        for partial in partials if dist.get_rank() == 0 else ():
            with contextlib.suppress(OSError):
                partial.unlink()


def _gathered(teacher: BuiltModel, group: list[Batch], objective: DistillLoss) -> list[list[tuple[np.ndarray, ...]]]:
    """(numbers of labels, ids, log-probabilities) of microbatches, from every rank, on rank 0. Collective."""
    said = says(teacher, group, objective)
    mine: list[tuple[np.ndarray, ...]] = []
    for batch, of in zip(group, said, strict=bool(said)) if teacher.groups.tp.rank() == 0 else ():
        assert isinstance(of, TopK)
        held = prepare(batch, teacher, teacher.recipe.train.seq_length)
        places = label_places(held.batch["labels"], teacher, held.label_positions)
        numbers = held.batch["label_ids"][places]
        mine.append((numbers.cpu().numpy(), of.ids.to("cpu").int().numpy(), of.logps.cpu().numpy()))
    everyone: list[list[tuple[np.ndarray, ...]]] = [[]] * dist.get_world_size()
    dist.gather_object(mine, everyone if dist.get_rank() == 0 else None)
    return everyone


def _allocated(path: Path, kind: np.dtype, shape: tuple[int, int]) -> np.memmap:
    """A new file of that size. Raises DataError: a page that the disk has no place for would end the process later."""
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
    return array


def _finish(array: np.memmap, partial: Path, path: Path) -> None:
    """Raises DataError."""
    try:
        array.flush()
        partial.rename(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None


def _read(paths: tuple[Path, Path], labels: int, count: int) -> Arrays | None:
    """None where they are not there, or cannot be read: they are made again."""
    if not all(path.is_file() for path in paths):
        return None
    try:
        ids, logps = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    except (OSError, ValueError, EOFError):
        return None
    fits = (ids.shape, logps.shape) == ((labels, count), (labels, count + 1))
    return (ids, logps) if fits and (ids.dtype, logps.dtype) == (np.int32, np.float32) else None


def _fingerprint(recipe: Recipe) -> str:
    said = recipe.distill
    how = [recipe.model.dtype, recipe.model.vision_mask, str(said.top_k), str(said.temperature)]
    assert said.teacher is not None
    return files_fingerprint(how, [said.teacher if is_megatron_folder(said.teacher) else str(resolve(said.teacher))])
