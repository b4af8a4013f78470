"""A toy Gemma 4 learns to read receipts: drawing, training, and `evaluate` on receipts that were held out.

python examples/receipts/run.py [--variant e4b] [--work FOLDER] [--ranks 2] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import draw

BRIDGE = [sys.executable, "-m", "bridge.cli"]
HERE = Path(__file__).parent
METRICS = "exact_match,json_valid,json_tree"
# Of the toys it is 8 tokens; of the published models it holds a picture and more.
WINDOW = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="e4b")
    parser.add_argument("--work", type=Path, default=Path(".receipts"))
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks, one thread each")
    parser.add_argument("--train", type=int, default=8000, help="receipts to learn from")
    parser.add_argument("--cells", type=int, default=6400, help="pictures of characters at random to learn from before")
    parser.add_argument("--test", type=int, default=200, help="receipts that are held out")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    said = parser.parse_args()
    work = said.work
    shutil.rmtree(work, ignore_errors=True)
    start = time.perf_counter()
    draw.write(work, said.train, said.cells, said.test, seed=0)
    make_toy(said.variant, work / "toy")
    reading = [f"model.hf={work / 'toy'}", f"data.path={work / 'cells.jsonl'}"]
    train("cells", said.ranks, work, [*reading, *said.overrides])
    receipts = [f"model.megatron={work / 'cells'}", f"data.path={work / 'train.jsonl'}"]
    train("recipe", said.ranks, work, [*receipts, f"data.eval={work / 'test.jsonl'}", *said.overrides])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = {"clock": time.perf_counter() - start, "processor": used.ru_utime + used.ru_stime + time.process_time()}
    found = {
        "untrained": evaluate(work / "toy", work / "test.jsonl", work),
        "trained": evaluate(work / "recipe", work / "test.jsonl", work),
        "trained, blank pictures": evaluate(work / "recipe", work / "blank.jsonl", work),
    }
    for name, result in found.items():
        print(json.dumps({name: result}))
    print(json.dumps({"drawing and training, seconds": {name: round(value) for name, value in seconds.items()}}))
    sys.exit(found["trained"]["json_tree"] < 0.9 or found["untrained"]["json_tree"] > 0.1)


def train(recipe: str, ranks: int, work: Path, given: list[str]) -> None:
    """One of the recipes beside this file, in data-parallel ranks; its run is `work` / the recipe's name."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    given = [f"data.cache={work / 'cache'}", f"output={work / recipe}", *given]
    subprocess.run([*launcher, "bridge.cli", "train", str(HERE / f"{recipe}.yaml"), *given], check=True)


def make_toy(variant: str, folder: Path) -> None:
    """A toy whose sliding layers see the whole receipt."""
    subprocess.run([*BRIDGE, "toy", variant, str(folder), "--dtype", "float32", "--head-dim", "64"], check=True)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"]["sliding_window"] = WINDOW
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def evaluate(model: Path, data: Path, work: Path) -> dict[str, float]:
    """What `gemma4-bridge evaluate` measures: token accuracy and the metrics."""
    target = work / "found.json"
    given = ["--data", str(data), "--metrics", METRICS, "--dtype", "float32", "--max-new-tokens", "160"]
    given += ["--seq-length", "256", "--max-rows", "50", "--cache", str(work / "cache"), "--json", str(target)]
    subprocess.run([*BRIDGE, "evaluate", str(model), *given], check=True)
    found = json.loads(target.read_text(encoding="utf-8"))
    return {"loss": found["loss"], "token_accuracy": found["token_accuracy"], **found["metrics"]}


if __name__ == "__main__":
    main()
