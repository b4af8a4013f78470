"""Vocabularies that tensor parallelism does not divide: rows are filled up inside the model, and nowhere else."""

from __future__ import annotations

import itertools
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.errors import ParallelError, UsageError
from bridge.geometry import Geometry
from bridge.lora.peft_folder import CONFIG_FILE, WEIGHTS_FILE, write_peft
from bridge.lora.source import open_megatron
from bridge.megatron.layout import check_layout
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.toy import VARIANTS

from .adapter_kit import save_run
from .conftest import References, Toy
from .test_live import check_live, relayout
from .test_lora_training import TEXT, WITH_TABLES, Trainings, check
from .test_parity import assert_passed, compare
from .training_kit import Trouble, losses, recipe, train_toy

SP2, SP4 = Parallel(tp=2, sequence_parallel=True), Parallel(tp=4, sequence_parallel=True)
# (variant, options of the toy, layout): of every kind of table one at least.
FEW: list[tuple[str, dict[str, Any], Parallel]] = [
    ("e2b", {"vocab_size": 515, "ple_vocab_size": 513}, Parallel(tp=4)),
    ("e4b", {"vocab_size": 509}, Parallel(tp=2, pp=2, sequence_parallel=True)),
    ("12b", {"vocab_size": 515, "untied": True, "text_only": True}, SP4),
    ("26b-a4b", {"vocab_size": 509}, Parallel(tp=2, ep=2, sequence_parallel=True)),
]
ALL = [
    (variant, {"vocab_size": size, "untied": untied, "text_only": untied}, parallel)
    for variant, size, untied, parallel in itertools.product(
        VARIANTS, (509, 512, 515), (False, True), (Parallel(), SP2, SP4)
    )
]


def _name(case: Any) -> str:
    return "-".join(f"{key}={value}" for key, value in case.items()) if isinstance(case, dict) else str(case)


def both_ways(ranks: RankPool, references: References, folder: Path, parallel: Parallel, tmp_path: Path) -> None:
    """Logits and gradients are those of transformers, and the folder comes back out of the live model bit by bit."""
    checks = compare(ranks, references, folder, parallel)
    assert_passed(checks, "logits relative", "gradients relative")
    check_live(ranks, folder, parallel, tmp_path / "out")


@pytest.mark.parametrize(("variant", "options", "parallel"), FEW, ids=_name)
def test_a_vocabulary_that_ranks_do_not_divide(
    ranks: RankPool, references: References, toy: Toy, tmp_path: Path, variant: str, options: Any, parallel: Parallel
) -> None:
    both_ways(ranks, references, toy(variant, **options), parallel, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "options", "parallel"), ALL, ids=_name)
def test_every_vocabulary(
    ranks: RankPool, references: References, toy: Toy, tmp_path: Path, variant: str, options: Any, parallel: Parallel
) -> None:
    both_ways(ranks, references, toy(variant, **options), parallel, tmp_path)


@pytest.mark.parametrize(
    ("variant", "options"),
    [("e2b", {"vocab_size": 509, "ple_vocab_size": 515}), ("12b", {"vocab_size": 515, "untied": True})],
    ids=_name,
)
def test_megatron_moves_it_between_layouts(
    ranks: RankPool, toy: Toy, tmp_path: Path, variant: str, options: dict[str, Any]
) -> None:
    """Megatron's own load and save, of one layout after another; our reader reads each of them. No row is added."""
    source, current = toy(variant, **options), tmp_path / "imported"
    import_hf(source, current)
    for hop, parallel in enumerate((SP2, Parallel(tp=4), Parallel(pp=2), SP4, Parallel())):
        target = tmp_path / f"hop{hop}"
        (target / "iter_0000007").mkdir(parents=True)
        (target / "hf").symlink_to(current / "hf")
        ranks.run(relayout, current, parallel, target / "iter_0000007", True, world_size=parallel.world_size)
        (target / "latest_checkpointed_iteration.txt").write_text("7")
        current = target
    export_hf(current, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trainings(ranks: RankPool, toy: Toy) -> Trainings:
    return Trainings(ranks, lambda variant: toy(variant, vocab_size=515, ple_vocab_size=513))


@pytest.mark.parametrize(
    ("lora", "parallel", "world"),
    [
        ({"targets": WITH_TABLES}, {"tp": 4}, 4),
        ({"targets": WITH_TABLES, "dora": True}, {"tp": 2, "sequence_parallel": True, "pp": 2}, 4),
        ({"targets": TEXT, "modules_to_save": ("embed_tokens", "embed_tokens_per_layer")}, {"tp": 4}, 4),
    ],
    ids=["tables", "tables, DoRA", "trained whole"],
)
def test_lora_trains_as_peft_does(
    trainings: Trainings, record_property: Any, lora: dict[str, Any], parallel: dict[str, Any], world: int
) -> None:
    check(trainings.compared("e2b", 3, 0, parallel, world, **lora), record_property)


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({"vocab_size": 515, "ple_vocab_size": 509}, {"targets": WITH_TABLES, "dora": True}),
        (
            {"vocab_size": 515, "untied": True, "text_only": True},
            {"targets": ["q_proj", "embed_tokens_per_layer"], "modules_to_save": ["embed_tokens", "lm_head"]},
        ),
    ],
    ids=["tied", "untied"],
)
def test_every_layout_exports_the_same_adapter(
    ranks: RankPool, toy: Toy, tmp_path: Path, options: dict[str, Any], lora: dict[str, Any]
) -> None:
    """Of the tables: factors, magnitudes, whole embeddings and heads; the optimizer's state is saved with them."""
    folder = toy("e2b", **options)
    for tp in (1, 2, 4):
        ranks.run(save_run, folder, tmp_path / f"tp{tp}", {"tp": tp}, lora, world_size=tp)
        with ExitStack() as stack:
            write_peft(tmp_path / f"peft{tp}", open_megatron(stack, tmp_path / f"tp{tp}"))
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            assert (tmp_path / f"peft{tp}" / file).read_bytes() == (tmp_path / "peft1" / file).read_bytes(), tp


def never_wins(folder: Path, parallel: Parallel) -> tuple[float, bool]:
    """On a rank: the largest weight of a word behind the vocabulary, and whether ids and labels there raise."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    from bridge import Gemma4Bridge

    bridge = Gemma4Bridge.from_hf(folder)
    (model,) = bridge.build(bridge.provider(parallel, torch.float32, overrides={"perform_initialization": False}))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # as memory may be, where nothing is initialised
    bridge.load_hf_weights([model])
    assert all(bool(p.isfinite().all()) for p in model.parameters()), "what fills it up was not cleared"
    rows = bridge.geometry.vocab_size
    ids = torch.arange(8, 24)[None]
    model(ids, labels=ids).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        logits: Tensor = gather_from_tensor_model_parallel_region(model.eval()(ids))
    refused = 0
    for wrong in (rows, rows + 1, -1):
        batch = torch.where(torch.arange(16) == 7, wrong, ids)
        for call in (lambda batch=batch: model(batch), lambda batch=batch: model(ids, labels=batch)):
            with pytest.raises(UsageError, match=f"token id {wrong} has no row in"):
                call()
            refused += 1
    behind = logits[..., rows:]
    weight = float(logits.softmax(-1)[..., rows:].max()) if behind.numel() else 0.0
    assert behind.numel() == logits.shape[1] * (-rows % parallel.tp)
    return weight, refused == 6 and bool((logits.topk(rows, dim=-1).indices < rows).all())


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_what_fills_it_up_never_wins(ranks: RankPool, toy: Toy, tp: int) -> None:
    """In a softmax, a top-k; and no id means it: not that of a token, and not that of a label."""
    folder = toy("e2b", vocab_size=515, ple_vocab_size=515)
    assert ranks.run(never_wins, folder, Parallel(tp=tp), world_size=tp) == [(0.0, True)] * tp


def test_a_rank_without_a_word_is_refused(toy: Toy) -> None:
    geometry = Geometry.from_folder(toy("e2b", vocab_size=9, ple_vocab_size=512))
    with pytest.raises(ParallelError, match="tp=4: the 9 rows of embed_tokens leave the last rank none"):
        check_layout(geometry, Parallel(tp=4))


def test_a_run_goes_on_at_another_tp(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """Weights and optimizer, of a head of its own too; what it exports has the vocabulary's rows."""
    folder = toy("e2b", vocab_size=515, ple_vocab_size=509, untied=True, text_only=True)
    ranks.run(train_toy, recipe(folder, tmp_path / "whole", 6), [], world_size=1)
    said = recipe(folder, tmp_path / "moved", 6)
    for turn, tp in enumerate((2, 4), 1):
        leave = Trouble(2 * turn, 0, signal.SIGTERM)
        stopped = ranks.run(train_toy, said, [f"parallel.tp={tp}"], leave, world_size=tp)
        assert stopped[0] == (True, 2 * turn)
    ranks.run(train_toy, said, [], world_size=1)
    ours, theirs = losses(tmp_path / "moved"), losses(tmp_path / "whole")
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) <= 1e-4
    export_hf(tmp_path / "moved", tmp_path / "out")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    assert shapes == {n: tuple(t.shape) for n, t in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("tp", [1, 2])
def test_a_run_refuses_ids_without_a_row(ranks: RankPool, toy: Toy, tmp_path: Path, tp: int) -> None:
    """What a stream of batches yields is held against the tables before any of it is looked up."""
    folder = toy("e2b", vocab_size=100)
    with pytest.raises(UsageError, match=r"the data: token id \d+ has no row in embed_tokens \(100 rows, vocab_size"):
        ranks.run(train_toy, recipe(folder, tmp_path, 2), [f"parallel.tp={tp}"], world_size=tp)
