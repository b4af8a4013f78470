"""`verify --streamed`: layer by layer against transformers, and what is wrong is named with its layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.convert.folders import import_hf
from bridge.errors import BridgeError, UsageError
from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel, initialize
from bridge.megatron.provider import Gemma4Provider
from bridge.ranks import RankPool
from bridge.verify.one_layer import come_and_go, layers_of, tensors_of
from bridge.verify.result import Check
from bridge.verify.streamed_run import parse_layers, verify_streamed

from .conftest import Toy

DEEP = 7


def failing(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize(
    "variant",
    ["e2b", "26b-a4b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("e4b", "12b", "31b"))],
)
def test_every_layer(ranks: RankPool, toy: Toy, variant: str) -> None:
    """The published dtype on disk, float32 in the arithmetic, text and media."""
    folder = toy(variant, dtype="bfloat16")
    checks = verify_streamed(folder, pool=ranks)
    names = [check.name for check in checks]
    layers = [name for name in names if name.startswith("layer")]
    assert names == [*["embeddings"] * names.count("embeddings"), *layers, "logits", "memory"]
    assert layers == [f"layer {i}" for i in range(len(layers))] and len(layers) > 8
    assert {"text", "image"} <= {check.detail for check in checks if check.name == "embeddings"}
    assert all(check.passed and check.bound == 1e-5 for check in checks[:-1]), [(c.name, c.value) for c in checks]


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a folder, its tensors changed."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def exchange(tensors: dict[str, torch.Tensor], one: str, other: str) -> None:
    if one in tensors:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()


def scale(tensors: dict[str, torch.Tensor], name: str) -> None:
    if name in tensors:
        tensors[name].mul_(1.01)


LAYER = f"model.language_model.layers.{DEEP}."
FAULTS: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "a weight of another layer": lambda t: exchange(
        t, LAYER + "mlp.up_proj.weight", LAYER.replace(str(DEEP), str(DEEP + 1)) + "mlp.up_proj.weight"
    ),
    "a norm 1.01 times as large": lambda t: (
        [t[name].mul_(1.01) for name in t if name == LAYER + "post_attention_layernorm.weight"] and None
    ),
    "k and v exchanged": lambda t: exchange(t, LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.v_proj.weight"),
}


def test_what_is_wrong_is_named(ranks: RankPool, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Megatron checkpoint with a fault in one deep layer, against the folder that it should be of."""
    folder, said = toy("26b-a4b"), list[str]()
    for name, change in FAULTS.items():
        wrong = edited(Path(shutil.copytree(folder, tmp_path / f"wrong {name}")), change)
        import_hf(wrong, tmp_path / name)
        work = tmp_path / "work"
        checks = verify_streamed(folder, megatron_dir=tmp_path / name, workdir=work, notify=said.append, pool=ranks)
        expected = [f"layer {DEEP}"]
        if name == "a weight of another layer":
            expected.append(f"layer {DEEP + 1}")
        assert failing(checks) == [*expected, "logits"], name
    # transformers' side was computed once, and layers were counted.
    assert len([line for line in said if line.startswith("transformers' side is in")]) == len(FAULTS) - 1
    assert any(line.startswith("transformers: 5 of 12") for line in said)
    assert len(list((tmp_path / "work").iterdir())) == 1


ROUTER = LAYER + "router.proj.weight"


@pytest.mark.parametrize(("factor", "failed"), [(1 + 1e-6, []), (1.01, [f"layer {DEEP}"])])
def test_experts_that_are_all_but_equal(
    ranks: RankPool, toy: Toy, tmp_path: Path, factor: float, failed: list[str]
) -> None:
    """Two experts that the router cannot tell apart: which of them a token goes to is a matter of rounding, and no
    error. Where it is not one of rounding the layer is named, though it is given transformers' choice."""

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        if ROUTER in tensors:
            tensors[ROUTER][1] = tensors[ROUTER][0]

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        if ROUTER in tensors:
            tensors[ROUTER][1] *= factor

    folder = edited(Path(shutil.copytree(toy("26b-a4b"), tmp_path / "tied")), tie)
    import_hf(edited(Path(shutil.copytree(folder, tmp_path / "nudged")), nudge), tmp_path / "megatron")
    checks = verify_streamed(folder, megatron_dir=tmp_path / "megatron", pool=ranks)
    assert [name for name in failing(checks) if name != "logits"] == failed
    assert failed or "logits" not in failing(checks)
    [detail] = [check.detail for check in checks if check.name == f"layer {DEEP}"]
    assert "chose experts by" in detail


def test_some_layers(ranks: RankPool, toy: Toy) -> None:
    """Those that were asked for have rows; E2B's layer 9 reads keys and values of layer 4, which runs unseen."""
    checks = verify_streamed(toy("e2b"), layers="2,8-9", pool=ranks)
    assert [check.name for check in checks if check.name.startswith("layer")] == ["layer 2", "layer 8", "layer 9"]
    assert not failing(checks)


def test_layers_that_do_not_run_are_not_read(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy("31b"), tmp_path / "folder"))

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(LAYER + "mlp.up_proj.weight", None)

    edited(folder, drop)
    assert not failing(verify_streamed(folder, layers="2", pool=ranks))
    with pytest.raises(BridgeError, match=rf"layers\.{DEEP}\.mlp\.up_proj"):
        verify_streamed(folder, layers=str(DEEP), pool=ranks)


def names_outside_layers(folder: Path) -> tuple[list[str], int]:
    """Of a Megatron model, whole and on one rank; and how many layers it has."""
    groups = initialize(Parallel())
    [model] = Gemma4Provider(Geometry.from_folder(folder), Parallel(), torch.float32).build(groups)
    layers = layers_of(model)
    inside = {id(tensor) for layer in layers for tensor in tensors_of(layer).values()}
    return [name for name, tensor in tensors_of(model).items() if id(tensor) not in inside], len(layers)


@pytest.mark.parametrize("variant", ["e2b", "26b-a4b"])
def test_layers_of_towers_come_and_go_too(ranks: RankPool, toy: Toy, variant: str) -> None:
    geometry = Geometry.from_folder(toy(variant))
    names, count = ranks.run(names_outside_layers, toy(variant), world_size=1)[0]
    assert names and not [name for name in names if ".layers." in name]
    towers = [tower for tower in (geometry.vision, geometry.audio) if tower is not None]
    assert count >= geometry.num_layers + sum(tower.num_layers for tower in towers)


def test_memory_of_layers_is_given_back() -> None:
    """One layer's after the other's in the same place; none of it is left when all have run."""
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    places: list[int] = []

    def load(layer: torch.nn.Module) -> None:
        weight, bias = layer.parameters()
        weight.data.copy_(torch.eye(8))
        bias.data.fill_(1.0)
        places.append(weight.data_ptr())

    with torch.no_grad():
        come_and_go(list(model), load)
        for _ in range(2):
            torch.testing.assert_close(model(torch.zeros(2, 8)), torch.full((2, 8), 3.0))
    assert len(places) == 6 and len(set(places[:3])) == 1
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in model.parameters())


def test_a_folder_that_lacks_a_tensor(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy("31b"), tmp_path / "folder"))

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("model.language_model.layers.3.mlp.up_proj.weight", None)

    edited(folder, drop)
    with pytest.raises(BridgeError, match=r"layers\.3\.mlp\.up_proj"):
        verify_streamed(folder, pool=ranks)


def test_layers_that_are_none() -> None:
    assert parse_layers("0,2-4", 5) == (0, 2, 3, 4)
    for text in ("5", "3-2", "x", "", "1-"):
        with pytest.raises(UsageError, match="the model has 0 to 4"):
            parse_layers(text, 5)
