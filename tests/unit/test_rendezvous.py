"""What a rank makes of its launcher's environment."""

from __future__ import annotations

import socket

import pytest

from recipes.train import rendezvous
from recipes.train.rendezvous import interface_towards, meet

SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "20007"}


def test_sruns_words_become_torchs() -> None:
    env = SRUN | {"SLURM_LAUNCH_NODE_IPADDR": "10.77.0.1", "SLURM_STEP_NUM_NODES": "1"}
    assert meet(env) is None and env["RANK"] == "2" and env["WORLD_SIZE"] == "4" and env["LOCAL_RANK"] == "0"
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.77.0.1", "20007") and "GLOO_SOCKET_IFNAME" not in env


@pytest.mark.parametrize(
    ("found", "given", "message"),
    [
        ("ib0", {}, "4 ranks meet at 10.77.0.1:20007, gloo through ib0 (GLOO_SOCKET_IFNAME names another)"),
        (None, {}, "4 ranks meet at 10.77.0.1:20007; no interface leads there from rank 2: gloo takes its own choice"),
        ("ib0", {"GLOO_SOCKET_IFNAME": "eth7"}, "4 ranks meet at 10.77.0.1:20007, GLOO_SOCKET_IFNAME=eth7"),
    ],
)
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_over_several_nodes_gloo_is_told_where(
    monkeypatch: pytest.MonkeyPatch, launcher: str, found: str | None, given: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(rendezvous, "interface_towards", lambda host: found if host == "10.77.0.1" else "wrong")
    env = SRUN | given | {"SLURM_LAUNCH_NODE_IPADDR": "10.77.0.1", "SLURM_STEP_NUM_NODES": "2"}
    if launcher == "torchrun":
        env = given | {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "20007"}
    said = meet(env)
    assert said is not None and said.startswith(message)
    assert env.get("GLOO_SOCKET_IFNAME") == given.get("GLOO_SOCKET_IFNAME", found)


def test_one_node_and_no_launcher_are_left_alone() -> None:
    one = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for env in ({}, one):
        assert meet(before := dict(env)) is None and before == env


def test_a_loopback_leads_nowhere() -> None:
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("no-such-host.invalid") is None


def test_the_interface_of_an_own_address() -> None:
    """Of every interface that has one, whatever this machine has."""
    for _, name in socket.if_nameindex():
        for address in rendezvous._addresses(name):
            if not (address.is_loopback or address.is_link_local):
                assert interface_towards(str(address)) == name
