"""How the tensors of an adapter are named and laid out for those who read them: PEFT, vLLM, SGLang.

A *format* lists, for every target, the stored pieces of each of its parts. A piece is a view of the canonical tensor:
writing takes the view, reading fills it, so that the two cannot disagree. Where two pieces are views of the same
elements (one A that serves gate and up, K that serves as V), reading holds the second against the first.

- `peft`: what PEFT 0.21 stores and loads. Expert parameters: A [E·r, in], expert by expert; B [out, E·r], rank by rank
  with the expert running fastest; `experts.base_layer` where another parameter of the module is wrapped around it
  (`peft.tuners.lora.layer.ParamWrapper`).
- `vllm`: every expert for itself, `moe.experts.E.{gate,up,down}_proj`, as the weights of a checkpoint that is not fused
  are named. PEFT's names of stacked experts are dropped without a word for Gemma 4 (vllm-project/vllm #41754, #50252).
- `sglang`: `experts.{gate_up_proj,down_proj}`, A [E, r, in], B [E, out, r] (sgl-project/sglang #21466).

Both engines compute q, k and v in one matrix and, where V is K, pack K twice: without an adapter for v_proj they would
serve another V than was trained (vllm-project/vllm #41944). So both formats hold the k adapter under v_proj as well.
SGLang does not load a layer that has an adapter of q or k and none of v (sgl-project/sglang #25913): where there is
none, as in layers that share K/V, its format has one of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from bridge.errors import UsageError
from bridge.lora.spec import Factor, Target
from bridge.mapping import Table
from bridge.mapping.modalities import MODULES
from bridge.mapping.transforms import Shape

PREFIX = "base_model.model."
FORMATS = ("peft", "vllm", "sglang")
_GATE_UP, _DOWN = ".gate_up_proj", ".down_proj"


@dataclass(frozen=True)
class StoredTensor:
    """One stored tensor: `view` takes it out of the canonical tensor of its target, in a shape of as many elements.

    `again` says that its elements are in an earlier piece as well.
    """

    key: str
    shape: Shape
    target: Target
    part: Factor
    view: Callable[[Tensor], Tensor]
    again: bool = False


# How the factors of experts are stored: (target, part) -> their pieces.
Experts = Callable[[Target, Factor], Iterator[StoredTensor]]


def stored_tensors(
    adapter_format: str, targets: Sequence[Target], table: Table, experts: Experts | None = None
) -> Iterator[StoredTensor]:
    """The stored tensors of an adapter in one format, target after target. Raises UsageError for an unknown format.

    `experts`: how those are stored, where another tool has names of its own for them.
    """
    if adapter_format not in FORMATS:
        raise UsageError(f"format {adapter_format!r}: expected one of {', '.join(FORMATS)}")
    wrapped = {t.module for t in targets}
    for target in targets:
        for part in target.parts:
            if target.kind == "saved":
                yield StoredTensor(f"{PREFIX}{target.module}", target.shape, target, part, lambda whole: whole)
                for copied in table.copies_of(target.name):
                    # A tied head is stored once more (`ensure_weight_tying`).
                    yield StoredTensor(f"{PREFIX}{copied}", target.shape, target, part, lambda whole: whole, again=True)
                continue
            if target.kind == "experts":
                if experts is not None:
                    yield from experts(target, part)
                elif adapter_format == "peft":
                    yield _stacked(target, part, nested=target.module.removesuffix(_GATE_UP) + _DOWN in wrapped)
                elif adapter_format == "sglang":
                    yield plain(target, part)
                else:
                    yield from each_expert(target, part)
                continue
            yield plain(target, part)
            if adapter_format != "peft":
                yield from _value(target, part, table, wrapped if adapter_format == "sglang" else None)


def check_servable(adapter_format: str, targets: Sequence[Target]) -> None:
    """Raise UsageError where an engine would serve something else.

    It knows one scaling, and no embeddings, magnitudes or whole modules.
    """
    if adapter_format == "peft":
        return
    first = targets[0]
    for target in targets:
        if target.kind == "embedding":
            raise UsageError(
                f"{target.module}: {adapter_format} has no adapters of embeddings; merge this adapter instead"
            )
        if target.kind == "saved":
            raise UsageError(f"{target.module}: {adapter_format} reads no modules_to_save; merge this adapter instead")
        if target.dora:
            raise UsageError(f"{target.module}: {adapter_format} reads no DoRA magnitudes; merge this adapter instead")
        if target.scaling != first.scaling:
            raise UsageError(
                f"{target.module}: scaled by {target.scaling:g}, {first.module} by {first.scaling:g}; "
                f"{adapter_format} knows one scaling for all, so merge this adapter instead"
            )


def note_for_engine(adapter_format: str, targets: Sequence[Target]) -> str | None:
    """What an engine has to be told lest it leaves a part of an adapter out, without a word."""
    found = [target.module for target in targets if not {*target.module.split(".")}.isdisjoint(MODULES)]
    if adapter_format != "vllm" or not found:
        return None
    return (
        f"{found[0]}{'' if len(found) == 1 else f' and {len(found) - 1} more'}: vLLM serves adapters of towers and "
        "projectors with --enable-tower-connector-lora, of an encoder-free model (12B) not at all; else it leaves them "
        "out without a word. `adapter merge` makes a folder that has everything"
    )


def engine_targets(adapter_format: str, targets: Sequence[Target], table: Table) -> list[str]:
    """The last parts of the names in a format: what `target_modules` says for an engine, which reads no patterns."""
    names = (
        piece.key.rpartition(".lora_")[0]
        for piece in stored_tensors(adapter_format, targets, table)
        if piece.part == "A"
    )
    return sorted({name.rpartition(".")[2] for name in names})


def plain(target: Target, part: Factor, module: str | None = None, again: bool = False) -> StoredTensor:
    """A tensor that is stored as it is, under the name of its module or of `module`."""
    kind = f"lora_embedding_{part}" if target.kind == "embedding" else f"lora_{part}.weight"
    kind = "lora_magnitude_vector" if part == "magnitude" else kind
    return StoredTensor(
        f"{PREFIX}{module or target.module}.{kind}", target.shape_of(part), target, part, lambda whole: whole, again
    )


def _stacked(target: Target, part: Factor, nested: bool) -> StoredTensor:
    module = target.module.rpartition(".")[0] + (".base_layer" if nested else "")
    experts, first, second = target.shape_of(part)
    key = f"{PREFIX}{module}.lora_{part}.weight"
    if part == "A":
        return StoredTensor(key, (experts * first, second), target, part, lambda whole: whole)
    return StoredTensor(key, (first, second * experts), target, part, lambda whole: whole.permute(1, 2, 0))


def each_expert(
    target: Target, part: Factor, room: str = "moe.experts", fused: bool = False, separate_a: bool = False
) -> Iterator[StoredTensor]:
    """The factors of every expert for itself, under `room`, gate and up apart unless they are `fused`.

    `separate_a`: gate and up have an A each, which are halves of the rank here: B is zero where one would meet the
    other's.
    """
    layer, _, name = target.module.rpartition(".experts.")
    experts, first, second = target.shape_of(part)
    whole = "." + name != _GATE_UP or fused
    names = (name,) if whole else ("gate_proj", "up_proj")
    for expert in range(experts):
        for index, projection in enumerate(names):
            rows, columns = slice(0, first), slice(0, second)
            if not whole and (part == "B" or separate_a):
                rows = _half(first, index)
            if not whole and part == "B" and separate_a:
                columns = _half(second, index)
            yield StoredTensor(
                f"{PREFIX}{layer}.{room}.{expert}.{projection}.lora_{part}.weight",
                (rows.stop - rows.start, columns.stop - columns.start),
                target,
                part,
                lambda whole, at=(expert, rows, columns): whole[at],  # type: ignore[misc]
                again=part == "A" and index > 0 and not separate_a,
            )


def _half(size: int, index: int) -> slice:
    return slice(index * size // 2, (index + 1) * size // 2)


def _value(target: Target, part: Factor, table: Table, filled: set[str] | None) -> Iterator[StoredTensor]:
    """What stands under v_proj of a layer without one: the adapter of k where K serves as V, or zeros.

    `filled`: the modules that have adapters, where zeros are wanted beside those of q and k.
    """
    entry, _ = table.by_hf_name[target.name]
    attention, _, name = target.module.rpartition(".")
    layer, q, k, v = entry.layer, *(f"{attention}.{x}_proj" for x in "qkv")
    if layer is None or name not in ("q_proj", "k_proj"):
        return
    if layer.k_eq_v and target.module == k:
        yield plain(target, part, v, again=True)
        return
    if filled is None or v in filled or (layer.k_eq_v and k in filled):
        return
    # Once a layer: beside q, or beside k where q has none.
    if target.module == q or q not in filled:
        shape = (target.rank, target.shape[1]) if part == "A" else (layer.kv_size, target.rank)
        yield StoredTensor(
            f"{PREFIX}{v}.lora_{part}.weight", shape, target, part, lambda whole: whole.new_zeros(shape), True
        )
