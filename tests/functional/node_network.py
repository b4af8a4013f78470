"""Two machines on this one, as far as a network goes: each with interfaces, a host name and a local disk of its own,
joined by a cable that can be cut. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

_NAMESPACES = ("--net", "--uts", "--mount")
_INTERFACE = "fabric0"


class NoNetwork(Exception):
    """Namespaces cannot be made here; why."""


class Network:
    """Namespaces `node1` and `node2` (10.77.0.1 and 10.77.0.2), that live until `close`. Names resolve to nothing.

    `local`: a folder that is empty on each of them, and its own.
    """

    interface = _INTERFACE

    def __init__(self, local: Path) -> None:
        """Raises NoNetwork."""
        missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
        if os.getuid() or missing:
            raise NoNetwork(f"{', '.join(missing)} not found" if missing else "only root may make network namespaces")
        self.addresses = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
        local.mkdir(parents=True)
        self.local = local
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name in self.addresses:
                # It says when it is in its namespaces, and ends when its input does: with this process in any case.
                script = 'hostname "$2" && mount -t tmpfs none "$1" && ip link set lo up && echo ready && exec cat'
                self._holders[name] = subprocess.Popen(
                    ["unshare", *_NAMESPACES, "sh", "-c", script, "sh", str(local), name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            for holder in self._holders.values():
                assert holder.stdout is not None and holder.stderr is not None
                if holder.stdout.readline() != b"ready\n":
                    raise NoNetwork(holder.stderr.read().decode(errors="replace").strip())
            second = self._holders["node2"]
            peer = ("type", "veth", "peer", "name", _INTERFACE, "netns", str(second.pid))
            self._ip("node1", "link", "add", _INTERFACE, *peer)
            for name, address in self.addresses.items():
                self._ip(name, "address", "add", f"{address}/24", "dev", _INTERFACE)
                self.mend(name)
        except BaseException:
            self.close()
            raise

    def at(self, node: str) -> list[str]:
        """What a command starts with that is run there."""
        return ["nsenter", "--target", str(self._holders[node].pid), *_NAMESPACES, "--"]

    def seen_at(self, node: str, path: Path) -> Path:
        """A path of that node, as it is seen from here."""
        return Path(f"/proc/{self._holders[node].pid}/root") / path.relative_to("/")

    def cut(self, node: str) -> None:
        """Pull the cable: who is connected hears nothing."""
        self._ip(node, "link", "set", _INTERFACE, "down")

    def mend(self, node: str) -> None:
        self._ip(node, "link", "set", _INTERFACE, "up")

    def _ip(self, node: str, *arguments: str) -> None:
        done = subprocess.run([*self.at(node), "ip", *arguments], capture_output=True, text=True)
        if done.returncode:
            raise NoNetwork(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

    def close(self) -> None:
        for holder in self._holders.values():
            with contextlib.suppress(OSError):
                holder.communicate(timeout=10)
