"""A toy Gemma 4 learns digits by reward alone: of sums, or of the colours of drawn bars.

python examples/grpo/run.py [sums|colours] [--seed 1] [--work FOLDER] [key=value ...]

A toy checkpoint, the form of an answer (a random digit), then GRPO; rewards are measured on prompts held out.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tasks

HERE = Path(__file__).parent
BRIDGE = [sys.executable, "-m", "bridge.cli"]
VARIANTS = {"sums": "e2b", "colours": "12b"}
# So many answers are sampled to prompts that are held out, at temperature 1, as in training.
SAMPLED = 960


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=VARIANTS, default="sums")
    parser.add_argument("--variant", help="e2b for sums, 12b for colours")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks, one thread each")
    parser.add_argument("--work", type=Path, default=Path(".grpo"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of sums.yaml or colours.yaml")
    said = parser.parse_intermixed_args()
    shutil.rmtree(said.work, ignore_errors=True)
    said.work.mkdir(parents=True)
    dice, start = random.Random(said.seed), time.perf_counter()
    task = tasks.sums(dice) if said.task == "sums" else tasks.colours(dice, said.work)
    for name in ("form", "asked"):
        lines = [json.dumps(row) + "\n" for row in getattr(task, name)]
        (said.work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    toy, form, run = (said.work / name for name in ("toy", "form", "run"))
    variant = said.variant or VARIANTS[said.task]
    subprocess.run([*BRIDGE, "toy", variant, str(toy), "--dtype", "float32", "--seed", str(said.seed)], check=True)
    train("form", said, form, [f"model.hf={toy}", f"data.path={said.work / 'form.jsonl'}"])
    found: dict[str, Any] = {"task": said.task, "seed": said.seed}
    (found["before"],) = rewards(form, said.work, task.held_out)
    asked = [f"model.megatron={form}", f"data.path={said.work / 'asked.jsonl'}", *said.overrides]
    train(said.task, said, run, asked)
    found["after"], *blank = rewards(run, said.work, task.held_out, *([task.blank] if task.blank else []))
    if blank:
        found["after, blank"] = blank[0]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found |= {"seconds": round(time.perf_counter() - start), "processor seconds": round(used.ru_utime + used.ru_stime)}
    print(json.dumps(found))
    (said.work / "result.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    sys.exit(found["before"] > 0.2 or found["after"] < 0.9)


def train(recipe: str, said: argparse.Namespace, output: Path, overrides: list[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={said.ranks}", "-m"]
    command = [*launcher, "bridge.cli"] if said.ranks > 1 else BRIDGE
    common = [f"output={output}", f"data.cache={said.work / 'cache'}", f"train.seed={said.seed}"]
    subprocess.run([*command, "train", str(HERE / f"{recipe}.yaml"), *common, *overrides], check=True)


def rewards(model: Path, work: Path, *sets: list[tasks.Row]) -> list[float]:
    """Of each of the `sets` the part of `SAMPLED` answers that is right."""
    answers, questions, rows = work / "answers.jsonl", work / "questions.jsonl", [row for rows in sets for row in rows]
    questions.write_text("".join(json.dumps(question(row)) + "\n" for row in rows), encoding="utf-8")
    answers.unlink(missing_ok=True)
    each = SAMPLED // len(sets[0])
    options = ["--max-new-tokens", "2", "--temperature", "1", "--num-return-sequences", str(each), "--max-rows", "120"]
    files = ["--input", str(questions), "--output", str(answers), "--dtype", "float32"]
    subprocess.run([*BRIDGE, "generate", str(model), *files, *options], check=True, stdout=subprocess.DEVNULL)
    right = [0] * len(rows)
    for answer in map(json.loads, answers.read_text(encoding="utf-8").splitlines()):
        right[answer["index"]] += answer["text"].strip() == rows[answer["index"]]["completion"]
    counts = iter(right)
    return [round(sum(next(counts) for _ in of_set) / (each * len(of_set)), 3) for of_set in sets]


def question(row: tasks.Row) -> dict[str, Any]:
    """As a conversation without its answer."""
    parts: list[dict[str, str]] = [{"type": "image", "path": name} for name in row.get("images", ())]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": row["prompt"]}]}]}


if __name__ == "__main__":
    main()
