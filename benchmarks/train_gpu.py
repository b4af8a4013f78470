"""Training on one GPU, ours against transformers + PEFT (+ liger-kernel): tokens/s, MFU, peak memory, kernel groups.

    python -m benchmarks.train_gpu                      # everything that fits, the most important first
    python -m benchmarks.train_gpu --dry-run            # the cases and what the memory estimate says of them
    python -m benchmarks.train_gpu --cases lora/12b --budget 1200 --resume train_gpu.jsonl
    python -m benchmarks.train_gpu --check --resume train_gpu.jsonl
    python -m benchmarks.train_gpu --toy                # tiny, float32, on the CPU: whether all of this still runs

    python -m benchmarks.train_gpu --table rows.jsonl   # the table of results that came back from elsewhere

Run it in the root of the repository. Every case is a process of its own, on random weights of the published geometry
made in memory (`random_model.py`); its phases are lines of JSON in `--resume` (or `--out`), an out-of-memory too. At
the end the table goes into docs/benchmarks.md, between its markers. A step is 16,384 tokens, or one row where that is
longer. Ours recomputes as little as the memory estimate says fits, and more where that was too little; transformers'
uses gradient checkpointing, which it needs at nearly all of these lengths.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.case import Case, available
from benchmarks.cases import cases, ladder, toy_cases
from benchmarks.lines import Row, append, done, rows_of
from benchmarks.train_gpu_report import kernel_table, misses, same_losses, table, write_between
from benchmarks.workers import LEAST_SECONDS, NO_TIME, ROOT, Workers, run_rungs

# Seconds a case may take: the weights of 31B, compilation, a few steps of 64k tokens.
CASE_SECONDS = 900.0


def run_all(
    chosen: Sequence[Case],
    out: Path,
    memory: float | None,
    budget: float = math.inf,
    seconds: float = CASE_SECONDS,
    least: float = LEAST_SECONDS,
) -> Iterator[tuple[str, Row]]:
    """What is not in `out` yet, appended to it phase by phase, as long as `budget` seconds are left.

    A case takes at most `seconds`, in as many steps as fit; one that would have fewer than `least` is not begun.
    """
    known = done(out)
    # What was missing may have come since.
    asked = [c for c in chosen if str(known.get(c.name, {"status": "not run"})["status"]).startswith("not run")]
    with Workers(out.with_suffix(".log"), time.monotonic() + budget, least) as workers:
        for i, case in enumerate(asked):
            missing = available(case)
            rungs, _ = ladder(case, memory)
            if missing or not rungs:
                why = missing or "the estimate says it does not fit"
                append(out, case.name, "left out", **asdict(case), status=f"not run: {why}")
            elif run_rungs(workers, case.name, rungs, out, seconds, another=i + 1 < len(asked)) == NO_TIME:
                return
            yield case.name, rows_of(out)[case.name]


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="*", default=[""], metavar="TEXT", help="those whose name holds one of these")
    add("--budget", type=float, default=math.inf, metavar="SECONDS", help="for all of them")
    add("--case-seconds", type=float, default=CASE_SECONDS, metavar="SECONDS", help="for one [%(default)s]")
    add("--out", type=Path, default=Path("train_gpu.jsonl"), help="where results are added, line by line")
    add("--resume", type=Path, metavar="FILE", help="as --out; what is in it is not run again")
    add("--docs", type=Path, metavar="FILE", help="where the table goes [docs/benchmarks.md]")
    add("--gpu-memory", type=float, metavar="GB", help="what cases have to fit [the visible GPU's]")
    add("--dry-run", action="store_true", help="only list the cases")
    add("--check", action="store_true", help="only hold the results against the bounds")
    add("--table", type=Path, metavar="FILE", help="only print the table of results, and the longest kernels")
    add("--toy", action="store_true", help="tiny models in float32")
    return parser


def show_plan(chosen: Sequence[Case], memory: float | None) -> None:
    """A line for each case: what it needs, and whether that is there."""
    for case in chosen:
        rungs, need = ladder(case, memory)
        fits = "" if need is None else f"{need / 1e9:8.1f} GB, " + (rungs[0].recompute if rungs else "does not fit")
        print(f"{case.name:44} {available(case) or fits or 'tried'}")


def main() -> int:
    """The exit code: 1 where a case failed, sides disagree (`--toy`), or a bound is missed (`--check`)."""
    said = parser().parse_args()
    out = said.resume or said.out
    if said.check or said.table:
        rows = done(out) if said.check else rows_of(said.table)
        missed = misses(rows) if said.check else []
        print("\n".join(missed) or "every bound is kept" if said.check else f"{table(rows)}\n\n{kernel_table(rows)}")
        return int(bool(missed))
    import torch

    memory = said.gpu_memory * 1e9 if said.gpu_memory else None
    if memory is None and torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    chosen = [c for c in (toy_cases() if said.toy else cases()) if any(text in c.name for text in said.cases)]
    if said.dry_run:
        show_plan(chosen, memory)
        return 0
    if not said.toy and not torch.cuda.is_available():
        print("no GPU is visible; --dry-run lists the cases, --toy runs tiny ones", file=sys.stderr)
        return 1
    if not said.resume and out.exists():
        print(f"{out}: exists already; go on with --resume {out}", file=sys.stderr)
        return 1
    failed = []
    for name, row in run_all(chosen, out, memory, said.budget, said.case_seconds):
        shown = {key: round(row[key], 3) for key in ("tokens_per_s", "mfu", "peak_gb") if row.get(key)}
        print(f"{name:44} {row['status']} {shown}", flush=True)
        failed += [name] if row["status"].startswith("failed") else []
    rows = done(out)
    docs = said.docs or (None if said.toy else ROOT / "docs" / "benchmarks.md")
    if docs is not None and rows:
        write_between(docs, table(rows))
    different = same_losses(rows) if said.toy else []
    print("\n".join(different), end="\n" if different else "")
    return int(bool(failed or different))


if __name__ == "__main__":
    sys.exit(main())
