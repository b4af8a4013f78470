"""The batches of one data-parallel rank: deterministic, sharded, resumable, made ahead by threads.

Rows form one global stream (`recipes.data.order`). A step of all ranks takes the next `dp_size * micro_batch_size` rows
of it, rank r its r-th share. So the position in the stream is all the state there is, it is the same on every rank, and
a run that goes on with another number of ranks goes on at the same row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bridge.close_on_exit import CloseOnExit
from bridge.errors import DataError, UsageError
from recipes.data.blend import BlendSource, Samples, blend_of, described_shares
from recipes.data.chat import Encoded
from recipes.data.collate import KL, batch_tensors, join_media, mismatched, source_tensors
from recipes.data.options import at_least, one_of
from recipes.data.order import Order, Plans, Position
from recipes.data.packing import PackingPlan, plan_epoch
from recipes.data.preference import SAMPLES
from recipes.data.threads import ordered_map

# By the fingerprints of corpora: see `Batches`.
Taught = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class BatchOptions:
    """How samples become batches.

    `seq_length`: width of packed rows. `pad_multiple`: unpacked rows are padded to the least multiple of it that holds
    the batch's longest. `document_multiple`: every packed sample is padded to a multiple of it (2 * CP with context
    parallelism). `pack_buffer`: how many shuffled samples are packed together. `epochs`: None goes on for ever; a
    number ends there, the last step filled up with rows without labels. `workers`: threads; 0 works in the caller's.
    `prefetch`: batches made ahead. `on_change`: what becomes of a place in other rows: "refuse", or "restart" at the
    first row. `prompts`: those of chosen answers are learnt too (ORPO). `mismatched`: also, for KTO's
    estimate of a divergence, rows of the same prompts with the answers before theirs in the data, as tensors whose
    names begin with `KL`. `label_ids`: number the labels of the data, as a teacher that is asked once needs it.

    The samples that `CorpusOptions.together` counts stay in one row, or unpacked are rows of one batch: of pairs
    `micro_batch_size` counts the pairs.
    """

    seq_length: int
    micro_batch_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    seed: int = 0
    shuffle: bool = True
    packing: bool = False
    pack_buffer: int = 4096
    document_multiple: int = 1
    pad_multiple: int = 1
    epochs: int | None = None
    workers: int = 2
    prefetch: int = 4
    on_change: str = "refuse"
    prompts: bool = False
    mismatched: bool = False
    label_ids: bool = False

    def __post_init__(self) -> None:
        one_of("data.on_change", self.on_change, ("refuse", "restart"))
        for name in ("micro_batch_size", "dp_size", "pack_buffer", "document_multiple", "pad_multiple"):
            at_least(name, getattr(self, name), 1)
        for name in ("seed", "dp_rank", "workers", "prefetch"):
            at_least(name, getattr(self, name), 0)
        at_least("seq_length", self.seq_length, 2)
        if self.dp_rank >= self.dp_size:
            raise UsageError(f"dp_rank: {self.dp_rank} is not below dp_size {self.dp_size}")
        if self.packing and self.seq_length % self.document_multiple:
            raise UsageError(f"seq_length: {self.seq_length} is not a multiple of {self.document_multiple}")


class Batches(CloseOnExit, Iterator[dict[str, Tensor]]):
    """Iterates over one rank's batches; `recipes.data.collate.batch_tensors` says what is in one.

    Media come beside the rest under the processor's names, in the order of their placeholders. A context manager;
    `close` ends the threads. `notify` gets a line where the data is begun anew. `ref_logps`: of preferences, by the
    fingerprints of corpora, what a reference makes of their samples, float64 [samples]; `taught`: a teacher of their
    labels, ids [labels, k] and log-probabilities [labels, k + 1].
    """

    def __init__(
        self,
        corpus: Samples,
        options: BatchOptions,
        notify: Callable[[str], None] = lambda line: None,
        ref_logps: Mapping[str, np.ndarray] = MappingProxyType({}),
        taught: Taught = MappingProxyType({}),
    ) -> None:
        """Raises DataError: an empty corpus, or samples longer than a row."""
        if not len(corpus):
            raise DataError(f"{corpus.folder}: holds no sample")
        self.corpus = blend_of(corpus)
        self.options, self._notify, self._ref_logps = options, notify, ref_logps
        sources, self._taught = self.corpus.sources, taught
        self._first_labels = [first_labels(one.samples) for one in sources] if options.label_ids else []
        self.order = Order(
            list(map(self._plans, sources)), [one.share for one in sources], options.seed, options.epochs
        )
        self._position = self.order.start()
        self._ahead: Iterator[tuple[Position, dict[str, Tensor]]] | None = None

    def _plans(self, source: BlendSource) -> Plans:
        """The rows of a source. Raises DataError for a sample that is longer than a row."""
        samples, options = source.samples, self.options
        lengths = samples.lengths.reshape(-1, samples.options.together)
        if options.mismatched:
            # Either of a sample's rows has to fit where the sample is put.
            asked = np.asarray([int(samples[sample].supervised.argmax()) for sample in range(len(samples))])
            behind = asked + np.roll(samples.lengths - asked, 1)
            lengths = np.minimum(np.maximum(samples.lengths, behind), options.seq_length)[:, None]
        if int(lengths.max()) > options.seq_length:
            raise DataError(
                f"{samples.folder}: its longest sample has {int(lengths.max())} tokens, a row only "
                f"{options.seq_length}; tokenise with that seq_length"
            )

        def plan(epoch: int) -> PackingPlan:
            return plan_epoch(
                lengths,
                epoch=epoch,
                seed=options.seed,
                shuffle=options.shuffle,
                packing=options.packing,
                seq_length=options.seq_length,
                document_multiple=options.document_multiple,
                pack_buffer=options.pack_buffer,
                source=source.number,
            )

        fixed = None if options.packing else len(lengths)
        return Plans(plan, samples.lengths, fixed=fixed, epochs=options.epochs)

    @property
    def position(self) -> Position:
        """Where the next batch begins."""
        return self._position

    def plan(self, epoch: int) -> PackingPlan:
        """The rows of an epoch of the first source."""
        return self.order.plans[0][epoch]

    def rows(self, epoch: int) -> int:
        """How many rows an epoch has."""
        return self.order.rows(epoch)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self._ahead is None:
            self._ahead = self._batches(self._position)
        try:
            self._position, batch = next(self._ahead)
        except StopIteration:
            raise
        except BaseException:
            self.close()
            raise
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, and what that depends on. The same on every rank."""
        return {**self._position.to_json(), "stream": self._stream()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with any number of ranks and any micro batch size.

        Where the rows are not the same (other tokens, another seed or packing) the data is begun anew, or DataError
        raised, as `on_change` says; either names what was changed.
        """
        self.close()
        causes, note = self._changes(state["stream"])
        if not causes:
            self._position = self.order.position(state)
            self._notify(f"the data goes on behind {self.order.said(self._position)}{note}")
            return
        what = f"{', '.join(self.corpus.options.paths)}: the checkpoint's place is in other rows: {'; '.join(causes)}"
        if self.options.on_change == "refuse":
            raise DataError(f"{what}; undo that, or begin the data anew at its first row with data.on_change=restart")
        self._position = self.order.start()
        self._notify(f"{what}; the data is begun anew, as data.on_change=restart says")

    def close(self) -> None:
        """End the threads; the next batch starts them again."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and hasattr(ahead, "close"):
            ahead.close()
        self.order.close()

    def _stream(self) -> dict[str, Any]:
        """What the rows depend on. `inputs` say why tokens are other ones, where they are."""
        options = self.options
        order: dict[str, Any] = {
            "train.seed": options.seed,
            "data.packing": options.packing,
            "data.shuffle": options.shuffle,
        }
        if options.packing:
            order |= {"train.seq_length": options.seq_length}
            order |= {name: getattr(options, name) for name in ("pack_buffer", "document_multiple")}
        if described := described_shares(self.corpus.sources):
            order["data.sources"] = described
        return {"tokens": self.corpus.fingerprint, "order": order, "inputs": dict(self.corpus.inputs)}

    def _changes(self, other: Mapping[str, Any]) -> tuple[list[str], str]:
        """What was changed since `other` was the stream, in words, where its rows are other ones; and what was changed
        where they are the same."""
        current = self._stream()
        if "tokens" not in other:
            return ["it is of a version that did not note which tokens they were"], ""
        # As version 0.1 called it.
        before = {"data.shuffle" if name == "shuffle" else name: value for name, value in other["order"].items()}
        changed = _differing(before, current["order"])
        inputs = _differing(other["inputs"], current["inputs"])
        if current["tokens"] == other["tokens"]:
            note = f", though {'; '.join(inputs.values())}: the tokens are the same" if inputs and not changed else ""
            return list(changed.values()), note
        inputs = inputs or {"tokens": "other tokens, though of the same inputs"}
        return list((inputs | changed).values()), ""

    def _batches(self, start: Position) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        if self.options.workers == 0:
            return map(self._made, self._steps(start))
        return ordered_map(
            self._made, self._steps(start), workers=self.options.workers, ahead=max(1, self.options.prefetch)
        )

    def _steps(self, position: Position) -> Iterator[tuple[Position, list[list[int]]]]:
        """For every step: where the next one begins, and this rank's rows (an empty one where the data has ended)."""
        options = self.options
        share, step = options.micro_batch_size, options.micro_batch_size * options.dp_size
        while True:
            rows, position = self.ahead(step, position)
            if not rows:
                return
            rows += [[] for _ in range(step - len(rows))]
            yield position, rows[options.dp_rank * share : (options.dp_rank + 1) * share]

    def ahead(self, count: int, position: Position) -> tuple[list[list[int]], Position]:
        """The samples of so many rows from a place on (fewer where the data ends), and the place behind them."""
        rows, behind = self.order.ahead(count, position)
        return [[self.corpus.first(source) + sample for sample in row] for source, row in rows], behind

    def go_to(self, position: Position) -> None:
        """Let the next batch begin there."""
        self.close()
        self._position = position

    def _made(self, step: tuple[Position, list[list[int]]]) -> tuple[Position, dict[str, Tensor]]:
        after, rows = step
        options, corpus = self.options, self.corpus
        together = corpus.options.together
        if together > 1 and not options.packing:
            # Each sample of a pair is a row, and a row that is missing are as many.
            rows = [[sample] for row in rows for sample in row] + [
                [] for row in rows if not row for _ in range(together)
            ]
        samples = [[corpus[sample] for sample in row] for row in rows]
        batch = self._tensors(samples)
        if (count := len(corpus.sources)) > 1:
            sources = [corpus.place(row[0])[0] if row else 0 for row in rows]
            width, answers = batch["input_ids"].shape[1], corpus.options.records != SAMPLES
            batch |= source_tensors(samples, sources, count=count, width=width, answers=answers)
            if together > 1 and not options.packing:
                batch["source_counts"][0] //= together
        if options.mismatched:
            behind = [[self._mismatched(sample) for sample in row] for row in rows]
            batch |= {f"{KL}{name}": tensor for name, tensor in self._tensors(behind).items()}
        if corpus.options.records != SAMPLES:
            batch |= self._numbered([sample for row in rows for sample in row])
        if options.label_ids:
            batch |= self._of_labels([sample for row in rows for sample in row])
        media = [corpus.media_tensors(sample) for row in rows for sample in row] if corpus.has_media else []
        return after, batch | join_media(media)

    def _tensors(self, samples: list[list[Encoded]]) -> dict[str, Tensor]:
        options, width = self.options, self.options.seq_length
        if not options.packing:
            longest = max((len(sample) for row in samples for sample in row), default=1)
            width = -(-longest // options.pad_multiple) * options.pad_multiple
        return batch_tensors(
            samples,
            width=width,
            pad_id=self.corpus.pad_id,
            packed=options.packing,
            with_types=self.corpus.has_media,
            document_multiple=options.document_multiple,
            answers=self.corpus.options.records != SAMPLES,
            prompts=options.prompts,
        )

    def _mismatched(self, sample: int) -> Encoded:
        source, index = self.corpus.place(sample)
        samples = self.corpus.sources[source].samples
        return mismatched(samples[index], samples[(index - 1) % len(samples)], self.options.seq_length)

    def _numbered(self, samples: list[int]) -> dict[str, Tensor]:
        """`sample_ids` int64 [answers], and their `ref_logps`, float64, where these are known."""
        numbers = np.asarray(samples, np.int64)
        found = {"sample_ids": torch.from_numpy(numbers)}
        known = [self._ref_logps.get(source.samples.fingerprint) for source in self.corpus.sources]
        if all(of is not None for of in known):
            places = map(self.corpus.place, samples)
            columns = [known[source][:, index] for source, index in places]  # type: ignore[index]
            rows = np.stack(columns, 1) if columns else np.zeros((len(known[0]), 0))  # type: ignore[arg-type]
            names = ("ref_logps", f"{KL}ref_logps")
            found |= {name: torch.from_numpy(row.copy()) for name, row in zip(names, rows, strict=False)}
        return found

    def _of_labels(self, samples: list[int]) -> dict[str, Tensor]:
        """`label_ids` int64 [labels], row by row, within their source, and what a teacher says, where that is known."""
        places = list(map(self.corpus.place, samples))
        spans = [np.arange(*self._first_labels[source][index : index + 2]) for source, index in places]
        found = {"label_ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *spans]))}
        known = [self._taught.get(source.samples.fingerprint) for source in self.corpus.sources]
        if all(of is not None for of in known):
            for row, name in enumerate(("teacher_ids", "teacher_logps")):
                nothing = known[0][row][:0]  # type: ignore[index]
                values = [known[source][row][span] for (source, _), span in zip(places, spans, strict=True)]  # type: ignore[index]
                found[name] = torch.from_numpy(np.concatenate([nothing, *values]))
        return found


def first_labels(corpus: Samples) -> np.ndarray:
    """The number of the first label of each sample, and behind them that of all: int64 [samples + 1]."""
    counts = [0, *(int(corpus[sample].supervised[1:].sum()) for sample in range(len(corpus)))]
    return np.cumsum(counts, dtype=np.int64)


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """The entries that differ, in words: with both values where people can read them."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return {
        name: f"{name} changed"
        if name.rpartition(": ")[2].startswith("the ")
        else f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in names
    }
