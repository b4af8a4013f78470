"""Runs with a teacher, for the tests. What ranks call lives here, so that they import nothing but this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SEED = 3


def write_chats(folder: Path, pictures: bool) -> Path:
    """Eight conversations, some with a picture or two, as JSON lines."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(8):
        content: list[dict[str, str]] = [{"type": "text", "text": f"Count {number} up to {number + number % 3}."}]
        for picture in range(number % 3 if pictures else 0):
            name = f"{number}-{picture}.png"
            Image.new("RGB", (24 + 8 * number, 24 + 16 * picture), (31 * number, 40, 90 * picture)).save(folder / name)
            content.insert(0, {"type": "image", "path": name})
        answer = " ".join(str(number + step) for step in range(2 + number % 3))
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(student: Path, teacher: Path, data: Path, output: Path, distill: dict[str, Any]) -> dict[str, Any]:
    return {
        "output": str(output),
        "model": {"hf": str(student), "dtype": "float32"},
        "data": {"path": str(data), "cache": str(data.parent / "cache")},
        "distill": {"teacher": str(teacher), **distill},
        "train": {"steps": 3, "global_batch_size": 8, "micro_batch_size": 2, "seq_length": 192, "seed": SEED},
        "optimizer": {"lr": 2e-3, "schedule": "constant", "min_lr": 2e-3, "eps": 1e-6},
    }
