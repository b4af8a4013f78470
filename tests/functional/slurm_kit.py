"""Jobs of a toy on a Slurm of this machine: what `launch --submit` makes of them, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bridge.toy import write_toy

from .node_network import Network
from .slurm_cluster import Cluster, NoSlurm

REPOSITORY = Path(__file__).parents[2]
STEPS, EVERY = 36, 12


@contextmanager
def running(folder: Path, network: Network | None = None) -> Iterator[Cluster]:
    """A Slurm of this machine, or of the nodes of a network, which leaves nothing behind; skips where there is none."""
    try:
        cluster = Cluster(folder, network)
    except NoSlurm as error:
        pytest.skip(f"no Slurm here: {error}")
    with cluster:
        yield cluster
    assert not cluster.processes(), "the cluster left processes behind"


class Site:
    """A toy, its data, and how jobs of it are submitted."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.toy = cluster, folder, folder / "toy"
        write_toy("e2b", self.toy, dtype="float32")
        lines = [json.dumps({"prompt": f"say {i}", "completion": f"{i} and then {i + 1}"}) for i in range(64)]
        (folder / "data.jsonl").write_text("\n".join(lines))

    def recipe(self, output: Path) -> list[str]:
        return [
            *(f"model.hf={self.toy}", f"data.path={self.folder / 'data.jsonl'}", f"output={output}"),
            *(f"train.steps={STEPS}", f"checkpoint.every={EVERY}", f"export.hf={output}-hf"),
        ]

    def launch(self, output: Path, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
        command = [
            *("launch", "sft/smoke", "--submit", "--nodes", str(len(self.cluster.addresses)), "--gpus-per-node", "0"),
            *("--cpus-per-rank", "1"),
            *("--ranks-per-node", str(ranks), "--export", f"PYTHONPATH={REPOSITORY}"),
            *(*self.recipe(output), *arguments),
        ]
        return subprocess.run(
            [*self.cluster.at(self.cluster.first), sys.executable, "-m", "bridge.cli", *command],
            cwd=REPOSITORY,
            env=self.cluster.env,
            capture_output=True,
            text=True,
        )

    def submit(self, output: Path, *arguments: str, ranks: int = 2) -> Submitted:
        done = self.launch(output, *arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr
        said, log = done.stdout.splitlines()
        return Submitted(self.cluster, int(said.split()[1]), output, Path(log.removeprefix("log ")))


class Submitted:
    """A job in the queue."""

    def __init__(self, cluster: Cluster, number: int, output: Path, log: Path) -> None:
        self.cluster, self.number, self.output, self.log = cluster, number, output, log

    @property
    def step(self) -> int:
        """The last step that was logged."""
        path = self.output / "log.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def text(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 600) -> None:
        try:
            self.cluster.wait(condition, what, seconds)
        except TimeoutError:
            pytest.fail(f"{what}: not after {seconds} s; the job is {self.state}, its log:\n{self.text()}")

    def trains(self, step: int) -> None:
        self.wait(lambda: self.step >= step or self.over, f"step {step}")
        assert not self.over, self.text()

    @property
    def state(self) -> str:
        return self.cluster.state(self.number)

    @property
    def over(self) -> bool:
        return self.state not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")

    def ends(self, state: str) -> dict[str, str]:
        self.wait(lambda: self.over, "the end of the job", 900)
        # Slurm calls a job over before it has cleared the node.
        self.wait(lambda: not self.cluster.processes(), "the end of its processes", 300)
        job = self.cluster.job(self.number)
        assert job["JobState"] == state, self.text()
        return job


def undisturbed(arguments: list[str]) -> None:
    """The same recipe on ranks that no queue started."""
    from recipes.config import load_recipe
    from recipes.train.loop import train

    train(load_recipe("sft/smoke", arguments))
