"""Does every byte come back? The HF folder against what export writes from the Megatron checkpoint."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from bridge.convert.export import open_checkpoint
from bridge.convert.folders import compare_assets, import_hf, open_source
from bridge.convert.manifest import MegatronFolder
from bridge.convert.stream import Progress, compare
from bridge.megatron.parallel import Parallel
from bridge.verify.result import Check


def check_round_trip(
    hf_dir: Path,
    megatron_dir: Path | None,
    variant: str,
    *,
    workdir: Path | None = None,
    progress: Progress | None = None,
) -> list[Check]:
    """Compare names, shapes, dtypes and bytes of every tensor, and the bytes of config and assets, streaming.

    Without `megatron_dir` the folder is imported to a temporary one (as large as the source, in `workdir` or beside the
    source's own file system default). What export would write is compared with the folder as it is produced, so that
    no second copy of the model is needed. Raises a BridgeError where the check could not be carried out.
    """
    with ExitStack() as stack:
        if megatron_dir is None:
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="gemma4-bridge-", dir=workdir))
            megatron_dir = Path(temporary) / "megatron"
            import_hf(hf_dir, megatron_dir, progress=progress)
        source = open_source(stack, hf_dir)
        checkpoint = MegatronFolder.open(megatron_dir)
        reader, tensors, _ = open_checkpoint(stack, checkpoint)
        wrong = [
            f"{name}: {detail}"
            for name, equal, detail in compare(tensors, reader, source.folder, progress=progress)
            if not equal
        ]
        written = {tensor.name for tensor in tensors}
        wrong += [f"{name}: does not come back" for name in source.folder.tensors if name not in written]
        assets = compare_assets(checkpoint.hf, source.folder.path, source.folder.assets, source.folder.config)
        left = [str(path) for path in source.folder.ignored]
    dtypes = sorted({tensor.dtype for tensor in source.folder.tensors.values()})

    def row(metric: str, value: int, detail: str) -> Check:
        return Check("round-trip", variant, Parallel(), "+".join(dtypes), metric, float(value), 0.0, detail)

    return [
        row("different_tensors", len(wrong), wrong[0] if wrong else f"{len(tensors)} tensors equal in every byte"),
        row(
            "different_assets",
            len(assets),
            assets[0] if assets else f"{len(source.folder.assets)} files equal in every byte" + _left_behind(left),
        ),
    ]


def _left_behind(files: list[str]) -> str:
    """What import leaves, since it is no part of the model."""
    return f"; {len(files)} left behind, {files[0]} first" if files else ""
