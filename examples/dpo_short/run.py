"""A toy Gemma 4 learns to prefer short answers: taught short and long ones alike, it loses the long ones to DPO.

python examples/dpo_short/run.py [--work FOLDER] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BRIDGE = [sys.executable, "-m", "bridge.cli"]
HERE = Path(__file__).parent
# So many tokens of an answer are short: a number and the end of the turn.
SHORT = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".dpo"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of dpo.yaml")
    said = parser.parse_args()
    shutil.rmtree(said.work, ignore_errors=True)
    said.work.mkdir(parents=True)
    write_data(said.work)
    start = time.perf_counter()
    toy, taught, preferring = (said.work / name for name in ("toy", "taught", "preferring"))
    subprocess.run([*BRIDGE, "toy", "e4b", str(toy), "--dtype", "float32"], check=True)
    train("sft.yaml", said.work, toy, taught, "answers.jsonl", [])
    before = short_answers(taught, said.work)
    train("dpo.yaml", said.work, taught, preferring, "pairs.jsonl", said.overrides)
    after = short_answers(preferring, said.work)
    print(json.dumps({"before": before, "after": after, "seconds": round(time.perf_counter() - start)}))
    sys.exit(after["short"] < max(0.9, before["short"] + 0.1))


def write_data(work: Path) -> None:
    """Questions, each with a short and a long answer: both as conversations, and as pairs."""
    conversations, pairs, prompts = [], [], []
    for number in range(1, 41):
        question = f"What comes after {number}?"
        answers = (f"{number + 1}", f"A good question: behind {number} comes the number {number + 1}, I should say.")
        asked = {"role": "user", "content": question}
        conversations += [{"messages": [asked, {"role": "assistant", "content": answer}]} for answer in answers]
        pairs.append({"prompt": question, "chosen": answers[0], "rejected": answers[1]})
        prompts.append({"prompt": question})
    for name, rows in (("answers", conversations), ("pairs", pairs), ("prompts", prompts)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(recipe: str, work: Path, model: Path, export: Path, data: str, overrides: list[str]) -> None:
    given = [f"model.hf={model}", f"data.path={work / data}", f"data.cache={work / 'cache'}"]
    given += [f"output={work / recipe.removesuffix('.yaml')}", f"export.hf={export}", *overrides]
    subprocess.run([*BRIDGE, "train", str(HERE / recipe), *given], check=True)


def short_answers(model: Path, work: Path) -> dict[str, Any]:
    """The part of greedy answers that are short, and how many tokens they have on average."""
    answers = work / f"{model.name}.jsonl"
    options = ["--max-new-tokens", "64", "--dtype", "float32", "--output", str(answers)]
    subprocess.run([*BRIDGE, "generate", str(model), "--input", str(work / "prompts.jsonl"), *options], check=True)
    sizes = [len(json.loads(line)["tokens"]) for line in answers.read_text(encoding="utf-8").splitlines()]
    return {"short": sum(size <= SHORT for size in sizes) / len(sizes), "mean tokens": sum(sizes) / len(sizes)}


if __name__ == "__main__":
    main()
