"""What is logged of each source of a blend: its loss, and how much of it there was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from recipes.losses.objective import Objective
from recipes.train.passes import Batch
from recipes.train.sinks import Values

# Of more sources than these the losses would fill the screen.
_SHOWN = 4


def counts_in(batches: Sequence[Batch], sources: int, groups: ProcessGroupCollection) -> list[float]:
    """Rows of every source in this rank's microbatches, then tokens; nothing where there is one source.

    One rank counts for all of its replica, the others have zeros.
    """
    if sources < 2:
        return []
    if groups.tp.rank() or groups.cp.rank() or groups.pp.rank():
        return [0.0] * (2 * sources)
    total = torch.stack([batch["source_counts"] for batch in batches]).sum(0)
    return [float(count) for count in total.flatten().tolist()]


def add_counts(total: dict[str, list[int]], names: Sequence[str], counts: Sequence[float]) -> None:
    """Add those of a step, of all ranks, to rows and tokens by the names of the sources."""
    for name, rows, tokens in zip(names, counts[: len(names)], counts[len(names) :], strict=True):
        before = total.get(name, [0, 0])
        total[name] = [before[0] + int(rows), before[1] + int(tokens)]


def source_values(objective: Objective, names: Sequence[str], figures: Sequence[float]) -> tuple[Values, Values]:
    """`loss/NAME` of each source that there was any of, and what each of these is a mean over, `supervised/NAME`: what
    the screen has room for, and more.

    `figures`: the objective's sums, of one source behind the other.
    """
    losses, counts, size = Values(), Values(), len(objective.names)
    for number, name in enumerate(names):
        sums = dict(zip(objective.names, figures[number * size : (number + 1) * size], strict=True))
        count = sums[objective.names[1]]
        counts[f"{objective.counted}/{name}"] = int(count)
        if count:
            losses[f"loss/{name}"] = objective.values(sums)["loss"]
    return (losses, counts) if len(losses) <= _SHOWN else (Values(), losses | counts)


def total_values(total: dict[str, list[int]]) -> Values:
    """`rows/NAME` and `tokens/NAME` of the whole run so far."""
    rows: Values = {f"rows/{name}": rows for name, (rows, _) in total.items()}
    return rows | {f"tokens/{name}": tokens for name, (_, tokens) in total.items()}
