"""What records are, without a model: their formats, the columns that are not read, and the first conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from bridge.errors import DataError
from recipes.data.encoding import INVALID, LEFT_OUT
from recipes.data.formats import loaded_function
from recipes.data.options import CorpusOptions
from recipes.data.preference import parse
from recipes.data.record_sources import find_sources
from recipes.data.sample import Sample

_SHOWN = 20


@dataclass
class Recognition:
    """Counts of records, and the first samples. `read` leaves blank lines out."""

    files: list[str] = field(default_factory=list)
    read: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For programs; `format` as `report.facts` has it."""
        return {
            "files": self.files,
            "format": ", ".join(name for name, _ in self.formats.most_common()),
            "formats": dict(self.formats),
            "read": self.read,
            "kept": sum(self.formats.values()),
            "dropped": dict(self.dropped),
            "skipped": self.skipped,
            "unread": dict(self.unread),
            "media": dict(self.media),
            "samples": [
                {"where": str(sample.where), "text": "\n".join(conversation(sample))} for sample in self.samples
            ],
        }


def recognise(options: CorpusOptions, count: int, progress: Callable[[int], None] = lambda read: None) -> Recognition:
    """Parse every record, and keep the first `count`. Media are not opened, and nothing is tokenised.

    Raises DataError: data that cannot be read on, and with `on_error="fail"` the first bad record; UsageError.
    """
    sources = find_sources(options.paths, split=options.split, subset=options.subset)
    function, found = loaded_function(options.format), Recognition([source.name for source in sources])
    for record in chain.from_iterable(batch.records() for source in sources for batch in source.record_batches()):
        if record.blank:
            continue
        found.read += 1
        progress(found.read)
        try:
            if record.error is not None:
                raise record.error
            value = function(record.value, record.where)
            if value is None and options.format.function is not None:
                found.dropped[LEFT_OUT] += 1
                continue
            samples, _ = parse(value, record.where, options)
        except DataError as error:
            if options.on_error == "fail":
                raise
            found.dropped[INVALID] += 1
            found.skipped += [str(error)] if len(found.skipped) < _SHOWN else []
            continue
        found.formats[samples[0].form] += 1
        found.unread.update(samples[0].unread)
        found.media.update(item.kind for sample in samples for item in sample.media)
        found.samples += samples[: max(0, count - len(found.samples))]
    return found


def conversation(sample: Sample) -> Iterator[str]:
    """A sample in words, a line or more for each message."""
    if sample.text is not None:
        yield sample.text
    if sample.tokens is not None:
        yield f"{len(sample.tokens.ids)} tokens, {int(sample.tokens.supervised.sum())} learnt"
    for message in sample.messages:
        said = "".join(part if isinstance(part, str) else f"[{part.kind}]" for part in message.parts)
        calls = "".join(f"[call of {call['function']['name']}]" for call in message.tool_calls)
        learnt = {None: "", True: " (learnt)", False: " (not learnt)"}[message.train]
        yield f"{message.role}{learnt}: {said}{calls}"


def lines(found: Recognition) -> Iterator[str]:
    """The whole for people."""
    for sample in found.samples:
        yield f"── {sample.where} · {sample.form}"
        yield from conversation(sample)
    yield f"── {', '.join(found.files[:3])}" + (f" and {len(found.files) - 3} more" if len(found.files) > 3 else "")
    formats = ", ".join(f"{name}: {count}" for name, count in found.formats.most_common()) or "none"
    yield f"{found.read} records; formats: {formats}"
    if found.unread:
        yield f"not read: {', '.join(name for name, _ in found.unread.most_common())}"
    for kind, count in found.media.items():
        yield f"{kind} items: {count}"
    for reason, count in found.dropped.items():
        yield f"dropped: {count} {reason}"
    yield from (f"dropped: {line}" for line in found.skipped)
    yield "what is learnt of them, in tokens: --model"
