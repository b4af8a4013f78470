"""What is asked: a number and 1, in many wordings; and the digit of a drawn bar's colour in the code of resistors.

A row is of prompt-completion data, with images' paths beside the data. What is asked comes in an order in which as many
rows as a step takes have each answer as often.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Each of the numbers and 1 are added, and asked for in all of these wordings, of which so many are held out.
NUMBERS = range(1, 9)
WORDINGS = ("{}+1", "{} + 1", "{} plus 1", "{} and 1", "{} add 1", "1 more than {}", "1 after {}", "sum of {} and 1")
WORDINGS_HELD_OUT = 2
# Colours as red, green and blue, which are low or high, with their digits; and how many pictures of each one are asked
# in training, and held out. The processor makes 35 soft tokens of a picture 18 times as wide as high, 64 of a square:
# strips are quicker.
COLOURS = {"red": ("2", (1, 0, 0)), "yellow": ("4", (1, 1, 0)), "green": ("5", (0, 1, 0))}
COLOURS |= {"blue": ("6", (0, 0, 1)), "violet": ("7", (1, 0, 1))}
ASKED, HELD_OUT, WIDTH, HEIGHT = 48, 12, 216, 12
# Of each row, with random digits, to teach the form of an answer.
FORMS = 10


@dataclass(frozen=True)
class Task:
    """`form`: what is asked, with digits at random; `asked` in training; `held_out`; `blank`: without the bar."""

    form: list[Row]
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
    count = WORDINGS_HELD_OUT * len(NUMBERS)
    return Task(form(rows[count:], "23456789", dice), rows[count:], rows[:count], [])


def colours(dice: random.Random, folder: Path) -> Task:
    """Pictures of a bar, whose shades, lengths, places and backgrounds are all different; each colour as often."""
    rows, count = [], HELD_OUT * len(COLOURS)
    for number in range(count + ASKED * len(COLOURS)):
        digit, colour = list(COLOURS.values())[number % len(COLOURS)]
        path = f"{number}.png"
        draw(dice, colour, folder / path)
        rows.append({"prompt": "Digit?", "images": [path], "completion": digit})
    draw(dice, None, folder / "blank.png")
    blank = [row | {"images": ["blank.png"]} for row in rows[:count]]
    return Task(form(rows[count:], "0123456789", dice), rows[count:], rows[:count], blank)


def form(rows: Sequence[Row], digits: str, dice: random.Random) -> list[Row]:
    """`rows`, over and over, with `digits` at random, which say nothing of what is right."""
    return [row | {"completion": dice.choice(digits)} for _ in range(FORMS) for row in rows]


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
