"""Weights out of a live model into a sink, in every layout: names and bytes of the export, in bounded memory."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bridge.geometry import Geometry
from bridge.lora.peft_folder import WEIGHTS_FILE, write_peft
from bridge.lora.source import open_megatron
from bridge.mapping import table_for
from bridge.ranks import RankPool

from .conftest import Toy
from .sync_kit import AdapterResult, SyncResult, fail_while_sending, refused, sync_adapters, sync_and_save
from .test_live_weights import near

# The largest groups of toys are buckets by themselves: gathered whole, beside the bucket, they would be seen.
BUCKET = 1 << 17
LAYOUTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "TP2+SP": ("e4b", {"tp": 2, "sequence_parallel": True}, 2),
    "PP2": ("12b", {"pp": 2}, 2),
    "TP2+SP PP2": ("e2b", {"tp": 2, "pp": 2, "sequence_parallel": True}, 4),
    "EP2": ("26b-a4b", {"ep": 2}, 2),
    "DP2": ("31b", {"overlap": True}, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_bytes_are_those_of_the_export(ranks: RankPool, toy: Toy, tmp_path: Path, layout: str) -> None:
    """On two ranks of all, after a step; then again, without what is frozen; and never more than two buckets."""
    variant, parallel, world = LAYOUTS[layout]
    receivers = (world - 1, 0)
    folder = toy(variant)
    found: list[SyncResult] = ranks.run(
        sync_and_save, folder, parallel, BUCKET, receivers, tmp_path / "out", ["vision"], world_size=world
    )
    table = table_for(Geometry.from_folder(folder))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        exported = set(file.keys())
    for rank, result in enumerate(found):
        print(f"{layout}, rank {rank}: {result.peak} bytes beside the shard, of 2 * {max(BUCKET, result.largest)}")
        assert result.peak <= 2 * max(BUCKET, result.largest), (rank, result.peak, result.largest)
        if rank not in receivers:
            assert result.names == []
            continue
        assert result.buckets > 3
        assert set(result.names) == exported - set(table.carried) - set(table.copies)
        assert result.megatron == {name: table.by_hf_name[name][0].key for name in result.names}
        assert (result.wrong, result.again_wrong, result.as_said) == ([], [], True)
        frozen = [name for name in result.names if "vision" in name]
        assert frozen and not set(frozen) & set(result.again)
        linears = {name for name in result.names if name.endswith(("_proj", "_proj.weight"))} - set(frozen)
        assert linears and linears <= set(result.again)


def test_adapters_merged_and_alone(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """In EP2: as `save_hf` merges them, then only what has adapters and its siblings; alone, as `adapter export`."""
    lora = {
        "targets": r".*language_model\.layers\.\d+\.self_attn\.(q|k|o)_proj",
        "parameters": ["experts.gate_up_proj"],
        "modules_to_save": [],
    }
    found: list[AdapterResult] = ranks.run(
        sync_adapters, toy("26b-a4b"), tmp_path / "run", {"ep": 2}, lora, world_size=2
    )
    result = found[0]
    assert found[1].merged == {} and not any(found[1].only.values())
    assert result.peak <= 2 * max(BUCKET, result.largest), (result.peak, result.largest)
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(near(saved[name], tensor) for name, tensor in result.merged.items())
    adapted = {
        name for name in result.merged if name.endswith(("q_proj.weight", "k_proj.weight", "experts.gate_up_proj"))
    }
    siblings = {name for name in result.merged if name.endswith(("v_proj.weight", "experts.down_proj"))}
    assert adapted and siblings
    assert set(result.again) == adapted | siblings | {n for n in result.merged if n.endswith("o_proj.weight")}
    for adapter_format, tensors in result.only.items():
        with ExitStack() as stack:
            write_peft(tmp_path / adapter_format, open_megatron(stack, tmp_path / "run"), adapter_format=adapter_format)
        exported = load_file(tmp_path / adapter_format / WEIGHTS_FILE)
        assert tensors.keys() == exported.keys()
        assert all(torch.equal(tensors[name], exported[name]) for name in exported), adapter_format


def test_a_sink_that_fails_fails_everywhere(ranks: RankPool, toy: Toy) -> None:
    """No rank waits for another, and every sink hears of it."""
    found = ranks.run(fail_while_sending, toy("31b", text_only=True), 1, world_size=2, timeout_s=120)
    assert found[1][0] == "OSError: [Errno 28] No space left on device"
    assert found[0][0] == "CheckpointError: rank 1: OSError: [Errno 28] No space left on device"
    assert [called for _, called in found] == [["take", "take", "abort"]] * 2


def test_options_that_make_no_sense(ranks: RankPool, toy: Toy) -> None:
    (said,) = ranks.run(refused, toy("31b", text_only=True), world_size=1)
    assert said == [
        "ranks=[1]: expected some of 0 to 0, each once",
        "ranks=[]: expected some of 0 to 0, each once",
        "bucket_bytes=0: a bucket holds a byte at least",
        "this model has no adapters",
        "adapters='no': known are merge, leave, only",
        "a rank that receives weights needs a sink for them",
    ]
