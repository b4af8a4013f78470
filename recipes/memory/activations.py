"""What a forward pass leaves for the backward pass, and what the backward pass needs beside it.

The figures follow the model's own code, operation by operation: bridge/megatron/{layer,attention,norm,moe,ple,loss}.py
and Megatron-Core's MLP. Only what grows with the number of tokens is here. Per tensor: e bytes an element in the dtype
of the model, 4 in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bridge.geometry import Geometry, LayerGeometry
from bridge.megatron.parallel import Parallel

# As in bridge/megatron/attention_backends/blockwise.py (a CPU's) and bridge/megatron/loss.py.
_TILE = 512
_LOSS_CHUNK, _LOSS_BLOCK = 128 << 20, 8 << 20

# Bytes by kind, such as "norms".
Bytes = Counter[str]


@dataclass(frozen=True)
class Load:
    """What one microbatch is: `rows` [b] of `length` [s] tokens; bytes `e` of an element; what is recomputed.

    `on_cpu`: attention in tiles, whose scores count; the kernels of a GPU keep theirs on the chip. `fp8`: of the
    linears, `fp8_experts`: of the experts. What FP8 keeps of a linear's input is counted as in the dtype of the model.
    `fake_quant`: the forward pass multiplies by rounded copies of the weights, which the backward pass needs.
    """

    rows: int
    length: int
    e: int = 2
    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ()
    on_cpu: bool = False
    fp8: bool = False
    fp8_experts: bool = False
    fake_quant: bool = False


@dataclass(frozen=True)
class Sizes:
    """A load on one rank of a layout: `full` tokens where the sequence is whole, `tokens` where SP splits it."""

    geometry: Geometry
    parallel: Parallel
    load: Load

    @property
    def full(self) -> int:
        return self.load.rows * self.load.length // self.parallel.cp

    @property
    def tokens(self) -> int:
        return self.full // (self.parallel.tp if self.parallel.sequence_parallel else 1)

    @property
    def e(self) -> int:
        return self.load.e

    @property
    def hidden(self) -> int:
        """Elements of a rank's hidden states."""
        return self.tokens * self.geometry.hidden_size

    def columns(self, layer: LayerGeometry) -> int:
        """Keys that a rank's queries see: under CP also other ranks', of a sliding layer two rims of one window."""
        whole = self.load.rows * self.load.length
        if self.parallel.cp == 1 or layer.window is None:
            return whole
        return min(whole, self.full + 2 * self.load.rows * layer.window)


def layer_bytes(sizes: Sizes, layer: LayerGeometry) -> Bytes:
    """Kept of one layer between its forward and its backward pass, without recompute."""
    e, hidden, full, tp = sizes.e, sizes.hidden, sizes.full, sizes.parallel.tp
    geometry, found = sizes.geometry, Bytes()
    q, groups = layer.q_size // tp, max(1, layer.num_query_groups // tp)
    kv = groups * layer.head_dim
    # The norms around attention and FFN.
    found["norms"] = 4 * _norm(e, hidden, sizes.tokens)
    # The projection's input; its output, which the norms of q, k and v keep; what they make of it, rotated.
    projections = _kv_projections(layer)
    found["attention"] = e * hidden + _norm(e, full * (q + projections * kv), full * (q // layer.head_dim + 2 * groups))
    found["attention"] += e * full * (q + (2 * kv if projections else 0))
    if sizes.parallel.cp > 1:
        found["context parallelism"] = 2 * e * kv * (sizes.columns(layer) - (0 if layer.shares_kv else full))
    found["attention"] += core_attention_bytes(sizes, layer)
    found["mlp"] = e * hidden + mlp_bytes(sizes, layer)
    if sizes.load.fp8:
        found["fp8 weights"] = sum(fp8_weight_bytes(sizes, layer))
    if sizes.load.fake_quant:
        found["rounded weights"] = e * sum(linear_weights(sizes, layer).values())
    if geometry.moe is not None:
        found["norms"] += 2 * _norm(e, hidden, sizes.tokens)
        found["experts"] = moe_bytes(sizes)
    if geometry.ple is not None:
        found["norms"] += _norm(e, hidden, sizes.tokens)
        found["per-layer inputs"] = e * hidden + (2 + sizes.load.on_cpu) * e * sizes.tokens * geometry.ple.dim
    return found


def core_attention_bytes(sizes: Sizes, layer: LayerGeometry) -> int:
    """What the kernel adds: output and log-sum-exp; a CPU's keeps the output in the order of its groups, and a copy."""
    q = layer.q_size // sizes.parallel.tp
    copies = 2 if sizes.load.on_cpu else 1
    return copies * sizes.e * sizes.full * q + 4 * sizes.full * q // layer.head_dim


def mlp_bytes(sizes: Sizes, layer: LayerGeometry) -> int:
    """Inside the dense FFN: gate and up, and the product that fc2 is given; without kernels the gate activated."""
    return (3 + sizes.load.on_cpu) * sizes.e * sizes.full * layer.ffn_hidden_size // sizes.parallel.tp


def fp8_weight_bytes(sizes: Sizes, layer: LayerGeometry) -> tuple[int, int]:
    """E4M3 copies of the weights of attention's linears and of the dense FFN's, made for each forward pass: as they
    are, and transposed for the gradient of the input (transformer_engine/pytorch/module/linear.py, 2.20.2: both are
    saved for the backward pass). Without their scales: 4 bytes for 128 × 128 of them, or for a tensor.
    """
    weights = linear_weights(sizes, layer)
    return 2 * weights["attention"], 2 * weights["mlp"]


def linear_weights(sizes: Sizes, layer: LayerGeometry) -> dict[str, int]:
    """Elements of the weights that a rank multiplies by: of attention's linears, the dense FFN's and the experts'."""
    hidden_size, tp, moe = sizes.geometry.hidden_size, sizes.parallel.tp, sizes.geometry.moe
    rows = 2 * layer.q_size + _kv_projections(layer) * layer.kv_size
    found = {"attention": hidden_size * rows // tp, "mlp": 3 * hidden_size * layer.ffn_hidden_size // tp}
    if moe is not None:
        ways = sizes.parallel.ep * sizes.parallel.etp
        found["moe"] = 3 * moe.num_experts * hidden_size * moe.ffn_hidden_size // ways
    return found


def moe_bytes(sizes: Sizes) -> int:
    """Router and experts. Tokens are taken to be spread evenly over experts."""
    moe = sizes.geometry.moe
    assert moe is not None
    e, hidden = sizes.e, sizes.hidden
    # The router's normed and scaled input. Its norm and that of the experts keep what the dense FFN's keeps.
    router = 2 * e * hidden + 4 * 4 * sizes.tokens * moe.num_experts
    norms = 2 * _norm(e, 0, sizes.tokens)
    # Copies of tokens for their experts, on the way there, at the experts' tensor-parallel ranks, and coming back.
    routed = sizes.tokens * moe.topk * sizes.parallel.etp
    width = moe.ffn_hidden_size // sizes.parallel.etp
    return router + norms + e * routed * (2 * sizes.geometry.hidden_size + (3 + sizes.load.on_cpu) * width)


def front_bytes(sizes: Sizes) -> Bytes:
    """Before the first layer of a model with per-layer inputs: for the layers of all stages together."""
    geometry, found = sizes.geometry, Bytes()
    if geometry.ple is not None:
        n = sizes.tokens * geometry.num_layers * geometry.ple.dim
        found["per-layer inputs"] = _norm(sizes.e, n, sizes.tokens * geometry.num_layers) + sizes.e * n
        found["per-layer inputs"] += sizes.e * sizes.hidden if sizes.e < 4 else 0
    return found


def loss_bytes(sizes: Sizes, train_head: bool, added: bool) -> tuple[int, int]:
    """(kept until the backward pass, the most on top of it while the loss is made or differentiated), last stage.

    `added`: the gradient of the head goes straight to DDP's buffer, as that of a tied one on the same stage does.
    """
    e, tp, hidden_size = sizes.e, sizes.parallel.tp, sizes.geometry.hidden_size
    vocab = -(-sizes.geometry.vocab_size // tp)
    head = vocab * hidden_size if train_head else 0
    until_backward = _norm(e, sizes.hidden, sizes.tokens) + 2 * e * sizes.full * hidden_size
    chunk = min(sizes.full, max(1, _LOSS_CHUNK // (vocab * e)))
    blocks = 2 * 4 * vocab * min(chunk, max(1, _LOSS_BLOCK // (4 * vocab)))
    making = e * chunk * (vocab + 2 * hidden_size) + blocks
    if e == 4:
        # The forward pass sums the head's gradient.
        return until_backward + e * head, making
    if head:
        # The backward pass makes it of some words at a time, of copies of the states that have a label.
        words = min(vocab, max(1, _LOSS_CHUNK // (sizes.full * e + hidden_size * 4)))
        again = words * (sizes.full * e + hidden_size * 4) + e * sizes.full * hidden_size + blocks
        making = max(making, again + (0 if added else e * head))
    return until_backward, making


def backward_bytes(sizes: Sizes, layer: LayerGeometry) -> int:
    """The most that the backward pass of a layer holds on top of what the forward pass kept."""
    e, full, tp = sizes.e, sizes.full, sizes.parallel.tp
    q, groups = layer.q_size // tp, max(1, layer.num_query_groups // tp)
    kv = groups * layer.head_dim * sizes.columns(layer)
    # Gradients of the output and of q, k and v.
    attention = e * (2 * full * q + 2 * kv)
    if sizes.load.on_cpu or sizes.parallel.cp > 1:
        # Keys' and values' are summed in float32.
        attention += 4 * 2 * kv
    if sizes.load.on_cpu:
        # Operands side by side in float32, and two tiles of scores.
        queries = _TILE * layer.num_query_groups // layer.num_attention_heads
        seen = sizes.load.length if layer.window is None else queries + layer.window
        tile = _TILE * min(_TILE, sizes.load.length, seen) * groups * sizes.load.rows
        attention += 4 * (3 * full * q + 2 * kv) + 2 * 4 * tile
    # By then the layer has let go of all that comes behind attention; its first norm is still there.
    until_backward = layer_bytes(sizes, layer)
    attention -= (
        until_backward.total()
        - until_backward["attention"]
        - until_backward["context parallelism"]
        - _norm(e, sizes.hidden, sizes.tokens)
    )
    mlp = 3 * e * full * layer.ffn_hidden_size // tp
    if sizes.load.fp8:
        # Gradients of gate and up once more, as they are and transposed.
        mlp += 2 * 2 * full * layer.ffn_hidden_size // tp
        if sizes.load.recompute == "selective" and "mlp" in sizes.load.recompute_modules:
            mlp += fp8_weight_bytes(sizes, layer)[1]
    if sizes.load.fake_quant and sizes.load.recompute == "selective" and "mlp" in sizes.load.recompute_modules:
        mlp += e * linear_weights(sizes, layer)["mlp"]
    norms = 3 * 4 * sizes.hidden
    experts = 0
    if sizes.geometry.moe is not None:
        # Gradients of the outputs of experts, weighed and not (without kernels in float32, with a product of both);
        # then as in the dense FFN.
        routed = sizes.tokens * sizes.geometry.moe.topk * sizes.parallel.etp
        width = sizes.geometry.moe.ffn_hidden_size // sizes.parallel.etp
        weighing = 3 * 4 if sizes.load.on_cpu else 2 * e
        experts = routed * (weighing * sizes.geometry.hidden_size + 3 * e * width)
        if sizes.load.fp8_experts:
            # Gradients of gate and up once more, and the weights that they are multiplied by.
            local = sizes.geometry.moe.num_experts // sizes.parallel.ep
            experts += 2 * width * (routed + local * sizes.geometry.hidden_size)
        if sizes.load.fake_quant and sizes.load.recompute == "selective" and "moe" in sizes.load.recompute_modules:
            experts += e * linear_weights(sizes, layer)["moe"]
    return max(attention, mlp, norms, experts) + e * sizes.hidden


def stage_bytes(sizes: Sizes, layers: Sequence[LayerGeometry]) -> Bytes:
    """Kept of one microbatch by the layers of a stage."""
    load, found = sizes.load, Bytes()
    for layer in layers:
        if load.recompute == "full":
            found["layer inputs"] += sizes.e * sizes.hidden
            # Keys and values that later layers read travel from layer to layer as arguments.
            if any(reader.kv_source == layer.index and reader.shares_kv for reader in sizes.geometry.layers):
                groups = max(1, layer.num_query_groups // sizes.parallel.tp)
                found["layer inputs"] += 2 * sizes.e * sizes.full * groups * layer.head_dim
            continue
        found += layer_bytes(sizes, layer)
        if load.recompute == "selective":
            if "core_attn" in load.recompute_modules:
                # The context that the output projection is given stays.
                attention_output = sizes.e * sizes.full * layer.q_size // sizes.parallel.tp
                found["attention"] -= core_attention_bytes(sizes, layer) - attention_output
                found["context parallelism"] = 0
            if "mlp" in load.recompute_modules:
                found["mlp"] -= mlp_bytes(sizes, layer)
                if load.fp8:
                    found["fp8 weights"] -= fp8_weight_bytes(sizes, layer)[1]
            if "moe" in load.recompute_modules and sizes.geometry.moe is not None:
                found["experts"] -= moe_bytes(sizes) - sizes.e * sizes.hidden
            if load.fake_quant:
                weights = linear_weights(sizes, layer)
                found["rounded weights"] -= sizes.e * sum(weights.get(part, 0) for part in load.recompute_modules)
    share = len(layers) / sizes.geometry.num_layers
    for kind, size in front_bytes(sizes).items():
        found[kind] += round(size * share)
    return found


def _kv_projections(layer: LayerGeometry) -> int:
    """How many of keys and values a layer projects for itself."""
    return 0 if layer.shares_kv else 1 if layer.k_eq_v else 2


def _norm(e: int, elements: int, rows: int) -> int:
    """An RMSNorm keeps its input, and a number a row."""
    return e * elements + 4 * rows
