"""What is done in the process of a command that is disturbed, and the folders that it leaves."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Sequence
from pathlib import Path


def save_hf(source: str, target: str) -> None:
    """A live model of one rank, loaded and saved."""
    import torch
    import torch.distributed as dist

    from bridge import Gemma4Bridge
    from bridge.megatron.parallel import Parallel
    from bridge.ranks import RankPool  # noqa: F401  imported here as everywhere else: before the fork

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    bridge = Gemma4Bridge.from_hf(source)
    model = bridge.build(bridge.provider(Parallel(), dtype=torch.float32))
    bridge.load_hf_weights(model)
    bridge.save_hf(model, target, overwrite=True)


def limit(arguments: Sequence[str], exchange: bool = True, file_bytes: int | None = None) -> None:
    """What a command may do: exchange two folders in one step, write files of so many bytes.

    `save_hf` is a command here: what the command line makes of errors and signals, for a call from Python.
    """
    import bridge.cli
    from bridge.convert import replace

    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if not exchange:
        replace._exchange = lambda *_: False
    if arguments[0] == "save_hf":
        bridge.cli.app = lambda *_, **__: save_hf(*arguments[1:])  # type: ignore[assignment]


def contents(folder: Path) -> dict[str, bytes] | None:
    """Every file of a folder; None where there is no folder."""
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def emptied(folder: Path) -> None:
    """Remove all that is in a folder, which may be a mount."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
