"""What a checkpoint costs the steps around it, written while they wait and beside them, in turns in one run.

    python benchmarks/async_checkpoints.py                # a toy with a large table: 1 GB of checkpoint, a CPU

The stall of a step is its time, and that of a save behind it, beyond the median step with which nothing was written. Of
a save beside training several steps may have one: the largest counts, and their sum is given too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.toy import write_toy

# Rows of the per-layer table of E2B's toy, of 32 numbers a layer: 84 million parameters, and two moments of each.
ROWS, WIDTH = 262_144, 32


@dataclass
class Step:
    """Seconds of a step and of the save behind it; which kind of save, and whether one was being written meanwhile."""

    seconds: float
    save: float = 0.0
    kind: str = ""
    during: bool = False


def write_model(folder: Path, rows: int = ROWS) -> None:
    """A toy of text whose table makes up its size, float32."""
    import torch
    from safetensors.torch import load_file, save_file

    from bridge.geometry import Geometry
    from bridge.mapping import table_for

    write_toy("e2b", folder, text_only=True, dtype="float32")
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size_per_layer_input": rows, "hidden_size_per_layer_input": WIDTH}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for entry in table_for(Geometry.from_folder(folder)).entries.values():
        for source in entry.sources:
            if source.name in tensors and tuple(tensors[source.name].shape) != source.shape:
                tensors[source.name] = 0.02 * torch.randn(source.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def measure(model: Path, output: Path, rounds: int, between: int) -> list[Step]:
    """One run with `2 * rounds` saves, `between` steps apart, the kinds in turns."""
    from recipes.config import load_recipe
    from recipes.train import loop

    steps: list[Step] = []
    data = output.parent / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"say {i}", "completion": f"{i} and {i + 1}"}) for i in range(64)))
    recipe = load_recipe(
        "sft/smoke",
        [
            *(f"model.hf={model}", f"data.path={data}", f"output={output}", "checkpoint.keep=1", "log.every=1000000"),
            *(f"train.steps={2 * rounds * between + between}", f"checkpoint.every={between}"),
        ],
    )

    def stepped(self: Any, step: Callable[[Any], Any] = loop._Loop._step) -> Any:
        during, begun = self._saver._save is not None, time.perf_counter()
        result = step(self)
        steps.append(Step(time.perf_counter() - begun, during=during))
        return result

    def saved(self: Any, save: Callable[[Any], Any] = loop._Loop._save) -> Any:
        recipe.checkpoint.async_ = not recipe.checkpoint.async_
        begun = time.perf_counter()
        result = save(self)
        steps[-1].save, steps[-1].kind = time.perf_counter() - begun, "beside" if recipe.checkpoint.async_ else "waits"
        return result

    loop._Loop._step, loop._Loop._save = stepped, saved  # type: ignore[method-assign]
    recipe.checkpoint.async_ = True  # the first one waits
    loop.train(recipe)
    return steps


def report(steps: list[Step]) -> dict[str, Any]:
    """Medians of the saves but the first of each kind; seconds."""
    usual = statistics.median(step.seconds for step in steps[2:] if not step.during and not step.kind)
    saves: dict[str, list[list[float]]] = {"waits": [], "beside": []}
    for at, step in enumerate(steps):
        if step.kind:
            saves[step.kind].append([])
            for later in steps[at:]:
                if later is not step and (later.kind or not later.during):
                    break
                stall = (0.0 if later is step else later.seconds - usual) + later.save
                saves[step.kind][-1].append(stall)
    found: dict[str, Any] = {"step": usual}
    for kind, each in saves.items():
        kept = each[1:-1] if kind == "waits" else each[1:]
        found[kind] = {
            "largest": statistics.median(max(stalls) for stalls in kept),
            "sum": statistics.median(sum(stalls) for stalls in kept),
            "steps": statistics.median(len(stalls) for stalls in kept),
            "saves": len(kept),
        }
    found["ratio"] = found["beside"]["largest"] / found["waits"]["largest"]
    found["ratio_of_sums"] = found["beside"]["sum"] / found["waits"]["sum"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="saves of each kind")
    parser.add_argument("--between", type=int, default=10, help="steps from save to save")
    parser.add_argument("--rows", type=int, default=ROWS, help="of the table: 3.9 kB of checkpoint each")
    parser.add_argument("--workdir", type=Path, help="on the disk to measure; else a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.workdir) as name:
        folder = Path(name)
        write_model(folder / "model", options.rows)
        steps = measure(folder / "model", folder / "run", options.rounds, options.between)
        size = sum(path.stat().st_size for path in (folder / "run").rglob("*.distcp")) / 1e9
        json.dump({"checkpoint_gb": size, **report(steps)}, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
