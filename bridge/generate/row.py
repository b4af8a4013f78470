"""A row while it is answered: what it holds so far, and where its keys and values lie."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from bridge.generate.rows import Prompt
from bridge.generate.sampling import SamplingOptions, uniform
from bridge.megatron.visibility import Visibility


@dataclass
class GeneratedRow:
    """`seen` tokens of it are in the caches, in `slot`.

    `embeddings` [prompt, 1, h] of its prompt, on the first stage, while it is read. `state` [h]: the model's, of the
    last token that was seen, on the last stage. `rounds`: see `Completion`.
    """

    index: int
    sample: int
    prompt: Prompt
    visibility: Visibility
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    slot: int = -1
    seen: int = 0
    embeddings: Tensor | None = None
    state: Tensor | None = None
    rounds: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt.ids) + len(self.tokens)

    def drawn(self, options: SamplingOptions, ahead: int = 0, use: str = "") -> float:
        """The number of [0, 1) that its token `ahead` of the next one is drawn with."""
        return uniform(options.seed, self.index, self.sample, len(self.tokens) + ahead, use)

    def previous(self, options: SamplingOptions, more: list[int] | None = None) -> list[int]:
        """What it holds, prompt and answer, and `more`, for those who penalise it; nothing where nobody does."""
        if options.repetition_penalty == 1.0:
            return []
        return [*self.prompt.ids, *self.tokens, *(more or [])]
