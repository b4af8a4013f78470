"""Attention by layer kind, length of the row and backend: time, useful TFLOP/s, peak memory, saved bytes per token.

    python benchmarks/attention.py                                  # on the GPU if there is one, else on the CPU
    python benchmarks/attention.py --model 31b --lengths 8192,32768 --json attention.json

A row of the table is one layer's forward and backward. «Useful» work is that of the pairs that the mask lets see each
other: 4 d FLOP a pair and head forward, 10 d backward. Every row is measured in a process of its own; one that fails or
does not apply says so. On a CPU the time is that of one thread's work, which a busy machine disturbs least. Peers,
which the model never uses, run beside: torch's quadratic math path, and Transformer Engine where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.geometry import Geometry, LayerGeometry
from bridge.megatron.attention_backends import BACKENDS, flex
from bridge.megatron.mask import Mask, mask_of
from bridge.megatron.visibility import Visibility, mask_rule
from bridge.toy.config import VARIANTS, published

Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
CONTENTS = ("text", "packed")
COLUMNS = ("layer", "content", "S", "backend", "forward ms", "backward ms", "TFLOP/s", "peak MiB", "saved B/token")


def sdpa_math(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """What torch falls back to in silence: dense, with the mask as a tensor."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    with sdpa_kernel([SDPBackend.MATH]):
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask.dense[:, None], scale=1.0, enable_gqa=True
        )
    return output.permute(2, 0, 1, 3)


def transformer_engine(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Text only: causal, with the layer's window. Not run yet: it needs a GPU."""
    from transformer_engine.pytorch import DotProductAttention  # type: ignore[import-not-found]

    window = (-1, 0) if mask.rule.window is None else (mask.rule.window - 1, 0)
    attention = DotProductAttention(
        query.shape[2], query.shape[3], num_gqa_groups=key.shape[2], softmax_scale=1.0, window_size=window
    )
    output: Tensor = attention(query, key, value, qkv_format="sbhd", attn_mask_type="causal")
    return output.unflatten(-1, query.shape[2:])


def flex_checked(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """FlexAttention as it comes to be where lengths change: bounds are checked, whether or not they need be."""
    return flex.attend(query, key, value, mask, {"IS_DIVISIBLE": False})


# Of one length, torch's kernel is made for that: at multiples of 128 `flex` checks no bounds.
FLEX_CHECKED = "flex IS_DIVISIBLE=False"
PEERS: dict[str, Attend] = {
    "peer: SDPA math": sdpa_math,
    "peer: TE": transformer_engine,
    FLEX_CHECKED: flex_checked,
}


def attention(name: str) -> Attend:
    """What computes, of a backend or a peer."""
    return PEERS[name] if name in PEERS else BACKENDS[name].attend


def refusal(name: str, query: Tensor, key: Tensor, mask: Mask) -> str | None:
    """Why it cannot, or None."""
    if name == "peer: TE" and (not query.is_cuda or mask.visibility.block is not None):
        return "text on a GPU only"
    backend = "flex" if name == FLEX_CHECKED else name
    return None if backend in PEERS else BACKENDS[backend].refuse(query, key, mask)


def describe(content: str, length: int, device: str) -> Visibility:
    """One document, or eight with an image of 280 tokens each."""
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    if content == "text":
        return Visibility.of(ids)
    bounds = torch.linspace(0, length, 9, device=device).long()
    types = torch.zeros_like(ids)
    for start in bounds[:-1].tolist():
        types[0, start + 16 : start + 16 + min(280, length // 16)] = 1
    return Visibility.of(ids, cu_seqlens=bounds, mm_token_type_ids=types)


def measure(
    layer: LayerGeometry, geometry: Geometry, content: str, length: int, name: str, repeat: int
) -> dict[str, Any]:
    """One row, in this process. A dictionary with `skipped` where the backend cannot do it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    mask = mask_of(describe(content, length, device), mask_rule(geometry, layer))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(heads: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(length, 1, heads, layer.head_dim, device=device, dtype=dtype) * scale
        return x.requires_grad_()

    query = normal(layer.num_attention_heads, layer.head_dim**-0.5)
    key, value = normal(layer.num_query_groups), normal(layer.num_query_groups)
    if (reason := refusal(name, query, key, mask)) is not None:
        return {"skipped": reason}
    attend = attention(name)
    first, stop = mask.reach
    flop = int((stop - first).sum()) * layer.num_attention_heads * layer.head_dim * 14

    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = attend(query, key, value, mask)  # also warms up, and compiles
    upstream = torch.randn_like(output)
    output.backward(upstream)
    del output

    memory = _Memory(device)
    times = []
    for _ in range(repeat):
        start = _now(device)
        output = attend(query, key, value, mask)
        middle = _now(device)
        output.backward(upstream)
        times.append((middle - start, _now(device) - middle))
        del output
    forward, backward = min(times, key=sum)
    return {
        "forward ms": forward * 1e3,
        "backward ms": backward * 1e3,
        "TFLOP/s": flop / (forward + backward) / 1e12,
        "peak MiB": memory.peak() / 2**20,
        "saved B/token": sum(saved.values()) / length,
    }


class _Memory:
    """The peak from here on, above what is held now."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")

    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")) - self.before

    @staticmethod
    def _status(key: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, bfloat16, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    return f"{cpu}, 1 thread, processor time, float32, torch {torch.__version__}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|---|" + "---:|" * (len(COLUMNS) - 4)]
    for row in rows:
        if "skipped" in row:
            cells = [f"({row['skipped']})", *[""] * (len(COLUMNS) - 5)]
        else:
            cells = [f"{row[c]:.3g}" if c == "TFLOP/s" else f"{row[c]:,.0f}" for c in COLUMNS[4:]]
        lines.append("| " + " | ".join([*(str(row[c]) for c in COLUMNS[:4]), *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=VARIANTS, default="31b" if on_gpu else "e2b")
    parser.add_argument("--lengths", default="4096,8192,16384,32768" if on_gpu else "1024,2048,4096")
    parser.add_argument("--backends", default=",".join([*BACKENDS, *PEERS]))
    parser.add_argument("--contents", default=",".join(CONTENTS))
    parser.add_argument("--layers", default="sliding,global")
    parser.add_argument("--repeat", type=int, default=5 if on_gpu else 2)
    parser.add_argument("--timeout", type=int, default=600, help="seconds per row")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this process measures a single row
    arguments = parser.parse_args()
    geometry = Geometry.from_dict(published(arguments.model))
    layers: dict[str, LayerGeometry] = {}
    for layer in geometry.layers:
        layers.setdefault(layer.kind, layer)
    if arguments.one:
        kind, content, length, name = json.loads(arguments.one)
        print(json.dumps(measure(layers[kind], geometry, content, length, name, arguments.repeat)))
        return

    # Freed tensors leave the process at once: the peak is of what is alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    rows: list[dict[str, Any]] = []
    for kind in arguments.layers.split(","):
        for content in arguments.contents.split(","):
            for length in map(int, arguments.lengths.split(",")):
                for name in arguments.backends.split(","):
                    one = json.dumps([kind, content, length, name])
                    command = [sys.executable, __file__, "--model", arguments.model, "--repeat", str(arguments.repeat)]
                    row: dict[str, Any] = {"layer": kind, "content": content, "S": length, "backend": name}
                    try:
                        done = subprocess.run(
                            [*command, "--one", one],
                            capture_output=True,
                            text=True,
                            env=environment,
                            timeout=arguments.timeout,
                            check=False,
                        )
                        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:100]
                        row |= json.loads(done.stdout) if done.returncode == 0 else {"skipped": f"failed: {last}"}
                    except subprocess.TimeoutExpired:
                        row["skipped"] = f"more than {arguments.timeout} s"
                    rows.append(row)
                    print(row, file=sys.stderr, flush=True)
    result = {"machine": machine(), "model": arguments.model, "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    print(f"{arguments.model}; {result['machine']}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
