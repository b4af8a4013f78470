"""Live, sharded models: weights in and out through the tables, and Megatron's own checkpoints at any layout."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.convert.manifest import MegatronFolder
from bridge.geometry import Geometry
from bridge.mapping import table_for
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.toy import VARIANTS

from .conftest import Toy

LAYOUTS = {
    "1 rank": Parallel(),
    "TP4+SP": Parallel(tp=4, sequence_parallel=True),
    "PP2 VPP2": Parallel(pp=2, vpp=2),
    "TP2+SP PP2": Parallel(tp=2, pp=2, sequence_parallel=True),
}
EXPERT_LAYOUTS = {
    "EP4": Parallel(ep=4),
    "TP2+SP EP2 ETP2": Parallel(tp=2, ep=2, etp=2, sequence_parallel=True),
    "PP2 EP2": Parallel(pp=2, ep=2),
}


def through_a_live_model(folder: Path, parallel: Parallel, dtype: torch.dtype, out: Path) -> list[str]:
    """On a rank: folder -> sharded model -> names that differ in `iter_hf_weights`; `save_hf` writes `out`."""
    from bridge import Gemma4Bridge

    bridge = Gemma4Bridge.from_hf(folder)
    provider = bridge.provider(parallel, dtype=dtype, overrides={"perform_initialization": False})
    model = bridge.build(provider)
    for chunk in model:
        for tensor in chunk.state_dict().values():
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(float("nan"))  # what is not loaded shows
    bridge.load_hf_weights(model)
    stored = load_file(folder / "model.safetensors")
    seen = dict(bridge.iter_hf_weights(model))
    wrong = [name for name, tensor in seen.items() if not torch.equal(tensor, stored[name])]
    wrong += [name for name in bridge.table.by_hf_name if name not in seen]
    bridge.save_hf(model, out, max_shard_size=1 << 40)
    return wrong


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense(ranks: RankPool, toy: Toy, tmp_path: Path, variant: str, layout: str) -> None:
    check_live(ranks, toy(variant), LAYOUTS[layout], tmp_path / "out")


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts(ranks: RankPool, toy: Toy, tmp_path: Path, layout: str) -> None:
    check_live(ranks, toy("26b-a4b"), EXPERT_LAYOUTS[layout], tmp_path / "out")


def test_untied_bf16(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    folder = toy("e4b", dtype="bfloat16", untied=True, text_only=True)
    check_live(ranks, folder, LAYOUTS["TP2+SP PP2"], tmp_path / "out", torch.bfloat16)


def check_live(
    ranks: RankPool, folder: Path, parallel: Parallel, out: Path, dtype: torch.dtype = torch.float32
) -> None:
    results = ranks.run(through_a_live_model, folder, parallel, dtype, out, world_size=parallel.world_size)
    assert results == [[]] * parallel.world_size
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    _, different, missing = filecmp.cmpfiles(folder, out, names, shallow=False)
    assert not different and not missing


def relayout(
    source: Path, parallel: Parallel, target: Path | None, with_our_reader: bool
) -> dict[str, tuple[int, ...]]:
    """On a rank: Megatron's own load of a checkpoint at one layout, and its own save.

    Returns how much of each axis of each key this rank holds.
    """
    import megatron.core.dist_checkpointing as dist_checkpointing

    from bridge import Gemma4Bridge
    from bridge.convert.live import METADATA, boxes

    bridge = Gemma4Bridge.from_megatron(source)
    provider = bridge.provider(parallel, dtype=torch.float32, overrides={"perform_initialization": False})
    model = bridge.build(provider)
    assert bridge.megatron is not None
    weights = bridge.megatron.weights

    def sharded() -> dict[str, Any]:
        return {f"chunk{i}": chunk.sharded_state_dict(metadata=dict(METADATA)) for i, chunk in enumerate(model)}

    loaded = dist_checkpointing.load(sharded(), str(weights), strict="raise_all")
    for i, chunk in enumerate(model):
        chunk.load_state_dict(loaded[f"chunk{i}"])
    if with_our_reader:
        expected = [tensor.clone() for chunk in model for tensor in chunk.state_dict().values() if tensor is not None]
        for chunk in model:
            for tensor in chunk.state_dict().values():
                if tensor is not None:
                    tensor.fill_(float("nan"))
        bridge.load_hf_weights(model)
        again = [tensor for chunk in model for tensor in chunk.state_dict().values() if tensor is not None]
        assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True)), "our reader and Megatron's differ"
    if target is not None:
        dist_checkpointing.save(sharded(), str(target), content_metadata=dict(METADATA))
    held: dict[str, list[set[int]]] = {}
    for box in boxes(model):
        rows = held.setdefault(box.key, [set() for _ in box.offset])
        for axis, (offset, size) in enumerate(zip(box.offset, box.tensor.shape, strict=True)):
            rows[axis] |= set(range(offset, offset + size))
    return {key: tuple(len(numbers) for numbers in axes) for key, axes in held.items()}


HOPS = {
    "e2b": [Parallel(tp=2, sequence_parallel=True), Parallel(pp=2, vpp=2), Parallel(tp=4), Parallel(pp=4)],
    "12b": [Parallel(pp=2), Parallel(tp=4, sequence_parallel=True), Parallel()],
    "26b-a4b": [
        Parallel(ep=4),
        Parallel(tp=2, etp=2, ep=2, sequence_parallel=True),
        Parallel(pp=2, ep=2),
        Parallel(tp=2, sequence_parallel=True),
    ],
}


@pytest.mark.parametrize("variant", HOPS)
def test_megatron_moves_a_checkpoint_between_layouts(ranks: RankPool, toy: Toy, tmp_path: Path, variant: str) -> None:
    """Imported once, loaded and saved by Megatron itself at one layout after another, exported: nothing changed."""
    source = toy(variant)
    current = tmp_path / "imported"
    import_hf(source, current)
    for hop, parallel in enumerate(HOPS[variant]):
        target = tmp_path / f"hop{hop}"
        target.mkdir()
        (target / "iter_0000007").mkdir()
        (target / "hf").symlink_to(current / "hf")
        ranks.run(relayout, current, parallel, target / "iter_0000007", True, world_size=parallel.world_size)
        (target / "latest_checkpointed_iteration.txt").write_text("7")
        current = target
        assert MegatronFolder.open(current).weights.name == "iter_0000007"
    export_hf(current, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("variant", "group", "parallel"),
    [
        ("e2b", "tp", Parallel(tp=2)),
        ("12b", "tp", Parallel(tp=4)),
        ("e4b", "pp", Parallel(pp=2)),
        ("26b-a4b", "ep", Parallel(ep=2)),
        ("26b-a4b", "etp", Parallel(etp=2, tp=1)),
    ],
)
def test_tables_say_how_megatron_shards(
    ranks: RankPool, toy: Toy, tmp_path: Path, variant: str, group: str, parallel: Parallel
) -> None:
    import_hf(toy(variant), tmp_path / "m")
    cuts = ranks.run(relayout, tmp_path / "m", parallel, None, False, world_size=parallel.world_size)[0]
    table = table_for(Geometry.from_folder(toy(variant)))
    assert cuts
    for key, held in cuts.items():
        entry = table.entries[key]
        for axis, name in enumerate(entry.row.shard):
            if name == group and group != "pp":
                assert held[axis] * parallel.world_size == entry.shape[axis], (key, axis)
            elif name == group:
                assert held[axis] < entry.shape[axis], (key, axis)
            else:
                assert held[axis] == entry.shape[axis], (key, axis)
