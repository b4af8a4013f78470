"""Seconds of a step from sums alone, in microseconds: which of hundreds of layouts are worth being simulated.

The same profile and the same counts as of a simulation, without its schedule: stages are taken to be alike, collectives
to hide behind nothing, elementwise kernels to take what they took where one was simulated (`_ELEMENTWISE`).
"""

from __future__ import annotations

from collections import defaultdict

from bridge.flops import attention_flops, decoder_flops, head_flops
from bridge.geometry import Geometry, LayerGeometry
from bridge.mapping.table import Table
from bridge.megatron.parallel import Parallel
from recipes.memory.activations import Load
from recipes.memory.estimate import TrainingPlan, adapter_counts
from recipes.memory.parameters import count
from recipes.simulate.hardware import Hardware

Seconds = defaultdict[str, float]

# Bytes that norms, activations, copies and sums of a layer read and write, forward and backward, in hidden states.
_ELEMENTWISE = 220
# Bytes of an update for a trained parameter: its gradient, the float32 copy and two moments there and back, the weight.
_UPDATE = 28


def predicted_parts(table: Table, plan: TrainingPlan, hardware: Hardware) -> dict[str, float]:
    """Seconds of a step by what they go into, the most first."""
    geometry, parallel, load = table.geometry, plan.parallel, plan.load
    found: Seconds = defaultdict(float)
    per_microbatch = _microbatch(geometry, plan, hardware)
    for name, seconds in per_microbatch.items():
        found[name] = seconds * plan.microbatches
    found["bubble"] = sum(per_microbatch.values()) * (parallel.pp - 1) / parallel.vpp
    counts, adapters = (
        count(table, parallel, 0, plan.trains),
        adapter_counts(table, plan, 0) if plan.lora_rank else None,
    )
    dense = counts.dense + (adapters.dense if adapters else 0)
    for trained, group, copies in (
        (dense, _ranks(parallel.tp, plan.world_size // parallel.pp), plan.world_size // (parallel.tp * parallel.pp)),
        (
            counts.experts,
            _ranks(parallel.etp * parallel.ep, plan.world_size // parallel.pp),
            plan.world_size // (parallel.etp * parallel.ep * parallel.pp),
        ),
    ):
        # Gradients in float32 on their way out, weights on their way back.
        found["data parallelism"] += (4 + load.e) * trained * (copies - 1) / copies / hardware.link(group)
        found["memory"] += _UPDATE * trained / copies / hardware.rate("memory")
    return dict(sorted(((name, of) for name, of in found.items() if of), key=lambda each: -each[1]))


def _ranks(stride: int, stop: int) -> tuple[int, ...]:
    return tuple(range(0, stop, stride))


def _microbatch(geometry: Geometry, plan: TrainingPlan, hardware: Hardware) -> Seconds:
    """Of the last stage, which has the head: forward and backward pass of one microbatch."""
    parallel, load, found = plan.parallel, plan.load, Seconds(float)
    full = load.rows * load.length / parallel.cp
    passes = (2 if plan.lora_rank else 3) + _repeated(load, "mlp") * 0.6 + _repeated(load, "all") * 0.4
    experts = 0
    if geometry.moe is not None:
        experts = 2 * geometry.hidden_size * 3 * geometry.moe.topk * geometry.moe.ffn_hidden_size * geometry.num_layers
    share = full * passes / parallel.tp / parallel.pp
    found["products"] = (decoder_flops(geometry) - experts) * share / hardware.rate("products")
    found["products"] += head_flops(geometry) * full * 4 / parallel.tp / hardware.rate("products")
    if experts:
        again = (2 if plan.lora_rank else 3) + _repeated(load, "moe")
        found["experts"] = experts * full * again / parallel.tp / parallel.pp / hardware.rate("experts")
    forward = 1 + _repeated(load, "core_attn")
    for layer in geometry.layers:
        flops = attention_flops(layer) * _pairs(layer, load) * load.rows / parallel.cp / parallel.tp / parallel.pp
        found["attention"] += forward * flops / hardware.rate("attention")
        found["attention_backward"] += 2.5 * flops / hardware.rate("attention_backward")
    states = full * geometry.hidden_size * load.e / (parallel.tp if parallel.sequence_parallel else 1)
    layers = geometry.num_layers / parallel.pp
    found["memory"] = _ELEMENTWISE * states * layers * (1 + 0.5 * _repeated(load, "all")) / hardware.rate("memory")
    found.update(_communication(geometry, parallel, load, full, hardware))
    return found


def _repeated(load: Load, part: str) -> int:
    """1 where the backward pass makes a part of the forward pass again."""
    if load.recompute == "selective":
        return int(part in load.recompute_modules)
    return int(load.recompute == "full")


def _pairs(layer: LayerGeometry, load: Load) -> float:
    """Of a row, that see each other in a layer."""
    if layer.window is None or layer.window >= load.length:
        return load.length**2 / 2
    return layer.window * (load.length - layer.window / 2)


def _communication(geometry: Geometry, parallel: Parallel, load: Load, full: float, hardware: Hardware) -> Seconds:
    """Of one microbatch: what goes on within a stage, and to the next."""
    found: Seconds = defaultdict(float)
    layers, whole = geometry.num_layers / parallel.pp, full * geometry.hidden_size * load.e
    if parallel.tp > 1:
        # A gather and a scatter around attention and FFN each; backward the same and the inputs gathered once more.
        times = 10 + 4 * _repeated(load, "all") + _repeated(load, "mlp") * (load.recompute == "selective")
        sent = times * whole * (parallel.tp - 1) / parallel.tp * layers
        found["tensor parallelism"] = sent / hardware.link(_ranks(1, parallel.tp))
    if parallel.cp > 1:
        found["context parallelism"] = _exchanged(geometry, parallel, load, hardware) / parallel.pp
    if geometry.moe is not None and parallel.ep > 1:
        routed = full / parallel.tp * geometry.moe.topk * geometry.hidden_size * load.e
        ways = 4 + 2 * _repeated(load, "moe")
        sent = ways * routed * layers
        group = _ranks(parallel.etp, parallel.ep * parallel.etp)
        found["expert parallelism"] = sent * hardware.all_to_all_share(group)
    if parallel.pp > 1:
        far = hardware.point_to_point(0, max(hardware.gpus_per_node, 1))
        found["pipeline"] = 2 * whole / (parallel.tp if parallel.sequence_parallel else 1) / far
    return found


def _exchanged(geometry: Geometry, parallel: Parallel, load: Load, hardware: Hardware) -> float:
    """Seconds of all layers' keys and values on their way to other context-parallel ranks, and their gradients back."""
    group, total = _ranks(parallel.tp, parallel.tp * parallel.cp), 0.0
    for layer in geometry.layers:
        rows = load.length if layer.window is None else min(load.length, 2 * layer.window)
        kv = 2 * max(1, layer.num_query_groups // parallel.tp) * layer.head_dim
        total += (2 + _repeated(load, "core_attn")) * load.rows * rows * kv * load.e
    return total * hardware.all_to_all_share(group)
