"""Receipts, drawn: pictures of 84 x 120 pixels, and what stands on them as JSON with the keys of CORD-v2.

python examples/receipts/draw.py FOLDER [--train 8000] [--test 200] [--seed 0]

Till printers have one width for all characters: 7 in a line here. Shop, number of dishes, currency, decimal mark, ink,
paper, place on the paper and noise vary. Line prices of the held-out receipts are never those of the others: they
cannot be remembered, they have to be read.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

QUESTION = "Read the receipt."
# What the toys' image processor takes as it is: 7 x 10 soft tokens of 12 x 12 pixels.
_CELL, _COLUMNS, _ROWS = 12, 7, 10
_DISHES = ("TEA", "COLA", "SOUP", "RICE", "BREAD", "PIE", "HAM", "EGGS")
_SHOPS = ("CAFE 7", "BAR 21", "DELI", "NOODLES", "THE INN")
# As printed (the font has no other signs than $), whether it stands before the amount, decimal mark.
_CURRENCIES = (("$", True, "."), ("Rs", True, "."), ("kr", False, ","), ("Ft", False, ","))
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
    def total(self) -> str:
        """As it is printed."""
        sign, before, _ = _CURRENCIES[self.currency]
        amount = self.amount(sum(cents for _, _, cents in self.lines))
        return f"{sign}{amount}" if before else f"{amount}{sign}"

    @property
    def answer(self) -> dict[str, Any]:
        """The JSON: menu and total, with CORD-v2's keys."""
        menu = [{"nm": dish, "cnt": str(count), "price": self.amount(cents)} for count, dish, cents in self.lines]
        return {"menu": menu, "total": {"total_price": self.total}}


def invent(dice: random.Random, held_out: bool) -> Receipt:
    """A receipt of one or two different dishes."""
    dishes = dice.sample(_DISHES, dice.randint(1, 2))
    lines = tuple((dice.randint(1, 4), dish, _price(dice, held_out)) for dish in dishes)
    return Receipt(dice.choice(_SHOPS), lines, dice.randrange(len(_CURRENCIES)))


def _price(dice: random.Random, held_out: bool) -> int:
    while True:
        cents = dice.randint(100, 999)
        if (cents % _HELD_OUT_EVERY == 0) is held_out:
            return cents


@functools.cache
def _font() -> Any:
    return ImageFont.load_default(14)


def draw(receipt: Receipt, dice: random.Random) -> Image.Image:
    """A picture of it: the shop, each dish with its price below at the right edge, a rule, the total, some noise."""
    ink, paper = dice.randint(0, 70), dice.randint(200, 255)
    image = Image.new("L", (_CELL * _COLUMNS, _CELL * _ROWS), paper)
    pen = ImageDraw.Draw(image)
    left, top = dice.randint(-1, 1), dice.randint(-1, 1)

    def line(row: int, words: str, right: bool = False) -> None:
        start = _COLUMNS - len(words) if right else 0
        for column, character in enumerate(words, start):
            place = (left + (column + 0.5) * _CELL, top + (row + 0.5) * _CELL)
            pen.text(place, character, ink, _font(), anchor="mm")

    line(0, f"{receipt.shop:^{_COLUMNS}}")
    row = 1
    for count, dish, cents in receipt.lines:
        line(row, f"{count} {dish}")
        line(row + 1, receipt.amount(cents), right=True)
        row += 2
    rule = top + (row + 0.5) * _CELL
    pen.line((2, rule, _CELL * _COLUMNS - 2, rule), ink)
    line(row + 1, dice.choice(("TOTAL", "SUM")))
    line(row + 2, receipt.total, right=True)
    return _with_noise(image, dice)


def _with_noise(image: Image.Image, dice: random.Random) -> Image.Image:
    """Of the receipt's own seed."""
    grain = np.random.default_rng(dice.getrandbits(32)).normal(0, dice.uniform(1, 12), image.size[::-1])
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype("uint8")).convert("RGB")


def blank(image: Image.Image) -> Image.Image:
    """A picture of the same size with nothing on it."""
    return Image.new("RGB", image.size, (230, 230, 230))


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
    image.save(folder / "images" / f"{name}.png", compress_level=1)
    question = [{"type": "image", "path": f"images/{name}.png"}, {"type": "text", "text": QUESTION}]
    answer = json.dumps(receipt.answer, separators=(",", ":"))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    said = parser.parse_args()
    write(said.folder, said.train, said.test, said.seed)


if __name__ == "__main__":
    main()
