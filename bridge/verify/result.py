"""What a verification says: rows, one printer, one JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridge.megatron.parallel import Parallel


@dataclass(frozen=True)
class Check:
    """One measured value. A row without a bound informs and cannot fail."""

    name: str
    variant: str
    parallel: Parallel
    dtype: str
    metric: str
    value: float
    bound: float | None
    detail: str = ""
    at_least: bool = False

    @property
    def passed(self) -> bool:
        if self.bound is None:
            return True
        # A NaN fails whichever way the bound points.
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        row["parallel"] = {name: getattr(self.parallel, name) for name in ("tp", "pp", "vpp", "ep", "etp", "cp")}
        row["parallel"]["sequence_parallel"] = self.parallel.sequence_parallel
        row["passed"] = self.passed
        row["value"] = self.value if math.isfinite(self.value) else None
        del row["at_least"]
        return row


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """The machine-readable result of `verify`."""
    return {"checks": [check.to_json() for check in checks], "passed": all(check.passed for check in checks)}


def print_checks(checks: Sequence[Check], console: Console, title: str | None = None) -> None:
    """The rows that have a bound, and the ones that inform dimmed below their kind."""
    table = Table(title=title, title_justify="left")
    for heading in ("model", "layout", "dtype", "check", "metric"):
        table.add_column(heading, no_wrap=True)
    for heading in ("value", "bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    table.add_column("detail", overflow="fold")
    for check in checks:
        sign = ">=" if check.at_least else "<="
        table.add_row(
            check.variant,
            str(check.parallel),
            check.dtype,
            check.name,
            check.metric,
            f"{check.value:.3g}",
            "" if check.bound is None else f"{sign} {check.bound:.0e}" if check.bound else f"{sign} 0",
            "" if check.bound is None else Text("ok", "green") if check.passed else Text("FAILED", "red"),
            check.detail,
            style="dim" if check.bound is None else None,
        )
    console.print(table)
