"""What a few minutes on one GPU can show: attention first, then rows of `train_gpu`, in an order that is given.

    python -m benchmarks.short_gpu attention --out DIR --seconds 65
    python -m benchmarks.short_gpu rows --out DIR --seconds 415 --rows lora/12b/8192/ours+none+profile=80 ...

A row is a case of `benchmarks.train_gpu` by its name, with the recomputation that it is to begin with (`+none`,
`+selective`, `+full`), `+profile` where it is to be profiled, and its seconds. Where it runs out of memory more is
recomputed in what is left of them. Its process has imported everything while the row before it ran. Results are lines
in DIR: `attention.jsonl`, and `rows.jsonl`, which `train_gpu --table` and `--check --resume` read.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.case import RECOMPUTE, Case, available
from benchmarks.cases import cases, toy_cases
from benchmarks.lines import append, rows_of
from benchmarks.workers import LEAST_SECONDS, Workers, run_rungs
from bridge.errors import BridgeError, UsageError

ROW_SECONDS = 90.0


@dataclass(frozen=True)
class Asked:
    """One row. `name`: of its lines, that of a case of `train_gpu`; `rungs`: in turn, where memory is short."""

    name: str
    rungs: tuple[Case, ...]
    seconds: float = ROW_SECONDS
    profile: bool = False


def parse(text: str, known: dict[str, Case]) -> Asked:
    """`NAME[+RECOMPUTE][+profile][=SECONDS]`. Raises UsageError where it names no case or no number."""
    whole, _, seconds = text.partition("=")
    name, profile, rest = whole.partition("+profile")
    base, _, recompute = name.rpartition("+")
    if rest or (name not in known and not (base in known and recompute in RECOMPUTE)):
        raise UsageError(f"--rows {text}: no such row; benchmarks.train_gpu --dry-run lists the names")
    case = known[name] if name in known else replace(known[base], recompute=recompute)
    rungs = [case]
    if case.side == "ours" and case.mode != "loss":
        first = 0 if case.recompute == "auto" else RECOMPUTE.index(case.recompute)
        rungs = [replace(case, recompute=more) for more in RECOMPUTE[first:]]
    try:
        return Asked(name if name in known else base, tuple(rungs), float(seconds or ROW_SECONDS), bool(profile))
    except ValueError:
        raise UsageError(f"--rows {text}: {seconds} is no number of seconds") from None


def rows(out: Path, seconds: float, asked: Sequence[Asked], least: float = LEAST_SECONDS) -> bool:
    """Run them in turn for as long as there is time; whether all that were begun were measured."""
    file, right = out / "rows.jsonl", True
    with Workers(out / "workers.log", time.monotonic() + seconds, least) as workers:
        workers.prepare()
        for i, row in enumerate(asked):
            if missing := available(row.rungs[0]):
                append(file, row.name, "left out", **asdict(row.rungs[0]), status=f"not run: {missing}")
                print(f"{row.name}: not run: {missing}", flush=True)
                continue
            last = i + 1 == len(asked)
            status = run_rungs(workers, row.name, row.rungs, file, row.seconds, profile=row.profile, another=not last)
            found = rows_of(file)[row.name]
            shown = {k: round(found[k], 3) for k in ("seconds", "tokens_per_s", "mfu", "peak_gb") if found.get(k)}
            print(f"{row.name} {found.get('recompute', '')}: {status} {shown}", flush=True)
            right &= status == "ok" or status.startswith("not run")
    return right


def main() -> int:
    """The exit code: 1 where something was wrong or failed; what was not reached is no failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("attention", "rows"))
    parser.add_argument("--out", type=Path, default=Path("short_gpu"), metavar="DIR")
    parser.add_argument("--seconds", type=float, default=300.0, help="for all of it [%(default)s]")
    parser.add_argument("--rows", nargs="*", default=[], metavar="ROW")
    parser.add_argument("--toy", action="store_true", help="tiny models in float32, on any device")
    said = parser.parse_args()
    said.out.mkdir(parents=True, exist_ok=True)
    if said.what == "attention":
        from benchmarks.attention_check import check

        return int(not check(said.out / "attention.jsonl", said.seconds, said.toy))
    known = {case.name: case for case in (toy_cases() if said.toy else cases())}
    try:
        asked = [parse(text, known) for text in said.rows]
    except BridgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(not rows(said.out, said.seconds, asked))


if __name__ == "__main__":
    sys.exit(main())
