"""`verify` in every layout that README.md lists: it passes, or is refused with what would fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bridge.hf.folder import HfFolder
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.toy import VARIANTS
from bridge.verify.run import verify

from .conftest import Toy

pytest.importorskip("torchvision", reason="transformers' Gemma 4 processors need torchvision")


def tp(size: int, **sizes: int) -> Parallel:
    return Parallel(tp=size, sequence_parallel=True, **sizes)


DENSE = (
    Parallel(),
    tp(2),
    tp(4),
    Parallel(pp=2),
    Parallel(pp=3),
    Parallel(pp=4),
    Parallel(pp=2, vpp=2),
    Parallel(pp=2, vpp=5),
    Parallel(pp=3, vpp=2),
    Parallel(pp=4, vpp=2),
    Parallel(cp=2),
    Parallel(cp=3),
    Parallel(cp=4),
    tp(2, pp=2),
    tp(2, pp=2, vpp=2),
    tp(2, cp=2),
    Parallel(pp=2, cp=2),
    Parallel(pp=2, vpp=2, cp=2),
    tp(2, pp=2, cp=2),
)
# Megatron's dispatchers want sequence parallelism beside experts.
NO_EXPERTS = (Parallel(tp=2), Parallel(tp=2, pp=2), Parallel(tp=2, cp=2))
EXPERTS = (
    Parallel(ep=2),
    Parallel(ep=4),
    Parallel(etp=2),
    Parallel(ep=2, etp=2),
    tp(2, ep=2),
    tp(2, etp=2),
    tp(4, ep=2, etp=2),
    Parallel(pp=2, ep=2),
    Parallel(pp=2, vpp=2, ep=2),
    Parallel(ep=2, cp=2),
    tp(2, ep=4),
    tp(2, pp=2, ep=2),
)
# Those that could not be run once, for one reason each.
ALWAYS = {("e2b", Parallel(pp=2, vpp=2)), ("12b", Parallel(pp=4, vpp=2)), ("26b-a4b", Parallel(ep=4))}
EVERY = [
    *((variant, layout) for variant in VARIANTS for layout in DENSE),
    *((variant, layout) for variant in VARIANTS for layout in NO_EXPERTS if variant != "26b-a4b"),
    *(("26b-a4b", layout) for layout in EXPERTS),
]


@pytest.fixture(scope="module")
def eight() -> Iterator[RankPool]:
    """As many ranks as the largest layout asks for."""
    with RankPool(8) as pool:
        yield pool


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        pytest.param(v, layout, id=f"{v} {layout}", marks=[] if (v, layout) in ALWAYS else pytest.mark.slow)
        for v, layout in EVERY
    ],
)
def test_verify_runs(request: pytest.FixtureRequest, toy: Toy, variant: str, layout: Parallel) -> None:
    pool = request.getfixturevalue("ranks" if layout.world_size <= 4 else "eight")
    checks = verify(toy(variant), checks=["logits", "gradients"], parallel=layout, pool=pool)
    bounded = [check for check in checks if check.bound is not None]
    assert {check.name for check in bounded} == {"logits", "gradients"}
    assert any("media" in check.detail for check in bounded) and any("packed" in check.detail for check in bounded)
    for check in bounded:
        print(check.variant, check.parallel, check.name, f"{check.value:.2e}", check.detail)
        assert check.passed, check


@pytest.mark.parametrize(
    ("variant", "text_only"), [("e2b", False), ("26b-a4b", True), pytest.param("12b", False, marks=pytest.mark.slow)]
)
def test_a_folder_that_the_base_class_saved(
    ranks: RankPool, toy: Toy, tmp_path: Path, variant: str, text_only: bool
) -> None:
    """`AutoModel.save_pretrained`: names without `model.`, which transformers loads; every check of `verify`."""
    source, folder = toy(variant, text_only=text_only), tmp_path / variant
    ranks.run(save_base_class, source, folder, world_size=1)
    with HfFolder(folder) as saved:
        assert not [name for name in saved.tensors if name.startswith("model.")]
    checks = verify(folder, parallel=tp(2), pool=ranks)
    assert {check.name for check in checks} == {"round-trip", "logits", "gradients"}
    for check in checks:
        assert check.passed, check


def save_base_class(source: Path, folder: Path) -> None:
    """What is in `source`, saved by transformers' class without a head; the processor's files beside it."""
    from transformers import AutoModel

    AutoModel.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
