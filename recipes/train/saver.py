"""When checkpoints of a run are written: at once, or one at a time beside the next steps (`checkpoint.async`)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from recipes.train.checkpoint import RunProgress, Save, begin_save, checkpoints
from recipes.train.setup import Run
from recipes.train.step import any_rank

# Before a job's time limit: what it takes to end, and to go back into the queue. Seconds.
_BEFORE_LIMIT = 20.0
_BETWEEN_LOOKS = 0.1


def time_limit() -> float | None:
    """When Slurm ends this job (seconds since 1970); None where that is not known."""
    said = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(said) if said.isdecimal() else None


class Saver:
    """The checkpoints of a run. `say`: what there is to say of them, on the rank that has the log."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._save: Save | None = None
        self._begun = 0
        limit = time_limit()
        self._latest = None if limit is None else limit - _BEFORE_LIMIT

    @property
    def writing(self) -> bool:
        """Whether this rank writes one."""
        return self._save is not None and self._save.writing.going_on

    def save(self, progress: RunProgress) -> bool:
        """Write one, or begin to, when the last one is there; False where time is up. Collective."""
        if not self.finish():
            return False
        self._save, self._begun = begin_save(self._run, progress), progress.step
        if not self._run.recipe.checkpoint.async_:
            self._appear(progress.step)
        return True

    def before_update(self) -> None:
        """Wait until what is written reads nothing any more that an update changes. Of this rank."""
        if self._save is not None:
            self._save.writing.copied()

    def stepped(self, step: int, writing: bool) -> None:
        """Let one appear that no rank writes any more (not `writing`). Collective, between steps."""
        if self._save is not None and not writing:
            self._appear(step)

    def finish(self) -> bool:
        """Wait for the one that is written; False where it had to be given up: the job's time is up. Collective."""
        save = self._save
        if save is None:
            return True
        while any_rank(self.writing, self._run.device):
            if any_rank(self._latest is not None and time.time() > self._latest, self._run.device):
                self._save = None
                save.give_up()
                self._say(self._given_up(save, "before the time limit of the job"))
                return False
            time.sleep(_BETWEEN_LOOKS)
        self._appear(self._begun)
        return True

    def abandon(self) -> None:
        """End what this rank writes: the run has failed, or ends at once."""
        if self._save is not None:
            save, self._save = self._save, None
            save.writing.give_up()
            self._say(self._given_up(save, "when the run ended"))

    def _appear(self, step: int) -> None:
        assert self._save is not None
        save, self._save = self._save, None
        where, steps = save.finish(), step - self._begun
        self._say(f"saved {where}" + (f" beside {steps} step{'s' * (steps > 1)}" if steps else ""))

    def _given_up(self, save: Save, when: str) -> str:
        left = list(checkpoints(Path(self._run.recipe.output)).values())
        goes_on = f"from {left[-1]}" if left else "from the beginning"
        return f"the checkpoint of step {save.step} was not written {when} and is given up: the run goes on {goes_on}"
