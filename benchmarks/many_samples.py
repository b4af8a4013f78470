"""What a second start costs a rank with so many samples: seconds until its first batch, and resident memory.

`python benchmarks/many_samples.py [--samples 1000000] [--folder DIR]`. Records are tokens already (8 to 40). They
are prepared once, as `data prepare` does; then a process each, packed and not, opens them as a run does
(`recipes.data.training.prepared`, and the streams of a rank) and takes a batch. Ten samples are the empty run that the
figures are above. CPU seconds (user and system) are what counts on a machine that is shared.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_TAKE = """
import json, resource, sys, time
from pathlib import Path
from bridge.geometry import Geometry
from recipes.config import load_recipe
from recipes.data.training import model_folder, prepared
import recipes.train.loop
began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
recipe, data = prepared(load_recipe("sft/smoke", sys.argv[1:]))
streams = data(recipe, Geometry.from_folder(Path(model_folder(recipe))), 0, 1)
batch = next(streams.train)
used = resource.getrusage(resource.RUSAGE_SELF)
streams.train.close()
cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps({"cpu": cpu, "wall": time.perf_counter() - began, "peak_mb": used.ru_maxrss / 1024}))
"""


def write(path: Path, count: int) -> None:
    """So many records of tokens."""
    dice = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            ids = [2, *(dice.randrange(300, 500) for _ in range(dice.randrange(7, 40)))]
            file.write(f'{{"input_ids": {ids}}}\n')


def taken(keys: list[str]) -> dict[str, Any]:
    """What a process needs until it has its first batch."""
    done = subprocess.run([sys.executable, "-c", _TAKE, *keys], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="Keeps data, model and cache.")
    arguments = parser.parse_args()
    from bridge.toy import write_toy

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        model = folder / "toy"
        if not model.exists():
            write_toy("e2b", model, text_only=True)
        for packing in ("false", "true"):
            found: dict[int, dict[str, Any]] = {}
            for count in (10, arguments.samples):
                path = folder / f"{count}.jsonl"
                if not path.exists():
                    write(path, count)
                keys = [
                    f"data.path={path}",
                    f"model.hf={model}",
                    f"data.cache={folder / 'cache'}",
                    "train.seq_length=256",
                ]
                keys += [f"data.packing={packing}", "train.eval_every=0", f"output={folder / 'run'}"]
                began = time.perf_counter()
                command = [sys.executable, "-m", "bridge.cli", "data", "prepare", "sft/smoke", *keys]
                subprocess.run(command, check=True, capture_output=True)
                children = resource.getrusage(resource.RUSAGE_CHILDREN)
                print(
                    f"{count} prepared in {time.perf_counter() - began:.0f} s "
                    f"({children.ru_utime + children.ru_stime:.0f} CPU seconds so far)",
                    flush=True,
                )
                found[count] = taken(keys)
                print(count, f"packing={packing}", found[count], flush=True)
            more = {name: value - found[10][name] for name, value in found[arguments.samples].items()}
            print(f"above ten samples, packing={packing}: {more}", flush=True)


if __name__ == "__main__":
    main()
