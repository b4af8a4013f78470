"""What a run says while it goes on."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.errors import UsageError
from bridge.generate.rows import Completion
from recipes.config import Recipe, resolve
from recipes.train.log import LOG_FILE, Log, remaining
from recipes.train.meter import Meter
from recipes.train.samples import acceptance_values
from recipes.train.sinks import LogSink, check_sinks, wandb_mode


def test_the_rest_of_a_run_takes_as_long_a_step_as_what_was() -> None:
    assert remaining(30.0, done=10, left=1200) == "1:00:00"
    assert remaining(0.4, done=4, left=0) == "0:00:00"
    assert remaining(86_400.0, done=100, left=150) == "1 day, 12:00:00"


def test_who_watches_sees_when_a_resumed_run_will_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of steps of this process alone; the file has only what was measured."""
    log = Log(resolve({"output": str(tmp_path), "model": {"hf": "toy"}, "train": {"steps": 30}}), resumed_at=20)
    log._start -= 7200.0
    log.write(22, {"loss": 1.5})
    log.write(22, {"eval_loss": 1.25})
    log.close()
    trained, evaluated = capsys.readouterr().err.splitlines()
    assert trained.startswith("step 22/30  loss 1.5  eta 8:00:0") and evaluated == "step 22/30  eval_loss 1.25"
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert lines == [{"step": 22, "loss": 1.5}, {"step": 22, "eval_loss": 1.25}]


def test_the_acceptance_of_a_drafter_is_in_every_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file, the terminal, and what W&B and TensorBoard are told: mean length, and the rate at each place."""
    log, told = Log(logged(tmp_path), resumed_at=0), list[tuple[int, dict[str, float]]]()
    log._sinks.append(LogSink(lambda step, values: told.append((step, values)), lambda step, texts: None, lambda: None))
    rounds = ((3, 3), (3, 1), (1, 0))
    log.write(6, acceptance_values([Completion(0, 0, (5,), (6, 7), (-1.0, -1.0), "length", rounds=rounds)]))
    log.close()
    values = {"eval_mean_accepted_length": 4 / 3, "eval_acceptance/1": 2 / 3, "eval_acceptance/2": 0.5}
    values["eval_acceptance/3"] = 0.5
    assert told == [(6, values)]
    assert json.loads((tmp_path / LOG_FILE).read_text()) == {"step": 6} | values
    shown = "step 6/30  eval_mean_accepted_length 1.33333  eval_acceptance/1 0.666667  eval_acceptance/2 0.5"
    assert shown in capsys.readouterr().err


def test_time_that_is_no_training_does_not_count() -> None:
    """34 tokens/s were said for 200 on the step behind an evaluation."""
    meter = Meter(1e12, devices=1)
    meter._start -= 2.0
    meter.add(200, 250, 1e12)
    with meter.paused():
        time.sleep(0.5)
    values = meter.read()
    assert values["tokens_per_s"] == pytest.approx(100, rel=0.1) and values["mfu"] == pytest.approx(0.5, rel=0.1)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A key is set, and nobody answers where the server should be."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb_mode.cache_clear()
    yield monkeypatch
    wandb_mode.cache_clear()


def logged(tmp_path: Path, *keys: str) -> Recipe:
    return resolve({"output": str(tmp_path), "model": {"hf": "toy"}, "train": {"steps": 30}}, keys)


def test_wandb_without_network_is_offline_and_says_so_at_the_start(wandb: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = logged(tmp_path, "log.wandb=gemma")
    (note,) = check_sinks(recipe, rank=0)
    assert note.startswith("log.wandb: offline, since http://127.0.0.1:9 does not answer ([Errno ")
    assert check_sinks(recipe, rank=1) == [] and check_sinks(logged(tmp_path), rank=0) == []
    log = Log(recipe, resumed_at=0)
    log.write(1, {"loss": 1.5})
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*")), "what was logged is kept"


def test_wandb_without_a_key_and_as_it_is_told(wandb: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb.delenv("WANDB_API_KEY")
    assert wandb_mode() == ("offline", "no key is set (WANDB_API_KEY)")
    wandb_mode.cache_clear()
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password key\n")
    (tmp_path / "netrc").chmod(0o600)
    assert "does not answer" in wandb_mode()[1]
    wandb_mode.cache_clear()
    wandb.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == ("disabled", "")


@pytest.mark.parametrize("key", ["log.tensorboard=true", "log.wandb=gemma"])
def test_a_missing_package_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"{key.partition('=')[0]}: the package \w+ is not installed"):
        check_sinks(logged(tmp_path, key), rank=0)


def test_steps_that_come_again_are_purged_from_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = logged(tmp_path, "log.tensorboard=true")
    for resumed_at, steps in ((0, range(1, 6)), (2, range(3, 5))):
        log = Log(recipe, resumed_at)
        for step in steps:
            log.write(step, {"loss": float(step + resumed_at)})
        log.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]
