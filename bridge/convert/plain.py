"""A folder of quantized weights, written as the plain folder that it stands for: what other programs compute with."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from bridge.convert.atomic import staged
from bridge.convert.folders import DEFAULT_SHARD_BYTES, copy_assets, open_source
from bridge.convert.pieces import plan_digest, same_tensors
from bridge.convert.stream import CHUNK_BYTES, Progress, copy
from bridge.hf.writer import HfWriter


def write_plain(hf_dir: str | Path, target: str | Path, *, progress: Progress | None = None) -> None:
    """A folder of quantized weights as the plain folder that it stands for. Raises a BridgeError."""
    with ExitStack() as stack:
        source = open_source(stack, hf_dir)
        tensors = same_tensors(source.folder)
        stage = stack.enter_context(
            staged(
                target,
                plan=plan_digest(tensors, "plain", CHUNK_BYTES),
                sources=[*source.folder.files, *(source.folder.path / asset for asset in source.folder.assets)],
                source_folder=source.folder.path,
                needed_bytes=sum(tensor.spec.nbytes for tensor in tensors),
                overwrite=False,
            )
        )
        writer = stack.enter_context(HfWriter(stage.folder, [tensor.spec for tensor in tensors], DEFAULT_SHARD_BYTES))
        copy(tensors, source.folder, writer, journal=stage.journal, progress=progress)
        writer.finish()
        copy_assets(source.folder.path, source.folder.assets, stage.folder, source.folder.config)
