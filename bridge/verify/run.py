"""`verify`: what to compare, and the ranks to do it on."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
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
    unknown = [name for name in checks if name not in CHECKS]
    if unknown or not checks:
        raise UsageError(f"check {unknown[0] if unknown else ''!r}: known are {', '.join(CHECKS)}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: known are {', '.join(DTYPES)}")
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
        rows += _parity(
            hf_dir,
            quantized,
            megatron_dir,
            geometry,
            variant,
            checks,
            parallel,
            dtype,
            seed,
            workdir,
            notify,
            pool,
            overrides,
        )
    return rows


def _parity(
    hf_dir: Path,
    quantized: bool,
    megatron_dir: Path | None,
    geometry: Geometry,
    variant: str,
    checks: Sequence[str],
    parallel: Parallel,
    dtype: str,
    seed: int,
    workdir: Path | None,
    notify: Notify | None,
    pool: RankPool | None,
    overrides: dict[str, Any] | None,
) -> list[Check]:
    import torch

    from bridge.megatron.layout import check_layout
    from bridge.ranks import RankPool
    from bridge.verify.media import kinds_of, media_sample
    from bridge.verify.on_ranks import run, run_reference
    from bridge.verify.sample import random_sample
    from bridge.verify.task import ParityTask, row_count_multiple

    check_layout(geometry, parallel)
    checkpoint = None if megatron_dir is None else MegatronFolder.open(megatron_dir)
    if checkpoint is not None:
        geometry = replace(geometry, tied=checkpoint.geometry.tied)
    # What the layout asks of the length of a row, and of the number of rows.
    length, rows_of = math.lcm(8, parallel.row_multiple), row_count_multiple(parallel)
    batch = 4 + -4 % rows_of
    images = geometry.multimodal
    run_dtype = getattr(torch, dtype)
    results: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="gemma4-bridge-", dir=workdir) as folder:
        reference_dir = hf_dir
        if quantized:
            reference_dir = Path(folder) / "plain"
            if notify is not None:
                notify(f"transformers computes with the dequantized weights, written to {reference_dir} for the while")
            write_plain(hf_dir, reference_dir)
        ranks = pool or RankPool(parallel.world_size)
        try:
            samples = [
                ("", random_sample(geometry, seed, batch, length)),
                (
                    "packed, image blocks" if images else "packed",
                    random_sample(geometry, seed, batch, length, images=images),
                ),
            ]
            missing = cannot_compare_media(geometry)
            if missing is None:
                kinds = kinds_of(geometry, rows_of)
                media = ranks.run(media_sample, hf_dir, geometry, seed, kinds, length, world_size=1)
                samples += [("", sample) for sample in media]
            elif missing:
                results.append(Check("logits", variant, parallel, dtype, "media", math.nan, None, missing))
            references = {"dtype": Path(folder) / "dtype.safetensors"}
            if run_dtype is not torch.float32:
                references["float32"] = Path(folder) / "float32.safetensors"
            gradients = "gradients" in checks
            for number, (note, sample) in enumerate(samples, 1):
                if notify is not None:
                    notify(f"comparing batch {number} of {len(samples)}{f' ({note})' if note else ''}")
                ranks.run(run_reference, reference_dir, sample, run_dtype, gradients, references["dtype"], world_size=1)
                if "float32" in references:
                    truth = references["float32"]
                    ranks.run(run_reference, reference_dir, sample, torch.float32, False, truth, world_size=1)
                task = ParityTask(
                    variant,
                    geometry,
                    hf_dir if checkpoint is None else checkpoint.weights,
                    checkpoint is not None,
                    parallel,
                    run_dtype,
                    sample,
                    references,
                    gradients=gradients,
                    logits="logits" in checks,
                    overrides=overrides or {},
                    note=note,
                    packed=bool(note),
                )
                for rows in ranks.run(run, task, world_size=parallel.world_size):
                    results += rows
        finally:
            if pool is None:
                ranks.close()
    return results


def cannot_compare_media(geometry: Geometry) -> str | None:
    """Why pictures, clips and tones are not compared; "" where the model takes none, None where they can be."""
    if geometry.vision is None and geometry.audio is None:
        return ""
    absent = [name for name in ("PIL", "torchvision") if importlib.util.find_spec(name) is None]
    return f"images, video and audio are not compared: no {' and no '.join(absent)}" if absent else None
