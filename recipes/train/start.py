"""The reference of a run that has none in its own weights: what the model says as the run begins.

Log-probabilities of every answer of the data are computed once, before the first step, and kept beside the tokens in a
file that is named by all they depend on: the samples, and the files of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from bridge.errors import DataError
from bridge.together import together
from recipes.config import Recipe
from recipes.data.training import model_folder
from recipes.losses.names import KTO, loss_names
from recipes.train.data import AnswerBatches, Streams
from recipes.train.passes import in_groups, mismatched_rows, prepare
from recipes.train.reference import log_probabilities
from recipes.train.setup import Run

Say = Callable[[str], None]


def start_logps(run: Run, streams: Streams, load: Callable[[], None] | None, say: Say) -> None:
    """Fill `streams.ref_logps`, from files where they are there. Collective; `load`: makes the weights those of
    the start, where they are not. Raises DataError where the cache cannot be written."""
    model = _fingerprint(run.recipe)
    for answers in streams.answers:
        samples = answers.samples
        if samples.fingerprint in streams.ref_logps:
            continue
        digest = hashlib.sha256(f"{samples.fingerprint} {model}".encode()).hexdigest()[:24]
        path = samples.folder / f"ref_logps-{digest}.npy"
        # The answers as they are, and with KTO behind other prompts.
        shape = (2 if loss_names(run.recipe.preference) == (KTO,) else 1, len(samples))
        values = _read(path, shape, run.device)
        if values is None:
            if load is not None:
                load()
            say(f"reference: computing the log-probabilities of {len(samples)} answers, once, into {path}")
            values = _computed(run, answers, shape)
            with together():
                if dist.get_rank() == 0:
                    _write(path, values.cpu().numpy())
        streams.ref_logps[samples.fingerprint] = values.cpu().numpy()


def _computed(run: Run, answers: AnswerBatches, shape: tuple[int, int]) -> torch.Tensor:
    """float64 [1 or 2, samples], on every rank."""
    values = torch.zeros(shape, dtype=torch.float64, device=run.device)
    once = run.groups.tp.rank() == 0 and run.groups.cp.rank() == 0
    for group in in_groups(run, answers.batches()):
        for row, of in enumerate((group, [mismatched_rows(batch) for batch in group])[: len(values)]):
            found = log_probabilities(run, [prepare(batch, run, run.recipe.train.seq_length) for batch in of])
            for batch, logps in zip(group, found, strict=True) if found and once else ():
                values[row, batch["sample_ids"].to(values.device)] = logps
    dist.all_reduce(values)
    return values


def _read(path: Path, shape: tuple[int, int], device: torch.device) -> torch.Tensor | None:
    """What rank 0 has read, on every rank."""
    values = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
    if dist.get_rank() == 0 and path.is_file():
        try:
            held = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            held = np.empty(0)  # what cannot be read is made again
        if held.shape == shape and held.dtype == np.float64:
            values.copy_(torch.from_numpy(held))
    dist.broadcast(values, 0)
    return None if values.isnan().any() else values


def _write(path: Path, values: np.ndarray) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.save(file, values)
        partial.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None


def _fingerprint(recipe: Recipe) -> str:
    """Of the files that the run's weights begin with, and of how they compute."""
    named = [model_folder(recipe), recipe.model.megatron, recipe.lora.adapter]
    return files_fingerprint([recipe.model.dtype, recipe.model.vision_mask], named)


def files_fingerprint(how: Sequence[str], named: Sequence[str | None]) -> str:
    """Of what computes, and of the names, sizes and times of all files of folders."""
    said = list(how)
    for folder in (Path(name) for name in named if name is not None):
        for file in _files([folder]):
            stat = file.stat()
            said.append(f"{file} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\0".join(said).encode()).hexdigest()


def _files(folders: Sequence[Path]) -> list[Path]:
    return sorted(file for folder in folders for file in folder.resolve().rglob("*") if file.is_file())
