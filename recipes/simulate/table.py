"""Every shipped recipe on the clusters of docs/recipes-simulated.md, whose table this writes:

    python -m recipes.simulate.table docs/recipes-simulated.md                                   # all of it: hours
    python -m recipes.simulate.table docs/recipes-simulated.md --only sft/31b --clusters 64x80   # that line, anew
    python -m recipes.simulate.table - --only sft/31b --clusters 64x80 --set parallel.cp=2       # as if it said that

Each line has the recipe as it is for that cluster (`cluster=`), and the best layout found: the quickest of `--try` that
are simulated, which are those that predictions put first (`predict.py`). No figure is measured.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import BridgeError
from bridge.megatron.silence import silence_warnings
from recipes.clusters import SELECTOR
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
# Long context: a recipe, tokens of a row, and rows of a step; in the layout that is shipped such rows hardly ever fit.
LONG = {
    "sft/31b, 131,072 tokens": ("sft/31b", 131_072, 16),
    "sft/26b-a4b, 262,144 tokens": ("sft/26b-a4b", 262_144, 16),
    "lora/31b, 131,072 tokens": ("lora/31b", 131_072, 16),
    "lora/26b-a4b, 262,144 tokens": ("lora/26b-a4b", 262_144, 16),
}
# The slowest that a recipe may be, against the best layout found.
WITHIN = 1.1
HEAD = ("| recipe | GPUs × GB | as shipped | best layout found | slower by | overrides |", "|---|---|---|---|---|---|")


@dataclass(frozen=True)
class Line:
    """A recipe (`case`: its name, or one of `LONG`) on a cluster. `as_shipped`: as it is, None where it cannot be laid
    out there. `best`: a proposal and its forecast, None where nothing fits."""

    case: str
    cluster: str
    as_shipped: Forecast | None
    best: tuple[Proposal, Forecast] | None
    why_not: str = ""

    @property
    def good(self) -> bool:
        """Whether the recipe fits, and is near enough to the best."""
        if self.as_shipped is None or not self.as_shipped.fits:
            return False
        return self.best is None or self.as_shipped.seconds <= WITHIN * self.best[1].seconds

    def row(self) -> str:
        figures = "cannot be laid out so" if self.as_shipped is None else _figures(self.as_shipped)
        if self.best is None:
            return f"| {self.case} | {self.cluster} | {figures} | nothing fits: {self.why_not} | | |"
        best, behind, change = _figures(self.best[1]), "", ""
        if self.as_shipped is not None and self.as_shipped.fits:
            behind = f"{max(0.0, self.as_shipped.seconds / self.best[1].seconds - 1):.0%}"
            best = "this one" if self.as_shipped.seconds <= self.best[1].seconds else best
        if not self.good:
            change = f"`{shlex.join(self.best[0].overrides(_recipe(self.case, self.cluster).parallel))}`"
        return f"| {self.case} | {self.cluster} | {figures} | {best} | {behind} | {change} |"


def _figures(one: Forecast) -> str:
    load = one.simulation.recipe.parallel
    again = "" if load.recompute == "none" else f", {load.recompute} recompute"
    again += f" of {', '.join(load.recompute_modules)}" if load.recompute == "selective" else ""
    fits = f"{one.simulation.need / 1e9:.0f} GB" + ("" if one.fits else ", too much")
    return f"{one.simulation.parallel}{again}: {fits}, {one.seconds:.2f} s, MFU {one.mfu:.0%}"


def _recipe(case: str, cluster: str, overrides: Sequence[str] = ()) -> Recipe:
    """Of a name among `SHIPPED`, for a cluster, or `LONG`, whose rows its layouts are not for."""
    name, *long = LONG.get(case, (case,))
    keys = ("train.seq_length", "train.global_batch_size")
    said = [f"{key}={value}" for key, value in zip(keys, long, strict=False)] or [f"{SELECTOR}={cluster}"]
    return load_recipe(str(name), ["output=unused", *said, *overrides])


def line(simulator: Simulator, case: str, cluster: str, tries: int, overrides: Sequence[str] = ()) -> Line:
    """A recipe on a cluster: as it is, and the best of so many layouts."""
    gpus, hardware = CLUSTERS[cluster]
    recipe = _recipe(case, cluster, overrides)
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
    as_shipped = told.pop(0) if laid_out else None
    fitting = [pair for pair in zip(found, told, strict=True) if pair[1].fits]
    best = min(fitting, key=lambda pair: pair[1].seconds, default=None)
    return Line(case, cluster, as_shipped, best, why_not)


def _can_be_laid_out(question: Question, recipe: Recipe) -> bool:
    try:
        plan_of(recipe, question.gpus, question.table)
    except BridgeError:
        return False
    return True


def lines(cases: Sequence[str], clusters: Sequence[str], tries: int, overrides: Sequence[str]) -> Iterator[Line]:
    """All of them, one after the other."""
    with Simulator() as simulator:
        for case in cases:
            for cluster in clusters:
                yield line(simulator, case, cluster, tries, overrides)


def merged(text: str, rows: Sequence[str]) -> str:
    """A document with `rows` in its table, in the place of those of the same recipe and cluster."""
    before, begin, rest = text.partition("<!-- table: begin -->\n")
    table, end, after = rest.partition("<!-- table: end -->")
    existing = [row for row in table.splitlines() if row.startswith("| ") and not row.startswith("| recipe ")]
    places = [(case, cluster) for case in (*SHIPPED, *LONG) for cluster in CLUSTERS]
    found = dict(sorted(((_place(row), row) for row in (*existing, *rows)), key=lambda each: places.index(each[0])))
    return f"{before}{begin}\n" + "\n".join([*HEAD, *found.values()]) + f"\n\n{end}{after}"


def _place(row: str) -> tuple[str, str]:
    case, cluster = (cell.strip() for cell in row.split("|")[1:3])
    return case, cluster


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="the file in whose table the lines are written anew; -: print them")
    parser.add_argument("--only", nargs="*", default=[*SHIPPED, *LONG], choices=[*SHIPPED, *LONG], metavar="RECIPE")
    parser.add_argument("--clusters", nargs="*", default=list(CLUSTERS), choices=list(CLUSTERS), metavar="CLUSTER")
    parser.add_argument("--try", dest="tries", type=int, default=3, metavar="N", help="layouts that are simulated")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe; with -")
    said = parser.parse_args()
    if said.set and said.target != "-":
        parser.error("--set: the table is of recipes as they are shipped; print with -")
    silence_warnings()
    for one in lines(said.only, said.clusters, said.tries, said.set):
        print(row := one.row(), flush=True)
        if said.target != "-":
            path = Path(said.target)
            path.write_text(merged(path.read_text(encoding="utf-8"), [row]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
