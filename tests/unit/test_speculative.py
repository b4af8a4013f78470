"""Rejection of proposed tokens: the distribution of what is answered, whatever the drafter says; the meter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from bridge.generate.acceptance import Acceptance
from bridge.generate.row import GeneratedRow
from bridge.generate.rows import Completion, Prompt
from bridge.generate.sampling import SamplingOptions, distribution, draw
from bridge.generate.speculative import sampled
from bridge.megatron.visibility import Visibility

DRAWS = 20_000
WORDS = 6


SEEN = Visibility.of(torch.zeros(1, 2, dtype=torch.int64))


def row(sample: int) -> GeneratedRow:
    return GeneratedRow(0, sample, Prompt((1, 2)), SEEN, tokens=[3])


@pytest.mark.parametrize(
    ("options", "wrong"), [({}, 0.0), ({}, 1.0), ({"top_k": 3}, 1.0), ({"temperature": 0.6, "top_p": 0.9}, 6.0)]
)
def test_the_distribution_is_the_models_own(options: dict[str, float], wrong: float) -> None:
    """Two tokens are proposed with probabilities that are the model's, others, or nearly never right.

    Of the 36 pairs of tokens that begin an answer each occurs as often as the model alone would draw it: chi-square.
    """
    asked = SamplingOptions(**{"temperature": 1.0, "seed": 11, **options})  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, WORDS, generator=generator)
    own = distribution(logits[:2] + wrong * torch.randn(2, WORDS, generator=generator), asked, [[], []])
    p = distribution(logits, asked, [[]] * 3)
    rows = [row(sample) for sample in range(DRAWS)]

    def drawn(probabilities: torch.Tensor, ahead: int, use: str) -> list[int]:
        numbers = [each.drawn(asked, ahead, use) for each in rows]
        return draw(probabilities.expand(DRAWS, -1), numbers).tolist()

    proposed = list(zip(*(drawn(own[i], i, " draft") for i in range(2)), strict=True))
    later = drawn(p[1], 1, " later")  # what the next pass gives a row that has one token only
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for each, pair, other in zip(rows, proposed, later, strict=True):
        tokens = sampled(p, list(pair), list(own), each, asked)
        accepted += len(tokens) - 1
        counts[tuple([*tokens, other][:2])] += 1
    expected = {(i, j): DRAWS * float(p[0, i] * p[1, j]) for i in range(WORDS) for j in range(WORDS)}
    assert all(expected[pair] > 0 for pair in counts)
    usual = {pair: number for pair, number in expected.items() if number >= 5}
    statistic = sum((counts[pair] - number) ** 2 / number for pair, number in usual.items())
    degrees = torch.tensor((len(usual) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)) > 1e-3
    assert (accepted == 2 * DRAWS) == (wrong == 0.0)


def test_the_meter() -> None:
    rounds = (((4, 4), (4, 0), (2, 1)), ((4, 2),))
    met = Acceptance.of([Completion(i, 0, (1,), (2,), (0.0,), "stop", "", of) for i, of in enumerate(rounds)])
    assert (met.passes, met.drafted, met.accepted) == (4, (4, 4, 3, 3), (3, 2, 1, 1))
    assert met.mean_length == 7 / 4 and met.rates == (3 / 4, 2 / 4, 1 / 3, 1 / 3)
    assert "7 of 14 tokens accepted in 4 passes, 1.75 a pass; by position 75% 50% 33% 33%" in str(met)
    nothing = Acceptance.of([Completion(0, 0, (1,), (2,), (0.0,), "stop")])
    assert nothing.mean_length == 0.0 and "none" in str(nothing)
