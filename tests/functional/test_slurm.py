"""The real scripts on a real Slurm of one node: `launch --submit` of the toy recipe over two ranks, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.ranks import RankPool
from recipes.train.checkpoint import checkpoints

from .slurm_cluster import Cluster
from .slurm_kit import EVERY, REPOSITORY, STEPS, Site, Submitted, running, undisturbed
from .training_kit import losses


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(cluster, tmp_path_factory.mktemp("site"))


def test_a_job_that_is_interrupted_twice_goes_on_exactly(site: Site, cluster: Cluster, ranks: RankPool) -> None:
    """Told to stop as the queue does before a time limit or a preemption; then the node fails; then it is done."""
    whole = site.folder / "whole"
    ranks.run(undisturbed, site.recipe(whole), world_size=2)
    job = site.submit(site.folder / "job")
    assert job.log == job.output / "slurm" / f"sft-smoke-{job.number}.log"
    # After a checkpoint, so that whatever its writer started is signalled as well.
    job.trains(EVERY + 1)
    cluster.run("scancel", "--signal=USR1", str(job.number))
    job.wait(lambda: "goes back into the queue" in job.text(), "the requeue")
    stopped = max(checkpoints(job.output))
    assert EVERY < stopped < STEPS
    job.wait(lambda: job.step > stopped or job.over, "a step after the first restart")
    host = cluster.job(job.number)["NodeList"]
    cluster.run("scontrol", "update", f"nodename={host}", "state=down", "reason=test")
    job.wait(lambda: job.state == "PENDING", "the requeue by Slurm")
    cluster.run("scontrol", "update", f"nodename={host}", "state=resume")
    facts = job.ends("COMPLETED")
    assert facts["ExitCode"] == "0:0" and facts["Restarts"] == "2" and facts["JobName"] == "sft-smoke"
    text = job.text()
    assert f"resuming after step {stopped}" in text and ": start 3 on " in text and text.rstrip().endswith(": done")
    assert f"0: step {STEPS}/{STEPS}  loss " in text
    assert list(checkpoints(job.output))[-1] == STEPS and len(checkpoints(job.output)) == 2
    ours = losses(job.output)
    assert ours == losses(whole) and len(ours) == STEPS and ours[-1] < 0.5 * ours[0]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (Path(f"{job.output}-hf") / name).read_bytes() == (Path(f"{whole}-hf") / name).read_bytes()


def test_a_rank_that_is_killed_ends_the_job_for_good(site: Site, cluster: Cluster) -> None:
    job = site.submit(site.folder / "killed", f"checkpoint.every={EVERY // 2}")
    job.trains(EVERY // 2 + 1)
    os.kill(cluster.rank(1), signal.SIGKILL)
    facts = job.ends("FAILED")
    assert facts["Restarts"] == "0" and facts["ExitCode"] == "137:0"
    said = [line for line in job.text().splitlines() if ": error: a rank failed" in line]
    assert len(said) == 1 and str(job.output) in said[0] and "task 1: Killed" in job.text()
    assert checkpoints(job.output) and not Path(f"{job.output}-hf").exists()


def test_cancelled_it_saves_and_stays_away(site: Site) -> None:
    job = site.submit(site.folder / "cancelled", ranks=1)
    job.trains(EVERY + 1)
    job.cluster.run("scancel", str(job.number))
    facts = job.ends("CANCELLED")
    assert facts["Restarts"] == "0"
    assert max(checkpoints(job.output)) > EVERY and not Path(f"{job.output}-hf").exists()
    assert "goes back" not in job.text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partition", "gpu"], "not submitted: sbatch: error: invalid partition specified: gpu"),
        (["--partition", "cpu", "--time", "soon"], "not submitted: sbatch: error: Invalid --time specification"),
        (["--mem", "900G"], "not submitted: sbatch: error: Memory specification can not be satisfied"),
        (["parallel.tp=3"], "2 ranks are no multiple of tp × cp × pp"),
        (["train.global_batch_size=3"], "train.global_batch_size=3 is not divisible"),
        (["train.setps=3"], "did you mean train.steps?"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_nothing(site: Site, arguments: list[str], message: str) -> None:
    done = site.launch(site.folder / "refused", *arguments)
    assert done.returncode == 1 and not done.stdout
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (site.folder / "refused").exists()


def test_the_conversion_job(site: Site, cluster: Cluster, tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "gemma4-bridge"
    target = tmp_path / "megatron"
    variables = f"HF={site.toy},MEGATRON={target},GEMMA4_BRIDGE={program},PYTHONPATH={REPOSITORY}"
    script = REPOSITORY / "scripts" / "slurm" / "convert.sbatch"
    options = ["--mem=500M", f"--chdir={tmp_path}"]
    number = cluster.run("sbatch", "--parsable", *options, f"--export=ALL,{variables}", str(script)).strip()
    job = Submitted(cluster, int(number), target, tmp_path / f"gemma4-import-{number}.log")
    job.ends("COMPLETED")
    assert "imported" in job.text() and (target / "release").is_dir()


@pytest.mark.slow
def test_a_time_limit_that_hits_mid_run(site: Site) -> None:
    """Slurm counts limits in minutes, and may send its signal a minute before what was asked for."""
    steps = 20_000
    job = site.submit(site.folder / "limit", "--time", "2", "--signal-lead", "60", f"train.steps={steps}")
    job.wait(lambda: "goes back into the queue" in job.text(), "the signal before the limit", 150)
    assert 0 < max(checkpoints(job.output)) < steps
    job.wait(lambda: "resuming after step" in job.text(), "the second start", 90)
    job.cluster.run("scancel", str(job.number))
    job.ends("CANCELLED")
    assert losses(job.output)
