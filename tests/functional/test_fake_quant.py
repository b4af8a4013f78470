"""Training with rounded weights: in every layout, on frozen ones with adapters, and what is left after an export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.geometry import Geometry
from bridge.ranks import RankPool
from bridge.toy import config, write_toy

from .conftest import Toy
from .test_lora_runs import lora_recipe
from .training_kit import GLOBAL_BATCH, Corpus, collate, losses, recipe, train_toy

# Of a batch that is learnt by heart.
STEPS = 80

TP2 = ["parallel.tp=2", "parallel.sequence_parallel=true"]
# variant, ranks, scheme, layout
LAYOUTS: dict[str, tuple[str, int, str, list[str]]] = {
    "e2b TP2": ("e2b", 2, "int4-g32", ["parallel.tp=2"]),
    "12b TP2+SP fp8": ("12b", 2, "fp8", TP2),
    "26b-a4b TP2+SP EP2 fp8": ("26b-a4b", 4, "fp8", [*TP2, "parallel.ep=2", "parallel.etp=2"]),
    "26b-a4b TP2+SP ETP2": ("26b-a4b", 2, "q4_0", [*TP2, "parallel.etp=2"]),
    "e4b PP2 VPP2 full recompute": (
        "e4b",
        2,
        "int4-g32",
        ["parallel.pp=2", "parallel.vpp=2", "parallel.recompute=full"],
    ),
    "12b CP2": ("12b", 2, "q4_0", ["parallel.cp=2"]),
    "26b-a4b DP2 EP2": ("26b-a4b", 2, "int4-g32", ["parallel.ep=2"]),
}
IN_MAKE_TEST = {"e2b TP2", "12b TP2+SP fp8", "26b-a4b TP2+SP ETP2"}


class Toys:
    """Toys whose parts on two ranks are whole blocks of 32 columns."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def __call__(self, variant: str) -> Path:
        folder = self._base / variant
        if not folder.exists():
            with patch.dict(config._SMALLER["text_config"], {"intermediate_size": 128, "moe_intermediate_size": 64}):
                write_toy(variant, folder, dtype="float32")
        return folder


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in IN_MAKE_TEST else pytest.mark.slow) for case in LAYOUTS]
)
def test_a_layout_is_one_rank(case: str, toys: Toys, ranks: RankPool, tmp_path: Path) -> None:
    """Losses and gradients of two batches, without an update between: behind one a weight near the middle between two
    codes may take the other, by the last bit of its gradient (with microbatches of one row, on one rank: 4e-4)."""
    variant, world, scheme, layout = LAYOUTS[case]
    found = []
    for size, overrides in ((1, []), (world, layout)):
        output = tmp_path / f"{size}"
        said = recipe(toys(variant), output, 2, seed=34)
        still = ["optimizer.lr=0", "optimizer.min_lr=0", f"model.fake_quant={scheme}"]
        ranks.run(train_toy, said, [*still, *overrides], world_size=size)
        found.append((losses(output), losses(output, "grad_norm")))
    for one, many, bound in zip(*found, (1e-6, 2e-6), strict=True):
        assert all(abs(a - b) <= bound * a for a, b in zip(one, many, strict=True)), (one, many)


def plain_first_step(folder: str, scheme: str, seed: int) -> tuple[float, float]:
    """Loss and gradient norm of transformers with W + (Q(W) - W), the second part a constant. Runs on a rank."""
    import re

    from torch.nn.utils import parametrize

    from bridge.verify.reference import load_hf
    from tests.unit.test_fake_quant import of_compressed_tensors

    class Rounded(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            quantized = of_compressed_tensors(weight.detach().flatten(0, -2), scheme).reshape(weight.shape)
            return weight + (quantized - weight).detach()

    geometry = Geometry.from_folder(folder)
    model = load_hf(Path(folder), geometry, torch.float32).train()
    linear = re.compile(r".*language_model\.layers\.\d+\.(self_attn\.\w_proj|mlp\.\w+_proj|experts)$")
    for name, module in list(model.named_modules()):
        if linear.fullmatch(name):
            for parameter in [name for name, _ in module.named_parameters(recurse=False)]:
                parametrize.register_parametrization(module, parameter, Rounded())
    batch = collate(geometry, seed, range(GLOBAL_BATCH))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return loss.item(), float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))


@pytest.mark.parametrize(("variant", "scheme"), [("26b-a4b", "int4-g32"), ("12b", "fp8")])
def test_a_model_is_transformers_with_rounded_weights(
    variant: str, scheme: str, toys: Toys, ranks: RankPool, tmp_path: Path
) -> None:
    """And with weights as they are it is another one."""
    ((loss, norm),) = ranks.run(plain_first_step, str(toys(variant)), scheme, 34, world_size=1)
    said = recipe(toys(variant), tmp_path / "rounded", 1, seed=34)
    ranks.run(train_toy, said, [f"model.fake_quant={scheme}"], world_size=1)
    ours, our_norm = losses(tmp_path / "rounded")[0], losses(tmp_path / "rounded", "grad_norm")[0]
    assert abs(ours - loss) <= 1e-6 * loss and abs(our_norm - norm) <= 1e-5 * norm
    said = recipe(toys(variant), tmp_path / "plain", 1, seed=34)
    ranks.run(train_toy, said, [], world_size=1)
    assert abs(losses(tmp_path / "plain")[0] - loss) > 1e-5 * loss


@pytest.mark.parametrize(
    ("variant", "scheme", "preset", "options"),
    [
        ("26b-a4b", "int4-g32", "w4a16", ["lora.parameters=[experts.down_proj]"]),
        ("12b", "fp8", "fp8-dynamic", ["lora.dora=true", "lora.targets=[q_proj,down_proj]"]),
    ],
)
def test_adapters_on_frozen_weights(
    variant: str, scheme: str, preset: str, options: list[str], toys: Toys, ranks: RankPool, tmp_path: Path
) -> None:
    """They are trained as on the quantized folder itself, to the bit."""
    import_hf(toys(variant), tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "quantized", quantize=preset)
    found = []
    for base, rounding in ((toys(variant), scheme), (tmp_path / "quantized", "none")):
        output = tmp_path / f"run-{base.name}"
        said = lora_recipe(base, output, 3)
        ranks.run(train_toy, said, [f"model.fake_quant={rounding}", *options], world_size=1)
        found.append((losses(output), losses(output, "grad_norm")))
    assert found[0] == found[1]


def train_by_heart(said: dict[str, Any], overrides: list[str]) -> None:
    """Train on one batch again and again, and evaluate on it. Runs on a rank."""
    from recipes.config import Recipe, resolve
    from recipes.train.data import Streams
    from recipes.train.loop import train

    def data(recipe: Recipe, geometry: Geometry, dp_rank: int, dp_size: int) -> Streams:
        class Again(Corpus):
            def __next__(self) -> dict[str, torch.Tensor]:
                self.taken %= GLOBAL_BATCH
                return super().__next__()

        def corpus() -> Again:
            return Again(geometry, 1, dp_rank, dp_size, 2)

        def evaluation() -> Iterator[dict[str, torch.Tensor]]:
            rows = corpus()
            return (next(rows) for _ in range(GLOBAL_BATCH // 2))

        return Streams(corpus(), {"": evaluation})

    train(resolve(said, overrides), data)


def eval_loss(output: Path) -> float:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line][-1]


def test_a_tuned_model_keeps_what_it_learnt_when_it_is_quantized(toy: Toy, ranks: RankPool, tmp_path: Path) -> None:
    """The loss of the exported and quantized model, against that of the run; without fake quantisation it is worse."""
    worse = {}
    for rounding in ("int4-g32", "none"):
        run, folder = tmp_path / f"run-{rounding}", tmp_path / f"quantized-{rounding}"
        evaluated = ["data.eval=x", "optimizer.warmup=0", "optimizer.weight_decay=0"]
        said = recipe(toy("12b"), run, STEPS)
        options = [f"train.eval_every={STEPS}", "optimizer.lr=1e-2", f"model.fake_quant={rounding}"]
        ranks.run(train_by_heart, said, [*evaluated, *options], world_size=1)
        export_hf(run, folder, quantize="w4a16")
        said = recipe(folder, tmp_path / f"again-{rounding}", 1)
        options = ["train.eval_every=1", "optimizer.lr=0", "optimizer.min_lr=0"]
        ranks.run(train_by_heart, said, [*evaluated, *options], world_size=1)
        worse[rounding] = eval_loss(tmp_path / f"again-{rounding}") / eval_loss(run) - 1
    assert abs(worse["int4-g32"]) <= 0.01 < worse["none"]
