"""The fused loss against whole logits: peak memory and time of a forward and a backward pass. A table, and JSON.

    python benchmarks/loss.py                     # 8,192 tokens fused, and both at 512, where whole logits fit
    python benchmarks/loss.py --tokens 1024 --hidden 640 --vocab 32768
    python benchmarks/loss.py --device cuda --dtype bfloat16

Peak memory is what the process held at its highest (VmHWM; of a GPU, what its allocator gave out) beyond what it held
before, less the gradients, which every way of computing them has to return.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEGABYTE = 1e6
EXTRA_BOUND_MB = 400
TIME_BOUND = 1.3
SOFTCAP = 30.0


def memory_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


def start_of_peak(on_gpu: bool) -> int:
    """The bytes held now; the peak is counted from here on."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    before = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return before


def arguments(
    tokens: int, hidden_size: int, vocab: int, device: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [tokens, 1, h], weight [V, h], labels [1, tokens], made on the device: of a weight of the published
    size the host has 738 million numbers to draw, one after the other."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 1, hidden_size, device=device, dtype=dtype)
    weight = torch.empty(vocab, hidden_size, device=device, dtype=dtype).normal_(0, 0.2)
    return hidden, weight, torch.randint(vocab, (1, tokens), device=device)


def measure(
    how: str,
    tokens: int,
    hidden_size: int,
    vocab: int,
    threads: int,
    repeats: int,
    device: str = "cpu",
    dtype: str = "float32",
    frozen: bool = False,
) -> dict[str, float | str]:
    """One way, in this process: extra peak memory of the first run, seconds of the fastest, checksums of the result.

    `frozen`: the head takes no gradient, as with adapters.
    """
    from bridge.megatron.loss import linear_cross_entropy

    torch.set_num_threads(threads)
    where = {"device": device, "dtype": getattr(torch, dtype)}
    hidden, weight, labels = arguments(tokens, hidden_size, vocab, **where)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    on_gpu = device != "cpu"

    def run() -> torch.Tensor:
        if how == "fused":
            return linear_cross_entropy(hidden, weight, labels, softcap=SOFTCAP).mean()
        logits = torch.nn.functional.linear(hidden, weight)
        logits = torch.tanh(logits / SOFTCAP) * SOFTCAP
        return torch.nn.functional.cross_entropy(logits.transpose(0, 1).flatten(0, 1), labels.flatten())

    # What is allocated once, whichever way: the matrix library's threads and buffers.
    (torch.randn(64, 64, **where) @ torch.randn(64, 64, **where)).sum().item()
    seconds, extra, loss = [], 0.0, torch.zeros(())
    for repeat in range(repeats):
        hidden.grad = weight.grad = None
        before = start_of_peak(on_gpu)
        start = time.perf_counter()
        loss = run()
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if repeat == 0:
            peak = torch.cuda.max_memory_allocated() if on_gpu else memory_bytes("VmHWM")
            extra = peak - before - hidden.nbytes - (0 if frozen else weight.nbytes)
    assert hidden.grad is not None
    return {
        "how": how,
        "tokens": tokens,
        "seconds": min(seconds),
        "extra_mb": extra / MEGABYTE,
        "loss": loss.item(),
        "grad_hidden_norm": hidden.grad.norm(dtype=torch.float64).item(),
        "grad_weight_norm": 0.0 if weight.grad is None else weight.grad.norm(dtype=torch.float64).item(),
    }


def main() -> None:
    """Every measurement in a process of its own: memory that one freed is not what the next one finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--compared-tokens", type=int, default=512, help="where whole logits fit")
    parser.add_argument("--hidden", type=int, default=2816)
    parser.add_argument("--vocab", type=int, default=262144)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--one", nargs=2, metavar=("HOW", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.one:
        how, tokens = options.one[0], int(options.one[1])
        shape = (tokens, options.hidden, options.vocab, options.threads, options.repeats)
        print(json.dumps(measure(how, *shape, options.device, options.dtype)))
        return
    rows = []
    for how, tokens, repeats in (
        ("naive", options.compared_tokens, options.repeats),
        ("fused", options.compared_tokens, options.repeats),
        ("fused", options.tokens, 1),
    ):
        arguments = ["--one", how, str(tokens), "--hidden", str(options.hidden), "--vocab", str(options.vocab)]
        arguments += ["--threads", str(options.threads), "--repeats", str(repeats)]
        arguments += ["--device", options.device, "--dtype", options.dtype]
        done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print({k: v if isinstance(v, str) else round(v, 7) for k, v in rows[-1].items()}, flush=True)
    naive, fused, large = rows
    result = {
        "rows": rows,
        "time_ratio": fused["seconds"] / naive["seconds"],
        "extra_mb": large["extra_mb"],
        "differences": {
            key: abs(fused[key] - naive[key]) / abs(naive[key])
            for key in ("loss", "grad_hidden_norm", "grad_weight_norm")
        },
    }
    print(f"time {result['time_ratio']:.2f} x naive (bound {TIME_BOUND}), at {options.compared_tokens} tokens")
    print(f"extra peak {result['extra_mb']:.0f} MB (bound {EXTRA_BOUND_MB}), at {options.tokens} tokens")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
