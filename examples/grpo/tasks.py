"""What is asked: a number and 1, in many wordings; and the digit of a drawn bar's colour in the code of resistors.

A row is of prompt-completion data, with images' paths beside the data. What is asked comes in an order in which as many
rows as a step takes have each answer as often.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Each of the numbers and 1 are added, and asked for in all of these wordings, of which so many are held out.
NUMBERS = dict(enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine"), 1))
WORDINGS = ("{}+1", "{} + 1", "{} plus 1", "{} and 1", "{} add 1", "1 more than {}", "1 after {}", "sum of {} and 1")
WORDINGS_HELD_OUT = 2
# Colours as red, green and blue, which are low or high, with their digits; and how many pictures of each one are asked
# in training, and held out. The processor makes 35 soft tokens of a picture 18 times as wide as high, 64 of a square:
# strips are quicker.
COLOURS = {"black": ("0", (0, 0, 0)), "red": ("2", (1, 0, 0)), "yellow": ("4", (1, 1, 0)), "green": ("5", (0, 1, 0))}
COLOURS |= {"blue": ("6", (0, 0, 1)), "violet": ("7", (1, 0, 1)), "white": ("9", (1, 1, 1))}
ASKED, HELD_OUT, WIDTH, HEIGHT = 48, 12, 216, 12
# Answers in words that a model is taught, and as many in digits.
TAUGHT = 3600


@dataclass(frozen=True)
class Task:
    """`taught`: what a model knows before, see `before`; `asked` in training; `held_out`; `blank`: without the bar."""

    taught: list[Row]
    asked: list[Row]
    held_out: list[Row]
    blank: list[Row]


def sums(dice: random.Random) -> Task:
    """Of every number some wordings are held out."""
    of_numbers = []
    for number in NUMBERS:
        wordings = dice.sample(WORDINGS, len(WORDINGS))
        of_numbers.append([{"prompt": said.format(number), "completion": str(number + 1)} for said in wordings])
    rows = [of_number[place] for place in range(len(WORDINGS)) for of_number in of_numbers]
    names = [name for _ in WORDINGS for name in NUMBERS.values()]
    return task(rows, names, WORDINGS_HELD_OUT * len(NUMBERS), dice)


def colours(dice: random.Random, folder: Path) -> Task:
    """Pictures of a bar, whose shades, lengths, places and backgrounds are all different; each colour as often."""
    rows, names = [], list(COLOURS) * (HELD_OUT + ASKED)
    for number, name in enumerate(names):
        digit, colour = COLOURS[name]
        path = f"{number}.png"
        draw(dice, colour, folder / path)
        rows.append({"prompt": "colour", "images": [path], "completion": digit})
    draw(dice, None, folder / "blank.png")
    return task(rows, names, HELD_OUT * len(COLOURS), dice, {"images": ["blank.png"]})


def task(rows: list[Row], names: list[str], held_out: int, dice: random.Random, blank: Row | None = None) -> Task:
    """Of `rows` with right answers, the first ones are held out. `names`: the answers in words."""
    asked = [row | {"prompt": f"{row['prompt']} as digit"} for row in rows]
    taught = before(rows[held_out:], names[held_out:], dice)
    without = [row | blank for row in asked[:held_out]] if blank else []
    return Task(taught, asked[held_out:], asked[:held_out], without)


def before(rows: Sequence[Row], names: Sequence[str], dice: random.Random) -> list[Row]:
    """Answers as words, which are right; and as digits, at random, which say nothing of what is right."""
    digits, found = sorted({row["completion"] for row in rows}), []
    for row, name in islice(cycle(zip(rows, names, strict=True)), TAUGHT):
        found.append(row | {"prompt": f"{row['prompt']} as word", "completion": name})
        found.append(row | {"prompt": f"{row['prompt']} as digit", "completion": dice.choice(digits)})
    return found


def draw(dice: random.Random, colour: Sequence[int] | None, path: Path) -> None:
    """A bar of that colour somewhere on a grey strip; None: the grey alone."""
    from PIL import Image, ImageDraw

    shade = dice.randint(110, 145)
    picture = Image.new("RGB", (WIDTH, HEIGHT), (shade, shade, shade))
    if colour is not None:
        size = dice.randint(WIDTH // 3, WIDTH - 8)
        left = dice.randint(0, WIDTH - size)
        red, green, blue = (dice.randint(190, 255) if high else dice.randint(0, 65) for high in colour)
        ImageDraw.Draw(picture).rectangle((left, 0, left + size, HEIGHT), fill=(red, green, blue))
    picture.save(path)
