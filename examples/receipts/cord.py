"""CORD-v2 of the Hugging Face hub as conversations about pictures: train.jsonl, validation.jsonl, test.jsonl.

python examples/receipts/cord.py FOLDER [--dataset naver-clova-ix/cord-v2]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
from draw import QUESTION


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", default="naver-clova-ix/cord-v2")
    said = parser.parse_args()
    for split, rows in datasets.load_dataset(said.dataset).items():
        print(f"{split}: {write(rows, said.folder, split)} receipts")


def write(rows: Any, folder: Path, split: str) -> int:
    """One split; how many receipts it has."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        name = f"{split}/{number:04d}.png"
        row["image"].convert("RGB").save(folder / name)
        answer = json.dumps(json.loads(row["ground_truth"])["gt_parse"], ensure_ascii=False)
        question = [{"type": "image", "path": name}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


if __name__ == "__main__":
    main()
