"""What weights can be rounded to in training (`fake_quant.py`), which ones are, and in which layouts. Without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge.errors import UsageError
from bridge.mapping import table_for

if TYPE_CHECKING:
    from bridge.geometry import Geometry
    from bridge.megatron.parallel import Parallel

# `layer_options.LOCAL`, which lies above.
_LOCAL = "local"
# What the weights of the decoder's linears may be rounded to in training (`fake_quant.py`) -> how many columns share a
# scale, None for whole rows.
FAKE_QUANT: dict[str, int | None] = {"none": None, "q4_0": 32, "int4-g32": 32, "fp8": None}


def check_fake_quant(geometry: Geometry, parallel: Parallel, name: str, layer_spec: str, fp8_experts: bool) -> None:
    """Whether weights can be rounded so in this layout: every rank has whole blocks. Raises UsageError."""
    if name not in FAKE_QUANT:
        raise UsageError(f"fake_quant={name}: is one of {', '.join(FAKE_QUANT)}")
    if name == "none":
        return
    if layer_spec != _LOCAL:
        raise UsageError(
            f"fake_quant={name} needs layer_spec={_LOCAL}: {layer_spec}'s linears round weights themselves"
        )
    if fp8_experts:
        raise UsageError(f"fake_quant={name}: fp8_experts=true rounds the experts' weights itself; choose one of them")
    ways, width = {"tp": parallel.tp, "etp": parallel.etp}, FAKE_QUANT[name]
    for key, columns, group in fake_quantized(geometry, name):
        if width is not None and group in ways and columns % (width * ways[group]):
            raise UsageError(
                f"fake_quant={name}: {group}={ways[group]} gives each rank {columns / ways[group]:g} of the {columns} "
                f"columns of {key}, no multiple of {width}, which share a scale"
            )


def fake_quantized(geometry: Geometry, name: str) -> list[tuple[str, int, str | None]]:
    """The weights that are rounded: key, columns, and the parallel group that divides these. As the export chooses."""
    width = FAKE_QUANT[name] or 1
    linears = [entry for entry in table_for(geometry).entries.values() if entry.is_layer_linear and name != "none"]
    return [(e.key, e.shape[-1], e.row.shard[-1]) for e in linears if e.shape[-1] % width == 0]
