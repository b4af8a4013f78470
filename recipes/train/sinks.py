"""TensorBoard and W&B: whether they can be had is known before a model is built; each is told the values of a step."""

from __future__ import annotations

import functools
import importlib.util
import netrc
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bridge.errors import UsageError
from recipes.config import Recipe

Values = dict[str, float]

_WANDB_HOST = "https://api.wandb.ai"
# Seconds in which a server has to answer, whatever it answers.
_ANSWER_S = 10.0


@dataclass(frozen=True)
class LogSink:
    """Where the values of a step also go, and the answers to `train.samples`, by the numbers of the prompts."""

    write: Callable[[int, Values], None]
    texts: Callable[[int, dict[str, str]], None]
    close: Callable[[], None]


def check_sinks(recipe: Recipe, rank: int) -> list[str]:
    """What is to be said of where a recipe logs to: on rank 0, which alone logs. Raises UsageError: no such package."""
    for key, wanted, package in (
        ("log.tensorboard", recipe.log.tensorboard, "tensorboard"),
        ("log.wandb", recipe.log.wandb is not None, "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UsageError(f"{key}: the package {package} is not installed: pip install {package}")
    if recipe.log.wandb is None or rank:
        return []
    _, why = wandb_mode()
    return [f"log.wandb: offline, since {why}; `wandb sync` sends it later"] if why else []


@functools.cache
def wandb_mode() -> tuple[str, str]:
    """(W&B's mode, why it is offline, if it is): what WANDB_MODE says; else online where a key is set and the server
    answers, which is asked once."""
    if said := os.environ.get("WANDB_MODE"):
        return said, ""
    host = os.environ.get("WANDB_BASE_URL", _WANDB_HOST)
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(host):
        return "offline", "no key is set (WANDB_API_KEY)"
    try:
        urllib.request.urlopen(host, timeout=_ANSWER_S).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        return "offline", f"{host} does not answer ({getattr(error, 'reason', None) or error})"
    return "online", ""


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(host).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_tensorboard(output: Path, resumed_at: int) -> LogSink:
    """Steps beyond `resumed_at`, of an earlier process, are no longer shown: they come again."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)

    def write(step: int, values: Values) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def texts(step: int, answers: dict[str, str]) -> None:
        for name, text in answers.items():
            writer.add_text(f"samples/{name}", text, step)

    return LogSink(write, texts, writer.close)


def open_wandb(recipe: Recipe, output: Path, say: Callable[[str], None]) -> LogSink:
    """A run that goes on is the same run there. Offline as `wandb_mode` says, or where W&B refuses, which is said."""
    import wandb
    from omegaconf import OmegaConf

    id_file = output / "wandb.id"
    if not id_file.is_file():
        id_file.write_text(secrets.token_hex(8), encoding="utf-8")
    mode, _ = wandb_mode()

    def begin(mode: str) -> Any:
        return wandb.init(
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            project=recipe.log.wandb,
            # A job names its runs by W&B's own variable.
            name=os.environ.get("WANDB_NAME", output.name),
            dir=str(output),
            config=OmegaConf.to_container(OmegaConf.structured(recipe)),  # type: ignore[arg-type]
            mode=mode,  # type: ignore[arg-type]
        )

    try:
        run = begin(mode)
    except wandb.errors.Error as error:
        if mode != "online":
            raise UsageError(f"log.wandb: {' '.join(str(error).split())}") from None
        say(f"log.wandb: offline, since W&B says {' '.join(str(error).split())}; `wandb sync` sends it later")
        run = begin("offline")

    def write(step: int, values: Values) -> None:
        run.log(values, step=step)

    def texts(step: int, answers: dict[str, str]) -> None:
        table = wandb.Table(columns=["prompt", "answer"], data=[list(row) for row in answers.items()])
        run.log({"samples": table}, step=step)

    return LogSink(write, texts, run.finish)
