"""Where the numbers of a run go: JSON lines always, TensorBoard and W&B where asked for, a line on the terminal."""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from bridge.errors import UsageError
from recipes.config import Recipe, to_yaml

LOG_FILE = "log.jsonl"
CONFIG_FILE = "recipe.yaml"

Values = dict[str, float]


class Log:
    """Rank 0's. `resumed_at`: what an earlier run logged beyond that step is dropped, since those steps come again."""

    def __init__(self, recipe: Recipe, resumed_at: int) -> None:
        output = Path(recipe.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / CONFIG_FILE).write_text(to_yaml(recipe), encoding="utf-8")
        path = output / LOG_FILE
        kept = []
        if resumed_at and path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= resumed_at]
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(line + "\n" for line in kept)
        self._file.flush()
        self._steps = recipe.train.steps
        self._first, self._start = resumed_at, time.perf_counter()
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._status = self._console.status("starting") if self._console.is_terminal else None
        if self._status is not None:
            self._status.start()
        self._sinks: list[Callable[[int, Values], None]] = []
        self._closers: list[Callable[[], None]] = []
        if recipe.log.tensorboard:
            self._open_tensorboard(output)
        if recipe.log.wandb is not None:
            self._open_wandb(recipe, output)

    def _open_tensorboard(self, output: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("log.tensorboard: the package tensorboard is not installed") from None
        writer = SummaryWriter(str(output / "tensorboard"))

        def write(step: int, values: Values) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._sinks.append(write)
        self._closers.append(writer.close)

    def _open_wandb(self, recipe: Recipe, output: Path) -> None:
        import netrc

        import wandb
        from omegaconf import OmegaConf

        known = bool(os.environ.get("WANDB_API_KEY"))
        if not known:
            try:
                known = netrc.netrc().authenticators("api.wandb.ai") is not None
            except (OSError, netrc.NetrcParseError):
                known = False
        # A run that goes on is the same run there.
        id_file = output / "wandb.id"
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(8), encoding="utf-8")
        run = wandb.init(
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            project=recipe.log.wandb,
            # A job names its runs by W&B's own variable.
            name=os.environ.get("WANDB_NAME", output.name),
            dir=str(output),
            config=OmegaConf.to_container(OmegaConf.structured(recipe)),  # type: ignore[arg-type]
            mode=None if known or os.environ.get("WANDB_MODE") else "offline",
        )
        self._sinks.append(lambda step, values: run.log(values, step=step))
        self._closers.append(run.finish)

    def write(self, step: int, values: Values) -> None:
        """Note the values of a step, in every place."""
        line: dict[str, Any] = {"step": step}
        # JSON has no NaN.
        line |= {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink(step, values)
        # What has a slash in its name is a table, and would fill the screen.
        shown = [f"{name} {value:.6g}" for name, value in values.items() if "/" not in name]
        if "loss" in values and step > self._first:
            shown.append(f"eta {remaining(time.perf_counter() - self._start, step - self._first, self._steps - step)}")
        text = f"step {step}/{self._steps}  " + "  ".join(shown)
        if self._status is not None and "loss" in values:
            self._status.update(text)
        else:
            self._console.print(text)

    def say(self, text: str) -> None:
        """A line for who watches."""
        self._console.print(text)

    def close(self) -> None:
        """Finish every place."""
        if self._status is not None:
            self._status.stop()
        self._file.close()
        for close in self._closers:
            close()


def remaining(seconds: float, done: int, left: int) -> str:
    """How long `left` steps take if each takes as long as one of `done` in `seconds`, as h:mm:ss."""
    return str(timedelta(seconds=round(seconds / done * left)))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off by whatever ended the run
