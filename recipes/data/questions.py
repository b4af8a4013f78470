"""Samples of a corpus as questions: what a model is asked, and how it should answer, which is its last turn there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bridge.errors import DataError
from bridge.generate.rows import Prompt
from recipes.data.blend import Samples
from recipes.data.chat import Encoded
from recipes.data.sample import Where
from recipes.data.supervision import THOUGHT, THOUGHT_END
from recipes.metrics.named import Metric, parsed


class Questions:
    """The first `count` samples (0: all), made as they are asked for: their media are read then.

    A prompt ends where the model's last answer begins, with the tokens that the sample has, and so as the template and
    the options of the corpus say; the reference is the text of that answer. Thoughts are of neither.
    """

    def __init__(self, samples: Samples, count: int = 0) -> None:
        self._samples, self.tokenizer = samples, samples.tokenizer
        self._count = min(count, len(samples)) if count else len(samples)
        self._thought, self._thought_end = self.tokenizer.convert_tokens_to_ids([THOUGHT, THOUGHT_END])

    def __len__(self) -> int:
        return self._count

    def where(self, number: int) -> Where:
        """The file and line of a question."""
        return self._samples.where(number)

    def prompt_length(self, number: int) -> int:
        """Tokens of a prompt; its media are not read. Raises DataError: no question."""
        return self._answer(self._samples[number], number)[0]

    def media(self, number: int) -> tuple[np.ndarray, dict[str, Any]]:
        """The kinds of a prompt's tokens, as in `Encoded.types`, and what the processor made of its media."""
        encoded = self._samples[number]
        end = self._answer(encoded, number)[0]
        return encoded.types[:end], self._samples.media_tensors(number) if encoded.media else {}

    def prompt(self, number: int) -> Prompt:
        """What a model is asked. Raises DataError: no question, media that cannot be read."""
        encoded = self._samples[number]
        end = self._answer(encoded, number)[0]
        ids = tuple(encoded.ids[:end].tolist())
        if not encoded.media:
            return Prompt(ids)
        types = torch.from_numpy(encoded.types[:end].astype("int64"))
        return Prompt(ids, types, self._samples.media_tensors(number))

    def reference(self, number: int) -> str:
        """The text of the answer that is wanted. Raises DataError: no question."""
        encoded = self._samples[number]
        start, end = self._answer(encoded, number)
        return self.text(encoded.ids[start:end].tolist())

    def text(self, tokens: Sequence[int]) -> str:
        """An answer's text: without thoughts, control tokens, and white space around it."""
        visible, inside = [], False
        for token in tokens:
            inside = token == self._thought or (inside and token != self._thought_end)
            if not inside:
                visible.append(token)
        return str(self.tokenizer.decode(visible, skip_special_tokens=True)).strip()

    def _answer(self, encoded: Encoded, number: int) -> tuple[int, int]:
        """Where the last run of learnt tokens begins and ends."""
        learnt = np.flatnonzero(encoded.supervised)
        end = int(learnt[-1]) + 1
        unlearnt = np.flatnonzero(~encoded.supervised[:end])
        start = int(unlearnt[-1]) + 1 if len(unlearnt) else 0
        if start <= 1:
            raise DataError(
                f"{self.where(number)}: asks nothing: an answer is generated to a conversation, not to text"
            )
        return start, end


def check_questions(metrics: Sequence[Metric], questions: Questions, key: str) -> None:
    """Raise DataError, which names the record, for a sample that asks nothing, or whose answer a metric cannot use."""
    needs_json = [metric.name for metric in metrics if metric.needs_json]
    for number in range(len(questions)):
        reference = questions.reference(number)
        if needs_json and parsed(reference) is None:
            raise DataError(f"{questions.where(number)}: {key}={needs_json[0]}: the answer is no JSON")
