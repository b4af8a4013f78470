"""Files of several sources, and recipes that blend them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.config import resolve

from .data_helpers import chat, write_jsonl


def write_sources(folder: Path) -> Path:
    """A folder of chats (20), code (30, Alpaca's columns), facts (10) and pairs (8)."""
    write_jsonl(folder / "chats.jsonl", [chat(f"hello {n}", f"good day {n}") for n in range(20)])
    write_jsonl(folder / "code.jsonl", [{"instruction": f"add {n}", "output": f"{n} + {n}"} for n in range(30)])
    write_jsonl(folder / "facts.jsonl", [{"text": f"the number {n} is {n * n} squared"} for n in range(10)])
    pairs = [{"prompt": f"say {n}", "chosen": str(n), "rejected": f"no {n}"} for n in range(8)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "more.jsonl", pairs[:5])
    labelled = [{"prompt": f"say {n}", "completion": str(n), "label": n % 2 == 0} for n in range(8)]
    write_jsonl(folder / "labelled.jsonl", labelled)
    write_jsonl(folder / "others.jsonl", labelled[:5])
    return folder


def said(model: Path, files: Path, sources: str, *keys: str) -> Any:
    recipe = {
        "output": "run",
        "model": {"hf": str(model)},
        "data": {"cache": str(files / "cache")},
        "train": {"steps": 10, "global_batch_size": 4, "seq_length": 128, "seed": 3},
    }
    return resolve(recipe, [f"data.sources={sources}".replace("DIR", str(files)), *keys])


CHATS_AND_CODE = "[{path: DIR/chats.jsonl, weight: 3}, {path: DIR/code.jsonl, weight: 1}]"
