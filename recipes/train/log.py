"""Where the numbers of a run go: JSON lines always, TensorBoard and W&B where asked for, a line on the terminal."""

from __future__ import annotations

import json
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from recipes.config import Recipe, to_yaml
from recipes.train.sinks import LogSink, Values, open_tensorboard, open_wandb

LOG_FILE = "log.jsonl"
CONFIG_FILE = "recipe.yaml"


class Log:
    """Rank 0's. `resumed_at`: what an earlier run logged beyond that step is dropped, since those steps come again."""

    def __init__(self, recipe: Recipe, resumed_at: int) -> None:
        output = Path(recipe.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / CONFIG_FILE).write_text(to_yaml(recipe), encoding="utf-8")
        path = output / LOG_FILE
        earlier = []
        if resumed_at and path.is_file():
            earlier = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= resumed_at]
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(line + "\n" for line in earlier)
        self._file.flush()
        self._steps = recipe.train.steps
        self._first, self._start = resumed_at, time.perf_counter()
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._status = self._console.status("starting") if self._console.is_terminal else None
        if self._status is not None:
            self._status.start()
        self._sinks: list[LogSink] = []
        if recipe.log.tensorboard:
            self._sinks.append(open_tensorboard(output, resumed_at))
        if recipe.log.wandb is not None:
            self._sinks.append(open_wandb(recipe, output, self.say))

    def write(self, step: int, values: Values, more: Values | None = None) -> None:
        """Note the values of a step, in every place; `more` would fill the screen, and goes to all the others."""
        line: dict[str, Any] = {"step": step}
        every = values | (more or {})
        # JSON has no NaN.
        line |= {name: value if math.isfinite(value) else str(value) for name, value in every.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(step, every)
        columns = [f"{name} {value:.6g}" for name, value in values.items()]
        if "loss" in values and step > self._first:
            columns.append(
                f"eta {remaining(time.perf_counter() - self._start, step - self._first, self._steps - step)}"
            )
        text = f"step {step}/{self._steps}  " + "  ".join(columns)
        if self._status is not None and "loss" in values:
            self._status.update(text)
        else:
            self._console.print(text)

    def texts(self, step: int, texts: dict[str, str]) -> None:
        """Note what the model said at a step, by the names of the prompts, where there is a place for it."""
        for sink in self._sinks:
            sink.texts(step, texts)

    def say(self, text: str) -> None:
        """A line for who watches."""
        self._console.print(text)

    def close(self) -> None:
        """Finish every place."""
        if self._status is not None:
            self._status.stop()
        self._file.close()
        for sink in self._sinks:
            sink.close()


def remaining(seconds: float, done: int, left: int) -> str:
    """How long `left` steps take if each takes as long as one of `done` in `seconds`, as h:mm:ss."""
    return str(timedelta(seconds=round(seconds / done * left)))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off by whatever ended the run
