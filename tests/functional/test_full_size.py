"""The published geometry of E2B: 10.2 GB, minutes. `pytest -m slow tests/functional/test_full_size.py`"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bridge.convert.folders import import_hf
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.toy import write_toy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("full")
    write_toy("e2b", base / "hf", full_size=True)
    import_hf(base / "hf", base / "megatron")
    return base / "hf", base / "megatron"


def load_with_megatron_alone(hf: Path, megatron: Path, parallel: Parallel) -> tuple[int, list[str]]:
    """On a rank: Megatron's own loader, then every parameter against the HF file, read by safetensors itself."""
    import megatron.core.dist_checkpointing as dist_checkpointing
    from safetensors import safe_open

    from bridge import Gemma4Bridge
    from bridge.convert.live import METADATA, boxes

    bridge = Gemma4Bridge.from_megatron(megatron)
    provider = bridge.provider(parallel, dtype=torch.bfloat16, overrides={"perform_initialization": False})
    model = bridge.build(provider)
    assert bridge.megatron is not None
    state = {"model": model[0].sharded_state_dict(metadata=dict(METADATA))}
    loaded = dist_checkpointing.load(state, str(bridge.megatron.weights), strict="raise_all")
    model[0].load_state_dict(loaded["model"])
    files = {}
    for path in sorted(hf.glob("*.safetensors")):
        opened = safe_open(path, framework="pt")
        files.update(dict.fromkeys(opened.keys(), opened))
    wrong, count = [], 0
    for box in boxes(model):
        entry = bridge.table.entries[box.key]
        for block in entry.blocks:
            low, high = max(block.row, box.rows.start), min(block.row + block.num_rows, box.rows.stop)
            if low >= high:
                continue
            name = entry.sources[block.source].name
            first = block.source_row + low - block.row
            columns = tuple(slice(o, o + n) for o, n in zip(box.offset[1:], box.tensor.shape[1:], strict=True))
            stored = files[name].get_slice(name)
            if stored.get_shape():
                expected = stored[(slice(first, first + high - low), *columns)]
            else:
                expected = files[name].get_tensor(name).reshape(1)
            count += expected.numel()
            if not torch.equal(box.tensor[low - box.rows.start : high - box.rows.start], expected):
                wrong.append(f"{box.key} rows {low}-{high}")
    return count, wrong


@pytest.mark.parametrize("parallel", [Parallel(tp=2), Parallel(pp=2)], ids=str)
def test_megatron_loads_the_imported_full_size_model(
    ranks: RankPool, imported: tuple[Path, Path], parallel: Parallel
) -> None:
    results = ranks.run(load_with_megatron_alone, *imported, parallel, world_size=2, timeout_s=1800)
    assert [wrong for _, wrong in results] == [[], []]
    # Every value is held once over two ranks, replicated norms and the tied head of the last stage apart.
    assert sum(count for count, _ in results) >= 4_600_000_000
