"""Records -> samples that fit: encode, and drop or split what is longer than a row."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bridge.errors import DataError
from recipes.data.blocks import Record
from recipes.data.chat import ChatModel, Encoded, ReadMedia
from recipes.data.formats import loaded_function
from recipes.data.options import CorpusOptions
from recipes.data.preference import SAMPLES, parse
from recipes.data.sample import Message, Sample, parse_record

# Why a record gives no sample.
INVALID, TOO_LONG, NOTHING, LEFT_OUT = "invalid", "too long", "nothing to learn", "left out by data.function"


@dataclass(frozen=True)
class Outcome:
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
        self._function = loaded_function(options.layout)
        self._local = threading.local()
        # Deep copies are made one at a time: of an object that nobody works with.
        self._lock = threading.Lock()

    def outcome(self, record: Record, read: ReadMedia) -> Outcome:
        """What a record gives. A DataError is part of the outcome; other errors are raised."""
        try:
            if record.error is not None:
                raise record.error
            value = self._function(record.value, record.where)
            if value is None and self._options.layout.function is not None:
                return Outcome(record, reason=LEFT_OUT, message=str(record.where))
            if self._options.records != SAMPLES:
                return self._answers(value, record, read)
            sample = parse_record(value, record.where, self._options.layout)
            encoded, dropped = self._fitting(sample, read)
        except DataError as error:
            return Outcome(record, reason=INVALID, message=str(error), error=error)
        except UnicodeError as error:
            message = f"{record.where}: {error}"
            return Outcome(record, reason=INVALID, message=message, error=DataError(message))
        given = Outcome(record, pieces_dropped=dropped, form=sample.form, unread=sample.unread)
        if not encoded:
            longest = f"longer than {self._options.seq_length} tokens"
            return replace(given, reason=TOO_LONG, message=f"{record.where}: {longest}")
        learnable = tuple(item for item in encoded if item.supervised[1:].any())
        if not learnable:
            return replace(given, reason=NOTHING, message=f"{record.where}: nothing in it is supervised")
        return replace(given, encoded=learnable, pieces_dropped=dropped + len(encoded) - len(learnable))

    def model(self) -> ChatModel:
        """This thread's own model."""
        if not hasattr(self._local, "model"):
            with self._lock:
                self._local.model = self._model.fork()
        own: ChatModel = self._local.model
        return own

    def _answers(self, value: Any, record: Record, read: ReadMedia) -> Outcome:
        """Both answers of a pair, or one with its label: all of it or nothing. Raises DataError."""
        samples, desirable = parse(value, record.where, self._options)
        encoded = tuple(replace(self.model().encode(sample, read), desirable=desirable) for sample in samples)
        given = Outcome(record, form=samples[0].form, unread=samples[0].unread)
        lengths = [len(item) for item in encoded]
        if (sum(lengths) if self._options.one_row else max(lengths)) > self._options.seq_length:
            both = "both answers with their prompts are " if self._options.one_row else ""
            longest = f"{both}longer than {self._options.seq_length} tokens"
            return replace(given, reason=TOO_LONG, message=f"{record.where}: {longest}")
        if not all(item.supervised[1:].any() for item in encoded):
            return replace(given, reason=NOTHING, message=f"{record.where}: nothing in it is supervised")
        return replace(given, encoded=encoded)

    def _fitting(self, sample: Sample, read: ReadMedia) -> tuple[list[Encoded], int]:
        """The sample, or its pieces, as far as they fit; and how many pieces did not."""
        limit = self._options.seq_length
        whole = self.model().encode(sample, read)
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
        encoded = self.model().encode(replace(sample, messages=messages), read)
        return encoded if len(encoded) <= self._options.seq_length else None


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
