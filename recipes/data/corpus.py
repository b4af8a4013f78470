"""Tokenised once: samples in a cache folder named by the content of everything that they depend on.

A cache is a folder `<digest>/` of flat arrays, mapped into memory, not loaded:

    ids.bin     int32 [tokens]
    flags.bin   uint8 [tokens]      bit 0: supervised; above it: 0 text, 1 image, 2 video, 3 audio
    index.bin   int64 [samples, 3]  end of the sample in tokens; source; line
    media.jsonl one line per sample that has media; blobs.bin: bytes that were inline, or fetched from a URL
    skipped.txt every record that was dropped, by file and line
    meta.json   statistics, written last

It is written beside its place and takes its name when complete, so that no rank ever sees half of one. A lock makes the
ranks of a machine wait for the first; where locks do not work, the slower one finds the place taken.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from bridge.errors import DataError
from bridge.hf.hub import resolve
from recipes.data.chat import ChatModel, Encoded
from recipes.data.encoding import Encoder, Outcome
from recipes.data.media import read_blob
from recipes.data.options import CorpusOptions
from recipes.data.sample import Blob, Media, Where
from recipes.data.sources import Record, Source, find_sources
from recipes.data.statistics import Counts, Statistics
from recipes.data.threads import ordered_map

# Counts up whenever the same inputs give other tokens or another layout of the cache.
_FORMAT = 1
_PROGRESS_EVERY = 1000

Progress = Callable[[int], None]


class Corpus:
    """An open cache. Thread-safe. `model` makes media into tensors, `fingerprint` names the content."""

    def __init__(self, folder: Path, model: ChatModel, options: CorpusOptions, sources: Sequence[Source]) -> None:
        """Raises DataError for a damaged cache."""
        self.folder, self.options, self.fingerprint = folder, options, folder.name
        self.encoder = Encoder(model, options)
        self.pad_id, self.tokenizer = model.pad_id, model.tokenizer
        self._sources = sources
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.statistics = Statistics.from_json(meta["statistics"])
            self._index = _mapped(folder / "index.bin", np.int64).reshape(-1, 3)
            self._ids = _mapped(folder / "ids.bin", np.int32)
            self._flags = _mapped(folder / "flags.bin", np.uint8)
            lines = (folder / "media.jsonl").read_text(encoding="utf-8").splitlines()
            self._media: dict[int, Any] = {row["sample"]: row["media"] for row in map(json.loads, lines)}
            tokens = int(self._index[-1, 0]) if len(self._index) else 0
            if not tokens == len(self._ids) == len(self._flags) == self.statistics.tokens:
                raise ValueError("sizes differ")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: this cache is damaged ({error}); remove it") from None

    def __len__(self) -> int:
        return len(self._index)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample, int64 [samples]."""
        return np.diff(self._index[:, 0], prepend=0)

    @property
    def has_media(self) -> bool:
        return bool(self._media)

    def where(self, sample: int) -> Where:
        """The file and line that a sample comes from."""
        _, source, line = self._index[sample].tolist()
        return Where(self._sources[source].name, line)

    def __getitem__(self, sample: int) -> Encoded:
        """One sample, a copy."""
        start, end = int(self._index[sample - 1, 0]) if sample else 0, int(self._index[sample, 0])
        flags = self._flags[start:end]
        media = tuple(_media_from_json(row) for row in self._media.get(sample, ()))
        return Encoded(self._ids[start:end].copy(), (flags & 1).astype(bool), flags >> 1, media)

    def media_tensors(self, sample: int) -> dict[str, Any]:
        """The media of a sample as the processor makes them: tensors by its names, {} without media.

        Raises DataError: a file that has gone, or changed so that it is another number of tokens.
        """
        encoded = self[sample]
        if not encoded.media:
            return {}
        where = self.where(sample)
        root = _root(self.options, self._sources[int(self._index[sample, 1])])
        tensors, soft = self.encoder.model().media_tensors(
            encoded.media, lambda blob, at: self._read(blob, root, at), str(where)
        )
        expected = int((encoded.types != 0).sum())
        if soft != expected:
            raise DataError(
                f"{where}: its media have changed: {soft} tokens now, {expected} when they were tokenised; "
                f"remove {self.folder}"
            )
        return tensors

    def _read(self, blob: Blob, root: Path | None, at: str) -> bytes:
        if blob.path is not None and blob.path.startswith(_STORED):
            start, size = (int(number) for number in blob.path.removeprefix(_STORED).split("+"))
            with (self.folder / "blobs.bin").open("rb") as file:
                file.seek(start)
                return file.read(size)
        return read_blob(blob, root, allow_urls=False, at=at)


def open_corpus(
    options: CorpusOptions,
    model: str | Path,
    *,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> Corpus:
    """The corpus of `options` for the model in a folder (or hub id): from the cache, tokenised first if need be.

    Args:
        progress: called with the number of records read so far, now and then.
        notify: called with a line for every record that is skipped.

    Raises:
        DataError: a bad record (with `on_error="fail"`), data that cannot be read, or none that can be kept.
        UsageError: options that make no sense, a model without a tokenizer or a chat template.
    """
    sources = find_sources(options.paths, split=options.split, subset=options.subset)
    chat = ChatModel(resolve(str(model)), options)
    caches = Path(options.cache) if options.cache else _default_cache()
    try:
        caches.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{caches}: the cache cannot be written ({error.strerror})") from None
    folder = caches / _digest(options, chat, sources)
    with _locked(folder.with_suffix(".lock")):
        if not (folder / "meta.json").is_file():
            _build(folder, chat, options, sources, progress, notify)
    corpus = Corpus(folder, chat, options, sources)
    if corpus.has_media:
        chat.processor  # noqa: B018  what is wrong with it is said now, not in the middle of a run
    return corpus


def _build(
    folder: Path,
    chat: ChatModel,
    options: CorpusOptions,
    sources: Sequence[Source],
    progress: Progress | None,
    notify: Callable[[str], None] | None,
) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name[:8]}-", dir=folder.parent))
    try:
        with _Writer(unfinished) as writer:
            for source, outcome in _outcomes(chat, options, sources):
                if outcome.error is not None and options.on_error == "fail":
                    raise outcome.error
                writer.add(source, outcome)
                if outcome.reason == "invalid" and notify is not None:
                    notify(f"skipped {outcome.message}")
                if progress is not None and writer.counts.read % _PROGRESS_EVERY == 0:
                    progress(writer.counts.read)
            statistics = writer.counts.frozen()
        if not statistics.samples:
            reasons = ", ".join(f"{count} {reason}" for reason, count in statistics.dropped.items()) or "no records"
            first = f"; first: {statistics.skipped[0]}" if statistics.skipped else ""
            raise DataError(f"{', '.join(options.paths)}: no sample to train on ({reasons}{first})")
        meta = {"format": _FORMAT, "statistics": statistics.to_json(), "sources": [source.name for source in sources]}
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if not folder.exists():
            # Another machine's rank may have come first, where locks do not reach.
            try:
                unfinished.rename(folder)
            except OSError:
                if not (folder / "meta.json").is_file():
                    raise
    except OSError as error:
        raise DataError(f"{folder}: the cache cannot be written ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _outcomes(chat: ChatModel, options: CorpusOptions, sources: Sequence[Source]) -> Iterator[tuple[int, Outcome]]:
    encoder = Encoder(chat, options)

    def records() -> Iterator[tuple[int, Record]]:
        for number, source in enumerate(sources):
            for record in source.records():
                yield number, record

    def work(item: tuple[int, Record]) -> tuple[int, Outcome]:
        number, record = item
        if record.blank:
            return number, Outcome(record)
        root = _root(options, sources[number])
        fetched: dict[str, bytes] = {}

        def read(blob: Blob, at: str) -> bytes:
            if blob.url is None:
                return read_blob(blob, root, allow_urls=options.allow_urls, at=at)
            if blob.url not in fetched:
                fetched[blob.url] = read_blob(blob, root, allow_urls=options.allow_urls, at=at)
            return fetched[blob.url]

        outcome = encoder.outcome(record, read)
        return number, _with_fetched(outcome, fetched) if fetched else outcome

    return ordered_map(work, records(), workers=options.workers, ahead=8 * options.workers)


def _with_fetched(outcome: Outcome, fetched: dict[str, bytes]) -> Outcome:
    """The outcome with bytes in place of URLs: training never goes to the network."""

    def stored(blob: Blob) -> Blob:
        return blob if blob.url is None else Blob(data=fetched[blob.url])

    def local(item: Media) -> Media:
        return replace(item, blobs=tuple(stored(blob) for blob in item.blobs))

    encoded = tuple(replace(item, media=tuple(local(media) for media in item.media)) for item in outcome.encoded)
    return replace(outcome, encoded=encoded)


class _Writer:
    """The arrays of a cache, appended to; `counts` as they grow."""

    def __init__(self, folder: Path) -> None:
        self.counts = Counts()
        self._files: dict[str, IO[bytes]] = {
            name: (folder / name).open("wb")
            for name in ("ids.bin", "flags.bin", "index.bin", "media.jsonl", "blobs.bin", "skipped.txt")
        }

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, source: int, outcome: Outcome) -> None:
        """Append what a record gave."""
        counts, record = self.counts, outcome.record
        if record.blank:
            counts.blank_lines += 1
            return
        counts.read += 1
        counts.pieces_dropped += outcome.pieces_dropped
        if outcome.reason is not None:
            counts.skip(outcome.reason, outcome.message)
            self._files["skipped.txt"].write(f"{outcome.reason}: {outcome.message}\n".encode())
            return
        counts.kept += 1
        for encoded in outcome.encoded:
            for item in encoded.media:
                counts.media[item.kind] += 1
            counts.thoughts_left_out += encoded.thoughts_left_out
            if encoded.media:
                rows = [self._media_to_json(item) for item in encoded.media]
                self._files["media.jsonl"].write(json.dumps({"sample": counts.samples, "media": rows}).encode() + b"\n")
            counts.add(len(encoded), int(encoded.supervised.sum()))
            self._files["ids.bin"].write(encoded.ids.astype(np.int32).tobytes())
            self._files["flags.bin"].write((encoded.supervised | encoded.types << 1).astype(np.uint8).tobytes())
            row = np.asarray([counts.tokens, source, record.where.line], np.int64)
            self._files["index.bin"].write(row.tobytes())

    def _media_to_json(self, item: Media) -> dict[str, Any]:
        return {"kind": item.kind, "fps": item.fps, "blobs": [self._blob_to_json(blob) for blob in item.blobs]}

    def _blob_to_json(self, blob: Blob) -> str:
        if blob.data is None:
            assert blob.path is not None
            # A leading "./" keeps a path that looks like a place in blobs.bin a path.
            return f"./{blob.path}" if blob.path.startswith(_STORED) else blob.path
        start = self._files["blobs.bin"].tell()
        self._files["blobs.bin"].write(blob.data)
        return f"{_STORED}{start}+{len(blob.data)}"


# In media.jsonl: bytes in blobs.bin, not a path.
_STORED = "blobs.bin:"


def _media_from_json(row: dict[str, Any]) -> Media:
    return Media(row["kind"], tuple(Blob(path=path) for path in row["blobs"]), row["fps"])


def _root(options: CorpusOptions, source: Source) -> Path | None:
    return Path(options.media_root) if options.media_root is not None else source.root


def _digest(options: CorpusOptions, chat: ChatModel, sources: Sequence[Source]) -> str:
    import tokenizers
    import transformers

    # Where things lie and how many threads read them is no part of the content; whether media can be found is.
    neutral = asdict(options) | dict.fromkeys(("path", "cache", "workers", "chat_template"))
    content = {
        "format": _FORMAT,
        "options": neutral,
        "model": chat.fingerprint(),
        "kinds": sorted(chat.kinds),
        "sources": [source.fingerprint() for source in sources],
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gemma4-bridge" / "data"


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    # numpy cannot map an empty file.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock; on a file system without locks, nothing (see the module's text)."""
    try:
        file = path.open("wb")
    except OSError as error:
        raise DataError(f"{path}: the cache cannot be written ({error.strerror})") from None
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
