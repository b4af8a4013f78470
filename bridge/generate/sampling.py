"""From logits to tokens, as transformers' `GenerationConfig` names it. All in float32, draws in float64."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bridge.errors import UsageError


@dataclass(frozen=True)
class SamplingOptions:
    """Temperature 0 is greedy. The order is transformers': repetition penalty, temperature, top-k, top-p, min-p.

    `stop_token_ids` end a row and are kept in its tokens; `stop_strings` end it as soon as its text holds one.
    Raises UsageError for a value that means nothing.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    num_return_sequences: int = 1
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (1, math.inf),
            "temperature": (0.0, math.inf),
            "top_k": (1, math.inf),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (0.0, math.inf),
            "num_return_sequences": (1, math.inf),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in bounds and value is not None:
                low, high = bounds[field.name]
                # A NaN is in no range. A penalty divides, and no probability at all is below a top-p of 0.
                excluded = value == 0 and field.name in ("repetition_penalty", "top_p")
                if not low <= value <= high or excluded or value == math.inf:
                    raise UsageError(f"{field.name}={value}: it is from {low} to {high}")
        if self.num_return_sequences > 1 and not self.temperature:
            raise UsageError(f"num_return_sequences={self.num_return_sequences} answers would be one: temperature is 0")


def uniform(seed: int, row: int, sample: int, step: int, use: str = "") -> float:
    """A number of [0, 1) that nothing else decides: neither batch nor layout nor the order in which rows come.

    `use`: of several numbers for one step, which.
    """
    digest = hashlib.blake2b(f"{seed} {row} {sample} {step}{use}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def choose(
    logits: Tensor, options: SamplingOptions, draws: Sequence[float], previous: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Tokens [rows] and their log-probabilities [rows] out of `logits` [rows, vocab].

    The log-probability is the model's own, before penalty, temperature and cuts. `draws` [rows] are of [0, 1);
    `previous`: what each row holds already, prompt and answer.
    """
    logits = logits.float()
    if options.temperature == 0:
        tokens = _penalised(logits, options.repetition_penalty, previous).argmax(-1)
    else:
        tokens = draw(distribution(logits, options, previous), draws)
    # Of one token a row: no second [rows, vocab].
    logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return tokens, logprobs


def distribution(logits: Tensor, options: SamplingOptions, previous: Sequence[Sequence[int]]) -> Tensor:
    """The probabilities that tokens are drawn with, float64 [rows, vocab]; `options` are not greedy."""
    scores = _penalised(logits.float(), options.repetition_penalty, previous)
    return _filtered(scores / options.temperature, options).double().softmax(-1)


def _penalised(logits: Tensor, penalty: float, previous: Sequence[Sequence[int]]) -> Tensor:
    if penalty == 1.0:
        return logits
    scores = logits.clone()
    for row, tokens in zip(scores, previous, strict=True):
        held = torch.tensor(sorted(set(tokens)), device=row.device)
        row[held] = torch.where(row[held] < 0, row[held] * penalty, row[held] / penalty)
    return scores


def _filtered(scores: Tensor, options: SamplingOptions) -> Tensor:
    """-inf where a token is not among the top k, in the top p, or likelier than min p of the likeliest."""
    if options.top_k is not None and options.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(options.top_k).values[:, -1:], -torch.inf)
    if options.top_p is not None and options.top_p < 1:
        ordered, order = scores.sort(-1)
        unlikely = ordered.softmax(-1).cumsum(-1) <= 1 - options.top_p
        unlikely[:, -1] = False
        scores = scores.masked_fill(unlikely.scatter(1, order, unlikely), -torch.inf)
    if options.min_p is not None:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < options.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return scores


def draw(weights: Tensor, draws: Sequence[float]) -> Tensor:
    """Tokens [rows], in proportion to `weights`, float64 [rows, vocab], which need not sum to one.

    Inverse transform over the words in their order: a sort could break ties in another way elsewhere.
    """
    cumulated = weights.cumsum(-1)
    wanted = torch.tensor(draws, dtype=torch.float64, device=weights.device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, wanted, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)
