"""Which layouts a geometry allows, and where its pipeline stages are cut. Needs neither torch nor Megatron."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.errors import ParallelError
from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel
from bridge.token_ids import embedding_tables


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


def check_layout(geometry: Geometry, parallel: Parallel) -> None:
    """Refuse a layout that the geometry does not allow. Raises ParallelError naming the sizes."""
    tp = parallel.tp
    for table in embedding_tables(geometry):
        if table.rows <= (tp - 1) * -(-table.rows // tp):
            raise ParallelError(f"tp={tp}: the {table.rows} rows of {table.name} leave the last rank none")
    for what, size in _split_by_tp(geometry):
        if size % tp:
            raise ParallelError(f"tp={tp} does not divide {what} ({size})")
    for layer in geometry.layers:
        if tp > layer.num_query_groups and tp % layer.num_query_groups:
            raise ParallelError(
                f"tp={tp} is neither a divisor nor a multiple of the {layer.num_query_groups} query groups of layer "
                f"{layer.index}"
            )
    stage_layers(geometry.num_layers, parallel.pp * parallel.vpp)
    if geometry.moe is None:
        if parallel.ep > 1:
            raise ParallelError(f"ep={parallel.ep}: this model has no experts")
        return
    if geometry.moe.num_experts % parallel.ep:
        raise ParallelError(f"ep={parallel.ep} does not divide {geometry.moe.num_experts} experts")
    if geometry.moe.ffn_hidden_size % parallel.etp:
        raise ParallelError(f"etp={parallel.etp} does not divide the experts' width {geometry.moe.ffn_hidden_size}")
    if tp > 1 and not parallel.sequence_parallel:
        raise ParallelError(f"tp={tp} with experts needs sequence_parallel: Megatron's dispatchers split the sequence")


def _split_by_tp(geometry: Geometry) -> Sequence[tuple[str, int]]:
    sizes = [("the attention heads", geometry.layers[0].num_attention_heads)]
    sizes += [(f"the FFN of layer {layer.index}", layer.ffn_hidden_size) for layer in geometry.layers]
    return sizes
