"""Training on one GPU, ours against transformers + PEFT (+ liger-kernel): tokens/s, MFU, peak memory, kernel groups.

    python -m benchmarks.train_gpu                      # everything that fits, the most important first
    python -m benchmarks.train_gpu --dry-run            # the cases and what the memory estimate says of them
    python -m benchmarks.train_gpu --cases lora/12b --budget 1200 --resume train_gpu.jsonl
    python -m benchmarks.train_gpu --check --resume train_gpu.jsonl
    python -m benchmarks.train_gpu --toy                # tiny, float32, on the CPU: whether all of this still runs

Run it in the root of the repository. Every case is a process of its own, on random weights of the published geometry
made in memory (`random_model.py`); its result is a line of JSON in `--resume` (or `--out`), an out-of-memory too. At
the end the table goes into docs/benchmarks.md, between its markers. A step is 16,384 tokens, or one row where that is
longer. Ours recomputes as little as the memory estimate says fits, and more where that was too little; transformers'
uses gradient checkpointing, which it needs at nearly all of these lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.kernel_groups import breakdown, transfers_to_host
from benchmarks.loss import measure as measure_loss
from benchmarks.train_gpu_report import MEMORY, Row, misses, same_losses, table, write_between
from benchmarks.training_sides import RECOMPUTE, SIDES, Case, available, recipe_of
from recipes.train.meter import peak_flops, peak_memory

ROOT = Path(__file__).parents[1]
LENGTHS = (4096, 16_384, 65_536)
# Seconds a case may take: the weights of 31B, compilation, a few steps of 64k tokens.
CASE_SECONDS = 900
WARM, MEASURED = 3, 5
_PACKAGES = ("torch", "megatron-core", "transformers", "peft", "liger-kernel", "transformer-engine", "triton")


def cases() -> list[Case]:
    """All of them: what has a bound first, then what is compared, then the rest."""
    bounds = [
        Case("e4b", "sft", 4096),
        *(Case(variant, "lora", 8192) for variant in ("12b", "31b", "26b-a4b")),
        *(Case("26b-a4b", "loss", 8192, side) for side in ("head frozen", "head trained")),
    ]
    sides = ("ours", "transformers", "liger")
    compared = [Case("12b", "lora", 65_536)]
    for variant in ("12b", "26b-a4b", "e4b", "31b"):
        # Quick and small pull apart: once with as little recompute as fits, once with as much as the others do.
        compared += [Case(variant, "lora", 16_384, recompute=recompute) for recompute in ("auto", "full")]
        compared += [Case(variant, "lora", 16_384, side) for side in sides[1:]]
    # What this project's own kernels are worth, side by side.
    plain = [replace(case, kernels="torch") for case in bounds if case.mode != "loss"]
    specs = [
        replace(case, layer_spec="te", fp8=fp8)
        for case in bounds
        if case.mode != "loss"
        for fp8 in ("none", "current", "block")
    ]
    media = [Case(v, "lora", n, side, media=True) for v in ("e4b", "26b-a4b") for n in LENGTHS for side in sides]
    kinds = [("sft", "e2b"), ("sft", "e4b"), *(("lora", v) for v in ("e2b", "e4b", "12b", "26b-a4b", "31b"))]
    rest = [Case(variant, mode, n, side) for n in LENGTHS for mode, variant in kinds for side in sides]
    return list(dict.fromkeys([*bounds, *compared, *plain, *specs, *media, *rest]))


def toy_cases() -> list[Case]:
    """One of each side that needs nothing more, on the same tiny model, and its loss."""
    trained = Case("e2b", "lora", 48, recompute="full", size="toy", dtype="float32")
    return [trained, replace(trained, side="transformers"), replace(trained, mode="loss", side="head frozen")]


def estimated(case: Case) -> int:
    """Bytes that ours needs, its reserve included. The estimate knows our side only."""
    from bridge.mapping import table_for
    from recipes.memory.estimate import RESERVE, estimate
    from recipes.memory.recipe import plan_of

    table_ = table_for(case.model.geometry)
    return estimate(table_, plan_of(recipe_of(case), 1, table_)).total + RESERVE


def ladder(case: Case, memory: float | None) -> tuple[list[Case], int | None]:
    """The case with as little recompute as fits `memory` bytes, and then with more; its estimate. Empty: does not."""
    if case.side != "ours" or case.mode == "loss":
        return [case], None
    rungs = [case]
    if case.recompute == "auto":
        rungs = [replace(case, recompute=recompute) for recompute in RECOMPUTE]
    if memory is None:
        return rungs, None
    needs = [estimated(rung) for rung in rungs]
    fitting = [i for i, need in enumerate(needs) if need <= memory]
    return (rungs[fitting[0] :], needs[fitting[0]]) if fitting else ([], needs[-1])


def measure(case: Case) -> Row:
    """Run a case in this process."""
    on_gpu = torch.cuda.is_available()
    if case.mode == "loss":
        device = "cuda" if on_gpu else "cpu"
        geometry = case.model.geometry
        frozen = case.side == "head frozen"
        found = measure_loss(
            "fused", case.length, geometry.hidden_size, geometry.vocab_size, 2, 3, device, case.dtype, frozen
        )
        return {"status": "ok", "seconds": found["seconds"], "peak_gb": float(found["extra_mb"]) / 1e3}
    torch.manual_seed(0)
    sync: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    step = SIDES[case.side](case)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    warm, measured = (WARM, MEASURED) if case.size == "published" else (1, 1)
    losses: list[float] = []
    times = []

    def run() -> None:
        losses.append(step())
        sync()

    for _ in range(warm):
        run()
    for _ in range(measured):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    # A pause of the host, or a kernel compiled late, is not the rate.
    seconds, peak = statistics.median(times), peak_memory()
    rate, best = case.flops() / seconds, peak_flops(0.0)
    return {
        "status": "ok",
        "seconds": seconds,
        "tokens_per_s": case.microbatches * case.length / seconds,
        "tflops": rate / 1e12,
        "mfu": rate / best if best else None,
        "peak_gb": peak / 1e9,
        "losses": losses,
        **profiled(run),
    }


def profiled(run: Callable[[], None]) -> Row:
    """Where the time of one more step goes. What was measured before stands, whatever becomes of this."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    try:
        with torch.profiler.profile(activities=activities) as profile:
            run()
        return {"breakdown": breakdown(profile), "waits": transfers_to_host(profile)}
    except Exception as error:
        return {"not_profiled": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def environment() -> dict[str, str]:
    """What the figures depend on."""
    found = {"device": platform.machine(), "date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        found["cuda"] = str(torch.version.cuda)
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def child(case: Case, out: Path) -> None:
    """One case, its result in `out`."""
    try:
        row = measure(case)
    except torch.OutOfMemoryError:
        row = {"status": MEMORY}
    except Exception as error:
        # Libraries of kernels raise their own.
        text = " ".join(str(error).split())
        # cuBLAS asks for its workspace itself.
        full = any(said in text.lower() for said in ("out of memory", "alloc_failed"))
        row = {"status": MEMORY if full else f"failed: {type(error).__name__}: {text[:300]}"}
    row |= environment()
    out.write_text(json.dumps(row), encoding="utf-8")


def run_child(case: Case, seconds: float) -> Row:
    """A case in a process of its own, whatever becomes of it."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "result.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train_gpu", "--child", json.dumps(asdict(case))]
        # Both sides: without it long rows fail of fragments.
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        process = subprocess.Popen(
            [*command, "--out", str(out)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            # With the compilers that it started: they hold its output open, and memory.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"status": f"failed: not done after {seconds:.0f} s"}
        if out.is_file():
            row: Row = json.loads(out.read_text(encoding="utf-8"))
            return row
        lines = errors.strip().splitlines()
        return {"status": f"failed: exit code {process.returncode}: {lines[-1] if lines else ''}"}


def run_all(chosen: Sequence[Case], out: Path, memory: float | None, budget: float) -> Iterator[tuple[str, Row]]:
    """What is not in `out` yet, appended to it case by case, as long as `budget` seconds are left."""
    done = read(out)
    start = time.monotonic()
    for case in chosen:
        # What was missing may have come since.
        if case.name in done and not str(done[case.name]["status"]).startswith("not run"):
            continue
        missing = available(case)
        rungs, _ = ladder(case, memory)
        row: Row = {"status": f"not run: {missing}" if missing else "not run: the estimate says it does not fit"}
        for rung in [] if missing else rungs:
            left = budget - (time.monotonic() - start)
            if left <= 0:
                return
            row = run_child(rung, min(CASE_SECONDS, left)) | ({"recompute": rung.recompute} if rung is not case else {})
            if row["status"] != MEMORY:
                break
        row = {"case": case.name, **asdict(case), **row}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        yield case.name, row


def read(out: Path) -> dict[str, Row]:
    """The results in a file, but for those that failed: they are tried again."""
    if not out.is_file():
        return {}
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {row["case"]: row for row in rows if not row["status"].startswith("failed")}


def main() -> int:
    """The exit code: 1 where a case failed, sides disagree (`--toy`), or a bound is missed (`--check`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[""], metavar="TEXT", help="those whose name holds one of these")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument(
        "--out", type=Path, default=Path("train_gpu.jsonl"), help="where results are added, line by line"
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="as --out; what is in it is not run again")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="where the table goes [docs/benchmarks.md]")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="what cases have to fit [the visible GPU's]")
    parser.add_argument("--dry-run", action="store_true", help="only list the cases")
    parser.add_argument("--check", action="store_true", help="only hold the results against the bounds")
    parser.add_argument("--toy", action="store_true", help="tiny models in float32")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.child:
        child(Case(**json.loads(said.child)), said.out)
        return 0
    out = said.resume or said.out
    if said.check:
        missed = misses(read(out))
        print("\n".join(missed) or "every bound is kept")
        return int(bool(missed))
    memory = said.gpu_memory * 1e9 if said.gpu_memory else None
    if memory is None and torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    chosen = [c for c in (toy_cases() if said.toy else cases()) if any(text in c.name for text in said.cases)]
    if said.dry_run:
        for case in chosen:
            rungs, need = ladder(case, memory)
            fits = "" if need is None else f"{need / 1e9:8.1f} GB, " + (rungs[0].recompute if rungs else "does not fit")
            print(f"{case.name:44} {available(case) or fits or 'tried'}")
        return 0
    if not said.toy and not torch.cuda.is_available():
        print("no GPU is visible; --dry-run lists the cases, --toy runs tiny ones", file=sys.stderr)
        return 1
    if not said.resume and out.exists():
        print(f"{out}: exists already; go on with --resume {out}", file=sys.stderr)
        return 1
    failed = []
    for name, row in run_all(chosen, out, memory, said.budget):
        shown = {key: round(row[key], 3) for key in ("tokens_per_s", "mfu", "peak_gb") if row.get(key)}
        print(f"{name:44} {row['status']} {shown}", flush=True)
        failed += [name] if row["status"].startswith("failed") else []
    rows = read(out)
    docs = said.docs or (None if said.toy else ROOT / "docs" / "benchmarks.md")
    if docs is not None and rows:
        write_between(docs, table(rows))
    different = same_losses(rows) if said.toy else []
    print("\n".join(different), end="\n" if different else "")
    return int(bool(failed or different))


if __name__ == "__main__":
    sys.exit(main())
