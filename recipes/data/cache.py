"""The files of a cache, and the parts in which it is made.

A cache is a folder of flat arrays:

    ids.bin     int32 [tokens]
    flags.bin   uint8 [tokens]      bit 0: supervised; bits 1, 2: 0 text, 1 image, 2 video, 3 audio;
                                    bit 3: of an answer that is wanted, where answers have a label
    index.bin   int64 [samples, 3]  end of the sample in tokens; source; line
    media.jsonl one line per sample that has media; blobs.bin: bytes that were inline, or fetched from a URL
    skipped.txt every record that was dropped, by file and line
    meta.json   statistics, and a digest of the tokens; written last

A part is such a folder of some consecutive records. It takes its name, the number of records before it, when it is
complete: whatever ends a process, the next one goes on behind the last part, and processes that cannot exclude each
other do no harm.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from recipes.data.chat import Encoded
from recipes.data.encoding import RecordOutcome
from recipes.data.sample import Blob, Media
from recipes.data.statistics import Statistics, StatisticsBuilder

# In media.jsonl: bytes in blobs.bin, not a path.
STORED = "blobs.bin:"
_FILES = ("ids.bin", "flags.bin", "index.bin", "media.jsonl", "blobs.bin", "skipped.txt")
# So many tokens are held before they are written.
_HELD_TOKENS = 1 << 20
# A part ends with whichever comes first.
_PART_RECORDS, _PART_BYTES, _PART_SECONDS = 4096, 16 << 20, 10.0


class CacheParts:
    """The parts that a folder has from before, and those that are added. `records`: how many records they hold."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        self.folder, self.records, self.counts = folder, 0, StatisticsBuilder()
        folder.mkdir(exist_ok=True)
        self._done: list[Path] = []
        while (found := _complete(self._place())) is not None:
            self._take(self._place(), *found)
        self._pending: list[tuple[int, RecordOutcome]] = []
        self._bytes, self._since = 0, time.monotonic()

    def add(self, source: int, outcome: RecordOutcome) -> None:
        """Hold what a record gave, and write a part when it is time. Raises OSError."""
        # One operation: an interrupt comes before or after it.
        self._pending.append((source, outcome))
        self._bytes += sum(5 * len(encoded) + _inline(encoded.media) for encoded in outcome.encoded)
        full = len(self._pending) >= _PART_RECORDS or self._bytes >= _PART_BYTES
        if full or time.monotonic() - self._since >= _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a part. Raises OSError."""
        if not self._pending:
            return
        unfinished = Path(tempfile.mkdtemp(prefix="new-", dir=self.folder))
        self.take(unfinished, *write_part(unfinished, self._pending))
        self._pending, self._bytes, self._since = [], 0, time.monotonic()

    def take(self, unfinished: Path, records: int, statistics: Statistics) -> None:
        """Have what `write_part` wrote, in a folder of this one, as the next part."""
        place = self._place()
        try:
            unfinished.rename(place)
        except OSError:
            # Somebody else has come as far.
            place = unfinished
        self._take(place, records, statistics)

    def join(self, folder: Path) -> str:
        """Write all parts as one into `folder`, without its meta.json; a digest of the tokens. Raises OSError.

        The digest covers what a row of training depends on: ids, what is learnt, lengths, media.
        """
        # One for each, so that it does not depend on where parts end.
        digests = {name: hashlib.sha256() for name in ("ids.bin", "flags.bin", "index.bin", "media.jsonl")}
        tokens = samples = 0
        with ExitStack() as stack:
            files = {name: stack.enter_context((folder / name).open("wb")) for name in _FILES}
            for part in self._done:
                blobs = files["blobs.bin"].tell()
                for name in ("ids.bin", "flags.bin", "blobs.bin", "skipped.txt"):
                    _append(part / name, files[name], digests[name].update if name in digests else None)
                index = np.fromfile(part / "index.bin", np.int64).reshape(-1, 3)
                index[:, 0] += tokens
                files["index.bin"].write(index.tobytes())
                digests["index.bin"].update(index[:, 0].tobytes())
                for line in (part / "media.jsonl").read_text(encoding="utf-8").splitlines():
                    moved = json.dumps(_moved(json.loads(line), samples, blobs)).encode() + b"\n"
                    files["media.jsonl"].write(moved)
                    digests["media.jsonl"].update(moved)
                tokens, samples = int(index[-1, 0]) if len(index) else tokens, samples + len(index)
        return hashlib.sha256("".join(one.hexdigest() for one in digests.values()).encode()).hexdigest()[:32]

    def _place(self) -> Path:
        return self.folder / f"{self.records:012d}"

    def _take(self, part: Path, records: int, statistics: Statistics) -> None:
        self._done.append(part)
        self.records += records
        self.counts.absorb(statistics)


def media_from_json(row: dict[str, Any]) -> Media:
    """An item of media.jsonl."""
    return Media(row["kind"], tuple(Blob(path=path) for path in row["blobs"]), row["fps"])


def write_part(folder: Path, outcomes: Iterable[tuple[int, RecordOutcome]]) -> tuple[int, Statistics]:
    """Write what consecutive records gave, each with the number of its source; how many they are. Raises OSError."""
    records = 0
    with _Writer(folder) as writer:
        for source, outcome in outcomes:
            writer.add(source, outcome)
            records += 1
    statistics = writer.counts.frozen()
    meta = {"records": records, "statistics": statistics.to_json(), "sizes": _sizes(folder)}
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    return records, statistics


class _Writer:
    """The arrays of a part, appended to; `counts` as they grow."""

    def __init__(self, folder: Path) -> None:
        self.counts = StatisticsBuilder()
        self._held: list[tuple[Encoded, int, int]] = []
        self._tokens = 0
        self._files: dict[str, IO[bytes]] = {name: (folder / name).open("wb") for name in _FILES}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._write()
        for file in self._files.values():
            file.close()

    def add(self, source: int, outcome: RecordOutcome) -> None:
        """Append what a record gave."""
        counts, record = self.counts, outcome.record
        if record.blank:
            counts.blank_lines += 1
            return
        counts.read += 1
        counts.pieces_dropped += outcome.pieces_dropped
        if outcome.form is not None:
            counts.formats[outcome.form] += 1
        counts.unread.update(outcome.unread)
        if outcome.reason is not None:
            counts.skip(outcome.reason, outcome.message)
            self._files["skipped.txt"].write(f"{outcome.reason}: {outcome.message}\n".encode())
            return
        counts.kept += 1
        for encoded in outcome.encoded:
            for item in encoded.media:
                counts.media[item.kind] += 1
            counts.thoughts_left_out += encoded.thoughts_left_out
            counts.unlike_prompts += encoded.unlike_prompts
            if encoded.media:
                rows = [self._media_to_json(item) for item in encoded.media]
                row = {"sample": counts.samples + len(self._held), "media": rows}
                self._files["media.jsonl"].write(json.dumps(row).encode() + b"\n")
            self._held.append((encoded, source, record.where.line))
            self._tokens += len(encoded)
            if self._tokens >= _HELD_TOKENS:
                self._write()

    def _write(self) -> None:
        """Append the samples that are held: many at a time, as each call of numpy costs as much as a short sample."""
        if not self._held:
            return
        samples = [sample for sample, _, _ in self._held]
        lengths = np.fromiter(map(len, samples), np.int64, len(samples))
        supervised = np.concatenate([sample.supervised for sample in samples])
        flags = supervised | np.concatenate([sample.types for sample in samples]) << 1
        if any(sample.desirable for sample in samples):
            flags |= np.repeat(np.asarray([sample.desirable for sample in samples]), lengths).astype(np.uint8) << 3
        ends = np.cumsum(lengths)
        rows = np.asarray([(0, source, line) for _, source, line in self._held], np.int64)
        rows[:, 0] = self.counts.tokens + ends
        self._files["ids.bin"].write(np.concatenate([sample.ids for sample in samples]).astype(np.int32).tobytes())
        self._files["flags.bin"].write(flags.astype(np.uint8).tobytes())
        self._files["index.bin"].write(rows.tobytes())
        self.counts.add(lengths, int(supervised.sum()))
        self._held, self._tokens = [], 0

    def _media_to_json(self, item: Media) -> dict[str, Any]:
        return {"kind": item.kind, "fps": item.fps, "blobs": [self._blob_to_json(blob) for blob in item.blobs]}

    def _blob_to_json(self, blob: Blob) -> str:
        if blob.data is None:
            assert blob.path is not None
            # A leading "./" keeps a path that looks like a place in blobs.bin a path.
            return f"./{blob.path}" if blob.path.startswith(STORED) else blob.path
        start = self._files["blobs.bin"].tell()
        self._files["blobs.bin"].write(blob.data)
        return f"{STORED}{start}+{len(blob.data)}"


def _inline(media: Sequence[Media]) -> int:
    return sum(len(blob.data or b"") for item in media for blob in item.blobs)


def _complete(part: Path) -> tuple[int, Statistics] | None:
    """How many records a part holds, and their statistics; None for what is no whole part. Removes a damaged one."""
    if not part.exists():
        return None
    try:
        meta = json.loads((part / "meta.json").read_text(encoding="utf-8"))
        if _sizes(part) == meta["sizes"]:
            return int(meta["records"]), Statistics.from_json(meta["statistics"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    # A machine that lost its power may have kept a name and not the bytes.
    shutil.rmtree(part, ignore_errors=True)
    return None


def _sizes(part: Path) -> dict[str, int]:
    """In bytes, of its files. Raises OSError."""
    return {name: (part / name).stat().st_size for name in _FILES}


def _append(path: Path, target: IO[bytes], update: Callable[[bytes], None] | None) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            target.write(block)
            if update is not None:
                update(block)


def _moved(row: dict[str, Any], samples: int, blobs: int) -> dict[str, Any]:
    """A line of media.jsonl behind so many samples and bytes of other parts."""

    def place(path: str) -> str:
        if not path.startswith(STORED):
            return path
        start, size = path.removeprefix(STORED).split("+")
        return f"{STORED}{int(start) + blobs}+{size}"

    media = [item | {"blobs": [place(path) for path in item["blobs"]]} for item in row["media"]]
    return {"sample": row["sample"] + samples, "media": media}
