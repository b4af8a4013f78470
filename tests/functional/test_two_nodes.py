"""Runs over two nodes of a real Slurm, each in a network namespace of its own: what `launch` writes, by srun and by
torchrun. Needs root. `make slurm` runs all of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from bridge.ranks import RankPool
from bridge.toy import write_toy

from .node_network import Network, NoNetwork
from .slurm_cluster import Cluster
from .slurm_kit import REPOSITORY, Site, running, undisturbed
from .training_kit import losses

ONE_NODE = 1e-6
LAUNCHERS = ("srun", "torchrun")
# TP within a node, PP across: ranks of tensor-parallel groups follow each other.
LAYOUTS: dict[str, tuple[str, list[str]]] = {
    "TP2+SP PP2": ("e2b", ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.pp=2"]),
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
