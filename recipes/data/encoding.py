"""Records -> samples that fit: encode, and drop or split what is longer than a row."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from bridge.errors import BridgeError, DataError
from recipes.data.chat import ChatModel, Encoded
from recipes.data.formats import loaded_function
from recipes.data.options import CorpusOptions
from recipes.data.preference import SAMPLES, parse
from recipes.data.processing import ReadMedia
from recipes.data.record_batches import Record
from recipes.data.sample import Message, Sample

# Why a record gives no sample.
INVALID, TOO_LONG, NOTHING, LEFT_OUT = "invalid", "too long", "nothing to learn", "left out by data.function"


@dataclass(frozen=True)
class RecordOutcome:
    """What a record gave: samples, or the reason it gave none, with the message that says so in full. `form`: the
    name of its format; `unread`: what it says beside, which is not read."""

    record: Record
    encoded: tuple[Encoded, ...] = ()
    reason: str | None = None
    message: str = ""
    error: DataError | None = None
    pieces_dropped: int = 0
    form: str | None = None
    unread: tuple[str, ...] = ()


class Encoder:
    """Encodes records from any thread; each thread has a tokenizer of its own."""

    def __init__(self, model: ChatModel, options: CorpusOptions) -> None:
        self._model, self._options = model, options
        self._function = loaded_function(options.format)
        self._local = threading.local()
        # Deep copies are made one at a time: of an object that nobody works with.
        self._lock = threading.Lock()

    def outcomes(self, records: Sequence[Record], read: Sequence[ReadMedia]) -> Iterator[RecordOutcome]:
        """What each record gives, in order; `read`: its media. A DataError is part of the outcome.

        Raises UsageError, where it is due.
        """
        parsed = list(map(self._parsed, records))
        samples = [sample for one in parsed if not isinstance(one, RecordOutcome) for sample in one[0]]
        reads = [
            how
            for one, how in zip(parsed, read, strict=True)
            if not isinstance(one, RecordOutcome)
            for _ in range(len(one[0]))
        ]
        encoded = iter(self.model().encode(samples, reads))
        for record, one, how in zip(records, parsed, read, strict=True):
            if isinstance(one, RecordOutcome):
                yield one
                continue
            of_record, desirable = one
            given = list(islice(encoded, len(of_record)))
            try:
                whole = [_raised(item) for item in given]
                if self._options.records == SAMPLES:
                    yield self._outcome(record, of_record[0], whole[0], how)
                else:
                    answers = tuple(replace(item, desirable=desirable) for item in whole)
                    yield self._answers(record, of_record, answers)
            except DataError as error:
                yield RecordOutcome(record, reason=INVALID, message=str(error), error=error)

    def _parsed(self, record: Record) -> tuple[tuple[Sample, ...], bool] | RecordOutcome:
        if record.blank:
            return RecordOutcome(record)
        try:
            if record.error is not None:
                raise record.error
            value = self._function(record.value, record.where)
            if value is None and self._options.format.function is not None:
                return RecordOutcome(record, reason=LEFT_OUT, message=str(record.where))
            return parse(value, record.where, self._options)
        except DataError as error:
            return RecordOutcome(record, reason=INVALID, message=str(error), error=error)
        except UnicodeError as error:
            message = f"{record.where}: {error}"
            return RecordOutcome(record, reason=INVALID, message=message, error=DataError(message))

    def _outcome(self, record: Record, sample: Sample, whole: Encoded, read: ReadMedia) -> RecordOutcome:
        encoded, dropped = self._fitting(sample, whole, read)
        learnable = tuple(item for item in encoded if item.supervised[1:].any())
        if learnable:
            dropped += len(encoded) - len(learnable)
            return RecordOutcome(record, learnable, pieces_dropped=dropped, form=sample.form, unread=sample.unread)
        given = RecordOutcome(record, pieces_dropped=dropped, form=sample.form, unread=sample.unread)
        if not encoded:
            longest = f"longer than {self._options.seq_length} tokens"
            return replace(given, reason=TOO_LONG, message=f"{record.where}: {longest}")
        return replace(given, reason=NOTHING, message=f"{record.where}: nothing in it is supervised")

    def model(self) -> ChatModel:
        """This thread's own model."""
        if not hasattr(self._local, "model"):
            with self._lock:
                self._local.model = self._model.fork()
        model: ChatModel = self._local.model
        return model

    def _answers(self, record: Record, samples: Sequence[Sample], encoded: tuple[Encoded, ...]) -> RecordOutcome:
        """Both answers of a pair, or one with its label: all of it or nothing."""
        given = RecordOutcome(record, form=samples[0].form, unread=samples[0].unread)
        lengths = [len(item) for item in encoded]
        if (sum(lengths) if self._options.one_row else max(lengths)) > self._options.seq_length:
            both = "both answers with their prompts are " if self._options.one_row else ""
            longest = f"{both}longer than {self._options.seq_length} tokens"
            return replace(given, reason=TOO_LONG, message=f"{record.where}: {longest}")
        if not all(item.supervised[1:].any() for item in encoded):
            return replace(given, reason=NOTHING, message=f"{record.where}: nothing in it is supervised")
        return replace(given, encoded=encoded)

    def _fitting(self, sample: Sample, whole: Encoded, read: ReadMedia) -> tuple[list[Encoded], int]:
        """The sample, or its pieces, as far as they fit; and how many pieces did not."""
        limit = self._options.seq_length
        if len(whole) <= limit:
            return [whole], 0
        if self._options.overlong == "drop":
            return [], 0
        if not sample.messages:
            return _chunks(whole, limit, self.model().tokenizer.bos_token_id), 0
        return self._split(sample, read)

    def _split(self, sample: Sample, read: ReadMedia) -> tuple[list[Encoded], int]:
        """Pieces of whole exchanges (a user's turn and all up to the next), as many as fit, the system turn in each."""
        head, exchanges = _exchanges(sample.messages)
        pieces: list[Encoded] = []
        dropped = 0
        held: tuple[Message, ...] = ()
        fits: Encoded | None = None
        for exchange in exchanges:
            longer = self._encode(sample, head + held + exchange, read)
            if longer is None and held:
                if fits is not None:
                    pieces.append(fits)
                held, longer = (), self._encode(sample, head + exchange, read)
            if longer is None:
                dropped, held, fits = dropped + 1, (), None
            else:
                held, fits = held + exchange, longer
        if fits is not None:
            pieces.append(fits)
        return pieces, dropped

    def _encode(self, sample: Sample, messages: tuple[Message, ...], read: ReadMedia) -> Encoded | None:
        encoded = _raised(self.model().encode([replace(sample, messages=messages)], [read])[0])
        return encoded if len(encoded) <= self._options.seq_length else None


def _raised(encoded: Encoded | BridgeError) -> Encoded:
    """Raises what is in the place of a sample."""
    if isinstance(encoded, BridgeError):
        raise encoded
    return encoded


def _exchanges(messages: Sequence[Message]) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """The system message (or none), and the conversation cut before every user message that follows an answer."""
    head = tuple(message for message in messages[:1] if message.role in ("system", "developer"))
    exchanges: list[tuple[Message, ...]] = []
    for message in messages[len(head) :]:
        if not exchanges or (message.role == "user" and exchanges[-1][-1].role != "user"):
            exchanges.append(())
        exchanges[-1] += (message,)
    return head, exchanges


def _chunks(text: Encoded, limit: int, bos: int) -> list[Encoded]:
    """Plain text, or tokens, in rows of `limit` tokens, each with the <bos> of the first, where that has one."""
    pieces = []
    head = int(text.ids[0] == bos)
    for start in range(head, len(text), limit - head):
        ids = np.concatenate([text.ids[:head], text.ids[start : start + limit - head]])
        supervised = np.concatenate([text.supervised[:head], text.supervised[start : start + limit - head]])
        pieces.append(Encoded(ids, supervised, np.zeros(len(ids), np.uint8)))
    return pieces
