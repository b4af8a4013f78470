"""Runs over two nodes of a real Slurm, each in a network namespace of its own: what `launch` writes, by srun and by
torchrun. Needs root. `make slurm` runs all of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.ranks import RankPool
from bridge.toy import write_toy
from recipes.train.checkpoint import checkpoints

from .node_network import Network, NoNetwork
from .slurm_cluster import Cluster
from .slurm_kit import EVERY, REPOSITORY, Site, running, undisturbed
from .training_kit import losses

ONE_NODE = 1e-6
LAUNCHERS = ("srun", "torchrun")
# TP within a node, the others across: ranks of tensor-parallel groups follow each other.
LAYOUTS: dict[str, tuple[str, list[str]]] = {
    "TP2+SP PP2": ("e2b", ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.pp=2"]),
    "EP2 DP2": ("26b-a4b", ["parallel.ep=2", "train.micro_batch_size=1"]),
    "TP2+SP ETP2 EP2": (
        "26b-a4b",
        ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.etp=2", "parallel.ep=2"],
    ),
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    try:
        network = Network(tmp_path_factory.mktemp("network") / "local")
    except NoNetwork as error:
        pytest.skip(f"no two nodes here: {error}")
    yield network
    network.close()


@pytest.fixture(scope="module")
def cluster(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm"), network) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(cluster, tmp_path_factory.mktemp("site"))


def test_ranks_of_two_nodes_find_each_other(cluster: Cluster) -> None:
    """Address, port and interface, where names of nodes resolve to nothing."""
    program = (sys.executable, "-m", "tests.functional.two_nodes_kit")
    options = ("--nodes=2", "--ntasks-per-node=2", f"--export=ALL,PYTHONPATH={REPOSITORY}", f"--chdir={REPOSITORY}")
    everyone = json.loads(cluster.run("srun", *options, *program))
    assert [(one["host"], one["RANK"], one["LOCAL_RANK"]) for one in everyone] == [
        ("node1", "0", "0"),
        ("node1", "1", "1"),
        ("node2", "2", "0"),
        ("node2", "3", "1"),
    ]
    assert {one["MASTER_ADDR"] for one in everyone} == {"10.77.0.1"}
    assert {one["GLOO_SOCKET_IFNAME"] for one in everyone} == {Network.interface}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_over_two_nodes_train_as_on_one(site: Site, ranks: RankPool, name: str, launcher: str) -> None:
    variant, layout = LAYOUTS[name]
    toy = site.folder / variant
    if not toy.exists():
        write_toy(variant, toy, dtype="float32")
    given = [f"model.hf={toy}", "train.steps=6", "checkpoint.every=0", "export.hf=null", *layout]
    one = site.folder / f"one-{name.replace(' ', '-')}"
    if not one.exists():
        ranks.run(undisturbed, [*site.recipe(one), *given], world_size=4)
    job = site.submit(site.folder / f"{launcher}-{one.name}", "--launcher", launcher, *given)
    job.ends("COMPLETED")
    assert f"4 ranks meet at 10.77.0.1:{20000 + job.number}, gloo through {Network.interface}" in job.text()
    ours, theirs = losses(job.output), losses(one)
    assert len(ours) == len(theirs) == 6
    assert max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)) <= ONE_NODE


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_node_that_vanishes_and_one_signal(
    site: Site, cluster: Cluster, network: Network, ranks: RankPool, launcher: str
) -> None:
    """Its network is cut: the job goes back into the queue, and on from the last checkpoint when the node is there
    again; then it is told to stop as before a time limit, and goes on once more. To the bytes of a run of one node that
    nothing disturbed. Every node has prepared the data once, on its own disk."""
    layout = [*LAYOUTS["TP2+SP PP2"][1], "train.steps=60", "checkpoint.keep=0"]
    whole, local = site.folder / "whole", network.local / launcher
    if not whole.exists():
        ranks.run(undisturbed, [*site.recipe(whole), *layout], world_size=4)
    cached = [
        f"data.cache={local}/cache",
        "data.function=tests.functional.two_nodes_kit:noted",
        "checkpoint.async=true",
    ]
    noted = ["--export", f"NOTED_IN={local}.txt", "--launcher", launcher]
    job = site.submit(site.folder / f"cut-{launcher}", *noted, *layout, *cached)
    job.trains(EVERY + 1)
    job.wait(lambda: checkpoints(job.output) or job.over, "a checkpoint")
    network.cut("node2")
    cluster.miss_within(30)
    job.wait(lambda: job.state == "PENDING", "the requeue by Slurm")
    assert EVERY <= max(checkpoints(job.output)) < 60
    network.mend("node2")
    job.wait(lambda: cluster.nodes()["node2"].rstrip("*") == cluster.nodes()["node2"] != "down", "the node's return")
    cluster.miss_within(None)
    job.wait(lambda: ": start 2 on " in job.text(), "the second start")
    stopped_at = job.step
    job.wait(lambda: job.step > stopped_at or job.over, "a step after the restart")
    cluster.run("scancel", "--signal=USR1", str(job.number))
    job.wait(lambda: "goes back into the queue" in job.text(), "the requeue after a signal")
    facts = job.ends("COMPLETED")
    assert facts["Restarts"] == "2" and ": start 3 on node[1-2]" in job.text()
    assert losses(job.output) == losses(whole) and len(losses(whole)) == 60
    for file in ("model.safetensors", "config.json"):
        assert (Path(f"{job.output}-hf") / file).read_bytes() == (Path(f"{whole}-hf") / file).read_bytes()
    for node in cluster.addresses:
        lines = network.seen_at(node, Path(f"{local}.txt")).read_text().splitlines()
        assert len(lines) == len(set(lines)) == 64 and {line.split()[0] for line in lines} == {node}
        assert len([path for path in network.seen_at(node, local / "cache").iterdir() if path.name[0] != "."]) == 1
