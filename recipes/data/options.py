"""What decides the tokens of a corpus. Everything here is part of the cache's name; order and batches are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge.errors import UsageError
from recipes.data.formats import DEFAULT_FORMAT, FormatOptions


@dataclass(frozen=True)
class Supervise:
    """Which tokens are learnt. What the model itself says in the turns chosen here, and the `<turn|>` that ends them.

    `turns`: "all" model turns, only the "last" one of a conversation, or "everything", what is asked too. A message
    that says whether it is learnt (`train`) is asked first.
    `thinking`: thoughts (`<|channel>` to `<channel|>`) count.
    `tool_calls`: what the model says up to a tool call, and the call, count.
    """

    turns: str = "all"
    thinking: bool = True
    tool_calls: bool = True

    def __post_init__(self) -> None:
        one_of("data.supervise_turns", self.turns, ("all", "last", "everything"))


@dataclass(frozen=True)
class CorpusOptions:
    """Where the data is and how it becomes tokens.

    `path`: files, folders of them, globs, or the name of a dataset on the Hugging Face hub (`find_sources`).
    `split`, `subset`: of a hub dataset.
    `seq_length`: the longest sample, in tokens.
    `on_error`: "fail" at the first bad record, or "skip" and count.
    `overlong`: "drop" what is longer than `seq_length`, or "split" it between turns.
    `allow_urls`: fetch media from http(s), once, into the cache.
    `media_root`: the folder that media paths are relative to and must stay in; default: that of the data file.
    `chat_template`: a Jinja file instead of the model's own template.
    `template_kwargs`: variables for the template, such as `{"enable_thinking": True}`.
    `generation_prefix`: whether what the template's generation prompt has behind `<|turn>model\\n` (an empty thought,
        in the larger published models) stands before the last answer, unlearnt, as it will when the model is used.
        None: wherever the template makes such a prompt.
    `records`: what they hold: "samples" to learn, "pairs" of a chosen and a rejected answer, "labelled" answers
        (`recipes.data.preference`). The samples of a pair stand together, the chosen one first.
    `one_row`: all samples of a record have to fit into `seq_length` together: pairs that are packed.
    `cache`: the folder of caches; default: gemma4-bridge/data in the user's cache folder.
    `workers`: processes that tokenise, threads that decode.
    `format`: how records are read, where they do not show it.
    """

    path: str | tuple[str, ...]
    seq_length: int
    split: str = "train"
    subset: str | None = None
    supervise: Supervise = field(default_factory=Supervise)
    on_error: str = "fail"
    overlong: str = "drop"
    allow_urls: bool = False
    media_root: str | None = None
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    generation_prefix: bool | None = None
    records: str = "samples"
    one_row: bool = False
    cache: str | None = None
    workers: int = 2
    format: FormatOptions = DEFAULT_FORMAT

    def __post_init__(self) -> None:
        one_of("data.on_error", self.on_error, ("fail", "skip"))
        one_of("data.overlong", self.overlong, ("drop", "split"))
        at_least("seq_length", self.seq_length, 2)
        at_least("data.workers", self.workers, 1)
        if not self.paths or not all(self.paths):
            raise UsageError("data.path: names nothing")

    @property
    def together(self) -> int:
        """How many samples of a record belong together: they are kept, and stand in a row or batch, together."""
        return 2 if self.records == "pairs" else 1

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises UsageError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UsageError(f"{name}: {value!r} is not one of {', '.join(allowed)}")


def at_least(name: str, value: int, least: int) -> None:
    """Raises UsageError for a number below `least`."""
    if value < least:
        raise UsageError(f"{name}: {value} is less than {least}")
