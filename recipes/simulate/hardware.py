"""What a cluster can do: a profile in YAML, and what work and collectives take on it, in seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bridge.errors import UsageError
from recipes.keys import meant

if TYPE_CHECKING:
    from recipes.simulate.events import Collective, Work

PROFILES = Path(__file__).parents[1] / "hardware"


@dataclass(frozen=True)
class Efficiency:
    """The part of its peak that each resource reaches."""

    products: float = 0.6
    experts: float = 0.4
    attention: float = 0.15
    attention_backward: float = 0.08
    memory: float = 0.8
    nvlink: float = 0.75
    network: float = 0.8


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in nodes of `gpus_per_node`; bandwidths are of one GPU, one way. `kernel_us`, `link_us`: of a
    kernel and of a collective at least. `uncertainty`: 0.2 says that a step may take 1.2 times as long, or as short.
    """

    name: str
    memory_gb: float
    peak_tflops: float
    memory_tb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    gpus_per_node: int = 8
    kernel_us: float = 4.0
    link_us: float = 20.0
    efficiency: Efficiency = field(default_factory=Efficiency)
    dollars_per_gpu_hour: float = 0.0
    uncertainty: float = 0.25

    @property
    def bytes(self) -> int:
        return round(self.memory_gb * 1e9)

    def rate(self, kind: str) -> float:
        """FLOP/s of products, experts, attention, attention_backward; bytes/s of memory."""
        peak = self.memory_tb_s if kind == "memory" else self.peak_tflops
        return float(getattr(self.efficiency, kind)) * peak * 1e12

    def link(self, ranks: tuple[int, ...]) -> float:
        """Bytes/s of each rank of a group, one way: of NVLink, or of the network, which the GPUs of a node share."""
        inside = self.nvlink_gb_s * self.efficiency.nvlink * 1e9
        nodes = Counter(rank // self.gpus_per_node for rank in ranks)
        if len(nodes) == 1:
            return inside
        return min(inside, self.network_gb_s * self.efficiency.network * 1e9 * min(nodes.values()))

    def work_seconds(self, work: Work) -> dict[str, float]:
        """By kind. Kernels that are bound by products take as long as these, others as long as their bytes."""
        found = {
            kind: getattr(work, kind) / self.rate(kind)
            for kind in ("products", "experts", "attention", "attention_backward")
            if getattr(work, kind)
        }
        found["memory"] = work.moved / self.rate("memory")
        found["kernels"] = max(0.0, work.kernels * self.kernel_us * 1e-6 - sum(found.values()))
        return found

    def collective_seconds(self, collective: Collective, rank: int) -> float:
        """Of `rank`. A ring over the group: what each sends of the `size` of the larger buffer, by the slowest link."""
        n = len(collective.group.ranks)
        if n == 1:
            return 0.0
        if collective.kind in ("send", "recv"):
            assert collective.peer is not None
            return self.link_us * 1e-6 + collective.size / self.point_to_point(rank, collective.peer)
        share = (2 if collective.kind == "all_reduce" else 1) * (n - 1) / n
        if collective.kind == "all_to_all":
            return self.link_us * 1e-6 + collective.size * self.all_to_all_share(collective.group.ranks)
        return self.link_us * 1e-6 + share * collective.size / self.link(collective.group.ranks)

    def point_to_point(self, rank: int, other: int) -> float:
        """Bytes/s between two ranks."""
        one_node = rank // self.gpus_per_node == other // self.gpus_per_node
        nvlink, network = self.nvlink_gb_s * self.efficiency.nvlink, self.network_gb_s * self.efficiency.network
        return (nvlink if one_node else network) * 1e9

    def all_to_all_share(self, ranks: tuple[int, ...]) -> float:
        """Seconds for every byte that a rank has for all: what stays in its node by NVLink, the rest by the network."""
        n, nodes = len(ranks), Counter(rank // self.gpus_per_node for rank in ranks)
        inside = min(nodes.values())
        seconds = (inside - 1) / n / (self.nvlink_gb_s * self.efficiency.nvlink * 1e9)
        return seconds + (n - inside) / n / (self.network_gb_s * self.efficiency.network * 1e9)


def load_hardware(name: str) -> Hardware:
    """A profile by its name under recipes/hardware, or a YAML file. Raises UsageError."""
    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    path = PROFILES / f"{name.lower()}.yaml" if name.lower() in known else Path(name)
    if not path.is_file():
        raise UsageError(f"hardware {name}: neither a file nor one of {', '.join(known)}")
    try:
        said = OmegaConf.to_container(OmegaConf.load(path))
    except OmegaConfBaseException as error:
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(said, dict):
        raise UsageError(f"{path}: is no list of keys with their values")
    said["efficiency"] = Efficiency(**_numbers(path, Efficiency, said.get("efficiency") or {}, "efficiency."))
    for key, value in vars(said["efficiency"]).items():
        if value > 1:
            raise UsageError(f"{path}: efficiency.{key}={value}: is a part of the peak, at most 1")
    hardware: Hardware = Hardware(**_numbers(path, Hardware, said, ""))
    if not 0 <= hardware.uncertainty < 1:
        raise UsageError(f"{path}: uncertainty={hardware.uncertainty}: is at least 0 and below 1")
    return hardware


def nearest_hardware(budget: int) -> Hardware:
    """The profile of a GPU with about so many bytes."""
    known = [load_hardware(path.stem) for path in sorted(PROFILES.glob("*.yaml"))]
    return min(known, key=lambda one: abs(one.bytes - budget))


def _numbers(path: Path, kind: Any, said: dict[Any, Any], prefix: str) -> dict[str, Any]:
    """Keys that there are, with values of their kind."""
    known = [each.name for each in fields(kind)]
    for key, value in said.items():
        if key not in known:
            raise UsageError(f"{path}: {prefix}{key}: there is no such key{meant(str(key), known)}")
        free = key in ("name", "efficiency")
        low = 0 if key in ("dollars_per_gpu_hour", "uncertainty", "kernel_us", "link_us") else 1e-9
        if not free and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= low):
            raise UsageError(f"{path}: {prefix}{key}={value}: must be a number above 0")
    for key in () if prefix else ("name", "memory_gb", "peak_tflops", "memory_tb_s", "nvlink_gb_s", "network_gb_s"):
        if key not in said:
            raise UsageError(f"{path}: {key} is missing")
    return {str(key): value for key, value in said.items()}
