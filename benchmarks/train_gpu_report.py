"""What the rows of `train_gpu.py` say: the table for the docs, the bounds, and whether both sides saw one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.lines import Row

BEGIN, END = "<!-- train_gpu: begin -->", "<!-- train_gpu: end -->"

# What it has to show on one GPU of the class of an H200 (docs/gpu.md): least MFU, by case.
LEAST_MFU = {
    "sft/e4b/4096/ours": 0.45,
    "lora/12b/8192/ours": 0.45,
    "lora/31b/8192/ours": 0.45,
    "lora/26b-a4b/8192/ours": 0.25,
}
# Against liger-kernel on the same rows.
COMPARED_AT, LEAST_SPEED, MOST_MEMORY = 16_384, 2.0, 0.6
LONG = "lora/12b/{}/ours"
LONG_LENGTHS = (4096, 16_384, 65_536)
# Of what memory grows by, against a straight line.
LINEAR = 1.15
LOSS_GB = 0.6
LOSSES = tuple(f"loss/26b-a4b/8192/head {head}" for head in ("frozen", "trained"))
# Of the first loss, of which the weights are the same.
SAME_LOSS = 1e-4


def misses(rows: Mapping[str, Row]) -> list[str]:
    """A line for every bound that is missed, or whose rows are not there."""
    return list(_misses(rows))


def _misses(rows: Mapping[str, Row]) -> Iterator[str]:
    def value(name: str, key: str) -> float | None:
        return rows.get(name, {}).get(key)

    def status(name: str) -> str:
        return str(rows[name]["status"]) if name in rows else "not run"

    for name, least in LEAST_MFU.items():
        mfu = value(name, "mfu")
        if mfu is None or mfu < least:
            yield f"{name}: MFU {status(name) if mfu is None else f'{mfu:.3f}'}, bound {least}"
    compared = 0
    for other, theirs in rows.items():
        if theirs["side"] != "liger" or theirs["length"] != COMPARED_AT or theirs["status"] != "ok":
            continue
        case = other.removesuffix("liger")
        ours = [rows.get(f"{case}{side}", {}) for side in ("ours", "ours+full")]
        ratios = [
            (row["tokens_per_s"] / theirs["tokens_per_s"], row["peak_gb"] / theirs["peak_gb"])
            for row in ours
            if row.get("status") == "ok"
        ]
        compared += bool(ratios)
        if ratios and not any(speed >= LEAST_SPEED and memory <= MOST_MEMORY for speed, memory in ratios):
            said = " or ".join(f"{speed:.2f} × tokens/s with {memory:.2f} × memory" for speed, memory in ratios)
            yield f"{case}: {said} of liger's, bounds {LEAST_SPEED} and {MOST_MEMORY}"
    if not compared:
        yield f"no case of {COMPARED_AT} tokens was measured with liger-kernel"
    short, middle, long = (value(LONG.format(length), "peak_gb") for length in LONG_LENGTHS)
    if long is None:
        yield f"{LONG.format(LONG_LENGTHS[2])}: {status(LONG.format(LONG_LENGTHS[2]))}"
    elif short is None or middle is None or _recomputes_differ(rows):
        yield f"{LONG.format('…')}: memory cannot be compared over lengths"
    else:
        straight = (LONG_LENGTHS[2] - LONG_LENGTHS[1]) / (LONG_LENGTHS[1] - LONG_LENGTHS[0])
        growth = (long - middle) / max(middle - short, 1e-9)
        if growth > LINEAR * straight:
            yield f"{LONG.format(LONG_LENGTHS[2])}: memory grows {growth / straight:.2f} × a straight line"
    for name in LOSSES:
        peak = value(name, "peak_gb")
        if peak is None or peak > LOSS_GB:
            yield f"{name}: {status(name) if peak is None else f'{peak:.2f} GB'}, bound {LOSS_GB} GB"


def _recomputes_differ(rows: Mapping[str, Row]) -> bool:
    return len({rows[LONG.format(length)].get("recompute") for length in LONG_LENGTHS}) > 1


def same_losses(rows: Mapping[str, Row]) -> list[str]:
    """A line for every case whose first loss is not that of ours, or for which there is none to compare."""
    found, compared = [], False
    for name, row in rows.items():
        if row["side"] == "ours" or not row.get("losses"):
            continue
        case = name.rpartition("/")[0]
        ours = next((rows[f"{case}/{side}"] for side in ("ours", "ours+full") if f"{case}/{side}" in rows), None)
        if ours is None or not ours.get("losses"):
            found.append(f"{name}: nothing of ours to compare with")
            continue
        a, b = row["losses"][0], ours["losses"][0]
        if not abs(a - b) <= SAME_LOSS * abs(a):
            found.append(f"{name}: first loss {a}, ours {b}")
        else:
            compared = True
    return found if found or compared else ["nothing was compared"]


def table(rows: Mapping[str, Row]) -> str:
    """Markdown: a line for a case, and what it was measured on."""
    measured = [row for row in rows.values() if row["status"] == "ok"] or list(rows.values())
    where = measured[0]
    versions = ", ".join(f"{key} {where[key]}" for key in where if key in _VERSIONS)
    lines = [
        f"{where.get('device', '?')}, {where.get('date', '?')}; {versions}. «Waits»: host syncs of a step, profiled;"
        " «busy»: the part of it in which a kernel ran.",
        "",
        "| case | tokens/s | TFLOP/s | MFU | peak GB | recompute | first loss | waits | busy | where the time goes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if row["status"] != "ok":
            lines.append(f"| {name} | {row['status']} | | | | {row.get('recompute', '')} | | | | |")
            continue
        groups = sorted(row.get("breakdown", {}).items(), key=lambda item: -item[1])
        shares = ", ".join(f"{group} {100 * share:.0f} %" for group, share in groups if share >= 0.01)
        cells = (
            name,
            _number(row.get("tokens_per_s"), ".0f"),
            _number(row.get("tflops"), ".1f"),
            _number(row.get("mfu"), ".3f"),
            _number(row.get("peak_gb"), ".2f"),
            row.get("recompute", ""),
            _number(next(iter(row.get("losses", [])), None), ".4f"),
            _number(sum(row["waits"][wait] for wait in _WAITS) if "waits" in row else None, "d"),
            _number(row["busy_ms"] / row["wall_ms"] if row.get("busy_ms") else None, ".2f"),
            shares,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernel_table(rows: Mapping[str, Row], most: int = 12) -> str:
    """Markdown: of each profiled case how long the device was busy, its longest kernels, and where the host waited."""
    lines = []
    for name, row in rows.items():
        if "wall_ms" not in row:
            continue
        lines += [f"{name}: a step of {row['wall_ms']:.1f} ms, the device busy for {row['busy_ms']:.1f} ms", ""]
        lines += ["| ms | times | kernel or call |", "|---:|---:|---|"]
        lines += [f"| {ms:.2f} | {count} | `{kernel}` |" for ms, count, kernel in row["kernels"][:most] + row["host"]]
        lines.append("")
    return "\n".join(lines)


_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
_VERSIONS = ("torch", "cuda", "megatron-core", "transformers", "peft", "liger-kernel", "transformer-engine", "triton")


def _number(value: Any, how: str) -> str:
    return "" if value is None else format(value, how)


def write_between(docs: Path, text: str) -> None:
    """Put `text` between the markers of a page. Raises ValueError where it has none."""
    page = docs.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{docs}: has no {BEGIN} … {END}")
    new = docs.with_name(docs.name + ".new")
    new.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    new.replace(docs)
