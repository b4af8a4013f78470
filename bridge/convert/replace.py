"""A folder that takes another's place in one step, and which folders it may take the place of.

Where the system can exchange two names that is one call. Elsewhere (NFS, Lustre) the previous folder is moved aside and
the new one moved in: whatever ends the program in between, one of them is whole, and `recover` puts the previous back.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from bridge.errors import CheckpointError, UsageError
from bridge.hf.tensors import fsync_folder, printable

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
# One of these makes a folder a checkpoint.
_MARKS = (
    "config.json",
    "adapter_config.json",
    "bridge.json",
    "latest_checkpointed_iteration.txt",
    "metadata.json",
    ".metadata",
    "model.safetensors",
    "model.safetensors.index.json",
)
# What else is in one: of Hugging Face, or of ours (whose hf/ holds whatever was imported, under a manifest).
_OF_MODELS = (
    *_MARKS,
    "*.safetensors",
    "*.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "additional_chat_templates/*.jinja",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    ".gitattributes",
    "adapter.json",
    "*.distcp",
    "common.pt",
    "release/*.distcp",
    "release/.metadata",
    "release/metadata.json",
    "release/common.pt",
)
_MANIFEST = "hf/bridge.json"


def check_replaceable(folder: Path, names: Iterable[str] = ()) -> None:
    """Raise UsageError unless a folder is empty, or a checkpoint with nothing else in it.

    `names`: of files that will be written again, and so are nothing else.
    """
    again = frozenset(names)
    marked, found = False, False
    for parent, folders, files in os.walk(folder):
        inner = Path(parent).relative_to(folder)
        empty = not folders and not files and inner != Path()
        for name in [
            *files,
            *(name for name in folders if (Path(parent) / name).is_symlink()),
            *([""] if empty else []),
        ]:
            found = True
            relative = (inner / name).as_posix()
            marked = marked or relative in _MARKS or relative == _MANIFEST
            if not _of_model(folder, relative, again):
                raise UsageError(_refusal(folder, f"it holds {printable(relative)}"))
    if found and not marked:
        raise UsageError(_refusal(folder, f"it has no {_MARKS[0]}"))


def _of_model(folder: Path, relative: str, again: frozenset[str]) -> bool:
    parts = relative.split("/")
    if any(part.startswith(".") for part in parts[:-1]):
        return False
    if parts[0] == "hf" and (folder / _MANIFEST).is_file():
        return True
    if parts[-1] in again:
        return True
    return any(relative.count("/") == pattern.count("/") and fnmatchcase(relative, pattern) for pattern in _OF_MODELS)


def _refusal(folder: Path, why: str) -> str:
    why_not = f"does not look like a checkpoint alone ({why}), so it is not overwritten; remove it yourself"
    return f"{printable(folder)}: {why_not}"


def sync_tree(folder: Path) -> None:
    """Make everything in a folder durable. Raises OSError and CheckpointError."""
    for parent, _, names in os.walk(folder):
        for name in names:
            fd = os.open(Path(parent) / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_folder(Path(parent))


def replace_folder(new: Path, target: Path, aside: Path) -> None:
    """Let `new` (durable, on the same file system) be `target`; what was there before is removed in the end.

    `aside`, a name that only calls for this target use, is where it stands meanwhile; call `recover` with it before
    the next run looks at the target. On any exception the target is what it was, or the new folder, and whole.
    """
    recover(target, aside)
    try:
        if not os.path.lexists(target) or not _exchange(new, target):
            if os.path.lexists(target):
                target.rename(aside)
                fsync_folder(aside.parent)
            new.rename(target)
        fsync_folder(target.parent)
    except BaseException:
        # Back, where it stands aside and nothing took its place.
        try:
            recover(target, aside)
        except OSError as error:
            raise CheckpointError(
                f"{printable(target)}: stands whole in {printable(aside)}, because it cannot be moved back "
                f"({error.strerror}); the next run will"
            ) from error
        raise
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)


def recover(target: Path, aside: Path) -> None:
    """Put back what an interrupted `replace_folder` had moved away, or remove it where the new folder is there."""
    if aside.is_dir():
        if not os.path.lexists(target):
            aside.rename(target)
            fsync_folder(target.parent)
        else:
            shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step, where the system can."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
