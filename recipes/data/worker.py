"""What a process of `recipes.data.tokenising` does: groups of batches -> parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from recipes.data.chat import ChatModel
from recipes.data.options import CorpusOptions
from recipes.data.tokenising import Numbered, RecordEncoder, WrittenPart


def opened(
    model: Path, options: CorpusOptions, roots: Sequence[Path | None], folder: Path
) -> Callable[[Sequence[Numbered]], WrittenPart]:
    """A function of a group, which writes a part into `folder`. Raises UsageError."""
    return partial(RecordEncoder(ChatModel(model, options), options, roots).part, folder)
