"""A toy Gemma 4 learns to count letters by reward alone: toy checkpoint, the form of an answer, GRPO.

python examples/grpo_counting/run.py [--variant e2b] [--seed 1] [--work FOLDER] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BRIDGE = [sys.executable, "-m", "bridge.cli"]
# Of the first and the last steps' rewards.
MEAN_OVER = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="e2b")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(".counting"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of rewards.yaml")
    said = parser.parse_args()
    shutil.rmtree(said.work, ignore_errors=True)
    said.work.mkdir(parents=True)
    start = time.perf_counter()
    toy, form, run = (said.work / name for name in ("toy", "form", "run"))
    write_questions(said.work, said.seed)
    subprocess.run([*BRIDGE, "toy", said.variant, str(toy), "--dtype", "float32"], check=True)
    common = [f"data.cache={said.work / 'cache'}", f"train.seed={said.seed}"]
    train(HERE / "form.yaml", [f"model.hf={toy}", f"data.path={said.work / 'form.jsonl'}", f"output={form}", *common])
    asked = [f"model.megatron={form}", f"data.path={said.work / 'counts.jsonl'}", f"output={run}", *common]
    train(HERE / "rewards.yaml", [*asked, *said.overrides])
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = [line["reward"] for line in lines if "reward" in line]
    first, last = (sum(part) / len(part) for part in (rewards[:2], rewards[-MEAN_OVER:]))
    said_of = {"seed": said.seed, "first": first, "last": last, "seconds": round(time.perf_counter() - start)}
    print(json.dumps(said_of))
    sys.exit(first > 0.2 or last < 0.9)


def train(recipe: Path, overrides: list[str]) -> None:
    subprocess.run([*BRIDGE, "train", str(recipe), *overrides], check=True)


def write_questions(work: Path, seed: int) -> None:
    """Rows of one to eight letters, with how many there are; and the same questions with answers at random."""
    dice = random.Random(seed)
    rows = [(" ".join(dice.choices("abcdefgh", k=count)), count) for count in range(1, 9) for _ in range(32)]
    dice.shuffle(rows)
    write(work / "form.jsonl", [(letters, dice.randint(1, 8)) for letters, _ in rows])
    write(work / "counts.jsonl", rows)


def write(path: Path, rows: list[tuple[str, int]]) -> None:
    lines = (json.dumps({"prompt": letters, "completion": str(count)}) for letters, count in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
