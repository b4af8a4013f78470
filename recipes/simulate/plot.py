"""A picture of a simulated step, as SVG: a timeline by stage, and each stage's memory by kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from recipes.simulate.run import Forecast

_WIDTH, _LEFT, _ROW, _GAP = 1200, 90, 22, 6
_COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "waiting": "#e6e6e6", "update": "#54a24b"}
_KINDS = ("#72b7b2", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d", "#bab0ac", "#4c78a8", "#f58518", "#54a24b", "#e45756")


def plot(forecast: Forecast) -> str:
    """The picture's text. Seconds run to the right; below, GB of each stage with the GPU's memory as a line."""
    ranks, simulation = forecast.step.ranks, forecast.simulation
    height = 2 * len(ranks) * (_ROW + _GAP) + 200
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(
            10,
            20,
            f"simulated, not run: {simulation.parallel} on {simulation.world_size} × "
            f"{forecast.hardware.name}, a step of {forecast.seconds:.2f} s, bubble {forecast.step.bubble:.0%}",
        ),
    ]
    top = 40.0
    lines += _legend(list(_COLOURS), list(_COLOURS.values()), top)
    lines += _timeline(forecast, top + 26)
    top += 50 + len(ranks) * (_ROW + _GAP)
    lines += _memory(forecast, top)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _timeline(forecast: Forecast, top: float) -> Iterator[str]:
    scale = (_WIDTH - _LEFT - 20) / forecast.seconds
    for number, rank in enumerate(forecast.step.ranks):
        y = top + number * (_ROW + _GAP)
        yield _text(10, y + 15, f"stage {rank.pp_rank}")
        yield _box(_LEFT, y, forecast.seconds * scale, "#e6e6e6", "waiting")
        for span in rank.spans:
            title = f"{span.name}: {span.start:.3f} to {span.stop:.3f} s"
            yield _box(_LEFT + span.start * scale, y, (span.stop - span.start) * scale, _COLOURS[span.name], title)


def _memory(forecast: Forecast, top: float) -> Iterator[str]:
    ranks = forecast.simulation.ranks
    parts = [
        {"weights": m.weights, "gradients": m.gradients, "optimizer": m.optimizer, **m.at_peak}
        for m in (rank.memory for rank in ranks)
    ]
    kinds = sorted({kind for part in parts for kind in part}, key=lambda kind: -max(p.get(kind, 0) for p in parts))
    colours = {kind: _KINDS[i % len(_KINDS)] for i, kind in enumerate(kinds)}
    most = max(forecast.hardware.bytes, *(rank.memory.total for rank in ranks))
    scale = (_WIDTH - _LEFT - 20) / most
    yield _text(10, top, "memory at each stage's worst moment, GB")
    yield from _legend(kinds, list(colours.values()), top + 10)
    top += 60
    for number, (rank, part) in enumerate(zip(ranks, parts, strict=True)):
        y, x = top + number * (_ROW + _GAP), float(_LEFT)
        yield _text(10, y + 15, f"stage {rank.pp_rank}")
        for kind in kinds:
            size = part.get(kind, 0)
            if size > 0:
                yield _box(x, y, size * scale, colours[kind], f"{kind}: {size / 1e9:.2f} GB")
                x += size * scale
        yield _text(x + 4, y + 15, f"{rank.memory.total / 1e9:.1f}")
    line = _LEFT + forecast.hardware.bytes * scale
    bottom = top + len(ranks) * (_ROW + _GAP)
    yield f'<line x1="{line:.1f}" y1="{top - 4:.1f}" x2="{line:.1f}" y2="{bottom:.1f}" stroke="#e45756"/>'


def _legend(names: Sequence[str], colours: Sequence[str], top: float) -> Iterator[str]:
    x, y = float(_LEFT), top
    for name, colour in zip(names, colours, strict=True):
        if x > _WIDTH - 160:
            x, y = float(_LEFT), y + 16
        yield f'<rect x="{x:.0f}" y="{y:.0f}" width="12" height="12" fill="{colour}"/>'
        yield _text(x + 16, y + 11, name)
        x += 30 + 7 * len(name)


def _box(x: float, y: float, width: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0.0):.2f}" height="{_ROW}" fill="{colour}" stroke="white" '
        f'stroke-width="0.3"><title>{escape(title)}</title></rect>'
    )


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
