"""The rewards of runs by step, as an SVG with a panel for each task.

python examples/grpo/curves.py PICTURE.svg FOLDER...   (folders that were run.py's --work)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 400, 220, 40
COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5")
Points = list[tuple[int, float]]


def main() -> None:
    picture, *folders = map(Path, sys.argv[1:])
    panels: dict[str, list[tuple[int, Points]]] = {}
    for folder in folders:
        said = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        panels.setdefault(said["task"], []).append((said["seed"], rewards(folder)))
    width = len(panels) * (WIDTH + MARGIN) + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT + 2 * MARGIN}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (task, runs) in enumerate(panels.items()):
        lines += panel(task, runs, MARGIN + number * (WIDTH + MARGIN))
    picture.write_text("\n".join([*lines, "</svg>"]) + "\n", encoding="utf-8")


def rewards(folder: Path) -> Points:
    """(step, mean reward of the answers of a step) of every line of the log that has one."""
    lines = map(json.loads, (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["reward"]) for line in lines if "reward" in line]


def panel(task: str, runs: list[tuple[int, Points]], left: int) -> list[str]:
    """Rewards upwards from 0 to 1, steps to the right, a line for each seed."""
    steps, bottom = max(points[-1][0] for _, points in runs), MARGIN + HEIGHT
    lines = [text(left, MARGIN - 14, f"{task}: mean reward of a step's answers, by step")]
    for value in (0.0, 0.2, 0.9, 1.0):
        y = bottom - HEIGHT * value
        lines.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#dddddd"/>')
        lines.append(text(left - 22, y + 4, f"{value:.1f}"))
    lines += [text(left, bottom + 16, "1"), text(left + WIDTH - 20, bottom + 16, str(steps))]
    for number, (seed, points) in enumerate(sorted(runs)):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(f"{left + WIDTH * step / steps:.1f},{bottom - HEIGHT * value:.1f}" for step, value in points)
        lines.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        lines.append(text(left + WIDTH - 60, bottom - 60 + 16 * number, f"seed {seed}", colour))
    return lines


def text(x: float, y: float, said: str, colour: str = "#222222") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}">{said}</text>'


if __name__ == "__main__":
    main()
