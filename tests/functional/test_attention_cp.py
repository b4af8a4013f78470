"""Packed rows with image blocks, on one rank and under context parallelism, against transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel, initialize
from bridge.ranks import RankPool
from bridge.toy import VARIANTS
from bridge.verify.parity import run_parity
from bridge.verify.reference import compute_reference
from bridge.verify.sample import VerificationSample, random_sample
from bridge.verify.task import ParityTask

BLOCKWISE = {"sliding": "blockwise", "global": "blockwise"}
CORE_ATTENTION = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}


@dataclass(frozen=True)
class Model:
    """A toy, a sample with image blocks, and what transformers makes of it."""

    folder: Path
    geometry: Geometry
    sample: VerificationSample
    reference: Path


@dataclass(frozen=True)
class Case:
    """A layout, and what else differs from a packed row computed in tiles."""

    parallel: Parallel = field(default_factory=Parallel)
    packed: bool = True
    backends: dict[str, str] = field(default_factory=lambda: BLOCKWISE)
    overrides: dict[str, Any] = field(default_factory=dict)
    world: int = 0  # 0: the smallest that carries the layout


EVERY_VARIANT = {
    "1 rank": Case(),
    "CP2": Case(Parallel(cp=2)),
    "CP4": Case(Parallel(cp=4)),
    "TP2+SP CP2": Case(Parallel(tp=2, cp=2, sequence_parallel=True)),
    "PP2 CP2": Case(Parallel(pp=2, cp=2)),
}
# What the layouts above leave out, on the variants that have the most to lose by it.
SOME = {
    "CP2 rows": ("12b", Case(Parallel(cp=2), packed=False)),
    "CP2 reference": ("12b", Case(Parallel(cp=2), backends={"sliding": "reference", "global": "reference"})),
    "CP2 auto": ("31b", Case(Parallel(cp=2), backends={})),
    "CP2 selective recompute": ("26b-a4b", Case(Parallel(cp=2), overrides=CORE_ATTENTION)),
    "selective recompute": ("e4b", Case(overrides=CORE_ATTENTION)),
    "PP2 CP2 full recompute": ("e2b", Case(Parallel(pp=2, cp=2), overrides=FULL)),
    "PP2 VPP2 CP2": ("e4b", Case(Parallel(pp=2, vpp=2, cp=2))),
    "EP2 CP2": ("26b-a4b", Case(Parallel(ep=2, cp=2))),
    "DP2 CP2": ("31b", Case(Parallel(cp=2), world=4)),
    "TP2 CP2": ("31b", Case(Parallel(tp=2, cp=2))),
}
CASES = [(variant, name, case) for variant in VARIANTS for name, case in EVERY_VARIANT.items()]
CASES += [(variant, name, case) for name, (variant, case) in SOME.items()]


@pytest.fixture(scope="module")
def toys(ranks: RankPool, toy: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("attention")
    toys = {}
    for variant in VARIANTS:
        folder, reference = toy(variant), root / f"{variant}.safetensors"
        geometry = Geometry.from_folder(folder)
        sample = random_sample(geometry, 0, images=True)
        ranks.run(compute_reference, folder, sample, torch.float32, True, reference, world_size=1)
        toys[variant] = Model(folder, geometry, sample, reference)
    return toys


@pytest.mark.parametrize(("variant", "case"), [pytest.param(v, c, id=f"{v} {n}") for v, n, c in CASES])
def test_logits_and_gradients(ranks: RankPool, toys: dict[str, Model], variant: str, case: Case) -> None:
    toy = toys[variant]
    task = ParityTask(
        variant,
        toy.geometry,
        toy.folder,
        False,
        case.parallel,
        torch.float32,
        toy.sample,
        {"dtype": toy.reference},
        overrides=case.overrides,
        packed=case.packed,
        attention_backends=case.backends,
    )
    results = ranks.run(run_parity, task, world_size=case.world or case.parallel.world_size)
    bounded = [check for rank in results for check in rank if check.bound is not None]
    assert {check.name for check in bounded} == {"logits", "gradients"}
    for check in bounded:
        assert check.passed, check


@pytest.mark.parametrize("variant", ["12b", "26b-a4b"])
def test_a_pack_gives_the_losses_of_its_documents(ranks: RankPool, toys: dict[str, Model], variant: str) -> None:
    loss, gradient = pack_differences(ranks, toys[variant], None)
    assert loss <= 1e-6
    assert gradient <= 1e-5


@pytest.mark.parametrize("leak", ["documents", "blocks"])
def test_a_leak_in_a_pack_is_caught(
    ranks: RankPool, toys: dict[str, Model], leak: Literal["documents", "blocks"]
) -> None:
    loss, gradient = pack_differences(ranks, toys["12b"], leak)
    assert loss > 1e-4
    assert gradient > 1e-2


def pack_differences(ranks: RankPool, toy: Model, leak: str | None) -> tuple[float, float]:
    """Pack against documents: worst relative difference of their losses, and of any parameter's gradient."""
    (result,) = ranks.run(pack_and_documents, toy, leak, world_size=1)
    return result


def pack_and_documents(toy: Model, leak: str | None) -> tuple[float, float]:
    """On one rank: a pack of four documents, with what leaks between them if so asked, and each document by itself."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from bridge.convert.live import load_from_hf
    from bridge.hf.folder import HfFolder
    from bridge.mapping import table_for
    from bridge.megatron.provider import Gemma4Provider

    groups = initialize(Parallel())
    provider = Gemma4Provider(toy.geometry, Parallel(), torch.float32, BLOCKWISE)
    (model,) = provider.build(groups)
    with HfFolder(toy.folder) as folder:
        load_from_hf([model], table_for(toy.geometry), folder)
    model.train()

    def run(sample: VerificationSample) -> tuple[Tensor, list[Tensor]]:
        """Token losses, and the gradient of their sum, of all tokens that have a label."""
        model.zero_grad()
        packed = PackedSeqParams("thd", sample.cu_seqlens, sample.cu_seqlens)
        losses = model(
            sample.input_ids,
            labels=sample.labels.clamp(min=0),
            attention_mask=sample.attention_mask,
            mm_token_type_ids=sample.mm_token_type_ids,
            packed_seq_params=packed if sample.cu_seqlens is not None else None,
        )
        losses = losses[sample.counted]
        losses.sum().backward()
        return losses.detach(), [p.grad.clone() for p in model.parameters()]

    lengths = toy.sample.attention_mask.sum(1).tolist()
    documents = [cut(toy.sample, row, length) for row, length in enumerate(lengths)]
    alone = [run(document) for document in documents]
    with planted(leak):
        losses, gradients = run(toy.sample.pack())
    together = losses.split([len(losses) for losses, _ in alone])
    difference = max(((a.mean() - b.mean()) / b.mean()).abs().item() for a, (b, _) in zip(together, alone, strict=True))
    expected = [sum(parts[1:], parts[0]) for parts in zip(*(grads for _, grads in alone), strict=True)]
    return difference, max(
        ((a - b).norm() / b.norm()).item() for a, b in zip(gradients, expected, strict=True) if b.norm() > 0
    )


def cut(sample: VerificationSample, row: int, length: int) -> VerificationSample:
    """One document without padding."""
    types = sample.mm_token_type_ids
    parts = (sample.input_ids, sample.attention_mask, sample.labels, *(() if types is None else (types,)))
    return VerificationSample(*(part[row : row + 1, :length] for part in parts))


@contextmanager
def planted(leak: str | None) -> Iterator[None]:
    """Describe every row wrongly meanwhile: as one document, or with all its images as one block."""
    from bridge.megatron.visibility import Visibility

    of = Visibility.of

    def leaky(*args: Any) -> Visibility:
        right = of(*args)
        if leak == "documents":
            return replace(right, document=right.document.clamp(max=0))
        assert right.block is not None
        return replace(right, block=right.block.clamp(max=0))

    with nullcontext() if leak is None else patch.object(Visibility, "of", leaky):
        yield


def test_verify_takes_context_parallelism(ranks: RankPool, toys: dict[str, Model]) -> None:
    from bridge.verify.run import verify

    checks = verify(toys["e2b"].folder, checks=["logits", "gradients"], parallel=Parallel(cp=2), pool=ranks)
    assert all(check.passed for check in checks)
    assert any("packed" in check.detail and check.bound is not None for check in checks)
