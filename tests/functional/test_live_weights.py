"""What a live model hands out: adapters in its weights, the last update, one dtype; and ranks that fail together."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bridge.errors import BridgeError, UsageError
from bridge.lora.adapter import Adapter
from bridge.lora.merge import merge_adapter, open_base
from bridge.lora.spec import LoraSpec
from bridge.lora.targets import resolve
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool

from .conftest import Toy
from .lora_kit import moved_values

SPECS = {
    "e2b": LoraSpec(
        4,
        8.0,
        r".*language_model\.(embed_tokens(_per_layer)?|per_layer_model_projection|.*\.(q|v|up|down)_proj)",
        rank_pattern={"self_attn.v_proj": 2},
        alpha_pattern={"up_proj": 3.0},
        dora=True,
        modules_to_save=("embed_vision",),
    ),
    "26b-a4b": LoraSpec(4, 8.0, "all-linear", parameters=("experts.gate_up_proj", "experts.down_proj"), rslora=True),
}


def hand_out(folder: Path, spec: LoraSpec, parallel: Parallel, dtype: torch.dtype, out: Path) -> dict[str, Any]:
    """On a rank: a model with an adapter; what is handed out of it, with and without, and `out` is written."""
    from bridge import Gemma4Bridge
    from bridge.lora.inject import attach, fill
    from bridge.lora.table import adapter_table

    bridge = Gemma4Bridge.from_hf(folder)
    model = bridge.build(bridge.provider(parallel, dtype=dtype, overrides={"perform_initialization": False}))
    bridge.load_hf_weights(model)
    table = adapter_table(bridge.table, resolve(spec, bridge.table))
    attach(model, table)
    fill(model, table, moved_values(3, folder))
    with pytest.raises(UsageError, match="adapters='no': known are merge, leave"):
        next(bridge.iter_hf_weights(model, adapters="no"))  # type: ignore[arg-type]
    merged = dict(bridge.iter_hf_weights(model))
    left = dict(bridge.iter_hf_weights(model, adapters="leave"))
    bridge.save_hf(model, out, max_shard_size=1 << 40)
    return {"merged": merged, "left": left} if torch.distributed.get_rank() == 0 else {}


@pytest.mark.parametrize(
    ("variant", "parallel", "dtype"),
    [
        ("e2b", Parallel(tp=2, pp=2, sequence_parallel=True), torch.float32),
        ("26b-a4b", Parallel(tp=2, ep=2, sequence_parallel=True), torch.bfloat16),
    ],
    ids=["e2b TP2+SP PP2, DoRA", "26b TP2+SP EP2, bf16"],
)
def test_adapters_are_in_the_weights(
    ranks: RankPool, toy: Toy, tmp_path: Path, variant: str, parallel: Parallel, dtype: torch.dtype
) -> None:
    """As a merge on the disk gives them; «leave» gives the base, to the bit."""
    folder = toy(variant, dtype=str(dtype).removeprefix("torch."))
    spec, values = SPECS[variant], moved_values(3, toy(variant))
    with ExitStack() as stack:
        base = open_base(stack, folder)
        rounded: Callable[..., Tensor] = lambda target, part: values(target, part).to(dtype)  # noqa: E731
        kinds = {torch.float32: "F32", torch.bfloat16: "BF16"}
        adapter = Adapter(
            tmp_path / "a", base.table, spec, resolve(spec, base.table), rounded, lambda *_: kinds[dtype], (), None
        )
        merge_adapter(base, adapter, tmp_path / "merged")
    (found, *_) = ranks.run(hand_out, folder, spec, parallel, dtype, tmp_path / "out", world_size=parallel.world_size)
    expected, before = load_file(tmp_path / "merged" / "model.safetensors"), load_file(folder / "model.safetensors")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == expected.keys() and found["merged"].keys() == found["left"].keys()
    for name, tensor in found["merged"].items():
        assert near(saved[name], tensor), name  # in other pieces, and so with other products
        assert torch.equal(found["left"][name], before[name]), name
        assert near(tensor, expected[name]), name
    changed = {name for name, tensor in found["merged"].items() if not torch.equal(tensor, before[name])}
    assert changed == {target.name for target in adapter.targets if target.kind != "saved"}


def near(ours: Tensor, theirs: Tensor) -> bool:
    """To the rounding of float32 products; in bf16 that may be the other side of a tie, once in many."""
    difference = (ours.float() - theirs.float()).abs()
    if ours.dtype is torch.float32:
        return bool(difference.max() <= 1e-6 * theirs.abs().max())
    step = torch.finfo(torch.bfloat16).eps * theirs.float().abs()
    return bool((difference <= step).all()) and int((difference > 0).sum()) <= 1e-3 * ours.numel() + 1


def stale_or_not(folder: Path) -> tuple[int, list[str], list[str]]:
    """On a rank: tensors that DDP has not gathered after an update, and those handed out that are not the last."""
    from bridge.convert.live import Gatherer, iter_hf
    from recipes.config import resolve as resolve_recipe
    from recipes.train.setup import assemble, start_ranks
    from recipes.train.step import clear_gradients, run_microbatches, update
    from tests.functional.training_kit import collate

    said = {
        "output": "unused",
        "model": {"hf": str(folder), "dtype": "float32"},
        "parallel": {"overlap": True},
        "train": {"steps": 9, "global_batch_size": 2, "micro_batch_size": 1, "seq_length": 40},
        "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup": 0},
    }
    start_ranks()
    found = []
    for wrapped in (False, True):
        run = assemble(resolve_recipe(said), 1, load=True)
        model = run.chunks if wrapped else run.models
        clear_gradients(run)
        run_microbatches(run, [collate(run.bridge.geometry, 1, range(run.groups.dp.rank(), 2))], train=True)
        run.scheduler.step(1)
        update(run, float("inf"))
        raw = {name: tensor.clone() for name, tensor in iter_hf(Gatherer(run.models, run.bridge.table))}
        handed = {name: tensor.clone() for name, tensor in run.bridge.iter_hf_weights(model)}
        run.gather_weights()
        last = dict(iter_hf(Gatherer(run.models, run.bridge.table)))
        stale = [name for name in last if not torch.equal(raw[name], last[name])]
        found.append((stale, [name for name in last if not torch.equal(handed[name], last[name])]))
    return len(found[0][0]), found[0][1], found[1][1]


def test_the_last_update_is_handed_out(ranks: RankPool, toy: Toy) -> None:
    """With overlapped gathering each rank holds old values of what others updated, until it is waited for."""
    for stale, bare, wrapped in ranks.run(stale_or_not, toy("31b", text_only=True), world_size=2):
        assert stale > 10, "nothing was stale: this test shows nothing"
        assert (bare, wrapped) == ([], [])


def save_in(folder: Path, dtype: torch.dtype, out: Path) -> None:
    """On a rank: a live model of that dtype, saved."""
    from bridge import Gemma4Bridge

    bridge = Gemma4Bridge.from_hf(folder)
    model = bridge.build(bridge.provider(Parallel(), dtype=dtype, overrides={"perform_initialization": False}))
    bridge.load_hf_weights(model)
    bridge.save_hf(model, out)


@pytest.mark.parametrize(
    ("stored", "held"), [("bfloat16", torch.float32), ("float32", torch.bfloat16)], ids=["wider", "narrower"]
)
def test_a_model_of_one_dtype_makes_a_folder_of_one_dtype(
    ranks: RankPool, toy: Toy, tmp_path: Path, stored: str, held: torch.dtype
) -> None:
    """The dead K/V that a folder carries too: its config speaks for them as well."""
    folder = toy("e2b", dtype=stored)
    ranks.run(save_in, folder, held, tmp_path / "out", world_size=1)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert {name: tensor.dtype for name, tensor in after.items() if tensor.dtype is not held} == {}
    assert [name for name in after if not torch.equal(after[name], before[name].to(held))] == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(held).removeprefix("torch.")


def fail_on(rank: int, what: str, folder: Path, out: Path) -> tuple[str, str]:
    """On a rank: `save_hf`, which fails on one of them; what it raises here."""
    import torch.distributed as dist

    from bridge import Gemma4Bridge
    from bridge.convert import live_save
    from bridge.convert.live import Gatherer

    bridge = Gemma4Bridge.from_hf(folder)
    provider = bridge.provider(Parallel(tp=2), torch.float32, overrides={"perform_initialization": False})
    model: list[Any] = list(bridge.build(provider))
    bridge.load_hf_weights(model)
    with ExitStack() as stack:
        if dist.get_rank() == rank and what == "model":
            model[0].sharded_state_dict = None
        elif dist.get_rank() == rank:
            place, name = {
                "write": (live_save.HfWriter, "write_rows"),
                "finish": (live_save.HfWriter, "finish"),
                "piece": (Gatherer, "_pieces"),
            }[what]
            effect = ZeroDivisionError("one / zero") if what == "write" else OSError(28, "No space left on device")
            stack.enter_context(mock.patch.object(place, name, side_effect=effect))
        try:
            bridge.save_hf(model, out)
        except Exception as error:
            return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("rank", "what", "own", "others"),
    [
        (0, "write", "ZeroDivisionError", "rank 0: ZeroDivisionError: one / zero"),
        (0, "finish", "CheckpointError", "rank 0: OSError: [Errno 28] No space left on device"),
        (1, "piece", "OSError", "rank 1: OSError: [Errno 28] No space left on device"),
        (1, "model", "TypeError", "rank 1: TypeError: 'NoneType' object is not callable"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all(
    ranks: RankPool, toy: Toy, tmp_path: Path, rank: int, what: str, own: str, others: str
) -> None:
    """None waits for another for ever, and nothing is left."""
    found = ranks.run(fail_on, rank, what, toy("31b", text_only=True), tmp_path / "out", world_size=2, timeout_s=120)
    assert found[rank][0] == own
    assert found[1 - rank] == ("CheckpointError", others)
    assert [path.name for path in tmp_path.iterdir() if "lock" not in path.name] == []


def test_a_bridge_error_stays_one(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(BridgeError, match="exists"):
        ranks.run(save_in, toy("31b", text_only=True), torch.float32, tmp_path / "out", world_size=2)
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
