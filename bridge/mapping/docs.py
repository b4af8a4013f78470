"""Writes docs/mapping.md from the tables: `python -m bridge.mapping.docs > docs/mapping.md` (or `make docs`)."""

from __future__ import annotations

from bridge.mapping.expansion import all_rows
from bridge.mapping.table import Row
from bridge.mapping.transforms import Transform, copy, interleave_groups, scalar, stack

_TRANSFORMS: dict[Transform, str] = {
    copy: "copy",
    scalar: "a tensor without axes as one row",
    stack: "rows one below the other",
    interleave_groups: "rows interleaved by query group: [q ... q k v] x groups",
}

_HEAD = """\
# The mapping tables

Generated from `bridge/mapping/` by `make docs`; a test holds it current. Every row says which Hugging Face tensors make
up one Megatron-Core tensor, how their rows are arranged in it, and which parallel group splits which of its axes.
The same rows drive import, export, live load and save of a sharded model, and the comparison of gradients.

`{layer}` is the number of a layer, of the decoder or of the tower that the name says. HF names are relative to
`model.language_model.` in the multimodal classes and to `model.` in the text classes; a leading slash means that the
name stands alone. Folders that the base class saved have the same names without `model.`. Shapes are in the words of
the geometry: `q` is heads x head dim, `kv` is query groups x head dim, both of that layer; `vision_` and `audio_` start
the words of the towers. Rows of a tower that are split by tp are so only where its heads and its FFN divide by the
ranks; otherwise every rank holds the whole tower.
"""

_TAIL = """\
## Carried beside

Tensors that the Megatron model does not use are kept in `hf/carried/` of the Megatron checkpoint and written back on
export: the k_proj, v_proj and k_norm that published E2B and E4B files hold for layers which share another layer's K and
V (transformers drops them).

## What is not on disk

RoPE frequencies, the embedding scale, the softcap and v_norm have no tensors: they come from the geometry.
"""


def render() -> str:
    """The page as Markdown."""
    mapped = [row for row in all_rows() if row.megatron is not None]
    lines = [_HEAD, "| Megatron | Hugging Face | rows | split by | when |", "|---|---|---|---|---|"]
    lines += [_line(row) for row in mapped]
    lines += ["", _TAIL]
    return "\n".join(lines)


def _line(row: Row) -> str:
    shapes = "<br>".join(f"`{name}` [{', '.join(size)}]" for name, size in zip(row.hf, row.shapes, strict=True))
    split = ", ".join(f"axis {axis}: {group}" for axis, group in enumerate(row.shard) if group) or "replicated"
    when = row.when.label or "always"
    kind = "a copy, checked equal" if row.optional else _TRANSFORMS[row.transform]
    return f"| `{row.megatron}` | {shapes} | {kind} | {split} | {when} |"


if __name__ == "__main__":
    print(render(), end="")
