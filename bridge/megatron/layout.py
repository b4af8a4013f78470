"""Which layouts a geometry allows, and where its pipeline stages are cut. Needs neither torch nor Megatron."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bridge.errors import ParallelError
from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel
from bridge.token_ids import embedding_tables

# Sizes below are offered in the place of one that does not fit.
_LARGEST_OFFERED = 64


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """Split layers over stages as evenly as they go; the first stages, which do less beside, take the odd ones."""
    if num_stages > num_layers:
        raise ParallelError(
            f"{num_stages} pipeline stages (pp * vpp) for {num_layers} layers; use at most {num_layers}"
        )
    stages, start = [], 0
    for stage in range(num_stages):
        count = num_layers // num_stages + (stage < num_layers % num_stages)
        stages.append(range(start, start + count))
        start += count
    return stages


def layout_string(stages: list[range]) -> str:
    """Megatron's `pipeline_model_parallel_layout`: E embedding, t decoder layer, L loss, | between stages."""
    return "E" + "|".join("t" * len(stage) for stage in stages) + "L"


def drafter_layout(parallel: Parallel) -> Parallel:
    """The layout of a drafter beside a target of `parallel`: whole on the last stage."""
    return replace(parallel, pp=1, vpp=1, ep=1, etp=1)


def check_layout(geometry: Geometry, parallel: Parallel) -> None:
    """Refuse a layout that the geometry does not allow. Raises ParallelError naming the sizes, and those that fit."""
    stage_layers(geometry.num_layers, parallel.pp * parallel.vpp)
    for size, reason in _misfits(geometry, parallel):
        others = (replace(parallel, **{size: n}, sequence_parallel=False) for n in range(1, _LARGEST_OFFERED + 1))
        fit = [str(getattr(other, size)) for other in others if size not in dict(_misfits(geometry, other))]
        raise ParallelError(f"{reason}; {size}={', '.join(fit)} would fit")
    if geometry.moe is not None and parallel.tp > 1 and not parallel.sequence_parallel:
        raise ParallelError(
            f"tp={parallel.tp} with experts needs sequence_parallel: Megatron's dispatchers split the sequence"
        )


def _misfits(geometry: Geometry, parallel: Parallel) -> Iterator[tuple[str, str]]:
    """Sizes (fields of `Parallel`) that this model does not divide by, and why not."""
    tp, ep, etp = parallel.tp, parallel.ep, parallel.etp
    for table in embedding_tables(geometry):
        if table.rows <= (tp - 1) * -(-table.rows // tp):
            yield "tp", f"tp={tp}: the {table.rows} rows of {table.name} leave the last rank none"
    for what, size in _split_by_tp(geometry):
        if size % tp:
            yield "tp", f"tp={tp} does not divide {what} ({size})"
    for layer in geometry.layers:
        if tp > layer.num_query_groups and tp % layer.num_query_groups:
            yield (
                "tp",
                f"tp={tp} is neither a divisor nor a multiple of the {layer.num_query_groups} query groups of layer "
                f"{layer.index}",
            )
    moe = geometry.moe
    if moe is None:
        for name, value in (("ep", ep), ("etp", etp)):
            if value > 1:
                yield name, f"{name}={value}: this model has no experts"
        return
    if moe.num_experts % ep:
        yield "ep", f"ep={ep} does not divide {moe.num_experts} experts"
    if moe.ffn_hidden_size % etp:
        yield "etp", f"etp={etp} does not divide the experts' width {moe.ffn_hidden_size}"


def _split_by_tp(geometry: Geometry) -> Sequence[tuple[str, int]]:
    sizes = [("the attention heads", geometry.layers[0].num_attention_heads)]
    sizes += [(f"the FFN of layer {layer.index}", layer.ffn_hidden_size) for layer in geometry.layers]
    return sizes
