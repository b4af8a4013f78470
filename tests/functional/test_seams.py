"""Random sequences of disturbed commands: signals, full and read-only disks, files that go missing, second processes.

After each the target is what it was or what it was to become, and whole; no traceback, no hang; and the same command,
undisturbed, ends well and leaves nothing beside it. A short run is part of `make test`; 300 sequences:
`pytest -m slow tests/functional/test_seams.py`, one of them: `-k 10015`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.torch_dist.reader import DistReader
from bridge.toy import write_toy
from tests.functional.adapter_kit import make_adapter
from tests.functional.command_server import Command, CommandServer
from tests.functional.seams_kit import contents, emptied

ROOT = os.getuid() == 0
LIMIT_S = 240.0
STEPS = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
KINDS = ("signal", "signal", "two signals", "full disk", "large file", "read-only", "missing file", "second process")


@dataclass
class Seam:
    """A command: its arguments for a target, files that it cannot do without, and what it makes."""

    name: str
    arguments: Callable[[Path], list[str]]
    needs: list[Path]
    old: Path | None = None
    new: dict[str, bytes] = field(default_factory=dict)
    steps: dict[str, dict[str, bytes]] = field(default_factory=dict)
    seconds: float = 0.0
    nbytes: int = 0


class Place:
    """The folder in which targets are: a small disk of its own, which only commands see, where that can be had."""

    def __init__(self, commands: CommandServer, folder: Path) -> None:
        self.commands, self.given = commands, folder
        folder.mkdir()
        self.mounted = ROOT and self._mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))
        self.folder = Path(f"/proc/{commands.pid}/root{folder}") if self.mounted else folder

    def _mount(self, *arguments: str) -> bool:
        command = ["nsenter", f"--mount=/proc/{self.commands.pid}/ns/mnt", "mount", *arguments]
        return subprocess.run(command, capture_output=True).returncode == 0

    def set(self, options: str) -> bool:
        return self.mounted and self._mount("-o", f"remount,{options}", str(self.given))

    def used(self) -> int:
        return sum(path.lstat().st_blocks * 512 for path in self.folder.rglob("*"))


@dataclass
class World:
    commands: CommandServer
    place: Place
    seams: dict[str, Seam]
    logs: Path

    def start(self, seam: Seam, **limits: Any) -> tuple[Command, Path]:
        log = self.logs / f"{len(list(self.logs.iterdir()))}.log"
        arguments = seam.arguments(self.place.given / "out")
        return self.commands.start(arguments, log, "tests.functional.seams_kit:limit", **limits), log

    def run(self, seam: Seam, **limits: Any) -> tuple[int, str]:
        command, log = self.start(seam, **limits)
        return command.wait(LIMIT_S), log.read_text(errors="replace")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with CommandServer(("unshare", "--mount", "--propagation", "private") if ROOT else ()) as commands:
        yield _world(tmp_path_factory.mktemp("seams"), commands)


def _world(base: Path, commands: CommandServer) -> World:
    hf, other = base / "hf", base / "other"
    write_toy("e2b", hf, text_only=True, dtype="float32", dead_kv=False)
    write_toy("31b", other, text_only=True, dtype="float32")
    import_hf(hf, base / "megatron")
    import_hf(other, base / "other-megatron")
    export_hf(base / "other-megatron", base / "other-hf", max_shard_size=400_000)
    make_adapter(hf, base / "peft", target_modules=["q_proj", "v_proj", "down_proj"])
    (base / "logs").mkdir()
    world = World(commands, Place(commands, base / "place"), _seams(base), base / "logs")
    for seam in world.seams.values():
        started = time.monotonic()
        code, log = world.run(seam)
        seam.seconds = time.monotonic() - started
        assert code == 0, f"{seam.name}: {log}"
        seam.new = made(world, seam) or {}
        seam.steps = steps(world.place.folder / "out")
        assert seam.new and (seam.name != "train" or len(seam.steps) == STEPS)
        seam.nbytes = world.place.used()
        emptied(world.place.folder)
    return world


def _seams(base: Path) -> dict[str, Seam]:
    """The commands, on what `_world` has made."""
    hf = base / "hf"
    (base / "cache").mkdir()
    chats = base / "chats.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": "1 2 3 " * n}]}
        for n in range(1, 17)
    ]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def train(target: Path) -> list[str]:
        said = {
            "model.hf": hf,
            "output": target,
            "export.hf": f"{target}-hf",
            "data.path": chats,
            "data.cache": base / "cache",
            "train.steps": STEPS,
            "train.global_batch_size": 2,
            "train.micro_batch_size": 2,
            "train.seq_length": 64,
            "optimizer.warmup": 1,
            "checkpoint.every": 1,
            "checkpoint.keep": 0,
        }
        return ["train", "sft/smoke", *(f"{key}={value}" for key, value in said.items())]

    shards = ["--max-shard-size", "300KB"]
    weights, distcp = hf / "model.safetensors", max((base / "megatron" / "release").glob("*.distcp"))
    megatron, peft = base / "megatron", base / "peft"
    found = [
        Seam("import", lambda t: ["import", str(hf), str(t), "--overwrite"], [weights, hf / "config.json"]),
        Seam(
            "export",
            lambda t: ["export", str(megatron), str(t), "--overwrite", *shards],
            [distcp, megatron / "release" / ".metadata", megatron / "hf" / "bridge.json"],
        ),
        Seam(
            "merge",
            lambda t: ["adapter", "merge", str(peft), str(t), "--base", str(hf), "--overwrite", *shards],
            [weights, peft / "adapter_model.safetensors", peft / "adapter_config.json"],
        ),
        Seam("save_hf", lambda t: ["save_hf", str(hf), str(t)], [weights, hf / "config.json"]),
        Seam("train", train, [weights, hf / "config.json", chats]),
    ]
    for seam, old in zip(found, ("other-megatron", "other-hf", "other-hf", "other-hf", "other-hf"), strict=True):
        seam.old = base / old
    return {seam.name: seam for seam in found}


def goal(world: World, seam: Seam) -> Path:
    """What is old or new: the target, or a run's model."""
    return world.place.folder / ("out-hf" if seam.name == "train" else "out")


def made(world: World, seam: Seam) -> dict[str, bytes] | None:
    return contents(goal(world, seam))


def steps(run: Path) -> dict[str, dict[str, bytes]]:
    """The weights and moments in every checkpoint of a run that stands under its name."""
    found = {}
    for folder in sorted(run.glob("iter_*")):
        with DistReader(folder, select=lambda key: "_extra_state" not in key and not key.startswith("rng")) as reader:
            found[folder.name] = {}
            for name, tensor in reader.tensors.items():
                out = np.empty(tensor.nbytes, dtype=np.uint8)
                reader.read_rows(name, 0, tensor.shape[0] if tensor.shape else 1, out)
                found[folder.name][name] = out.tobytes()
    return found


def disturb(world: World, seam: Seam, kind: str, dice: random.Random) -> list[tuple[int, str]]:
    """Run the command once, disturbed: exit codes and what was said."""
    exchange, moment = dice.random() < 0.5, dice.uniform(0.0, seam.seconds * 1.1)
    limits: dict[str, Any] = {"exchange": exchange}
    if kind == "large file":
        limits["file_bytes"] = dice.randrange(1000, max(2000, seam.nbytes // 2))
    full = kind == "full disk" and world.place.set(f"size={world.place.used() + dice.randrange(4096, seam.nbytes)}")
    read_only = kind == "read-only" and world.place.set("ro")
    missing = dice.choice(seam.needs) if kind == "missing file" else None
    away = None if missing is None else world.logs.with_name(f"away-{missing.name}")
    running = [world.start(seam, **limits)]
    try:
        if kind == "second process":
            time.sleep(dice.uniform(0, seam.seconds))
            running.append(world.start(seam, **limits))
        if kind != "missing file" or dice.random() < 0.5:
            time.sleep(moment)
        if missing is not None and away is not None:
            missing.rename(away)
        for _ in range({"signal": 1, "two signals": 2}.get(kind, 0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(running[0][0].pid, dice.choice(SIGNALS if seam.name != "train" else (*SIGNALS, signal.SIGUSR1)))
            time.sleep(dice.uniform(0, 0.02))
        return [(command.wait(LIMIT_S), log.read_text(errors="replace")) for command, log in running]
    finally:
        if missing is not None and away is not None:
            away.rename(missing)
        if full or read_only:
            assert world.place.set("rw,size=64m")


def check(world: World, seam: Seam, before: dict[str, bytes] | None, said: list[tuple[int, str]], what: str) -> None:
    """The target is old or new and whole, and what was said is in order."""
    for code, log in said:
        assert code in (0, 1, 75, 130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL, -signal.SIGUSR1), (
            what,
            code,
            log,
        )
        assert "Traceback" not in log and "internal error" not in log, (what, log)
        assert code != 1 or "error: " in log, (what, log)
    killed = any(code == -signal.SIGKILL for code, _ in said)
    now, target = made(world, seam), goal(world, seam)
    if now is None and before is not None:
        # Between two renames, where folders cannot be exchanged: the next run puts it back.
        assert killed, (what, "lost", said)
        now = contents(target.with_name(f".{target.name}.partial") / "old")
    assert now in (before, seam.new), (what, "half", said)
    if seam.name == "train":
        for name, tensors in steps(world.place.folder / "out").items():
            assert tensors == seam.steps[name], (what, name, said)


def sequence(world: World, seed: int, names: list[str]) -> str:
    """One to three disturbed runs, then one that is left alone."""
    dice = random.Random(seed)
    seam = world.seams[dice.choice(names)]
    emptied(world.place.folder)
    if dice.random() < 0.6:
        assert seam.old is not None
        shutil.copytree(seam.old, goal(world, seam))
    story = f"seed {seed}: {seam.name}"
    for _ in range(dice.choice((1, 1, 2, 3))):
        kind = dice.choice(KINDS)
        story += f", {kind}"
        before = made(world, seam)
        said = disturb(world, seam, kind, dice)
        check(world, seam, before, said, story)
        story += f" {[code for code, _ in said]}"
    code, log = world.run(seam)
    assert code == 0, (story, log)
    check(world, seam, seam.new, [(code, log)], story)
    expected = ["out", "out-hf"] if seam.name == "train" else ["out"]
    assert sorted(path.name for path in world.place.folder.iterdir()) == expected, (story, log)
    hidden = [path.name for path in (world.place.folder / "out").glob(".*")]
    assert not hidden, (story, hidden)
    return story


def test_a_few_sequences(world: World) -> None:
    for seed in range(7):
        print(sequence(world, seed, ["import", "export", "merge"]))
    for seed, name in ((1000, "save_hf"), (1001, "train")):
        print(sequence(world, seed, [name]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10_000, 10_300))
def test_three_hundred_sequences(world: World, seed: int) -> None:
    names = ["import", "export", "merge", "import", "export", "merge", "save_hf", "train"]
    print(sequence(world, seed, names), flush=True)
