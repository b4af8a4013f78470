"""Which cases there are, in the order of their worth, and with how much recomputation each fits a device."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.case import RECOMPUTE, Case

LENGTHS = (4096, 16_384, 65_536)
# By how much the memory estimate may be wrong, of what it says (benchmarks/full_size.py), and what a process on a GPU
# takes beside what torch's allocator gives out: the context, the matrix library's and the compiled kernels' own.
_ESTIMATE_ERROR, _CONTEXT = 0.03, 1 << 30


def cases() -> list[Case]:
    """All of them: what has a bound first, then what is compared, then the rest."""
    bounds = [
        Case("e4b", "sft", 4096),
        *(Case(variant, "lora", 8192) for variant in ("12b", "31b", "26b-a4b")),
        *(Case("26b-a4b", "loss", 8192, side) for side in ("head frozen", "head trained")),
    ]
    sides = ("ours", "transformers", "liger")
    compared = [Case("12b", "lora", 65_536)]
    for variant in ("12b", "26b-a4b", "e4b", "31b"):
        # Quick and small pull apart: once with as little recompute as fits, once with as much as the others do.
        compared += [Case(variant, "lora", 16_384, recompute=recompute) for recompute in ("auto", "full")]
        compared += [Case(variant, "lora", 16_384, side) for side in sides[1:]]
    # What this project's own kernels are worth, side by side.
    plain = [replace(case, kernels="torch") for case in bounds if case.mode != "loss"]
    specs = [
        replace(case, layer_spec="te", fp8=fp8)
        for case in bounds
        if case.mode != "loss"
        for fp8 in ("none", "current", "block")
    ]
    # Attention's own backward pass at head dim 512, which has to be asked for.
    specs += [replace(case, attention="flex_triton") for case in bounds if case.mode != "loss"]
    # A product of experts gains with its tokens, and pays for its weights.
    specs += [Case("26b-a4b", "lora", n, fp8_experts=True) for n in (8192, 65_536)]
    media = [Case(v, "lora", n, side, media=True) for v in ("e4b", "26b-a4b") for n in LENGTHS for side in sides]
    kinds = [("sft", "e2b"), ("sft", "e4b"), *(("lora", v) for v in ("e2b", "e4b", "12b", "26b-a4b", "31b"))]
    rest = [Case(variant, mode, n, side) for n in LENGTHS for mode, variant in kinds for side in sides]
    return list(dict.fromkeys([*bounds, *compared, *plain, *specs, *media, *rest]))


def toy_cases() -> list[Case]:
    """One of each side that needs nothing more, on the same tiny model, and its loss."""
    trained = Case("e2b", "lora", 48, recompute="full", size="toy", dtype="float32")
    return [trained, replace(trained, side="transformers"), replace(trained, mode="loss", side="head frozen")]


def estimated(case: Case) -> int:
    """Bytes that ours needs, its reserve included. The estimate knows our side only."""
    from benchmarks.training_sides import recipe_of
    from bridge.mapping import table_for
    from recipes.memory.estimate import RESERVE, estimate
    from recipes.memory.recipe import plan_of

    table = table_for(case.model.geometry)
    return estimate(table, plan_of(recipe_of(case), 1, table)).total + RESERVE


def ladder(case: Case, memory: float | None) -> tuple[list[Case], int | None]:
    """The case with as little recompute as fits `memory` bytes, and then with more; its estimate. Empty: does not.

    A rung with less recompute than the last has to fit even if the estimate is as wrong as it has been seen to be: on
    a GPU a row that runs out of memory has cost its compilation. The last is tried where the estimate itself fits.
    """
    if case.side != "ours" or case.mode == "loss":
        return [case], None
    rungs = [case]
    if case.recompute == "auto":
        rungs = [replace(case, recompute=recompute) for recompute in RECOMPUTE]
    if memory is None:
        return rungs, None
    needs = [estimated(rung) for rung in rungs]
    most = [*((1 + _ESTIMATE_ERROR) * need + _CONTEXT for need in needs[:-1]), needs[-1]]
    fitting = [i for i, need in enumerate(most) if need <= memory]
    return (rungs[fitting[0] :], needs[fitting[0]]) if fitting else ([], needs[-1])
