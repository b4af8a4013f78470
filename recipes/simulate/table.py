"""Every shipped recipe on the clusters of docs/recipes-simulated.md, whose table this writes:

    python -m recipes.simulate.table docs/recipes-simulated.md            # all of it, an hour on two cores
    python -m recipes.simulate.table - --only sft/31b --clusters 64x80    # a part of it, to the terminal

Each line has the recipe as it is and the best layout found: the quickest of `--try` that are simulated, which are those
that predictions put first (`predict.py`). No figure is measured.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError
from bridge.megatron.silence import silence_warnings
from recipes.config import Recipe, load_recipe
from recipes.memory.recipe import plan_of
from recipes.memory.search import Proposal
from recipes.simulate.hardware import load_hardware
from recipes.simulate.plan import Question, ask, proposals, recipe_in
from recipes.simulate.run import Forecast, Simulator, forecast

# GPUs, and the profile of each.
CLUSTERS = {"8x80": (8, "h100"), "8x141": (8, "h200"), "16x80": (16, "h100"), "64x80": (64, "h100")}
SHIPPED = tuple(f"{mode}/{size}" for mode in ("sft", "lora") for size in ("e2b", "e4b", "12b", "26b-a4b", "31b"))
SHIPPED += ("pretrain/e2b",)
# Long context: tokens of a row, GPUs. Rows of a step are one for each replica.
LONG = {"sft/31b": (131_072, 64), "sft/26b-a4b": (262_144, 64)}
# The slowest that a recipe may be, against the best layout found.
WITHIN = 1.1


@dataclass(frozen=True)
class Line:
    """A recipe on a cluster. `own`: as it is shipped, None where it cannot be laid out there. `best`: a proposal and
    its forecast, None where nothing fits."""

    recipe: str
    cluster: str
    own: Forecast | None
    best: tuple[Proposal, Forecast] | None
    why_not: str = ""

    @property
    def good(self) -> bool:
        """Whether the recipe fits, and is near enough to the best."""
        if self.own is None or not self.own.fits:
            return False
        return self.best is None or self.own.seconds <= WITHIN * self.best[1].seconds

    def row(self) -> str:
        own = "cannot be laid out so" if self.own is None else _figures(self.own)
        if self.best is None:
            best, change = f"nothing fits: {self.why_not}", ""
        elif self.good and self.own is not None and self.own.seconds <= self.best[1].seconds:
            best, change = "this one", ""
        else:
            best = _figures(self.best[1])
            change = "" if self.good else f"`{shlex.join(self.best[0].overrides(_parallel(self.recipe)))}`"
        return f"| {self.recipe} | {self.cluster} | {own} | {best} | {change} |"


def _figures(one: Forecast) -> str:
    fits = f"{one.simulation.need / 1e9:.0f} GB" + ("" if one.fits else ", too much")
    return f"{one.simulation.parallel}: {fits}, {one.seconds:.2f} s, MFU {one.mfu:.0%}"


def _parallel(name: str) -> Any:
    return load_recipe(name, ["output=unused"]).parallel


def line(simulator: Simulator, name: str, cluster: str, tries: int, overrides: Sequence[str] = ()) -> Line:
    """A recipe on a cluster: as it is, and the best of so many layouts."""
    gpus, hardware = CLUSTERS[cluster]
    recipe = load_recipe(name, ["output=unused", *overrides])
    question = ask(recipe, gpus, load_hardware(hardware), None)
    try:
        found, why_not = proposals(question)[:tries], ""
    except BridgeError as error:
        found, why_not = [], str(error)
    laid_out = _can_be_laid_out(question, recipe)
    asked = [*([recipe] if laid_out else []), *(recipe_in(question, one) for one in found)]
    told = [
        forecast(one, question.geometry, question.hardware) for one in simulator.run(asked, question.geometry, gpus)
    ]
    own = told.pop(0) if laid_out else None
    fitting = [pair for pair in zip(found, told, strict=True) if pair[1].fits]
    best = min(fitting, key=lambda pair: pair[1].seconds, default=None)
    return Line(name, cluster, own, best, why_not)


def _can_be_laid_out(question: Question, recipe: Recipe) -> bool:
    try:
        plan_of(recipe, question.gpus, question.table)
    except BridgeError:
        return False
    return True


def lines(names: Sequence[str], clusters: Sequence[str], tries: int) -> Iterator[Line]:
    """All of them, one after the other."""
    with Simulator() as simulator:
        for name in names:
            for cluster in clusters:
                yield line(simulator, name, cluster, tries)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="the file whose table is written anew; -: print it")
    parser.add_argument("--only", nargs="*", default=SHIPPED, metavar="RECIPE")
    parser.add_argument("--clusters", nargs="*", default=list(CLUSTERS), choices=list(CLUSTERS), metavar="CLUSTER")
    parser.add_argument("--try", dest="tries", type=int, default=3, metavar="N", help="layouts that are simulated")
    said = parser.parse_args()
    silence_warnings()
    rows = []
    for one in lines(said.only, said.clusters, said.tries):
        rows.append(one.row())
        print(rows[-1], file=sys.stderr, flush=True)
    head = ["| recipe | GPUs × GB | as shipped | best layout found | overrides |", "|---|---|---|---|---|"]
    text = "\n".join([*head, *rows])
    if said.target == "-":
        print(text)
        return 0
    path = Path(said.target)
    before, begin, rest = path.read_text(encoding="utf-8").partition("<!-- table: begin -->\n")
    _, end, after = rest.partition("<!-- table: end -->")
    path.write_text(f"{before}{begin}\n{text}\n\n{end}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
