"""A toy Gemma 4 learns to read handwritten digits: toy checkpoint, training, export, transformers' own generate.

python examples/sft_digits/run.py [--variants e4b,26b-a4b] [--work FOLDER] [key=value ...]
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
from typing import Any

QUESTION = "Which digit is this?"
HELD_OUT = 297
BRIDGE = [sys.executable, "-m", "bridge.cli"]
RECIPE = Path(__file__).with_name("recipe.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="e4b,26b-a4b", help="with commas")
    parser.add_argument("--work", type=Path, default=Path(".digits"))
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks, one thread each")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    said = parser.parse_args()
    shutil.rmtree(said.work, ignore_errors=True)
    write_digits(said.work)
    results = [one(variant, said.work, said.ranks, said.overrides) for variant in said.variants.split(",")]
    for result in results:
        print(json.dumps(result))
    sys.exit(any(result["trained"] < 0.95 or result["untrained"] > 0.2 for result in results))


def write_digits(work: Path) -> None:
    """The 1797 digits, 8 x 8 pixels each, as PNG files, and a conversation about each; `HELD_OUT` apart."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    (work / "images").mkdir(parents=True)
    rows = []
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"images/{number:04d}.png"
        Image.fromarray((pixels * (255 / 16)).astype("uint8")).convert("RGB").save(work / name)
        question = [{"type": "image", "path": name}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": str(digit)}]
        rows.append(json.dumps({"messages": messages}) + "\n")
    # In the order of the set, the last ones are of other writers than the rest.
    random.Random(0).shuffle(rows)
    (work / "train.jsonl").write_text("".join(rows[:-HELD_OUT]), encoding="utf-8")
    (work / "test.jsonl").write_text("".join(rows[-HELD_OUT:]), encoding="utf-8")


def one(variant: str, work: Path, ranks: int, overrides: list[str]) -> dict[str, Any]:
    """Toy, training, export, and both accuracies of one variant."""
    toy, run, tuned = (work / f"{variant}-{name}" for name in ("toy", "run", "tuned"))
    start = time.perf_counter()
    subprocess.run([*BRIDGE, "toy", variant, str(toy), "--dtype", "float32"], check=True)
    untrained = accuracy(toy, work)
    begun = time.perf_counter()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    given = [f"model.hf={toy}", f"data.path={work / 'train.jsonl'}", f"data.eval={work / 'test.jsonl'}"]
    given += [f"data.cache={work / 'cache'}", f"output={run}", *overrides]
    subprocess.run([*launcher, "bridge.cli", "train", str(RECIPE), *given], check=True)
    trained_in = time.perf_counter() - begun
    subprocess.run([*BRIDGE, "export", str(run), str(tuned)], check=True)
    return {
        "variant": variant,
        "held out": HELD_OUT,
        "untrained": untrained,
        "trained": accuracy(tuned, work),
        "training seconds": round(trained_in),
        "all seconds": round(time.perf_counter() - start),
    }


def accuracy(folder: Path, work: Path, batch: int = 33) -> float:
    """The part of the held-out digits that transformers' `generate` names exactly, and then ends its turn."""
    import torch
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForMultimodalLM.from_pretrained(folder, attn_implementation="eager").eval()
    rows = [json.loads(line)["messages"] for line in (work / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    right = 0
    for start in range(0, len(rows), batch):
        asked = [with_absolute_paths(messages[:1], work) for messages in rows[start : start + batch]]
        inputs = processor.apply_chat_template(
            asked, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        for ids, (_, answer) in zip(
            output[:, inputs["input_ids"].shape[1] :], rows[start : start + batch], strict=True
        ):
            right += processor.decode(ids, skip_special_tokens=False).startswith(f"{answer['content']}<turn|>")
    return right / len(rows)


def with_absolute_paths(messages: list[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """The messages as transformers reads them: an image is a file's full name."""

    def part(said: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "path": str((work / said["path"]).resolve())} if said["type"] == "image" else said

    return [message | {"content": [part(said) for said in message["content"]]} for message in messages]


if __name__ == "__main__":
    main()
