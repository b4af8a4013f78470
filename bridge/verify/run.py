"""`verify`: what to compare, and the ranks to do it on."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.convert.atomic import Notify
from bridge.convert.folders import open_source
from bridge.convert.manifest import MegatronFolder
from bridge.convert.plain import write_plain
from bridge.convert.stream import Progress
from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.hf.hub import model_name
from bridge.megatron.parallel import Parallel
from bridge.verify.result import Check
from bridge.verify.round_trip import check_round_trip

if TYPE_CHECKING:
    from bridge.ranks import RankPool
    from bridge.verify.sample import VerificationSample
    from bridge.verify.task import ParityTask

CHECKS = ("round-trip", "logits", "gradients")
DTYPES = ("float32", "bfloat16")


def verify(
    hf_dir: Path,
    *,
    megatron_dir: Path | None = None,
    checks: Sequence[str] = CHECKS,
    parallel: Parallel = Parallel(),  # noqa: B008 - frozen
    dtype: str = "float32",
    seed: int = 0,
    workdir: Path | None = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
    pool: RankPool | None = None,
    overrides: dict[str, Any] | None = None,
) -> list[Check]:
    """Run the checks and return their rows. Starts its own ranks unless `pool` is given.

    `progress` is of the round trip; `notify` gets a line before each batch whose logits or gradients are compared.
    Raises a BridgeError when a check could not be carried out (which is not the same as failing).
    """
    _check_known(checks, dtype)
    with ExitStack() as stack:
        source = open_source(stack, hf_dir)
        geometry, quantized = source.geometry, source.folder.config is not None
    if geometry.drafter is not None and set(checks) != {"round-trip"}:
        raise UsageError(f"{hf_dir}: a drafter, which computes nothing without its target; use --check round-trip")
    variant = model_name(hf_dir)
    rows: list[Check] = []
    if "round-trip" in checks:
        rows += check_round_trip(hf_dir, megatron_dir, variant, workdir=workdir, progress=progress)
    if "logits" in checks or "gradients" in checks:
        import torch

        from bridge.megatron.layout import check_layout
        from bridge.ranks import RankPool
        from bridge.verify.task import ParityTask

        check_layout(geometry, parallel)
        checkpoint = None if megatron_dir is None else MegatronFolder.open(megatron_dir)
        if checkpoint is not None:
            geometry = replace(geometry, tied=checkpoint.geometry.tied)
        with ExitStack() as stack:
            ranks = pool or stack.enter_context(RankPool(parallel.world_size))
            samples = _samples(hf_dir, geometry, parallel, seed, ranks)
            first = ParityTask(
                variant,
                geometry,
                hf_dir if checkpoint is None else checkpoint.weights,
                checkpoint is not None,
                parallel,
                getattr(torch, dtype),
                samples[0][1],
                {},
                gradients="gradients" in checks,
                logits="logits" in checks,
                overrides=overrides or {},
            )
            rows += _parity(hf_dir, quantized, first, samples, workdir, notify or _say_nothing, ranks)
    return rows


def _check_known(checks: Sequence[str], dtype: str) -> None:
    unknown = [name for name in checks if name not in CHECKS]
    if unknown or not checks:
        raise UsageError(f"check {unknown[0] if unknown else ''!r}: known are {', '.join(CHECKS)}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: known are {', '.join(DTYPES)}")


@dataclass(frozen=True)
class _Parity:
    """Comparisons with transformers that differ in their samples. `first`: the task of the first of them."""

    first: ParityTask
    reference_dir: Path
    ranks: RankPool
    folder: Path
    notify: Notify

    def run(self, number: str, note: str, sample: VerificationSample) -> list[Check]:
        """What transformers computes of a sample, then the rows of all ranks."""
        import torch

        from bridge.verify.on_ranks import run, run_reference

        self.notify(f"comparing batch {number}{f' ({note})' if note else ''}")
        dtype, gradients = self.first.dtype, self.first.gradients
        references = {"dtype": self.folder / "dtype.safetensors"}
        self.ranks.run(run_reference, self.reference_dir, sample, dtype, gradients, references["dtype"], world_size=1)
        if dtype is not torch.float32:
            references["float32"] = truth = self.folder / "float32.safetensors"
            self.ranks.run(run_reference, self.reference_dir, sample, torch.float32, False, truth, world_size=1)
        task = replace(self.first, sample=sample, references=references, note=note, packed=bool(note))
        found = self.ranks.run(run, task, world_size=task.parallel.world_size)
        return [row for rows in found for row in rows]


def _parity(
    hf_dir: Path,
    quantized: bool,
    first: ParityTask,
    samples: Sequence[tuple[str, VerificationSample]],
    workdir: Path | None,
    notify: Notify,
    ranks: RankPool,
) -> list[Check]:
    """Compare with transformers. `quantized`: the folder's weights are written plainly for it, for the while."""
    with tempfile.TemporaryDirectory(prefix="gemma4-bridge-", dir=workdir) as folder:
        reference_dir = hf_dir
        if quantized:
            reference_dir = Path(folder) / "plain"
            notify(f"transformers computes with the dequantized weights, written to {reference_dir} for the while")
            write_plain(hf_dir, reference_dir)
        rows: list[Check] = []
        if missing := cannot_compare_media(first.geometry):
            dtype = str(first.dtype).removeprefix("torch.")
            rows.append(Check("logits", first.variant, first.parallel, dtype, "media", math.nan, None, missing))
        parity = _Parity(first, reference_dir, ranks, Path(folder), notify)
        for number, (note, sample) in enumerate(samples, 1):
            rows += parity.run(f"{number} of {len(samples)}", note, sample)
    return rows


def _samples(
    hf_dir: Path, geometry: Geometry, parallel: Parallel, seed: int, ranks: RankPool
) -> list[tuple[str, VerificationSample]]:
    """Batches with what is said of them: text, packed documents, and media where the model takes any."""
    from bridge.verify.media import kinds_of, media_sample
    from bridge.verify.sample import random_sample
    from bridge.verify.task import row_count_multiple

    # What the layout asks of the length of a row, and of the number of rows.
    length, multiple_of = math.lcm(8, parallel.row_multiple), row_count_multiple(parallel)
    batch, images = 4 + -4 % multiple_of, geometry.multimodal
    packed = random_sample(geometry, seed, batch, length, images=images)
    samples = [
        ("", random_sample(geometry, seed, batch, length)),
        ("packed, image blocks" if images else "packed", packed),
    ]
    if cannot_compare_media(geometry) is None:
        kinds = kinds_of(geometry, multiple_of)
        media = ranks.run(media_sample, hf_dir, geometry, seed, kinds, length, world_size=1)
        samples += [("", sample) for sample in media]
    return samples


def _say_nothing(line: str) -> None:
    pass


def cannot_compare_media(geometry: Geometry) -> str | None:
    """Why pictures, clips and tones are not compared; "" where the model takes none, None where they can be."""
    if not geometry.modalities:
        return ""
    absent = [name for name in ("PIL", "torchvision") if importlib.util.find_spec(name) is None]
    return f"images, video and audio are not compared: no {' and no '.join(absent)}" if absent else None
