"""The acceptance of a drafter's tokens: at each place of a draft, and how many tokens a pass of the model gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.generate.rows import Completion


@dataclass(frozen=True)
class Acceptance:
    """Of `passes` of the model over proposed tokens: how many were proposed at each place of a draft, and accepted."""

    passes: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]

    @classmethod
    def of(cls, completions: Iterable[Completion]) -> Acceptance:
        """Of answers, each with its `rounds`."""
        rounds = [each for completion in completions for each in completion.rounds or ()]
        places = range(max((drafted for drafted, _ in rounds), default=0))
        counts = [
            tuple(sum(count > place for count in column) for place in places) for column in zip(*rounds, strict=True)
        ]
        return cls(len(rounds), *counts) if rounds else cls(0, (), ())

    @property
    def mean_length(self) -> float:
        """Accepted tokens a pass; each pass gives one token more. 0 without a pass."""
        return sum(self.accepted) / self.passes if self.passes else 0.0

    @property
    def rates(self) -> tuple[float, ...]:
        """At each place of a draft, how many of the tokens that were proposed there were accepted."""
        return tuple(accepted / drafted for drafted, accepted in zip(self.drafted, self.accepted, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "passes": self.passes,
            "drafted": sum(self.drafted),
            "accepted": sum(self.accepted),
            "mean_accepted_length": self.mean_length,
            "acceptance_per_position": list(self.rates),
        }

    def __str__(self) -> str:
        places = " ".join(f"{rate:.0%}" for rate in self.rates)
        return (
            f"drafter: {sum(self.accepted)} of {sum(self.drafted)} tokens accepted in {self.passes} passes, "
            f"{self.mean_length:.2f} a pass; by position {places or 'none'}"
        )
