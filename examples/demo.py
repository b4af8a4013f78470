"""All five Gemma 4 models at toy size: checkpoint -> Megatron -> back, and the same numbers as transformers.

Run by `make demo`. Nothing is downloaded and no GPU is needed.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from rich.console import Console

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.errors import BridgeError
from bridge.hf.folder import HfFolder
from bridge.megatron.parallel import Parallel
from bridge.megatron.silence import silence_warnings
from bridge.ranks import RankPool
from bridge.toy import VARIANTS, write_toy
from bridge.verify.result import Check, print_checks
from bridge.verify.run import verify

LAYOUTS = (Parallel(), Parallel(tp=2, pp=2, sequence_parallel=True))
EXPERT_LAYOUTS = (Parallel(ep=2),)


def run(folder: Path, console: Console) -> list[Check]:
    """toy, import, export, verify, for every variant; returns the rows that have a bound."""
    checks: list[Check] = []
    with RankPool(4) as pool:
        for variant in VARIANTS:
            source, megatron, back = (folder / f"{variant}{suffix}" for suffix in ("", "-megatron", "-back"))
            write_toy(variant, source, dtype="float32")
            import_hf(source, megatron)
            export_hf(megatron, back)
            same = (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
            with HfFolder(source) as opened:
                count = len(opened.tensors)
            console.print(
                f"{variant}: {count} tensors to Megatron and back, weight file {'equal' if same else 'DIFFERS'}"
            )
            if not same:
                raise BridgeError(f"{back}: differs from {source}")
            checks += verify(source, megatron_dir=megatron, pool=pool)
            for parallel in LAYOUTS[1:] + (EXPERT_LAYOUTS if variant == "26b-a4b" else ()):
                checks += verify(
                    source, megatron_dir=megatron, checks=("logits", "gradients"), parallel=parallel, pool=pool
                )
    return [check for check in checks if check.bound is not None]


def main() -> None:
    silence_warnings()
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    folder = Path(".demo")
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    console.print("Five toy models, each with every structural feature of its original. Ranks are starting ...")
    checks = run(folder, console)
    print_checks(checks, console, title="Megatron-Core against transformers")
    passed = all(check.passed for check in checks)
    console.print(f"{len(checks)} checks {'passed' if passed else 'FAILED'} in {time.monotonic() - started:.0f} s")
    console.print(f"The checkpoints are in {folder}/; try: .venv/bin/gemma4-bridge inspect {folder}/26b-a4b")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
