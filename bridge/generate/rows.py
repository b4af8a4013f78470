"""What goes into generation and what comes out, for processes that do not hold the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """Token ids, and what the processor made of pictures, clips and tones: names and tensors of `Media`.

    `mm_token_type_ids` [prompt] says which tokens are of images (1) or frames (2), where there are any.
    """

    ids: tuple[int, ...]
    mm_token_type_ids: Tensor | None = None
    media: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """What one row was answered. `index` is the prompt's, `sample` the number among its `num_return_sequences`.

    `logprobs` are the model's own of `tokens`; `finish_reason` is "stop" (a stop id or string) or "length". `text` is
    the answer up to a stop string, "" where the generator has no tokenizer. `rounds`: of each pass of the model over
    tokens that a drafter proposed, how many those were and how many of them were accepted; None without a drafter.
    """

    index: int
    sample: int
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    text: str = ""
    rounds: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Continuation:
    """Token ids behind others, both given: what is asked is how likely a model holds `tokens` behind `prompt`."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """Of the continuation number `index`: the log-probability of all its tokens, and whether each was the likeliest."""

    index: int
    logprob: float
    greedy: bool
