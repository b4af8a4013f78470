"""Adapter folders: what PEFT saves is read, what is written PEFT loads, and no format loses a bit."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from bridge.errors import CheckpointError, UsageError
from bridge.geometry import Geometry
from bridge.lora.adapter import Adapter
from bridge.lora.peft_config import CONFIG_FILE
from bridge.lora.peft_folder import WEIGHTS_FILE, open_peft, write_peft
from bridge.mapping import Table, table_for
from bridge.toy import VARIANTS
from tests.functional import adapter_kit
from tests.functional.adapter_kit import EXPERTS, load_model, make_adapter
from tests.functional.conftest import Toy

OPTIONS: dict[str, dict[str, Any]] = adapter_kit.OPTIONS | {
    "e2b": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "e4b": {
        "target_modules": ["embed_tokens_per_layer", "o_proj.linear", "up_proj"],
        "exclude_modules": r".*tower.*up_proj",
    },
    "31b": {"target_modules": r".*language_model\.(.*\.(q|k|v)_proj|embed_tokens)", "use_dora": True},
}
COMPARED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "ensure_weight_tying",
)


@pytest.fixture(scope="module")
def made(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`made(variant)`: (toy folder, adapter folder that PEFT saved, its PEFT model, the table), made once."""

    @cache
    def get(variant: str) -> tuple[Path, Path, Any, Table]:
        folder, adapter = toy(variant), tmp_path_factory.mktemp("adapter") / variant
        model = make_adapter(folder, adapter, **OPTIONS[variant])
        return folder, adapter, model, table_for(Geometry.from_folder(folder))

    return get


def bits(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    tensors = load_file(folder / WEIGHTS_FILE)
    return {
        n: (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()
    }


def base_layers_left_out(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".base_layer.weight")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_and_into_peft(variant: str, made: Any, tmp_path: Path) -> None:
    folder, adapter, model, table = made(variant)
    with ExitStack() as stack:
        ours = open_peft(stack, adapter, table)
        write_peft(tmp_path / "again", ours)
        deltas = {
            t.module: t.scaling * (ours.value(t, "B") @ ours.value(t, "A")) for t in ours.targets if t.kind != "saved"
        }
    assert bits(tmp_path / "again") == base_layers_left_out(bits(adapter))
    configs = [peft.LoraConfig.from_pretrained(str(path)) for path in (adapter, tmp_path / "again")]
    for name in (*COMPARED, "rank_pattern", "alpha_pattern", "bias"):
        assert getattr(configs[0], name) == getattr(configs[1], name), name

    loaded = peft.PeftModel.from_pretrained(load_model(folder), tmp_path / "again")
    theirs, back = (
        {n: p for n, p in each.named_parameters() if "lora_" in n or ".modules_to_save." in n}
        for each in (model, loaded)
    )
    assert theirs.keys() == back.keys()
    assert all(torch.equal(theirs[name], back[name]) for name in theirs)
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            name = f"{name}.{module.parameter_name}" if hasattr(module, "parameter_name") else name
            delta = module.get_delta_weight("default")
            expected = deltas[name].T if "embed_tokens" in name else deltas[name]
            torch.testing.assert_close(expected, delta, rtol=1e-5, atol=1e-6)
            seen += 1
    assert seen == len(deltas)


@pytest.mark.parametrize("alone", EXPERTS)
def test_one_expert_parameter_alone(alone: str, toy: Toy, tmp_path: Path) -> None:
    """Then nothing is wrapped around it, and its names have no `base_layer`; here in bf16, without any module."""
    folder = toy("26b-a4b", text_only=True)
    make_adapter(folder, tmp_path / "theirs", dtype=torch.bfloat16, target_modules=[], target_parameters=[alone])
    with ExitStack() as stack:
        ours = open_peft(stack, tmp_path / "theirs", table_for(Geometry.from_folder(folder)))
        write_peft(tmp_path / "ours", ours)
        assert ours.common_dtype() == "BF16"
    assert bits(tmp_path / "ours") == bits(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(load_model(folder), tmp_path / "ours")
    wrapped = [n for n, m in loaded.named_modules() if isinstance(m, LoraLayer)]
    assert len(wrapped) == 12
    assert all(name.endswith(".experts") for name in wrapped)


SMALL: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj"]}


@pytest.fixture(scope="module")
def served(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Table]:
    """An adapter of a 26B text toy with everything that the formats differ in: experts, and layers where V is K."""
    folder, adapter = toy("26b-a4b", text_only=True), tmp_path_factory.mktemp("served") / "adapter"
    make_adapter(folder, adapter, **SMALL, target_parameters=list(EXPERTS))
    return adapter, table_for(Geometry.from_folder(folder))


def test_the_format_of_vllm(served: tuple[Path, Table], tmp_path: Path) -> None:
    """Names and shapes as vLLM #41754 and OpenPipe/ART #865 (run on v0.28) give them; values against PEFT's."""
    adapter, table = served
    with ExitStack() as stack:
        write_peft(tmp_path / "vllm", open_peft(stack, adapter, table), adapter_format="vllm")
    theirs, ours = load_file(adapter / WEIGHTS_FILE), load_file(tmp_path / "vllm" / WEIGHTS_FILE)
    prefix, rank, width = "base_model.model.model.layers.3.", 4, 24
    for expert in (0, 7):
        names = [f"{prefix}moe.experts.{expert}.{p}_proj" for p in ("gate", "up", "down")]
        shapes = [(tuple(ours[f"{n}.lora_A.weight"].shape), tuple(ours[f"{n}.lora_B.weight"].shape)) for n in names]
        assert shapes == [((rank, 64), (width, rank))] * 2 + [((rank, width), (64, rank))]
        a = theirs[f"{prefix}experts.base_layer.lora_A.weight"].reshape(8, rank, 64)[expert]
        b = theirs[f"{prefix}experts.base_layer.lora_B.weight"].reshape(2 * width, rank, 8)[:, :, expert]
        assert torch.equal(ours[f"{names[0]}.lora_A.weight"], a)
        assert torch.equal(ours[f"{names[1]}.lora_A.weight"], a)
        assert torch.equal(torch.cat([ours[f"{n}.lora_B.weight"] for n in names[:2]]), b)
        down = theirs[f"{prefix}experts.lora_B.weight"].reshape(64, rank, 8)[:, :, expert]
        assert torch.equal(ours[f"{names[2]}.lora_B.weight"], down)
    assert not any(".experts.lora" in name or "base_layer" in name for name in ours)
    # v_proj is there exactly where k_proj is all there is, and is its copy.
    for layer in table.geometry.layers:
        for part in "AB":
            k, v = (f"base_model.model.model.layers.{layer.index}.self_attn.{x}_proj.lora_{part}.weight" for x in "kv")
            assert (v in ours) == layer.k_eq_v
            assert not layer.k_eq_v or torch.equal(ours[k], ours[v])
    config = json.loads((tmp_path / "vllm" / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 6, "LORA")
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_the_format_of_sglang(served: tuple[Path, Table], tmp_path: Path) -> None:
    """Names and shapes as SGLang #21466 gives them."""
    adapter, table = served
    with ExitStack() as stack:
        write_peft(tmp_path / "sglang", open_peft(stack, adapter, table), adapter_format="sglang")
    theirs, ours = load_file(adapter / WEIGHTS_FILE), load_file(tmp_path / "sglang" / WEIGHTS_FILE)
    prefix = "base_model.model.model.layers.3.experts."
    down_a, down_b = (ours[f"{prefix}down_proj.lora_{part}.weight"] for part in "AB")
    assert (tuple(down_a.shape), tuple(down_b.shape)) == ((8, 4, 24), (8, 64, 4))
    up_a, up_b = (ours[f"{prefix}gate_up_proj.lora_{part}.weight"] for part in "AB")
    assert (tuple(up_a.shape), tuple(up_b.shape)) == ((8, 4, 64), (8, 48, 4))
    stacked = theirs[f"{prefix}base_layer.lora_B.weight"].reshape(48, 4, 8)
    assert all(torch.equal(up_b[expert], stacked[:, :, expert]) for expert in range(8))
    for layer in table.geometry.layers:
        k, v = (ours[f"base_model.model.model.layers.{layer.index}.self_attn.{x}_proj.lora_B.weight"] for x in "kv")
        assert torch.equal(v, k if layer.k_eq_v else torch.zeros(layer.kv_size, 4))
    config = json.loads((tmp_path / "sglang" / CONFIG_FILE).read_text())
    assert {"gate_up_proj", "v_proj"} <= set(config["target_modules"])


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["k_proj"], ["q_proj"]])
@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_sglang_finds_a_value_in_every_layer(variant: str, targets: list[str], toy: Toy, tmp_path: Path) -> None:
    """SGLang #25913: a layer with an adapter of q or k needs one of v; zeros where there is none, and back again."""
    folder = toy(variant, text_only=True)
    table = table_for(Geometry.from_folder(folder))
    make_adapter(folder, tmp_path / "peft", target_modules=targets)
    with ExitStack() as stack:
        write_peft(tmp_path / "sglang", open_peft(stack, tmp_path / "peft", table), adapter_format="sglang")
        write_peft(tmp_path / "vllm", open_peft(stack, tmp_path / "peft", table), adapter_format="vllm")
        write_peft(tmp_path / "back", open_peft(stack, tmp_path / "sglang", table))
    assert bits(tmp_path / "back") == bits(tmp_path / "peft")
    ours, theirs = load_file(tmp_path / "sglang" / WEIGHTS_FILE), load_file(tmp_path / "peft" / WEIGHTS_FILE)
    for layer in table.geometry.layers:
        q, k, v = (f"base_model.model.model.layers.{layer.index}.self_attn.{x}_proj.lora_B.weight" for x in "qkv")
        assert (v in ours) == (q in ours or k in ours)
        if v in theirs or v not in ours:
            continue
        copied = layer.k_eq_v and k in theirs
        assert torch.equal(ours[v], theirs[k] if copied else torch.zeros(layer.kv_size, 4))
        assert (v in load_file(tmp_path / "vllm" / WEIGHTS_FILE)) == copied
        if not copied:
            save_file(ours | {v: ours[v] + 1}, tmp_path / "sglang" / WEIGHTS_FILE)
            with ExitStack() as stack, pytest.raises(CheckpointError, match=r"v_proj.* is not the same as"):
                write_peft(tmp_path / "no", open_peft(stack, tmp_path / "sglang", table))
            break


@pytest.mark.parametrize("adapter_format", ["vllm", "sglang"])
def test_formats_lose_nothing(adapter_format: str, served: tuple[Path, Table], tmp_path: Path) -> None:
    adapter, table = served
    with ExitStack() as stack:
        write_peft(tmp_path / "in_format", open_peft(stack, adapter, table), adapter_format=adapter_format)
        other = "sglang" if adapter_format == "vllm" else "vllm"
        write_peft(tmp_path / "other", open_peft(stack, tmp_path / "in_format", table), adapter_format=other)
        write_peft(tmp_path / "back", open_peft(stack, tmp_path / "other", table))
    assert bits(tmp_path / "back") == bits(adapter)
    configs = [peft.LoraConfig.from_pretrained(str(path)) for path in (adapter, tmp_path / "back")]
    assert all(getattr(configs[0], name) == getattr(configs[1], name) for name in COMPARED)


@pytest.mark.parametrize("broken", ["layers.5.self_attn.v_proj.lora_B", "layers.0.moe.experts.2.up_proj.lora_A"])
def test_copies_that_differ_are_refused(broken: str, served: tuple[Path, Table], tmp_path: Path) -> None:
    adapter, table = served
    with ExitStack() as stack:
        write_peft(tmp_path / "vllm", open_peft(stack, adapter, table), adapter_format="vllm")
        tensors = load_file(tmp_path / "vllm" / WEIGHTS_FILE)
        tensors[f"base_model.model.model.{broken}.weight"][0, 0] += 1
        save_file(tensors, tmp_path / "vllm" / WEIGHTS_FILE)
        with pytest.raises(CheckpointError, match=rf"{broken}.* is not the same as"):
            write_peft(tmp_path / "back", open_peft(stack, tmp_path / "vllm", table))
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("adapter_format", ["vllm", "sglang"])
def test_engines_know_factors_of_linears_alone(adapter_format: str, made: Any, toy: Toy, tmp_path: Path) -> None:
    with ExitStack() as stack, pytest.raises(UsageError, match=f"q_proj: {adapter_format} reads no DoRA magnitudes"):
        make_adapter(toy("31b", text_only=True), tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
        table = table_for(Geometry.from_folder(toy("31b", text_only=True)))
        write_peft(tmp_path / "no", open_peft(stack, tmp_path / "dora", table), adapter_format=adapter_format)
    with (
        ExitStack() as stack,
        pytest.raises(UsageError, match=f"embed_tokens.*: {adapter_format} has no adapters of embedd"),
    ):
        _, adapter, _, table = made("e4b")
        write_peft(tmp_path / "no", open_peft(stack, adapter, table), adapter_format=adapter_format)
    with (
        ExitStack() as stack,
        pytest.raises(UsageError, match=f"norm.weight: {adapter_format} reads no modules_to_save"),
    ):
        make_adapter(
            toy("31b", text_only=True), tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["norm"]
        )
        table = table_for(Geometry.from_folder(toy("31b", text_only=True)))
        write_peft(tmp_path / "no", open_peft(stack, tmp_path / "whole", table), adapter_format=adapter_format)
    assert not (tmp_path / "no").exists()


def test_peft_has_one_dropout(toy: Toy, tmp_path: Path) -> None:
    """Ours of a pattern stands beside it, where PEFT leaves it alone."""
    folder = toy("31b", text_only=True)
    table = table_for(Geometry.from_folder(folder))
    make_adapter(folder, tmp_path / "peft", target_modules=["q_proj", "o_proj"], lora_dropout=0.1)
    with ExitStack() as stack:
        ours = open_peft(stack, tmp_path / "peft", table)
        spec = replace(ours.spec, dropout_pattern={"o_proj": 0.5})
        write_peft(tmp_path / "ours", replace(ours, spec=spec))
        assert open_peft(stack, tmp_path / "ours", table).spec == spec
        again = {t.module.rpartition(".")[2]: t.dropout for t in open_peft(stack, tmp_path / "ours", table).targets}
    assert again == {"q_proj": 0.1, "o_proj": 0.5}
    assert peft.PeftModel.from_pretrained(load_model(folder), tmp_path / "ours").peft_config[
        "default"
    ].lora_dropout == pytest.approx(0.1)


@pytest.mark.parametrize("adapter_format", ["vllm", "sglang"])
def test_engines_know_one_scaling(adapter_format: str, toy: Toy, tmp_path: Path) -> None:
    """Ranks may differ as long as alpha does in proportion."""
    folder = toy("31b", text_only=True)
    table = table_for(Geometry.from_folder(folder))
    options: dict[str, Any] = {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 8}}
    make_adapter(folder, tmp_path / "uneven", **options)
    make_adapter(folder, tmp_path / "even", **options, alpha_pattern={"o_proj": 12})
    with ExitStack() as stack:
        with pytest.raises(UsageError, match=r"o_proj: scaled by 0\.75, .*q_proj by 1\.5"):
            write_peft(tmp_path / "no", open_peft(stack, tmp_path / "uneven", table), adapter_format=adapter_format)
        write_peft(tmp_path / "yes", open_peft(stack, tmp_path / "even", table), adapter_format=adapter_format)
    config = json.loads((tmp_path / "yes" / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 12)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("adapter_format", ["vllm", "sglang"])
def test_engines_need_not_know_rslora(adapter_format: str, toy: Toy, tmp_path: Path) -> None:
    """SGLang scales by lora_alpha / r, whatever use_rslora says."""
    folder = toy("31b", text_only=True)
    table = table_for(Geometry.from_folder(folder))
    make_adapter(folder, tmp_path / "peft", target_modules=["o_proj"], r=16, lora_alpha=6, use_rslora=True)
    with ExitStack() as stack:
        write_peft(tmp_path / "in_format", open_peft(stack, tmp_path / "peft", table), adapter_format=adapter_format)
        back = open_peft(stack, tmp_path / "in_format", table)
    config = json.loads((tmp_path / "in_format" / CONFIG_FILE).read_text())
    assert (config["use_rslora"], config["lora_alpha"] / config["r"]) == (False, 6 / 16**0.5)
    assert (back.spec.rslora, back.spec.alpha, back.targets[0].scaling) == (True, 6, 1.5)


def _config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": "absent"}, "r is missing"),
        ({"r": 5}, r"lora_A.weight has the shape \[4, 64\], expected \[5, 64\] \(rank 5\)"),
        ({"r": -1}, "rank is -1"),
        ({"bias": "some"}, "bias is 'some', expected one of none, all, lora_only"),
        ({"use_dora": True}, "dora does not work where experts are targeted"),
        ({"use_dora": 1}, "dora is 1"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens.* is tied to the head, without ensure_weight_tying"),
        ({"modules_to_save": ["q_proj"]}, "q_proj.weight is one weight with .*k_proj.weight here"),
        ({"modules_to_save": ["layers.3"]}, r"layers\.3\.layer_scalar is a buffer"),
        ({"modules_to_save": ["norms"]}, "'norms' matches nothing"),
        ({"modules_to_save": ["language_model.norm"]}, "matches nothing"),
        (
            {"target_modules": ["embed_tokens"], "target_parameters": None, "ensure_weight_tying": True},
            "ensure_weight_tying with an adapter of .*embed_tokens",
        ),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
        ({"layers_to_transform": [0]}, r"holds .*layers\.1\..*, which no target"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, "layers_to_transform needs targets that are a list"),
        ({"something_new": {"a": 1}}, "something_new is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"target_modules": ["q_proj", "w1"]}, "'w1' matches nothing"),
        ({"target_modules": ["q_proj", "up_proj"]}, r"has no .*layers\.0\.mlp\.up_proj\.lora_A"),
        ({"target_modules": ["q_proj"]}, r"holds .*gate_proj.*, which no target"),
        ({"target_parameters": "experts"}, "target_parameters is"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"gemma4_bridge": {"format": "gguf"}}, "gemma4_bridge names no format"),
        ({"gemma4_bridge": {"format": "vllm", "spec": {"rank": 4}}}, "expected the fields"),
        ({"gemma4_bridge": {"format": "peft", "dropout_pattern": {"q_proj": 2}}}, "dropout_pattern 'q_proj' is 2"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], words: str, served: tuple[Path, Table], tmp_path: Path) -> None:
    adapter, table = served
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / WEIGHTS_FILE).write_bytes((adapter / WEIGHTS_FILE).read_bytes())
    (folder / CONFIG_FILE).write_text((adapter / CONFIG_FILE).read_text())
    _config(folder, **changes)
    with ExitStack() as stack, pytest.raises(CheckpointError, match=words):
        open_peft(stack, folder, table)


def test_an_adapter_of_another_model(served: tuple[Path, Table], toy: Toy, tmp_path: Path) -> None:
    adapter, _ = served
    with ExitStack() as stack, pytest.raises(CheckpointError, match=r"'experts\.\w+_proj' matches nothing"):
        open_peft(stack, adapter, table_for(Geometry.from_folder(toy("31b", text_only=True))))
    dense = tmp_path / "dense"
    make_adapter(toy("12b", text_only=True), dense, **SMALL)
    with ExitStack() as stack, pytest.raises(CheckpointError, match="an adapter for another model"):
        open_peft(stack, dense, table_for(Geometry.from_folder(toy("e2b", text_only=True))))


def test_files_that_are_not_there(served: tuple[Path, Table], tmp_path: Path) -> None:
    adapter, table = served
    with ExitStack() as stack:
        with pytest.raises(CheckpointError, match=r"adapter_config\.json: not found"):
            open_peft(stack, tmp_path, table)
        (tmp_path / CONFIG_FILE).write_text((adapter / CONFIG_FILE).read_text())
        with pytest.raises(CheckpointError, match=r"neither adapter_model\.safetensors"):
            open_peft(stack, tmp_path, table)
        (tmp_path / "adapter_model.bin").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"only adapter_model\.bin, a pickle"):
            open_peft(stack, tmp_path, table)


def test_a_target_is_replaced_only_on_request(served: tuple[Path, Table], tmp_path: Path) -> None:
    adapter, table = served
    with ExitStack() as stack:
        ours = open_peft(stack, adapter, table)
        write_peft(tmp_path / "out", ours)
        with pytest.raises(UsageError, match="exists"):
            write_peft(tmp_path / "out", ours)
        write_peft(tmp_path / "out", ours, adapter_format="sglang", overwrite=True)
    assert len(bits(tmp_path / "out")) == len(bits(adapter)) + 2 * table.geometry.num_layers


def test_tensors_are_read_one_at_a_time(served: tuple[Path, Table], tmp_path: Path) -> None:
    adapter, table = served
    order: list[tuple[str, str]] = []
    with ExitStack() as stack:
        ours = open_peft(stack, adapter, table)

        def value(target: Any, part: Any) -> torch.Tensor:
            order.append((target.name, part))
            return ours.value(target, part)

        write_peft(tmp_path / "out", Adapter(**{**ours.__dict__, "value": value}), adapter_format="vllm")
    assert order == [(target.name, part) for target in ours.targets for part in "AB"]
    assert np.unique(order, axis=0).shape[0] == len(order)
