"""Where ranks meet: who they are by srun's account, the first one's address and port, and the interface towards it."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_GLOO = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


def meet(env: MutableMapping[str, str] = os.environ) -> str | None:
    """Complete what a launcher has set; what it found out, for a run over several nodes, as a line.

    srun says rank, size and the first node's address in its own words; torchrun in those that torch.distributed reads.
    Gloo takes the address of the node's own name, which on many a cluster is a loopback's, or none: unless
    GLOO_SOCKET_IFNAME is set, it gets the interface through which this node reaches the first rank. NCCL finds its
    interfaces itself, of which it may want several.
    """
    if "RANK" not in env and "SLURM_STEP_NUM_TASKS" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        env.setdefault("MASTER_PORT", port_of(env))
    if not _several_nodes(env):
        return None
    where = f"{env['WORLD_SIZE']} ranks meet at {env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    if _GLOO in env:
        return f"{where}, {_GLOO}={env[_GLOO]}"
    found = interface_towards(env["MASTER_ADDR"])
    if found is None:
        return f"{where}; no interface leads there from rank {env['RANK']}: gloo takes its own choice, or {_GLOO}"
    env[_GLOO] = found
    return f"{where}, gloo through {found} ({_GLOO} names another)"


def port_of(env: Mapping[str, str]) -> str:
    """The same on every node of a job, another for every job."""
    return str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)


def interface_towards(host: str) -> str | None:
    """The interface whose address this machine has for `host`, which may be its own; None where it has none but a
    loopback's, or cannot tell."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing: the kernel looks its routes up
            address = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError:
        return None
    if address.is_loopback:
        return None
    names = (name for _, name in socket.if_nameindex())
    return next((name for name in names if address in _addresses(name)), None)


def _several_nodes(env: MutableMapping[str, str]) -> bool:
    if "LOCAL_WORLD_SIZE" in env:  # torchrun's
        return env["LOCAL_WORLD_SIZE"] != env.get("WORLD_SIZE")
    return "RANK" in env and int(env.get("SLURM_STEP_NUM_NODES", "1")) > 1


def _addresses(interface: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Its first IPv4 address, and every IPv6 address, as Linux tells them."""
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
            found.append(ipaddress.IPv4Address(answer[20:24]))
        except OSError:
            pass
    try:
        lines = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    except OSError:
        lines = []
    return [*found, *(ipaddress.IPv6Address(bytes.fromhex(line[0])) for line in lines if line[5] == interface)]
