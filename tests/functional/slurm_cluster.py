"""A Slurm on this machine, for tests: its own key, sockets, ports and folders, and nothing left behind.

Of one node, or of the two of a `Network`, with a slurmd in each.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from .node_network import Network

DAEMONS = ("munged", "slurmctld", "slurmd")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
_SBIN = "/usr/sbin:/sbin"
# Seconds until a node that does not answer is down.
_TIMEOUT = 3600

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until the credentials of its last start have expired: 120 s, or the least that Slurm takes.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
# A node that a test takes down stays down until it is resumed.
ReturnToService=1
KillWait=15
SlurmdTimeout={timeout}
MinJobAge=3600
{nodes}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class NoSlurm(Exception):
    """Slurm can neither be found nor installed, or does not start here; why."""


class Cluster:
    """A running Slurm; `env` is the environment by which its commands find it. A context manager."""

    def __init__(self, folder: Path, network: Network | None = None) -> None:
        """Start it in `folder`. Raises NoSlurm."""
        _find_or_install()
        self.folder, self._network = folder, network
        self.addresses = {socket.gethostname().split(".")[0]: "127.0.0.1"} if network is None else network.addresses
        self.first = next(iter(self.addresses))
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{_SBIN}"}
        for name in list(self.env):
            if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF":
                del self.env[name]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", *(f"spool-{host}" for host in self.addresses)):
            (folder / name).mkdir()
        folder.chmod(0o755)
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge.key").chmod(0o400)
        self._ports = _free_ports(2)
        self._configure(_TIMEOUT)
        try:
            names = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "seed"}
            options = [f"--{option}={folder / name}" for option, name in names.items()]
            self._start(self.first, "munged", "--foreground", "--force", *options)
            self.wait(lambda: (folder / "munge.sock").exists(), "munged", 20)
            self._start(self.first, "slurmctld", "-D", "-c")
            for host in self.addresses:
                self._start(host, "slurmd", "-D")
            self.wait(lambda: all(state == "idle" for state in self.nodes().values()), "the nodes", 60)
        except BaseException:
            self.stop()
            raise

    def _configure(self, timeout: int) -> None:
        each = 4 // len(self.addresses)
        nodes = [f"NodeName={host} NodeAddr={at} CPUs={each} RealMemory=1000" for host, at in self.addresses.items()]
        text = _CONFIG.format(
            host=self.first,
            address=self.addresses[self.first],
            user=pwd.getpwuid(os.getuid()).pw_name,
            folder=self.folder,
            ctld_port=self._ports[0],
            slurmd_port=self._ports[1],
            timeout=timeout,
            nodes="\n".join(f"{node} State=UNKNOWN" for node in nodes),
        )
        (self.folder / "slurm.conf").write_text(text)

    def nodes(self) -> dict[str, str]:
        """The state of each, as sinfo has it; `*` behind it where it does not answer."""
        said = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).split()
        return dict(zip(said[::2], said[1::2], strict=True)) or {"none": "unknown"}

    def miss_within(self, seconds: int | None) -> None:
        """How soon a node that does not answer counts as down; None: later than any load makes it. The setting counts
        for the controller only."""
        self._configure(seconds or _TIMEOUT)
        self.run("scontrol", "reconfigure")

    def at(self, host: str) -> list[str]:
        """What a command starts with that is run on a node."""
        return [] if self._network is None else self._network.at(host)

    def _start(self, host: str, daemon: str, *arguments: str) -> None:
        name = f"{daemon}-{host}"
        with (self.folder / f"{name}.out").open("wb") as out:
            command = [*self.at(host), daemon, *arguments]
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/"
            )

    def wait(self, condition: Callable[[], object], what: str, seconds: float) -> None:
        """Until `condition` holds. Raises NoSlurm where a daemon has ended, TimeoutError."""
        end = time.monotonic() + seconds
        while not condition():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    said = (self.folder / f"{name}.out").read_text(errors="replace").strip().splitlines()
                    raise NoSlurm(f"{name} ended with {daemon.returncode}: {said[-1] if said else 'silently'}")
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: not after {seconds} s")
            time.sleep(0.1)

    def run(self, *command: str, check: bool = True) -> str:
        """A Slurm command's output."""
        command = (*self.at(self.first), *command)
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=check, timeout=60).stdout

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, by its own names."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: int) -> str:
        return self.job(number)["JobState"]

    def processes(self) -> list[int]:
        """Every process but the daemons that lives in this cluster: steps, job scripts, ranks."""
        wanted, found = f"SLURM_CONF={self.env['SLURM_CONF']}".encode(), []
        own = {daemon.pid for daemon in self._daemons.values()}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if int(entry.name) in own or (entry / "status").read_text().find("State:\tZ") >= 0:
                    continue
                if (entry / "comm").read_text().strip() in (*DAEMONS, "slurmscriptd"):
                    continue
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return sorted(found)

    def rank(self, number: int) -> int:
        """The process of a rank: of those with its number, the one that Slurm itself started."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                parent = (Path(f"/proc/{pid}/stat").read_text()).rpartition(")")[2].split()[1]
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                started_by = Path(f"/proc/{parent}/comm").read_text().strip()
                if f"SLURM_PROCID={number}".encode() in environment and started_by == "slurmstepd":
                    return pid
        raise ProcessLookupError(f"no rank {number}")

    def stop(self) -> None:
        """End jobs, daemons, and whatever is left of them."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.run("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name, check=False)
            self.run("scancel", "--signal=KILL", "--full", "--user", pwd.getpwuid(os.getuid()).pw_name, check=False)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in reversed(self._daemons.values()):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _find_or_install() -> None:
    os.environ["PATH"] = f"{os.environ['PATH']}:{_SBIN}" if _SBIN not in os.environ["PATH"] else os.environ["PATH"]
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if not missing:
        return
    if os.getuid() or shutil.which("apt-get") is None:
        raise NoSlurm(f"{', '.join(missing)} not found; on Debian: apt-get install {' '.join(PACKAGES)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-q", *command], env=environment, capture_output=True, text=True)
        if done.returncode and command[0] == "install":
            raise NoSlurm(f"{', '.join(missing)} cannot be installed: {' '.join(done.stderr.split()[-30:])}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
