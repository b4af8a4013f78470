"""Import, export and verify of a folder against a plain copy of the same bytes, in one run.

    python benchmarks/conversion.py --variant e2b --workdir /scratch            # writes a full-size random E2B first
    python benchmarks/conversion.py --source folder --workdir /scratch --runs 5 --cold
    python benchmarks/conversion.py --variant 26b-a4b --workdir /scratch --runs 1 --sparse  # room for one copy

Every operation runs in a process of its own. Reported are the seconds of the operation (start-up apart), the seconds
of the whole process, and its peak resident memory as the system counts it. Two copies are measured beside it: `copy`
leaves the data in the page cache as cp does, `copy+fsync` makes it durable, which import and export always do.

With `--sparse` the model is of zeros that stand nowhere on the disk (holes of its files), and so is the Megatron folder
where it is read: reading costs next to nothing, on both sides, and the ratios are those of the writing. What is written
is written in full, and made durable on both sides: of the copies only `copy+fsync` is measured.
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
_TOY = """
import sys, time
from bridge.toy import write_toy
t = time.perf_counter(); write_toy(sys.argv[1], sys.argv[2], full_size=True); print(time.perf_counter() - t)
"""
_SPARSE = """
import json, sys, time
from pathlib import Path
from bridge.hf.folder import INDEX_FILE
from bridge.hf.tensors import TensorSpec
from bridge.hf.writer import HfWriter
from bridge.toy.assets import write_assets
from bridge.toy.config import toy_config
from bridge.toy.weights import is_integer
from bridge.toy.write import build
t = time.perf_counter()
toy, folder = toy_config(sys.argv[1], full_size=True), Path(sys.argv[2])
config, shapes = build(toy, "bfloat16", dead_kv=True)
folder.mkdir()
config.save_pretrained(folder)
write_assets(folder, toy, full_size=True)
specs = [TensorSpec(name, "I64" if is_integer(name) else "BF16", shape) for name, shape in shapes.items()]
with HfWriter(folder, specs) as writer:
    units = writer.units(1 << 30)
    for unit in units:
        writer.finish_unit(unit, sync=False)  # its size and its header
weight_map = {chunk.name: unit.file for unit in units for chunk in unit.chunks}
if len(units) > 1:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
print(time.perf_counter() - t)
"""
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
from bridge.convert.export import export_hf
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
    """One child: seconds of its operation, of the whole process, of processors, and its peak resident memory in MB."""

    seconds: float
    process_seconds: float
    peak_mb: float
    cpu_seconds: float


@dataclass(frozen=True)
class Row:
    """One operation: medians over its runs. `side`: import or export, which its copies are compared with."""

    side: str
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
    return Run(
        float(output.split()[-1]),
        time.perf_counter() - started,
        usage.ru_maxrss / 1024,
        usage.ru_utime + usage.ru_stime,
    )


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


def dig_holes(folder: Path) -> None:
    """Give the disk back the zeros of a folder's files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            subprocess.run(["fallocate", "--dig-holes", path], check=True)


def check_written(folder: Path) -> None:
    """Raise SystemExit where the files stand on the disk with holes: not everything was written."""
    os.sync()
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    if on_disk < size(folder):
        raise SystemExit(f"{folder}: {on_disk} of {size(folder)} bytes were written")


def measure(
    source: Path, work: Path, runs: int, caches: Sequence[str], discard_source: bool, sparse: bool = False
) -> list[Row]:
    """Import and verify, then export, each beside copies of the folder that it reads.

    The operations of a side take turns, round after round, so that a machine that slows down slows all of them; each
    starts with its target absent and nothing but what it reads in the page cache (or not even that). No more than two
    copies of the model are on the disk where the source may be discarded, else three; one where it is `sparse`.
    """
    megatron, target = work / "megatron", work / "target"
    gigabytes = size(source) / 1e9
    copies = (("copy", _COPY, "no"), ("copy+fsync", _COPY, "sync"))[1 if sparse else 0 :]
    sides = (
        ("import", source, (*copies, ("import", _IMPORT, None), ("verify", _VERIFY, None))),
        ("export", megatron, (*copies, ("export", _EXPORT, None))),
    )
    rows: list[Row] = []
    for side, reads, operations in sides:
        if side == "export" and discard_source:
            shutil.rmtree(source)
        for cache in caches:
            collected: dict[str, list[Run]] = {}
            for _ in range(runs):
                for name, code, option in operations:
                    writes = megatron if name == "import" else target
                    shutil.rmtree(writes, ignore_errors=True)
                    os.sync()
                    for folder in work.iterdir():
                        drop_cache(folder)
                    if cache == "warm":
                        warm(reads)
                    arguments = (reads, megatron) if name == "verify" else (reads, writes)
                    run = child(code, arguments if option is None else (*arguments, option))
                    collected.setdefault(name, []).append(run)
                    print(f"{side}, {cache}: {name} {run.seconds:.1f} s, {run.peak_mb:.0f} MB", file=sys.stderr)
                    if sparse and name == "verify":
                        dig_holes(megatron)
                    elif sparse:
                        check_written(writes)
                    shutil.rmtree(target, ignore_errors=True)
            rows += [row(side, name, cache, gigabytes, measured) for name, measured in collected.items()]
    shutil.rmtree(megatron, ignore_errors=True)
    return rows


def row(side: str, operation: str, cache: str, gigabytes: float, measured: Sequence[Run]) -> Row:
    """Medians over the runs of one operation."""
    return Row(
        side,
        operation,
        cache,
        gigabytes,
        statistics.median(run.seconds for run in measured),
        statistics.median(run.process_seconds for run in measured),
        max(run.peak_mb for run in measured),
        len(measured),
    )


def markdown(rows: Sequence[Row], variant: str) -> str:
    """A table for docs/benchmarks.md."""
    lines = [
        f"### {variant}, {rows[0].gigabytes:.1f} GB",
        "",
        "| operation | cache | seconds | GB/s | to copy | to copy+fsync | whole process, s | peak RSS, MB | runs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = {r.operation: r.seconds for r in rows if (r.side, r.cache) == (row.side, row.cache)}
        folder = "HF folder" if row.side == "import" else "Megatron folder"
        shown = f"{row.operation} of the {folder}" if row.operation.startswith("copy") else row.operation
        to_copy = f"{row.seconds / base['copy']:.2f}" if "copy" in base else ""
        to_durable = row.seconds / base["copy+fsync"]
        lines.append(
            f"| {shown} | {row.cache} | {row.seconds:.1f} | {row.rate:.2f} | {to_copy} | {to_durable:.2f} "
            f"| {row.process_seconds:.1f} | {row.peak_mb:.0f} | {row.runs} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="e2b")
    parser.add_argument("--source", type=Path, help="an HF folder; without it one of --variant is written, full size")
    parser.add_argument(
        "--workdir",
        type=Path,
        required=True,
        help="room for three copies of the model, two of one that the benchmark writes and may discard, one if sparse",
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="also with a cold page cache")
    parser.add_argument("--sparse", action="store_true", help="with --variant: of holes, read cold; one copy at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    if options.sparse and options.source:
        parser.error("--sparse is of a model that the benchmark writes")
    options.workdir.mkdir(parents=True, exist_ok=True)
    source, written = options.source, options.source is None
    if source is None:
        source = options.workdir / options.variant
        if not source.exists():
            # In a process of its own: what this one holds counts as the peak of every child.
            child(_SPARSE if options.sparse else _TOY, (options.variant, source))
    caches = ("cold",) if options.sparse else ("warm", "cold") if options.cold else ("warm",)
    rows = measure(source, options.workdir, options.runs, caches, written, options.sparse)
    text = markdown(rows, options.variant)
    print(text)
    if options.json:
        machine = {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
        options.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1))
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
