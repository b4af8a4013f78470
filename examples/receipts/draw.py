"""Receipts, drawn: pictures of 84 x 120 pixels and what stands on them as JSON, shaped as CORD-v2 has it.

python examples/receipts/draw.py FOLDER [--train 4000] [--test 200] [--seed 0]

Layouts, currencies, decimal marks, grey and noise vary. Line prices of the held-out receipts are never those of the
others: they cannot be remembered, they have to be read.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

QUESTION = "Read the receipt."
SIZE = (84, 120)  # what the toys' image processor takes as it is: 7 x 10 soft tokens of 12 x 12 pixels
_LINE = 12
_DISHES = ("TEA", "COLA", "SOUP", "RICE", "CAKE", "PIE", "HAM", "BEER")
_SHOPS = ("CAFE LUNA", "BAR 21", "DELI", "NOODLES", "THE INN")
# As printed (the font has no other signs than $), whether it stands before the amount, decimal mark, code.
_CURRENCIES = (
    ("$", True, ".", "USD"),
    ("Rs ", True, ".", "INR"),
    (" EUR", False, ",", "EUR"),
    (" kr", False, ",", "SEK"),
)
# Of the prices in cents, one in so many is of held-out receipts alone.
_HELD_OUT_EVERY = 7


@dataclass(frozen=True)
class Receipt:
    """What is on a receipt: lines of (how many, dish, cents), and the currency's number."""

    shop: str
    lines: tuple[tuple[int, str, int], ...]
    currency: int

    def amount(self, cents: int) -> str:
        """As it is printed, without the currency."""
        return f"{cents // 100}{_CURRENCIES[self.currency][2]}{cents % 100:02d}"

    @property
    def answer(self) -> dict[str, Any]:
        """The JSON, as CORD-v2 has it: menu and total."""
        menu = [{"nm": dish, "cnt": str(count), "price": self.amount(cents)} for count, dish, cents in self.lines]
        total = self.amount(sum(cents for _, _, cents in self.lines))
        return {"menu": menu, "total": {"total_price": total, "currency": _CURRENCIES[self.currency][3]}}


def invent(dice: random.Random, held_out: bool) -> Receipt:
    """A receipt of one to three different dishes."""
    dishes = dice.sample(_DISHES, dice.randint(1, 3))
    lines = tuple((dice.randint(1, 4), dish, _price(dice, held_out)) for dish in dishes)
    return Receipt(dice.choice(_SHOPS), lines, dice.randrange(len(_CURRENCIES)))


def _price(dice: random.Random, held_out: bool) -> int:
    while True:
        cents = dice.randint(100, 999)
        if (cents % _HELD_OUT_EVERY == 0) is held_out:
            return cents


def draw(receipt: Receipt, dice: random.Random) -> Image.Image:
    """A picture of it: the shop, the lines with their prices at the right edge, the total at the bottom, some noise."""
    ink, paper = dice.randint(0, 60), dice.randint(215, 255)
    image = Image.new("L", SIZE, paper)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    left, right = dice.randint(1, 4), SIZE[0] - dice.randint(1, 4)
    top = dice.randint(0, 3)
    times = dice.choice(("", "x"))

    def line(row: int, words: str, amount: str = "") -> None:
        y = top + row * _LINE
        pen.text((left, y), words, ink, font)
        pen.text((right - pen.textlength(amount, font), y), amount, ink, font)

    pen.text(((SIZE[0] - pen.textlength(receipt.shop, font)) // 2, top), receipt.shop, ink, font)
    row = dice.choice((1, 2))
    for count, dish, cents in receipt.lines:
        line(row, f"{count}{times} {dish}", receipt.amount(cents))
        row += 1
    sign, before, *_ = _CURRENCIES[receipt.currency]
    total = receipt.amount(sum(cents for _, _, cents in receipt.lines))
    rule = top + row * _LINE + 6
    pen.line((left, rule, right, rule), ink)
    line(row + 1, dice.choice(("TOTAL", "SUM")))
    line(row + 2, "", f"{sign}{total}" if before else f"{total}{sign}")
    return _with_noise(image, dice)


def _with_noise(image: Image.Image, dice: random.Random) -> Image.Image:
    """Of its own seed: PIL's is another one every time."""
    grain = np.random.default_rng(dice.getrandbits(32)).normal(0, dice.uniform(1, 12), image.size[::-1])
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype("uint8")).convert("RGB")


def blank(image: Image.Image) -> Image.Image:
    """A picture of the same size and shade, with nothing on it."""
    return Image.new("RGB", image.size, image.getpixel((image.width - 1, image.height - 1)))


def write(folder: Path, train: int, test: int, seed: int) -> None:
    """train.jsonl, test.jsonl, and blank.jsonl, which is the latter with nothing on the pictures."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {"train": [], "test": [], "blank": []}
    for number in range(train + test):
        dice = random.Random(f"{seed} {number}")
        receipt = invent(dice, held_out=number >= train)
        image = draw(receipt, dice)
        if number < train:
            rows["train"].append(_row(folder, f"{number:05d}", image, receipt))
        else:
            rows["test"].append(_row(folder, f"{number:05d}", image, receipt))
            rows["blank"].append(_row(folder, f"{number:05d}-blank", blank(image), receipt))
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _row(folder: Path, name: str, image: Image.Image, receipt: Receipt) -> str:
    image.save(folder / "images" / f"{name}.png")
    question = [{"type": "image", "path": f"images/{name}.png"}, {"type": "text", "text": QUESTION}]
    answer = json.dumps(receipt.answer, separators=(",", ":"))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    said = parser.parse_args()
    write(said.folder, said.train, said.test, said.seed)


if __name__ == "__main__":
    main()
