"""What is asked: sums in many wordings, and which colour a bar on a drawn picture has. As many prompts of each answer.

A prompt is a row of prompt-completion data, whose completion is the right answer, with images' paths beside the data.
Rows come in an order in which so many of them as a step takes have each answer as often.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Sums of each result, each asked for in all of these wordings, one of which is held out.
RESULTS, SUMS = range(2, 10), 3
WORDINGS = ("{}+{}", "{} + {}", "{} and {}", "{} plus {}", "{} add {}", "sum {} {}")
# Eight colours by letters (k: black), as red, green and blue, which are low or high; and how many pictures of each one
# are asked in training, and held out. The processor makes 35 soft tokens of a picture 18 times as wide as high, 64 of a
# square: strips are quicker.
COLOURS = {"k": (0, 0, 0), "b": (0, 0, 1), "g": (0, 1, 0), "c": (0, 1, 1), "r": (1, 0, 0), "m": (1, 0, 1)}
COLOURS |= {"y": (1, 1, 0), "w": (1, 1, 1)}
ASKED, HELD_OUT, QUESTION, WIDTH, HEIGHT = 48, 10, "Colour?", 216, 12


@dataclass(frozen=True)
class Task:
    """`form`: the prompts with answers at random; `asked` in training; `held_out`; `blank`: without the picture."""

    form: list[Row]
    asked: list[Row]
    held_out: list[Row]
    blank: list[Row]


def sums(dice: random.Random) -> Task:
    """Of every sum one wording is held out."""
    of_sums = []
    for result in RESULTS:
        for a in dice.sample(range(result + 1), SUMS):
            wordings = dice.sample(WORDINGS, len(WORDINGS))
            of_sums.append([{"prompt": said.format(a, result - a), "completion": str(result)} for said in wordings])
    held_out, *asked = ([rows[place] for rows in of_sums] for place in range(len(WORDINGS)))
    rows = [row for of_wording in asked for row in of_wording]
    return Task(form(rows * 4, [str(result) for result in RESULTS], dice), rows, held_out, [])


def colours(dice: random.Random, folder: Path) -> Task:
    """Pictures of a bar, whose shades, lengths, places and backgrounds are all different; each colour as often."""
    rows = []
    for number in range((ASKED + HELD_OUT) * len(COLOURS)):
        name, path = list(COLOURS)[number % len(COLOURS)], f"{number}.png"
        draw(dice, COLOURS[name], folder / path)
        rows.append({"prompt": QUESTION, "images": [path], "completion": name})
    draw(dice, None, folder / "blank.png")
    asked, held_out = rows[: ASKED * len(COLOURS)], rows[ASKED * len(COLOURS) :]
    blank = [row | {"images": ["blank.png"]} for row in held_out]
    return Task(form(asked, list(COLOURS), dice), asked, held_out, blank)


def form(rows: Sequence[Row], answers: Sequence[str], dice: random.Random) -> list[Row]:
    """`rows` with one of the `answers` at random, which says nothing of what is right."""
    return [row | {"completion": dice.choice(answers)} for row in rows]


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
