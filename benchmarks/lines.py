"""Results as lines of JSON, one for each phase of a case, written as soon as it is over: what a killed run leaves.

A case begins with `asked` and `start` (what it is, and on what), goes on with `built`, a `step` each, `measured`,
`profile` and `groups`, and may end with `failed` or `killed`. A case that is not run has the one line `left out`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MEMORY = "out of memory"
# Phases after which a row begins anew: a case may be tried again, or with more recomputation.
_FIRST = ("asked", "start", "left out")


def append(out: Path, case: str, phase: str, **values: Any) -> None:
    """Add a line to a file, in one write."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"case": case, "phase": phase, **values}) + "\n")


def rows_of(out: Path) -> dict[str, Row]:
    """What a file says of each case, its last try only: `status` and what was measured.

    `status` is ok once the steps are measured, whatever became of the profile; `losses` and `step_seconds` are of every
    step. A line that was not written to its end is none.
    """
    rows: dict[str, Row] = {}
    whole, _, _ = out.read_text(encoding="utf-8").rpartition("\n")
    for line in whole.splitlines():
        said: Row = json.loads(line)
        name, phase = said.pop("case"), said.pop("phase")
        said.pop("at", None)
        if phase in _FIRST or name not in rows:
            rows[name] = {"status": "failed: it was cut short", "losses": [], "step_seconds": []}
        row = rows[name]
        if phase == "step":
            row["losses"].append(said["loss"])
            row["step_seconds"].append(said["seconds"])
        elif row["status"] == "ok" and "status" in said:
            row["not_profiled"] = said["status"]
        else:
            row |= said
    return rows


def done(out: Path) -> dict[str, Row]:
    """Of a file that may not be there, the cases that need not be run again: all but those that failed."""
    if not out.is_file():
        return {}
    return {name: row for name, row in rows_of(out).items() if not row["status"].startswith("failed")}
