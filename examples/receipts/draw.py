"""Receipts, drawn: pictures of 96 x 96 pixels, and what stands on them as JSON with the keys of CORD-v2.

python examples/receipts/draw.py FOLDER [--train 8000] [--cells 6400] [--test 200] [--seed 0]

Till printers have one width for all characters: 8 in a line here. Prices are like those of CORD-v2, from Indonesian
shops: whole thousands and five hundreds. Shop, number of dishes, currency, mark of the thousands, ink, paper, place on
the paper and noise vary. Line prices of the held-out receipts are never those of the others: they cannot be remembered,
they have to be read.
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

QUESTION, LETTERS = "Read the receipt.", "What is printed?"
# What the toys' image processor takes as it is: 8 x 8 soft tokens of 12 x 12 pixels.
_CELL, _COLUMNS, _ROWS = 12, 8, 8
_RULE = "-" * _COLUMNS
_DISHES = ("TEA", "COLA", "SOUP", "RICE", "BREAD", "PIE", "HAM", "EGGS")
_SHOPS = ("CAFE 7", "BAR 21", "DELI", "NOODLES", "THE INN")
# Before a total, and mark of the thousands.
_CURRENCIES = (("Rp", "."), ("Rp", ","), ("", "."), ("", ","))
_TOTALS = ("TOTAL", "SUM")
# All that is printed on receipts, but blanks and the rule.
_CHARACTERS = sorted({*"".join((*_DISHES, *_SHOPS, *_TOTALS, "Rp.,0123456789"))} - {" "})
# Prices are multiples of 500, up to 49.500. One in so many is of held-out receipts alone.
_STEP, _PRICES, _HELD_OUT_EVERY = 500, range(2, 100), 7


@dataclass(frozen=True)
class Receipt:
    """What is on a receipt: lines of (how many, dish, price), and the currency's number."""

    shop: str
    lines: tuple[tuple[int, str, int], ...]
    currency: int

    def amount(self, price: int) -> str:
        """As it is printed, without the currency."""
        return f"{price:,}".replace(",", _CURRENCIES[self.currency][1])

    @property
    def total(self) -> str:
        """As it is printed."""
        return _CURRENCIES[self.currency][0] + self.amount(sum(price for _, _, price in self.lines))

    @property
    def answer(self) -> dict[str, Any]:
        """The JSON: menu and total, with CORD-v2's keys."""
        menu = [{"nm": dish, "cnt": str(count), "price": self.amount(price)} for count, dish, price in self.lines]
        return {"menu": menu, "total": {"total_price": self.total}}


def invent(dice: random.Random, held_out: bool) -> Receipt:
    """A receipt of one or two different dishes."""
    dishes = dice.sample(_DISHES, dice.randint(1, 2))
    lines = tuple((dice.randint(1, 4), dish, _price(dice, held_out)) for dish in dishes)
    return Receipt(dice.choice(_SHOPS), lines, dice.randrange(len(_CURRENCIES)))


def _price(dice: random.Random, held_out: bool) -> int:
    while True:
        steps = dice.choice(_PRICES)
        if (steps % _HELD_OUT_EVERY == 0) is held_out:
            return steps * _STEP


@functools.cache
def _font() -> Any:
    return ImageFont.load_default(14)


def printed(receipt: Receipt, dice: random.Random) -> list[str]:
    """The lines, of as many characters each: the shop, each dish with its price below, a rule, the total."""
    lines = [f"{receipt.shop:^{_COLUMNS}}"]
    for count, dish, price in receipt.lines:
        lines += [f"{count} {dish}", f"{receipt.amount(price):>{_COLUMNS}}"]
    lines += [_RULE, dice.choice(_TOTALS), f"{receipt.total:>{_COLUMNS}}"]
    return [line.ljust(_COLUMNS) for line in lines] + [" " * _COLUMNS] * (_ROWS - len(lines))


def cells(dice: random.Random) -> list[str]:
    """Lines of characters at random, half of them none: nothing can be guessed, each has to be read where it stands."""
    return ["".join(dice.choice((" ", dice.choice(_CHARACTERS))) for _ in range(_COLUMNS)) for _ in range(_ROWS)]


def draw(lines: list[str], dice: random.Random) -> Image.Image:
    """A picture of them, with some noise."""
    ink, paper = dice.randint(0, 70), dice.randint(200, 255)
    image = Image.new("L", (_CELL * _COLUMNS, _CELL * _ROWS), paper)
    pen = ImageDraw.Draw(image)
    left, top = dice.randint(-1, 1), dice.randint(-1, 0)
    for row, line in enumerate(lines):
        middle = top + (row + 0.5) * _CELL
        if line == _RULE:
            pen.line((2, middle, _CELL * _COLUMNS - 2, middle), ink)
            continue
        for column, character in enumerate(line):
            pen.text((left + (column + 0.5) * _CELL, middle), character, ink, _font(), anchor="mm")
    return _with_noise(image, dice)


def _with_noise(image: Image.Image, dice: random.Random) -> Image.Image:
    """Of the receipt's own seed."""
    grain = np.random.default_rng(dice.getrandbits(32)).normal(0, dice.uniform(1, 12), image.size[::-1])
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype("uint8")).convert("RGB")


def blank(image: Image.Image) -> Image.Image:
    """A picture of the same size with nothing on it."""
    return Image.new("RGB", image.size, (230, 230, 230))


def write(folder: Path, train: int, letters: int, test: int, seed: int) -> None:
    """train.jsonl, test.jsonl, and blank.jsonl, which is the latter with nothing on the pictures; cells.jsonl asks for
    every character of pictures of `cells`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {"train": [], "test": [], "blank": [], "cells": []}
    for number in range(train + test):
        dice = random.Random(f"{seed} {number}")
        receipt = invent(dice, held_out=number >= train)
        image = draw(printed(receipt, dice), dice)
        answer = json.dumps(receipt.answer, separators=(",", ":"))
        name = _save(folder, f"{number:05d}", image)
        rows["train" if number < train else "test"].append(_row(name, QUESTION, answer))
        if number >= train:
            rows["blank"].append(_row(_save(folder, f"{number:05d}-blank", blank(image)), QUESTION, answer))
    for number in range(letters):
        dice = random.Random(f"{seed} cells {number}")
        lines = cells(dice)
        name = _save(folder, f"cells-{number:05d}", draw(lines, dice))
        rows["cells"].append(_row(name, LETTERS, "".join(lines).replace(" ", "_")))
    for name, written in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(written), encoding="utf-8")


def _save(folder: Path, name: str, image: Image.Image) -> str:
    path = f"images/{name}.png"
    image.save(folder / path, compress_level=1)
    return path


def _row(image: str, asked: str, answer: str) -> str:
    question = [{"type": "image", "path": image}, {"type": "text", "text": asked}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--cells", type=int, default=6400)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    said = parser.parse_args()
    write(said.folder, said.train, said.cells, said.test, said.seed)


if __name__ == "__main__":
    main()
