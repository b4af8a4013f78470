"""Statistics of a corpus as a picture: an SVG with lengths, what is learnt, how full rows get, and sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from bridge.errors import DataError, UsageError
from recipes.data.corpus import Corpus
from recipes.data.show import packing_figures

_WIDTH, _HEIGHT, _MARGIN, _LINE = 440, 260, 24, 15
_BINS, _SOURCES = 24, 8
_COLOUR, _INK, _FONT = "#2b6cb0", "#222222", "font-family='sans-serif' font-size='11'"


@dataclass(frozen=True)
class Panel:
    """Bars, each with its name and what is written behind it."""

    title: str
    names: Sequence[str]
    values: Sequence[float]
    said: Sequence[str]
    # Bars stand (a distribution, of which only the outermost names are written) or lie.
    standing: bool


def check_plot(path: Path) -> None:
    """Raises UsageError for what `write_plot` does not write."""
    if path.suffix.lower() != ".svg":
        raise UsageError(f"--plot {path}: is written as .svg, which every browser shows")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: its folder does not exist")


def write_plot(corpus: Corpus, path: Path) -> None:
    """Raises DataError where it cannot be written."""
    try:
        path.write_text(svg(panels(corpus)), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None


def panels(corpus: Corpus) -> list[Panel]:
    """What is drawn."""
    lengths = corpus.lengths
    counts, edges = np.histogram(lengths, _BINS, (0, int(lengths.max())))
    statistics, packing = corpus.statistics, packing_figures(corpus)
    learnt, parts = np.histogram(corpus.supervised / lengths, _BINS, (0, 1))
    tokens = corpus.source_tokens
    largest = np.argsort(-tokens, kind="stable")[:_SOURCES]
    rest = int(tokens.sum() - tokens[largest].sum())
    names = [Path(corpus.files[source]).name for source in largest] + ["others"] * bool(rest)
    of_sources = [*(int(tokens[source]) for source in largest), *([rest] if rest else [])]
    full = [packing["efficiency"] or 0.0, packing["unpacked_efficiency"]]
    return [
        Panel(
            f"{len(lengths)} samples by tokens, {statistics.tokens / len(lengths):.0f} in the mean",
            [f"{edge:.0f}" for edge in edges],
            counts.tolist(),
            [str(count) for count in counts],
            standing=True,
        ),
        Panel(
            f"samples by the part that is learnt, {statistics.supervised_fraction:.1%} of all tokens",
            [f"{part:.0%}" for part in parts],
            learnt.tolist(),
            [str(count) for count in learnt],
            standing=True,
        ),
        Panel(
            f"real tokens in rows of {corpus.options.seq_length}",
            ["packed", "one sample a row"],
            full,
            [f"{one:.1%}" for one in full],
            standing=False,
        ),
        Panel("tokens by sources", names, of_sources, [f"{count:,}" for count in of_sources], standing=False),
    ]


def svg(drawn: Sequence[Panel]) -> str:
    """Panels, two beside each other."""
    rows = -(-len(drawn) // 2)
    body = "".join(_panel(one, (n % 2) * _WIDTH, (n // 2) * _HEIGHT) for n, one in enumerate(drawn))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {2 * _WIDTH} {rows * _HEIGHT}' {_FONT} fill='{_INK}'>"
        f"<rect width='100%' height='100%' fill='white'/>{body}</svg>\n"
    )


def _panel(panel: Panel, left: int, top: int) -> str:
    x, y = left + _MARGIN, top + _MARGIN
    title = f"<text x='{x}' y='{y}' font-weight='bold'>{escape(panel.title)}</text>"
    width, height = _WIDTH - 2 * _MARGIN, _HEIGHT - 3 * _MARGIN
    most = max(panel.values, default=0) or 1
    return title + (_standing if panel.standing else _lying)(panel, most, x, y + _LINE, width, height)


def _standing(panel: Panel, most: float, x: int, y: int, width: int, height: int) -> str:
    step = width / len(panel.values)
    bars = "".join(
        f"<rect x='{x + n * step:.1f}' y='{y + height * (1 - value / most):.1f}' width='{step - 1:.1f}' "
        f"height='{height * value / most:.1f}' fill='{_COLOUR}'><title>{escape(said)}</title></rect>"
        for n, (value, said) in enumerate(zip(panel.values, panel.said, strict=True))
    )
    ends = f"<text x='{x}' y='{y + height + _LINE}'>{escape(panel.names[0])}</text>"
    return (
        f"{bars}{ends}<text x='{x + width}' y='{y + height + _LINE}' text-anchor='end'>{escape(panel.names[-1])}</text>"
    )


def _lying(panel: Panel, most: float, x: int, y: int, width: int, height: int) -> str:
    step = height / max(4, len(panel.values))
    drawn = ""
    for n, (name, value, said) in enumerate(zip(panel.names, panel.values, panel.said, strict=True)):
        short = name if len(name) <= 22 else f"{name[:21]}…"
        middle = y + n * step + step / 2
        length = 0.4 * width * value / most
        drawn += (
            f"<text x='{x}' y='{middle + 4:.1f}'>{escape(short)}</text>"
            f"<rect x='{x + 0.38 * width:.1f}' y='{middle - 6:.1f}' width='{length:.1f}' height='12' fill='{_COLOUR}'/>"
            f"<text x='{x + 0.38 * width + length + 5:.1f}' y='{middle + 4:.1f}'>{escape(said)}</text>"
        )
    return drawn
