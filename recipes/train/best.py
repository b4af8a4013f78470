"""The best evaluation of a run so far, and the end of a run that has had none better for long enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from recipes.config import Recipe
from recipes.train.checkpoint import RunProgress, checkpoints


def logged_name(measure: str) -> str:
    """What a measure of an evaluation is called in the log."""
    return f"eval_{measure.replace(':', '.')}"


class BestEvaluation:
    """By `eval.best` and `train.patience`; what it knows is in the run's progress. `say`: who is told in words."""

    def __init__(self, recipe: Recipe, progress: RunProgress, say: Callable[[str], None]) -> None:
        self._recipe, self._progress, self._say = recipe, progress, say

    @property
    def name(self) -> str:
        """In the log."""
        return logged_name(self._recipe.eval.best)

    def compare(self, value: float) -> None:
        """Note whether an evaluation is the best so far; another `eval.best` than before begins anew."""
        progress, measure = self._progress, self._recipe.eval.best
        if progress.best_of != measure:
            if progress.best_eval is not None:
                self._say(f"eval.best was {progress.best_of} and is {measure}: the best evaluation is looked for anew")
            progress.best_of, progress.best_eval = measure, None
        best = progress.best_eval
        # What is no number is never the best; an older version may have noted one.
        first = best is None or not math.isfinite(best)
        if math.isfinite(value) and (first or _better(value, best or 0.0, measure)):
            progress.best_eval, progress.best_step, progress.evals_since_best = value, progress.step, 0
        else:
            progress.evals_since_best += 1

    def is_this_step(self) -> bool:
        """Whether an early stop would come back to the step that was just made."""
        return bool(self._recipe.train.patience) and self._progress.best_step == self._progress.step

    def too_long_ago(self) -> bool:
        """Whether evaluations have not become better for as long as `train.patience` says."""
        patience = self._recipe.train.patience
        return bool(patience) and self._progress.evals_since_best >= patience

    def say_why(self) -> None:
        """Why the run ends before its last step."""
        progress, train = self._progress, self._recipe.train
        was = "no number"
        if progress.best_eval is not None:
            was = f"not better than {progress.best_eval:.6g} of step {progress.best_step}"
        self._say(
            f"ended early after step {progress.step} of {train.steps}: {self.name} was {was} in "
            f"{progress.evals_since_best} evaluations (train.patience={train.patience}; with more it goes on)"
        )

    def checkpoint(self) -> Path | None:
        """The one of the best evaluation, where an early stop is asked for and it is not the last one."""
        progress = self._progress
        if not self._recipe.train.patience or progress.best_step in (0, progress.step):
            return None
        found = checkpoints(Path(self._recipe.output)).get(progress.best_step)
        if found is None:
            self._say(f"the best checkpoint, of step {progress.best_step}, is not there any more: the last one counts")
        return found


def _better(value: float, best: float, measure: str) -> bool:
    """Of a loss the less, of a metric the more."""
    return value < best if measure == "loss" else value > best
