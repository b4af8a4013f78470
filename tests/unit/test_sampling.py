"""Sampling against transformers' own logits processors, and what a draw depends on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bridge.errors import UsageError
from bridge.generate.sampling import SamplingOptions, choose, uniform

VOCABULARY, ROWS = 50, 6


def logits(seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def probabilities(scores: torch.Tensor, options: SamplingOptions, previous: list[list[int]]) -> torch.Tensor:
    """[rows, vocab] of transformers' processors in the order in which it applies them."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(options.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k is not None:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p is not None:
        processors.append(MinPLogitsWarper(options.min_p))
    return processors(torch.tensor(previous), scores.clone()).softmax(-1)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "repetition_penalty": 1.4},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8},
    ],
)
def test_draws_follow_transformers_distribution(given: dict[str, Any]) -> None:
    """The inverse transform: between two cumulated probabilities lies one word, for every draw of a fine grid."""
    options = SamplingOptions(**given)
    scores, previous = logits(), [[row, 7, 7, 11] for row in range(ROWS)]
    wanted = probabilities(scores, options, previous)
    grid = 1001
    draws = [(i + 0.5) / grid for i in range(grid) for _ in range(ROWS)]
    tokens, _ = choose(scores.repeat(grid, 1), options, draws, previous * grid)
    counts = torch.stack([torch.bincount(chosen, minlength=VOCABULARY) for chosen in tokens.view(grid, ROWS).T])
    assert (counts / grid - wanted).abs().max() < 1.01 / grid + 1e-6
    assert not counts[wanted == 0].any()


def test_greedy_and_log_probabilities() -> None:
    scores = logits()
    tokens, logprobs = choose(scores, SamplingOptions(), [0.0] * ROWS, [[]] * ROWS)
    assert torch.equal(tokens, scores.argmax(-1))
    torch.testing.assert_close(logprobs, scores.log_softmax(-1).amax(-1))
    # The model's own, whatever is cut.
    options = SamplingOptions(temperature=0.5, top_k=2)
    tokens, logprobs = choose(scores, options, [0.9] * ROWS, [[]] * ROWS)
    torch.testing.assert_close(logprobs, scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def test_penalty_in_greedy_answers() -> None:
    scores = logits()
    best = scores.argmax(-1)
    tokens, _ = choose(scores, SamplingOptions(repetition_penalty=1e6), [0.0] * ROWS, [[int(i)] for i in best])
    processor = RepetitionPenaltyLogitsProcessor(1e6)
    assert torch.equal(tokens, processor(best[:, None], scores.clone()).argmax(-1))


def test_a_draw_depends_on_its_row_and_step_alone() -> None:
    draws = [
        uniform(seed, row, sample, step) for seed in (0, 1) for row in (0, 1) for sample in (0, 1) for step in (0, 1)
    ]
    assert len(set(draws)) == 16 and all(0 <= draw < 1 for draw in draws)
    assert uniform(3, 1, 4, 1) == uniform(3, 1, 4, 1)
    tenths = Counter(int(10 * uniform(0, row, 0, step)) for row in range(50) for step in range(200))
    assert sum((count - 1000) ** 2 / 1000 for count in tenths.values()) < 27.9  # chi-square of 9, p = 0.001


@pytest.mark.parametrize(
    "given",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"num_return_sequences": 3},
    ],
)
def test_values_that_mean_nothing(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        SamplingOptions(**given)
