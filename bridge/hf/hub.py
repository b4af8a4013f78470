"""A folder on disk, or a model id of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from bridge.errors import CheckpointError, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Weights as safetensors and what belongs to them; never pickles, never code.
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*"]


def resolve(name: str, *, config_only: bool = False, revision: str | None = None) -> Path:
    """The local folder of `name`; a hub id is downloaded to its cache first, without weights if `config_only`.

    A hub id is OWNER/NAME where there is no folder OWNER here; `revision`: of it, where it is not the default one.
    Raises CheckpointError, UsageError.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{name}: a file; expected a model folder or a hub id such as google/gemma-4-E2B-it")
    # The hub is asked for what can be nothing but one of its ids: it takes long to say no.
    if not _HUB_ID.fullmatch(name):
        home = "; ~ stands for the home folder only where a shell expands it" if name.startswith("~") else ""
        raise CheckpointError(f"{name}: no such folder{home}")
    if path.parent.is_dir():
        raise CheckpointError(f"{name}: no such folder; no hub id either, since {path.parent} is a folder here")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json"] if config_only else _PATTERNS
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        # The hub's own errors are many; what they have in common is that the model could not be had.
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: neither a folder here nor to be had from the hub ({line})") from error


def model_name(folder: Path) -> str:
    """What a model folder is called: in the hub's cache by its id, not by the hash of its snapshot."""
    folder = folder.absolute()
    repository = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    return repository.removeprefix("models--").replace("--", "/") if repository.startswith("models--") else folder.name
