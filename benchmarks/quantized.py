"""Export to quantized folders and import of them, against the plain export and import, in one run.

    python benchmarks/quantized.py MEGATRON_DIR --workdir /scratch --rounds 3

Operations take turns, each in a process of its own, round after round. Reported are medians of the seconds of the
operation and of the processor time of the process, their ratio to the plain one's, and the peak resident memory.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

from benchmarks.conversion import Run, child

PRESETS = ("fp8-dynamic", "w4a16", "nvfp4")
_EXPORT = """
import sys, time
from bridge.convert.export import export_hf
t = time.perf_counter()
export_hf(sys.argv[1], sys.argv[2], quantize=sys.argv[3] if len(sys.argv) > 3 else None)
print(time.perf_counter() - t)
"""
_IMPORT = """
import sys, time
from bridge.convert.folders import import_hf
t = time.perf_counter(); import_hf(sys.argv[1], sys.argv[2]); print(time.perf_counter() - t)
"""


def measure(megatron: Path, work: Path, rounds: int) -> dict[str, list[Run]]:
    """The runs of each operation, by its name."""
    found: dict[str, list[Run]] = {}
    for _ in range(rounds):
        for preset in ("plain", *PRESETS):
            folder, back = work / "folder", work / "back"
            options = () if preset == "plain" else (preset,)
            found.setdefault(f"export {preset}", []).append(child(_EXPORT, (megatron, folder, *options)))
            found.setdefault(f"import {preset}", []).append(child(_IMPORT, (folder, back)))
            shutil.rmtree(folder)
            shutil.rmtree(back)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megatron", type=Path)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    found = measure(options.megatron, options.workdir, options.rounds)
    print("| operation | seconds | to plain | processor seconds | to plain | peak RSS, MB |")
    print("|---|---|---|---|---|---|")
    for name, runs in found.items():
        plain = found[f"{name.split()[0]} plain"]
        seconds, cpu = (statistics.median(getattr(run, key) for run in runs) for key in ("seconds", "cpu_seconds"))
        base, cpu_base = (statistics.median(getattr(run, key) for run in plain) for key in ("seconds", "cpu_seconds"))
        peak = max(run.peak_mb for run in runs)
        print(f"| {name} | {seconds:.1f} | {seconds / base:.2f} | {cpu:.1f} | {cpu / cpu_base:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
