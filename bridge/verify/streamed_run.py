"""`verify --streamed`: the batch, and both sides one after the other on a rank."""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.convert.atomic import Notify
from bridge.convert.folders import open_source
from bridge.convert.manifest import MegatronFolder
from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.hf.hub import model_name
from bridge.progress import followed
from bridge.verify.result import Check
from bridge.verify.run import cannot_compare_media
from bridge.verify.task import StreamedTask

if TYPE_CHECKING:
    from bridge.ranks import RankPool
    from bridge.verify.sample import VerificationSample

_TOKENS = 96
# Of the file of transformers' side: 2 has the choices of experts too.
_FORMAT = 2


def verify_streamed(
    hf_dir: Path,
    *,
    megatron_dir: Path | None = None,
    layers: str | None = None,
    seed: int = 0,
    workdir: Path | None = None,
    notify: Notify | None = None,
    pool: RankPool | None = None,
) -> list[Check]:
    """A row for each layer and one for the logits, with one layer's weights in memory. See `streamed.py`.

    `layers`: `A-B`, from 0, both included; None: all of them and the logits. In `workdir` transformers' side is kept,
    and found again by the next run. Raises a BridgeError when the check could not be carried out.
    """
    from bridge.ranks import RankPool

    with ExitStack() as stack:
        geometry = open_source(stack, hf_dir).geometry
    chosen = None if layers is None else parse_layers(layers, geometry.num_layers)
    checkpoint = None if megatron_dir is None else MegatronFolder.open(megatron_dir)
    if checkpoint is not None:
        geometry = replace(geometry, tied=checkpoint.geometry.tied)
    say = notify or (lambda text: None)
    with ExitStack() as stack:
        folder = workdir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gemma4-bridge-")))
        folder.mkdir(parents=True, exist_ok=True)
        ranks = pool or stack.enter_context(RankPool(1))
        if missing := cannot_compare_media(geometry):
            say(missing)
        sample = ranks.run(make_sample, hf_dir, geometry, seed, world_size=1)[0]
        theirs = folder / f"transformers-{_fingerprint(hf_dir, layers, sample)}.safetensors"
        task = StreamedTask(
            model_name(hf_dir),
            geometry,
            hf_dir,
            None if checkpoint is None else checkpoint.weights,
            sample,
            chosen,
            theirs,
            stack.enter_context(followed(say)),
        )
        if theirs.exists():
            say(f"transformers' side is in {theirs}")
        else:
            ranks.run(transformers_side, task, world_size=1)
        return ranks.run(our_side, task, world_size=1)[0]


def make_sample(folder: Path, geometry: Geometry, seed: int) -> VerificationSample:
    """On a rank: a row with a picture and a clip, where the model takes them, and one of text; else two of text."""
    from bridge.verify.media import kinds_of, media_sample
    from bridge.verify.sample import VerificationSample, random_sample

    if cannot_compare_media(geometry) is None:
        kinds = kinds_of(geometry)
        rich = next((kind for kind in kinds if kind.startswith("image, audio")), kinds[0])
        return media_sample(folder, geometry, seed, (rich, "text"))
    whole = random_sample(geometry, seed, 2)
    ids, mask, labels = (x[:, :_TOKENS].contiguous() for x in (whole.input_ids, whole.attention_mask, whole.labels))
    return VerificationSample(ids, mask, labels)


def transformers_side(task: StreamedTask) -> None:
    """On a rank: see `streamed.run_transformers`."""
    from bridge.verify.streamed import run_transformers

    run_transformers(task)


def our_side(task: StreamedTask) -> list[Check]:
    """On a rank: see `streamed.compare`."""
    from bridge.verify.streamed import compare

    return compare(task)


def _fingerprint(folder: Path, layers: str | None, sample: VerificationSample) -> str:
    """Of all that transformers' side depends on: the files by size and time, and what it is given."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    said = repr((_FORMAT, str(folder.resolve()), files, layers, metadata.version("transformers")))
    digest = hashlib.sha256(said.encode())
    for name, tensor in sample.inputs().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """`A-B` or `A`, or several with commas: layers from 0, both ends included. Raises UsageError."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            span = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            span = range(0)
        if not span or span.stop > count:
            raise UsageError(f"--layers {text}: {part!r} names no layers; the model has 0 to {count - 1}")
        found.update(span)
    return tuple(sorted(found))
