"""Speculative decoding: a drafter proposes tokens of every row, and one pass of the model over them decides.

Greedy, a proposed token is accepted if it is the model's own choice. Sampled, token d of probability p(d), which was
drawn with q(d), is accepted with min(1, p(d) / q(d)), and in the place of the first that is not comes one drawn of what
p has more than q: answers are distributed as without a drafter, whatever q is (Leviathan et al., 2023). All draws are
keyed by seed, row and step, as those without a drafter are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from bridge.errors import ParallelError, UsageError
from bridge.generate.row import GeneratedRow
from bridge.generate.sampling import SamplingOptions, choose, distribution, draw
from bridge.generate.stages import StepOutput
from bridge.megatron.attention import KeyValue
from bridge.megatron.drafter import Gemma4Drafter, TargetEmbedding
from bridge.megatron.kv_cache import CachedStep, KeyValueCaches, NewTokens
from bridge.megatron.model import Gemma4Model
from bridge.megatron.rope import rotary_tables


@dataclass(frozen=True)
class Drafts:
    """Proposed tokens of each row; `probabilities` [rows, vocab] of each step, where they were drawn on this rank."""

    tokens: list[list[int]]
    probabilities: list[Tensor]


class Speculator:
    """Proposes up to `tokens` tokens a row. `drafter` is there on the ranks of the last stage, None on the others."""

    def __init__(
        self,
        drafter: Gemma4Drafter | None,
        chunks: Sequence[Gemma4Model],
        groups: ProcessGroupCollection,
        tokens: int,
    ) -> None:
        """`chunks`: this rank's of the target. Raises UsageError and ParallelError for what cannot be drafted with."""
        if tokens < 1:
            raise UsageError(f"draft tokens {tokens}: at least one is proposed")
        self._drafter, self._groups, self._tokens = drafter, groups, tokens
        self._device = next(p.device for chunk in chunks for p in chunk.parameters())
        self._embed: TargetEmbedding | None = None
        if drafter is not None:
            self._embed = TargetEmbedding(chunks)
            self._sources = {layer.kv_source for layer in drafter.config.geometry.layers}
            held = {layer.layer.kv_source for layer in chunks[-1].decoder.layers}
            if not self._sources <= held:
                layer = min(self._sources - held)
                raise ParallelError(
                    f"the drafter reads layer {layer}, whose keys and values the last pipeline stage does not hold: "
                    "use fewer stages"
                )

    @property
    def spare(self) -> int:
        """How many tokens may be taken back from the caches: those proposed, and one that drafters see besides."""
        return self._tokens + 1

    def draft(self, caches: KeyValueCaches, rows: Sequence[GeneratedRow], options: SamplingOptions) -> Drafts:
        """Tokens behind the last one of every row, known to all ranks of the pipeline; none behind the last allowed."""
        counts = [min(self._tokens, options.max_new_tokens - len(row.tokens) - 1) for row in rows]
        steps = max(counts)
        if steps <= 0:
            return Drafts([[] for _ in rows], [])
        if self._drafter is not None:
            proposed, probabilities = self._propose(self._drafter, caches, rows, options, steps)
        else:
            proposed, probabilities = torch.empty(len(rows), steps, dtype=torch.int64, device=self._device), []
        if self._groups.pp.size() > 1:
            dist.broadcast(proposed, group=self._groups.pp, group_src=self._groups.pp.size() - 1)
        found = [of_row[:count] for of_row, count in zip(proposed.tolist(), counts, strict=True)]
        return Drafts(found, probabilities)

    def _propose(
        self,
        drafter: Gemma4Drafter,
        caches: KeyValueCaches,
        rows: Sequence[GeneratedRow],
        options: SamplingOptions,
        steps: int,
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens [rows, steps], and the probabilities that each step's were drawn with."""
        config, tp, embed = drafter.config, self._groups.tp, self._embed
        assert embed is not None
        last = [NewTokens(row.slot, row.seen - 1, row.seen) for row in rows]
        step = CachedStep.of(caches, last, self._device, tp, config.sequence_parallel)
        step.written.update(self._sources)
        kv = {source: KeyValue(caches.layers[source].key, caches.layers[source].value) for source in self._sources}
        rotary = rotary_tables(config.geometry, step.position_ids + 1, config.params_dtype)

        def sequence(x: Tensor) -> Tensor:
            """[rows, H] -> [n (/tp), 1, H], padding behind the rows."""
            x = torch.nn.functional.pad(x, (0, 0, 0, step.padding))[:, None]
            return x.chunk(tp.size())[tp.rank()] if config.sequence_parallel else x

        states = sequence(torch.stack([row.state for row in rows if row.state is not None]))
        tokens = torch.tensor([row.tokens[-1] for row in rows], device=self._device)
        proposed: list[Tensor] = []
        probabilities: list[Tensor] = []
        for ahead in range(steps):
            hidden, states = drafter(sequence(embed(tokens[None])[:, 0]), states, rotary=rotary, visibility=step, kv=kv)
            if config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=tp)
            logits = drafter.logits(hidden[: len(rows), 0])
            more = torch.stack(proposed, 1).tolist() if proposed else [[] for _ in rows]
            previous = [row.previous(options, drafted) for row, drafted in zip(rows, more, strict=True)]
            if options.temperature == 0:
                tokens, _ = choose(logits, options, [], previous)
            else:
                probabilities.append(distribution(logits, options, previous))
                tokens = draw(probabilities[-1], [row.drawn(options, ahead, " draft") for row in rows])
            proposed.append(tokens)
        return torch.stack(proposed, 1), probabilities

    def accepted(
        self, output: StepOutput | None, drafts: Drafts, rows: Sequence[GeneratedRow], options: SamplingOptions
    ) -> list[tuple[list[int], list[float]]]:
        """Of every row its new tokens and their log-probabilities, on every rank of the pipeline.

        They are the proposed ones that are accepted, and one more. `output` is of each row's last token and of those
        proposed behind it.
        """
        longest = 1 + max(map(len, drafts.tokens))
        told = torch.zeros(len(rows), 1 + 2 * longest, dtype=torch.float64, device=self._device)
        if output is not None:
            first = 0
            for number, (row, proposed) in enumerate(zip(rows, drafts.tokens, strict=True)):
                logits = output.logits[first : first + len(proposed) + 1]
                first += len(proposed) + 1
                draft_probabilities = [probabilities[number] for probabilities in drafts.probabilities[: len(proposed)]]
                tokens = accept(logits, proposed, draft_probabilities, row, options)
                words = torch.tensor(tokens, device=logits.device)
                logprobs = logits[: len(tokens)].log_softmax(-1).gather(1, words[:, None])[:, 0]
                told[number, 0] = len(tokens)
                told[number, 1 : 1 + len(tokens)] = words.double()
                told[number, 1 + longest : 1 + longest + len(tokens)] = logprobs.double()
        if self._groups.pp.size() > 1:
            dist.broadcast(told, group=self._groups.pp, group_src=self._groups.pp.size() - 1)
        found = []
        for count, *numbers in told.tolist():
            tokens = [int(token) for token in numbers[: int(count)]]
            found.append((tokens, numbers[longest : longest + int(count)]))
        return found


def accept(
    logits: Tensor, proposed: list[int], draft_probabilities: list[Tensor], row: GeneratedRow, options: SamplingOptions
) -> list[int]:
    """The tokens that a row gets. `logits` [proposed + 1, vocab]; `draft_probabilities` [vocab] of each: what
    it was drawn with."""
    previous = [row.previous(options, proposed[:ahead]) for ahead in range(len(proposed) + 1)]
    if options.temperature == 0:
        chosen: list[int] = choose(logits, options, [], previous)[0].tolist()
        matches = 0
        while matches < len(proposed) and chosen[matches] == proposed[matches]:
            matches += 1
        return chosen[: matches + 1]
    return sampled(distribution(logits, options, previous), proposed, draft_probabilities, row, options)


def sampled(
    wanted: Tensor,
    proposed: list[int],
    draft_probabilities: Sequence[Tensor],
    row: GeneratedRow,
    options: SamplingOptions,
) -> list[int]:
    """The tokens that a row gets; `wanted` [proposed + 1, vocab]: the model's probabilities."""
    for ahead, (token, p, q) in enumerate(zip(proposed, wanted, draft_probabilities, strict=False)):
        if row.drawn(options, ahead, " accept") * float(q[token]) < float(p[token]):
            continue
        return [*proposed[:ahead], int(draw((p - q).clamp_(min=0)[None], [row.drawn(options, ahead)]))]
    return [*proposed, int(draw(wanted[-1:], [row.drawn(options, len(proposed))]))]
