"""Tokenised once: samples in a cache folder named by the content of everything that they depend on.

`recipes.data.cache` says what is in it. It is written beside its place and takes its name when complete, so that no
rank ever sees half of one. A lock makes the other ranks wait for the first, on all machines. What was tokenised when a
process ends stays, and the next one goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bridge.convert.lock import held
from bridge.errors import DataError
from bridge.hf.hub import resolve
from recipes.data.cache import STORED, CacheParts, media_from_json
from recipes.data.chat import ChatModel, Encoded
from recipes.data.encoding import Encoder
from recipes.data.fingerprints import fingerprints
from recipes.data.formats import function_digest
from recipes.data.media import read_blob
from recipes.data.options import CorpusOptions
from recipes.data.preference import SAMPLES
from recipes.data.processes import ProcessDied
from recipes.data.record_sources import RecordSource, find_sources
from recipes.data.sample import Blob, Where
from recipes.data.statistics import Statistics
from recipes.data.tokenising import tokenise
from recipes.data.uses import CacheUse, default_folder, lock_of, parts_of

# Counts up whenever the same inputs give other tokens or another layout of the cache.
_FORMAT = 4

# Samples whose tokens are looked at together.
_SAMPLES_AT_A_TIME = 1 << 16

Progress = Callable[[int, float], None]


class Corpus:
    """An open cache. Thread-safe.

    `fingerprint`: of the tokens; `inputs`: what they were made of, each by its name in a message.
    """

    def __init__(
        self,
        folder: Path,
        model: ChatModel,
        options: CorpusOptions,
        sources: Sequence[RecordSource],
        inputs: Mapping[str, Any],
    ) -> None:
        """Raises DataError for a damaged cache."""
        self.folder, self.options, self.inputs = folder, options, inputs
        self.encoder = Encoder(model, options)
        self.pad_id, self.tokenizer = model.pad_id, model.tokenizer
        self._sources = sources
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.fingerprint = str(meta["tokens"])
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
    def supervised(self) -> np.ndarray:
        """Tokens of every sample that are learnt, int64 [samples]. Reads all of them."""
        starts = self._index[:, 0] - self.lengths
        found = np.zeros(len(self), np.int64)
        for first in range(0, len(self), _SAMPLES_AT_A_TIME):
            which = slice(first, first + _SAMPLES_AT_A_TIME)
            begin, end = int(starts[first]), int(self._index[which, 0][-1])
            found[which] = np.add.reduceat(self._flags[begin:end] & 1, starts[which] - begin, dtype=np.int64)
        return found

    def records(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of `samples`, int64 [n], whose records have theirs one behind the other: where each record begins, int64
        [records], and a digest of what it says, ids and media, uint64 [records, 2]. Reads all of them."""
        origins, ends = self._index[samples, 1:], self._index[samples, 0]
        begins = np.r_[True, (origins[1:] != origins[:-1]).any(1)]
        data = memoryview(self._ids).cast("B")
        said = {sample: repr(tuple(map(media_from_json, rows))).encode() for sample, rows in self._media.items()}
        places = zip(
            *(each.tolist() for each in (begins, samples, 4 * (ends - self.lengths[samples]), 4 * ends)), strict=True
        )
        digests, digest = bytearray(), hashlib.blake2b(digest_size=16)
        for number, (first, sample, start, end) in enumerate(places):
            if first and number:
                digests += digest.digest()
                digest = hashlib.blake2b(digest_size=16)
            digest.update(data[start:end])
            digest.update(said.get(sample, b"()"))
        digests += digest.digest()
        return np.flatnonzero(begins), np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)

    @property
    def source_tokens(self) -> np.ndarray:
        """Tokens that come from each of `files`, int64 [files]."""
        return np.bincount(self._index[:, 1], self.lengths, len(self._sources)).astype(np.int64)

    @property
    def files(self) -> list[str]:
        """The files and datasets that the samples come from."""
        return [source.name for source in self._sources]

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
        media = tuple(media_from_json(row) for row in self._media.get(sample, ()))
        learnt, types, desirable = (flags & 1).astype(bool), flags >> 1 & 3, bool(flags[0] >> 3)
        return Encoded(self._ids[start:end].copy(), learnt, types, media, desirable=desirable)

    def media_tensors(self, sample: int) -> dict[str, Any]:
        """The media of a sample as the processor makes them: tensors by its names, {} without media.

        Raises DataError: a file that has gone, or changed so that it is another number of tokens.
        """
        encoded = self[sample]
        if not encoded.media:
            return {}
        where = self.where(sample)
        root = _root(self.options, self._sources[int(self._index[sample, 1])])
        tensors, soft = self.encoder.model().media.tensors(
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
        if blob.path is not None and blob.path.startswith(STORED):
            start, size = (int(number) for number in blob.path.removeprefix(STORED).split("+"))
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
    asked_by: str = "",
) -> Corpus:
    """The corpus of `options` for the model in a folder (or hub id): from the cache, tokenised first if need be.

    Args:
        progress: called for each record, with how many were read so far, and which part of the data that is, 0 to 1.
        notify: called with a line for every record that is skipped, and where work goes on.
        asked_by: for whom it is opened, as `data list` says it.

    Raises:
        DataError: a bad record (with `on_error="fail"`), data that cannot be read, or none that can be kept.
        UsageError: options that make no sense, a model without a tokenizer or a chat template.
    """
    sources = find_sources(options.paths, split=options.split, subset=options.subset)
    chat = ChatModel(resolve(str(model)), options)
    caches = Path(options.cache) if options.cache else default_folder()
    try:
        caches.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{caches}: the cache cannot be written ({error.strerror})") from None
    inputs = _inputs(options, chat, fingerprints(sources, caches, options.workers, notify or _silent))
    folder = caches / _digest({"format": _FORMAT, **inputs})
    with held(lock_of(folder), str(caches), notify=notify, wait=True):
        if not (folder / "meta.json").is_file():
            _build(folder, chat, options, sources, progress, notify)
        elif (parts := parts_of(folder)).exists():
            # Whoever made it was killed before it had tidied up.
            shutil.rmtree(parts, ignore_errors=True)
        # From here on `data clean` leaves it.
        use = CacheUse(folder, {"for": asked_by, "model": str(model), "seq_length": options.seq_length})
    corpus = Corpus(folder, chat, options, sources, inputs)
    weakref.finalize(corpus, use.end)
    if corpus.has_media:
        chat.media.processor  # noqa: B018  what is wrong with it is said now, not in the middle of a run
    return corpus


def _build(
    folder: Path,
    chat: ChatModel,
    options: CorpusOptions,
    sources: Sequence[RecordSource],
    progress: Progress | None,
    notify: Callable[[str], None] | None,
) -> None:
    parts_folder = parts_of(folder)
    keep = False
    try:
        parts = CacheParts(parts_folder)
        try:
            tokenise(parts, chat, options, sources, progress or _silent, notify or _silent)
        except (KeyboardInterrupt, ProcessDied):
            keep = True
            raise
        statistics = parts.counts.frozen()
        if not statistics.samples:
            reasons = ", ".join(f"{count} {reason}" for reason, count in statistics.dropped.items()) or "no records"
            first = f"; first: {statistics.skipped[0]}" if statistics.skipped else ""
            raise DataError(f"{', '.join(options.paths)}: no sample to train on ({reasons}{first})")
        _finish(folder, parts, statistics, sources)
    except OSError as error:
        raise DataError(f"{folder}: the cache cannot be written ({error})") from error
    finally:
        if not keep:
            shutil.rmtree(parts_folder, ignore_errors=True)


def _finish(folder: Path, parts: CacheParts, statistics: Statistics, sources: Sequence[RecordSource]) -> None:
    """The parts as a cache. Raises OSError."""
    unfinished = Path(tempfile.mkdtemp(prefix="new-", dir=parts.folder))
    tokens = parts.join(unfinished)
    names = [source.name for source in sources]
    meta = {"format": _FORMAT, "tokens": tokens, "statistics": statistics.to_json(), "sources": names}
    (unfinished / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    unfinished.rename(folder)


def _root(options: CorpusOptions, source: RecordSource) -> Path | None:
    return Path(options.media_root) if options.media_root is not None else source.root


def _inputs(options: CorpusOptions, chat: ChatModel, data: Sequence[str]) -> dict[str, Any]:
    """Everything that tokens depend on, by the key or the name that a message calls it by."""
    import tokenizers
    import transformers

    # Where things lie and how many threads read them is no part of the content; whether media can be found is.
    elsewhere = (
        "path",
        "cache",
        "workers",
        "chat_template",
        "generation_prefix",
        "seq_length",
        "supervise",
        "format",
        "records",
        "one_row",
    )
    said = {f"data.{name}": value for name, value in asdict(options).items() if name not in elsewhere}
    return {
        "the data": _digest(data),
        "train.seq_length": options.seq_length,
        **{f"data.supervise_{name}": value for name, value in asdict(options.supervise).items()},
        **said,
        **_of_preferences(options),
        **{f"data.{name}": value for name, value in asdict(options.format).items() if value},
        **({"the code of data.function": function_digest(options.format)} if options.format.function else {}),
        "data.generation_prefix": chat.prefix,
        **chat.fingerprints(),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def _of_preferences(options: CorpusOptions) -> dict[str, Any]:
    """What only data of preferences depends on."""
    if options.records == SAMPLES:
        return {}
    return {"the records that preference.loss takes": options.records, "data.packing": options.one_row}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    # numpy cannot map an empty file.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _silent(*said: object) -> None:
    pass
