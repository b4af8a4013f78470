"""The loop over rows: prompts come in as places get free, each step gives every row a token, finished rows leave.

Every rank of a replica runs the same loop over the same rows and learns every token; replicas, data-parallel ones and
those of context parallelism, take rows in turn. What a row gets depends on its tokens, the options and its number
alone, never on its company.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from bridge.errors import UsageError
from bridge.generate.memory import MAX_ROWS
from bridge.generate.row import GeneratedRow
from bridge.generate.rows import Completion, Prompt
from bridge.generate.sampling import SamplingOptions, choose
from bridge.generate.speculative import Speculator
from bridge.generate.stages import StepOutput, run_step
from bridge.megatron.kv_cache import CachedStep, KeyValueCaches, NewTokens, padded
from bridge.megatron.model import Gemma4Model
from bridge.megatron.multimodal import Gemma4MultimodalModel, MediaTensors
from bridge.megatron.visibility import Visibility
from bridge.token_ids import check_ids

OnToken = Callable[[int, int, int], None]  # index, sample, token
Decode = Callable[[Sequence[int]], str]


class Generator:
    """Generates with a model as it stands: `chunks` are this rank's, live or loaded, in any layout.

    `max_rows` rows at once on a replica; prompts are read `prefill_tokens` tokens at a time, or one image. `decode`
    turns tokens into text; stop strings need it. With a `speculator` a step gives a row several tokens, those that it
    would get one by one, or of their distribution. `on_token` and `on_finish` are called on every rank of a replica.
    """

    def __init__(
        self,
        chunks: Sequence[Gemma4Model],
        groups: ProcessGroupCollection,
        *,
        max_rows: int = MAX_ROWS,
        prefill_tokens: int = 2048,
        decode: Decode | None = None,
        on_token: OnToken | None = None,
        on_finish: Callable[[Completion], None] | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        if max_rows < 1 or prefill_tokens < 1:
            raise UsageError(f"max_rows={max_rows}, prefill_tokens={prefill_tokens}: both are at least 1")
        self.chunks, self.groups, self.replicas = list(chunks), groups, groups.dp_cp
        self.config = chunks[0].config
        self.geometry = self.config.geometry
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        self.decode, self.on_token, self.on_finish = decode, on_token, on_finish
        self.speculator = speculator
        self.device = next(p.device for chunk in chunks for p in chunk.parameters())
        # Experts of one layer lie on several replicas: they take every step together, also those without a row.
        self.together = self.geometry.moe is not None and self.replicas.size() > 1

    def generate(self, prompts: Sequence[Prompt], options: SamplingOptions, first_index: int = 0) -> list[Completion]:
        """The answers, in the order of `prompts`, on every rank. Collective over all ranks that hold the model.

        The numbers of the prompts begin at `first_index`. Raises UsageError for a prompt that cannot be read.
        """
        if options.stop_strings and self.decode is None:
            raise UsageError("stop_strings are compared with text: they need a tokenizer")
        rows = [
            self._row(first_index + i, sample, prompt)
            for i, prompt in enumerate(prompts)
            for sample in range(options.num_return_sequences)
        ]
        mine = rows[self.replicas.rank() :: self.replicas.size()]
        with evaluating(self.chunks):
            found = list(self._run(mine, options))
        if self.replicas.size() > 1:
            parts: list[list[Completion]] = [[] for _ in range(self.replicas.size())]
            dist.all_gather_object(parts, found, group=self.replicas)
            found = [completion for part in parts for completion in part]
        return sorted(found, key=lambda completion: (completion.index, completion.sample))

    def _row(self, index: int, sample: int, prompt: Prompt) -> GeneratedRow:
        if not prompt.ids:
            raise UsageError(f"prompt {index} has no tokens")
        check_ids(np.asarray(prompt.ids), self.geometry, f"prompt {index}")
        ids = torch.tensor([prompt.ids])
        types = None if prompt.mm_token_type_ids is None else prompt.mm_token_type_ids.reshape(1, -1).cpu()
        return GeneratedRow(index, sample, prompt, Visibility.of(ids, mm_token_type_ids=types).to(self.device))

    def _run(self, rows: Sequence[GeneratedRow], options: SamplingOptions) -> Iterator[Completion]:
        caches = KeyValueCaches(self.geometry, 0 if self.speculator is None else self.speculator.spare)
        waiting, active, reading = deque(rows), list[GeneratedRow](), list[GeneratedRow]()
        while self._any(bool(waiting or active or reading)):
            while waiting and len(active) + len(reading) < self.max_rows:
                row = waiting.popleft()
                row.slot = len(active) + len(reading)
                reading.append(row)
            if reading:
                self._read(caches, reading, options)
                # In the order of their slots: a row that is read is behind all that answer.
                while reading and reading[0].seen >= len(reading[0].prompt.ids):
                    active.append(reading.pop(0))
            elif self.speculator is not None and active:
                self._speculate(self.speculator, caches, active, options)
            else:
                self._step(caches, active, [NewTokens(row.slot, row.seen, len(row)) for row in active], options)
            yield from self._finish(caches, active, reading, options)

    def _any(self, busy: bool) -> bool:
        if not self.together:
            return busy
        flag = torch.tensor([busy], dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.replicas)
        return bool(flag)

    def _read(self, caches: KeyValueCaches, rows: list[GeneratedRow], options: SamplingOptions) -> None:
        """The next part of the prompts that are read, up to `prefill_tokens` of them together.

        A prompt is read once for all answers to it that are in `rows`.
        """
        room, parts, chosen = self.prefill_tokens, list[NewTokens](), list[GeneratedRow]()
        unread = [row for row in rows if row.seen < len(row.prompt.ids)]
        # Of each prompt the row that is ahead; the others have seen nothing.
        readers = {id(row.prompt): row for row in sorted(unread, key=lambda row: (row.seen, -row.slot))}
        for row in sorted(readers.values(), key=lambda row: row.slot):
            if chosen and room <= 0:
                break
            if row.seen == 0 and self.chunks[0].pre_process:
                row.embeddings = self._embed_prompt(row)
            stop = self._part_end(row, room)
            if chosen and stop == row.seen:
                break
            chosen.append(row)
            parts.append(NewTokens(row.slot, row.seen, stop, row.visibility))
            room -= stop - row.seen
        self._step(caches, chosen, parts, options, unread)

    def _part_end(self, row: GeneratedRow, room: int) -> int:
        """Where the next part of a prompt ends: after `room` tokens, or at the edge of an image near there."""
        length = len(row.prompt.ids)
        stop = min(length, row.seen + max(room, 1))
        visibility = row.visibility.host or row.visibility
        if visibility.block is None or stop == length:
            return stop
        block = visibility.block[0]
        if block[stop] < 0 or block[stop] != block[stop - 1]:
            return stop
        inside = (block == block[stop]).nonzero()[:, 0]
        first, last = int(inside[0]), int(inside[-1])
        return first if first > row.seen else last + 1

    def _embed_prompt(self, row: GeneratedRow) -> Tensor:
        """[prompt, 1, h] on every rank of the first stage, soft tokens where placeholders stand."""
        model = self.chunks[0]
        multiple = self.groups.tp.size() if self.config.sequence_parallel else 1
        length = len(row.prompt.ids)
        filler = padded(length, multiple) - length
        ids = torch.tensor([[*row.prompt.ids, *[self.geometry.pad_token_id or 0] * filler]], device=self.device)
        if isinstance(model, Gemma4MultimodalModel):
            media = {f.name: row.prompt.media[f.name] for f in fields(MediaTensors) if f.name in row.prompt.media}
            whole = model.embed_with_media(ids, MediaTensors(**media), divided=False)
        else:
            whole = model.embed(ids)
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(whole, group=self.groups.tp)
        return whole[:length]

    def _step(
        self,
        caches: KeyValueCaches,
        rows: Sequence[GeneratedRow],
        parts: Sequence[NewTokens],
        options: SamplingOptions,
        unread: Sequence[GeneratedRow] = (),
    ) -> None:
        """Run new tokens through the model; rows whose prompt is read to its end get their next token, and so do those
        of `unread` that have the same prompt."""
        step = self._cached_step(caches, parts)
        output = self._run_step(step, rows, [_tokens(row, part) for row, part in zip(rows, parts, strict=True)])
        ready, chosen = list[int](), list[GeneratedRow]()
        for i, (row, part) in enumerate(zip(rows, parts, strict=True)):
            row.seen = part.stop
            if part.stop >= len(row.prompt.ids):
                row.embeddings = None
            if part.stop == len(row):
                same = [other for other in unread if other.prompt is row.prompt and other is not row]
                if same:
                    caches.copy(row.slot, [other.slot for other in same], slots=1 + max(other.slot for other in unread))
                for other in same:
                    other.seen = row.seen
                chosen += [row, *same]
                ready += [i] * (1 + len(same))
        if not ready:
            return
        tokens, logprobs = self._choose(None if output is None else output.logits[ready], chosen, options)
        for i, row, token, logprob in zip(ready, chosen, tokens, logprobs, strict=True):
            if output is not None and self.speculator is not None:
                row.state = output.states[i]
            self._add(row, token, logprob)

    def _cached_step(self, caches: KeyValueCaches, parts: Sequence[NewTokens], *, every: bool = False) -> CachedStep:
        return CachedStep.of(caches, parts, self.device, self.groups.tp, self.config.sequence_parallel, every=every)

    def _run_step(
        self, step: CachedStep, rows: Sequence[GeneratedRow], ids: Sequence[Sequence[int]]
    ) -> StepOutput | None:
        """The model's pass over the new tokens `ids` of `rows`, of their prompts or behind them."""
        flat = [i for of_row in ids for i in of_row]
        input_ids = torch.tensor([flat + [self.geometry.pad_token_id or 0] * step.padding], device=self.device)
        embeddings = self._embeddings(rows, step.rows, step, input_ids) if self.chunks[0].pre_process else None
        return run_step(self.chunks, self.groups, step, input_ids, embeddings)

    def _add(self, row: GeneratedRow, token: int, logprob: float) -> None:
        row.tokens.append(token)
        row.logprobs.append(logprob)
        if self.on_token is not None:
            self.on_token(row.index, row.sample, token)

    def _speculate(
        self, speculator: Speculator, caches: KeyValueCaches, rows: Sequence[GeneratedRow], options: SamplingOptions
    ) -> None:
        """Tokens are proposed for every row; one pass over them says which it would have got anyway, and one more."""
        drafts = speculator.draft(caches, rows, options)
        parts = [NewTokens(row.slot, row.seen, len(row) + len(d)) for row, d in zip(rows, drafts.tokens, strict=True)]
        step = self._cached_step(caches, parts, every=True)
        ids = [[row.tokens[-1], *d] for row, d in zip(rows, drafts.tokens, strict=True)]
        output = self._run_step(step, rows, ids)
        first = 0
        for row, part, (tokens, logprobs) in zip(
            rows, parts, speculator.accepted(output, drafts, rows, options), strict=True
        ):
            begun = len(row.tokens)
            for token, logprob in zip(tokens, logprobs, strict=True):
                self._add(row, token, logprob)
                if self._completion(row, options) is not None:
                    break
            got = len(row.tokens) - begun
            row.rounds.append((len(part) - 1, got - 1))
            row.seen += got
            if output is not None:
                row.state = output.states[first + got - 1]
            first += len(part)

    def _embeddings(
        self, rows: Sequence[GeneratedRow], parts: Sequence[NewTokens], step: CachedStep, input_ids: Tensor
    ) -> Tensor:
        """[n (/tp), 1, h]: what prompts were embedded to, and the embeddings of tokens that were generated."""
        model = self.chunks[0]
        if not any(row.embeddings is not None for row in rows):
            # A placeholder that was generated is padding, as in transformers.
            text = model.text_ids(input_ids) if isinstance(model, Gemma4MultimodalModel) else input_ids
            return model.embed(text)
        found = []
        for row, part in zip(rows, parts, strict=True):
            assert row.embeddings is not None
            found.append(row.embeddings[part.start : part.stop])
        found.append(found[0].new_zeros(step.padding, *found[0].shape[1:]))
        whole = torch.cat(found)
        if not self.config.sequence_parallel:
            return whole
        return whole.chunk(self.groups.tp.size())[self.groups.tp.rank()].contiguous()

    def _choose(
        self, logits: Tensor | None, rows: Sequence[GeneratedRow], options: SamplingOptions
    ) -> tuple[list[int], list[float]]:
        """The last stage chooses; ranks of the other stages are told. [rows] each."""
        if logits is not None:
            draws, previous = [row.drawn(options) for row in rows], [row.previous(options) for row in rows]
            both = torch.stack([x.double() for x in choose(logits, options, draws, previous)])
        else:
            both = torch.empty(2, len(rows), dtype=torch.float64, device=self.device)
        if self.groups.pp.size() > 1:
            dist.broadcast(both, group=self.groups.pp, group_src=self.groups.pp.size() - 1)
        tokens, logprobs = both.tolist()
        return [int(token) for token in tokens], logprobs

    def _finish(
        self, caches: KeyValueCaches, active: list[GeneratedRow], reading: list[GeneratedRow], options: SamplingOptions
    ) -> Iterator[Completion]:
        """Rows that have ended, whose slots go to the rows behind them: those that answer stay without a gap."""
        for row in list(active):
            completion = self._completion(row, options)
            if completion is None:
                continue
            active.remove(row)
            others = sorted([*active, *reading], key=lambda other: other.slot)
            if others and others[-1].slot > row.slot:
                self._fill(caches, row.slot, others, active, reading)
            if self.on_finish is not None:
                self.on_finish(completion)
            yield completion

    def _fill(
        self,
        caches: KeyValueCaches,
        slot: int,
        others: list[GeneratedRow],
        active: list[GeneratedRow],
        reading: list[GeneratedRow],
    ) -> None:
        """Close the gap at `slot`: the last row that answers moves there, and the last that is read to its place."""
        for group in (active, reading):
            last = max(group, key=lambda row: row.slot, default=None)
            if last is not None and last.slot > slot:
                if last.seen:
                    caches.move(last.slot, slot)
                slot, last.slot = last.slot, slot
                group.sort(key=lambda row: row.slot)

    def _completion(self, row: GeneratedRow, options: SamplingOptions) -> Completion | None:
        reason, text = None, ""
        if row.tokens[-1] in options.stop_token_ids:
            reason = "stop"
        elif len(row.tokens) >= options.max_new_tokens:
            reason = "length"
        if options.stop_strings and self.decode is not None:
            text = self.decode(row.tokens)
            places = [place for stop in options.stop_strings if (place := text.find(stop)) >= 0]
            if places:
                reason, text = "stop", text[: min(places)]
        if reason is None:
            return None
        if not text and self.decode is not None and not options.stop_strings:
            text = self.decode(row.tokens)
        said = tuple(row.tokens), tuple(row.logprobs)
        rounds = None if self.speculator is None else tuple(row.rounds)
        return Completion(row.index, row.sample, row.prompt.ids, *said, reason, text, rounds)


def _tokens(row: GeneratedRow, part: NewTokens) -> list[int]:
    """The ids of a row at some positions, of its prompt or of its answer."""
    prompt = len(row.prompt.ids)
    if part.stop <= prompt:
        return list(row.prompt.ids[part.start : part.stop])
    assert part.start >= prompt
    return row.tokens[part.start - prompt : part.stop - prompt]


@contextlib.contextmanager
def evaluating(chunks: Sequence[Gemma4Model]) -> Iterator[None]:
    """Without gradients and dropout, and then as before: the modules of a model may be in different modes."""
    modes = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training
        _forget_buffers()


def _forget_buffers() -> None:
    """Megatron keeps buffers for sequence parallelism: training could not write to those of inference mode."""
    if not parallel_state.is_initialized():
        return
    held = parallel_state.get_global_memory_buffer().buffer
    for name in [name for name, buffer in held.items() if buffer.is_inference()]:
        del held[name]
