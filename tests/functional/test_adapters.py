"""Adapters between PEFT and Megatron: the same logits on both sides, and not a bit changed on the way."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bridge.convert.folders import import_hf
from bridge.errors import CheckpointError
from bridge.geometry import Geometry
from bridge.lora.peft_config import CONFIG_FILE
from bridge.lora.peft_folder import WEIGHTS_FILE, write_peft
from bridge.lora.source import import_peft, open_megatron
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.toy import VARIANTS
from bridge.verify.media import media_sample
from bridge.verify.on_ranks import run
from bridge.verify.task import ParityTask
from tests.functional.adapter_kit import EXPERTS, make_adapter, peft_logits, save_run
from tests.functional.conftest import Toy

# Everything that can have an adapter, ranks and scalings of several kinds.
UNEVEN: dict[str, Any] = {"rank_pattern": {"q_proj": 3, "up_proj": 6}, "alpha_pattern": {"k_proj": 2}}
OPTIONS: dict[str, dict[str, Any]] = {
    "e2b": {"target_modules": "all-linear", **UNEVEN},
    "e4b": {
        "target_modules": ["q_proj", "v_proj", "linear_end.linear"],
        "exclude_modules": r".*tower.*[qv]_proj",
        "modules_to_save": ["embed_tokens", "embed_vision", "language_model.norm"],
        "ensure_weight_tying": True,
    },
    "12b": {"target_modules": "all-linear", **UNEVEN},
    "26b-a4b": {"target_modules": "all-linear", "target_parameters": list(EXPERTS), "use_rslora": True, **UNEVEN},
    "31b": {"target_modules": r".*language_model\..*\.(q|k|v)_proj"},
}
# Scaled tables, and magnitudes of fused, split and replicated linears.
TABLES = r".*language_model\.(.*_proj|embed_tokens(_per_layer)?|per_layer_model_projection)"
LAYOUTS = {"e2b": Parallel(tp=2, pp=2, sequence_parallel=True), "26b-a4b": Parallel(tp=2, ep=2, sequence_parallel=True)}


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        *((variant, OPTIONS[variant]) for variant in VARIANTS),
        ("e2b", {"target_modules": TABLES, "use_dora": True}),
    ],
    ids=[*VARIANTS, "e2b-tables-dora"],
)
def test_an_adapter_of_peft_here_and_back(
    ranks: RankPool, toy: Toy, variant: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT's adapter is imported, gives PEFT's logits, and is exported with the same bits and config."""
    folder = toy(variant)
    geometry = Geometry.from_folder(folder)
    make_adapter(folder, tmp_path / "peft", **options)
    import_hf(folder, tmp_path / "base")
    import_peft(tmp_path / "peft", tmp_path / "adapter", tmp_path / "base")
    kinds = ("image", "audio") if geometry.audio is not None else ("image", "text")
    sample = media_sample(folder, geometry, seed=0, kinds=kinds)
    with ExitStack() as stack:
        write_peft(tmp_path / "again", open_megatron(stack, tmp_path / "adapter"))
    # Beside the adapter of an embedding PEFT stores the embedding.
    theirs = {n: bits for n, bits in _bits(tmp_path / "peft").items() if not n.endswith(".base_layer.weight")}
    assert _bits(tmp_path / "again") == theirs
    reference = peft_logits(folder, tmp_path / "again", sample, tmp_path / "logits.safetensors")
    for parallel in (Parallel(), *([LAYOUTS[variant]] if variant in LAYOUTS else [])):
        task = ParityTask(variant, geometry, folder, False, parallel, torch.float32, sample, {"dtype": reference})
        task = ParityTask(**{**task.__dict__, "gradients": False, "adapter": tmp_path / "adapter"})
        checks = [check for rank in ranks.run(run, task, world_size=parallel.world_size) for check in rank]
        relative = [check.value for check in checks if check.metric == "relative"]
        assert len(relative) == 1 + len(set(kinds))
        assert max(relative) <= 1e-5, relative


def test_whole_modules_keep_a_dtype_of_their_own(toy: Toy, tmp_path: Path) -> None:
    """PEFT trains factors in float32 beside modules of a bf16 model."""
    folder = toy("31b", text_only=True)
    make_adapter(folder, tmp_path / "peft", dtype=torch.bfloat16, target_modules=["q_proj"], modules_to_save=["norm"])
    import_hf(folder, tmp_path / "base")
    import_peft(tmp_path / "peft", tmp_path / "adapter", tmp_path / "base")
    with ExitStack() as stack:
        write_peft(tmp_path / "again", open_megatron(stack, tmp_path / "adapter"))
    assert _bits(tmp_path / "again") == _bits(tmp_path / "peft")
    assert {dtype for dtype, _ in _bits(tmp_path / "peft").values()} == {torch.float32, torch.bfloat16}


def _bits(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    tensors = load_file(folder / WEIGHTS_FILE)
    return {n: (t.dtype, t.contiguous().view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("variant", "lora"),
    [("e2b", {}), ("26b-a4b", {}), ("e2b", {"targets": TABLES, "dora": True})],
    ids=["e2b", "26b-a4b", "e2b-tables-dora"],
)
def test_every_layout_exports_the_same_bytes(
    ranks: RankPool, toy: Toy, variant: str, lora: dict[str, Any], tmp_path: Path
) -> None:
    """Checkpoints that a run writes, optimizer and all, in several layouts; each in every format that can have it."""
    folder = toy(variant)
    layouts: dict[str, dict[str, Any]] = {"one": {}, "tp2": {"tp": 2, "sequence_parallel": True}, "pp2": {"pp": 2}}
    if variant == "26b-a4b":
        layouts["ep2"] = {"ep": 2}
    else:
        layouts["tp2 pp2"] = {**layouts.pop("tp2"), **layouts.pop("pp2")}
    for name, parallel in layouts.items():
        world_size = math.prod(parallel.get(key, 1) for key in ("tp", "pp", "ep"))
        ranks.run(save_run, folder, tmp_path / name, parallel, lora, world_size=world_size)
        for adapter_format in ("peft",) if lora else ("peft", "vllm", "sglang"):
            with ExitStack() as stack:
                adapter = open_megatron(stack, tmp_path / name)
                assert adapter.base == str(folder)
                write_peft(tmp_path / f"{name}-{adapter_format}", adapter, adapter_format=adapter_format)
            for file in (WEIGHTS_FILE, CONFIG_FILE):
                first = (tmp_path / f"one-{adapter_format}" / file).read_bytes()
                assert (tmp_path / f"{name}-{adapter_format}" / file).read_bytes() == first, (
                    name,
                    adapter_format,
                    file,
                )
    assert len({value[1] for value in _bits(tmp_path / "one-peft").values()}) > 20


def test_refusals_leave_nothing(toy: Toy, tmp_path: Path) -> None:
    folder, other = toy("31b", text_only=True), toy("12b", text_only=True)
    import_hf(folder, tmp_path / "base")
    import_hf(other, tmp_path / "other")
    make_adapter(folder, tmp_path / "mixed", target_modules=["q_proj"])
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="another model"):
        import_peft(tmp_path / "mixed", tmp_path / "adapter", tmp_path / "other")
    with ExitStack() as stack, pytest.raises(CheckpointError, match=r"adapter\.json: not found"):
        open_megatron(stack, tmp_path / "base")
    config = json.loads((tmp_path / "mixed" / CONFIG_FILE).read_text()) | {"peft_type": "LOHA"}
    (tmp_path / "mixed" / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'LOHA'"):
        import_peft(tmp_path / "mixed", tmp_path / "adapter", tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
