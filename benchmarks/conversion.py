"""Import, export and verify of a folder against a plain copy of the same bytes, in one run.

    python benchmarks/conversion.py --variant e2b --workdir /scratch            # writes a full-size random E2B first
    python benchmarks/conversion.py --source folder --workdir /scratch --runs 5 --cold

Every operation runs in a process of its own. Reported are the seconds of the operation (start-up apart), the seconds
of the whole process, and its peak resident memory as the system counts it. Two copies are measured beside it: `copy`
leaves the data in the page cache as cp does, `copy+fsync` makes it durable, which import and export always do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# What a child runs: prints the seconds of the operation itself.
_COPY = """
import os, shutil, sys, time
source, target, sync = sys.argv[1], sys.argv[2], sys.argv[3] == "sync"
t = time.perf_counter()
shutil.copytree(source, target)
if sync:
    for folder, _, names in os.walk(target):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY); os.fsync(fd); os.close(fd)
print(time.perf_counter() - t)
"""
_IMPORT = """
import sys, time
from bridge.convert.folders import import_hf
t = time.perf_counter(); import_hf(sys.argv[1], sys.argv[2]); print(time.perf_counter() - t)
"""
_EXPORT = """
import sys, time
from bridge.convert.folders import export_hf
t = time.perf_counter(); export_hf(sys.argv[1], sys.argv[2]); print(time.perf_counter() - t)
"""
_VERIFY = """
import sys, time
from pathlib import Path
from bridge.verify.round_trip import check_round_trip
t = time.perf_counter(); rows = check_round_trip(Path(sys.argv[1]), Path(sys.argv[2]), "model")
assert all(row.passed for row in rows), rows
print(time.perf_counter() - t)
"""


@dataclass(frozen=True)
class Run:
    """One child: seconds of its operation, of the whole process, and its peak resident memory in MB."""

    seconds: float
    process_seconds: float
    peak_mb: float


@dataclass(frozen=True)
class Row:
    """One operation: medians over its runs."""

    operation: str
    cache: str
    gigabytes: float
    seconds: float
    process_seconds: float
    peak_mb: float
    runs: int

    @property
    def rate(self) -> float:
        return self.gigabytes / self.seconds


def child(code: str, arguments: Sequence[object]) -> Run:
    """Run a child to its end; resources as wait4 reports them."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"a child failed: {output}")
    return Run(float(output.split()[-1]), time.perf_counter() - started, usage.ru_maxrss / 1024)


def drop_cache(folder: Path) -> None:
    """Ask the system to forget the pages of a folder's files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def warm(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(8 << 20):
                    pass


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(source: Path, work: Path, runs: int, cold: bool) -> list[Row]:
    """All operations in turn, round after round, so that a machine that slows down slows all of them."""
    megatron, back, copied = work / "megatron", work / "back", work / "copy"
    collected: dict[str, list[Run]] = {}
    for _ in range(runs):
        for name, code, arguments, reads, target in (
            ("copy", _COPY, (source, copied, "no"), source, copied),
            ("copy+fsync", _COPY, (source, copied, "sync"), source, copied),
            ("import", _IMPORT, (source, megatron), source, megatron),
            ("verify", _VERIFY, (source, megatron), source, None),
            ("export", _EXPORT, (megatron, back), megatron, back),
        ):
            if target is not None:
                shutil.rmtree(target, ignore_errors=True)
            os.sync()
            drop_cache(reads) if cold else warm(reads)
            collected.setdefault(name, []).append(child(code, arguments))
            if target in (copied, back):
                shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(megatron, ignore_errors=True)
    gigabytes = size(source) / 1e9
    return [
        Row(
            name,
            "cold" if cold else "warm",
            gigabytes,
            statistics.median(run.seconds for run in measured),
            statistics.median(run.process_seconds for run in measured),
            max(run.peak_mb for run in measured),
            len(measured),
        )
        for name, measured in collected.items()
    ]


def markdown(rows: Sequence[Row], variant: str) -> str:
    """A table for docs/benchmarks.md."""
    lines = [
        f"### {variant}, {rows[0].gigabytes:.1f} GB",
        "",
        "| operation | cache | seconds | GB/s | to copy | to copy+fsync | whole process, s | peak RSS, MB | runs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = {r.operation: r.seconds for r in rows if r.cache == row.cache}
        to_copy, to_durable = row.seconds / base["copy"], row.seconds / base["copy+fsync"]
        lines.append(
            f"| {row.operation} | {row.cache} | {row.seconds:.1f} | {row.rate:.2f} | {to_copy:.2f} | {to_durable:.2f} "
            f"| {row.process_seconds:.1f} | {row.peak_mb:.0f} | {row.runs} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="e2b")
    parser.add_argument("--source", type=Path, help="an HF folder; without it one of --variant is written, full size")
    parser.add_argument("--workdir", type=Path, required=True, help="room for three copies of the model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="also with a cold page cache")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    source = options.source
    if source is None:
        from bridge.toy import write_toy

        source = options.workdir / options.variant
        if not source.exists():
            write_toy(options.variant, source, full_size=True)
    rows = measure(source, options.workdir, options.runs, cold=False)
    if options.cold:
        rows += measure(source, options.workdir, options.runs, cold=True)
    text = markdown(rows, options.variant)
    print(text)
    if options.json:
        machine = {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
        options.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1))
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
