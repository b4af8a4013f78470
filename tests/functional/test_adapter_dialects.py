"""Adapter folders that people hold: read as PEFT reads them, or refused by the name of the reason."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.errors import BridgeError, CheckpointError
from bridge.geometry import Geometry
from bridge.lora import peft_config
from bridge.lora.peft_config import CONFIG_FILE
from bridge.lora.peft_folder import WEIGHTS_FILE, open_peft
from bridge.lora.source import base_of, open_megatron, revision_of
from bridge.mapping import table_for
from tests.functional import dialect_kit as kit
from tests.functional.adapter_kit import EXPERTS, load_model, make_adapter
from tests.functional.conftest import Toy

BOUND = 1e-5
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
# The same in a model with towers, whose linears are wrapped.
LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.up_proj)"


def made(base: Path, path: Path, **options: Any) -> tuple[kit.Folder, torch.Tensor]:
    """A folder that PEFT saves, and PEFT's logits with it."""
    targets = LANGUAGE if Geometry.from_folder(base).multimodal else list(LINEARS)
    model = make_adapter(base, path, **({"target_modules": targets} | options))
    return kit.Folder.load(base, path), kit.logits(model.eval())


def opened(base: Path, adapter: Path) -> Any:
    with ExitStack() as stack:
        return open_peft(stack, adapter, table_for(Geometry.from_folder(base)))


def refused(base: Path, adapter: Path, words: str) -> None:
    with pytest.raises(BridgeError, match=words):
        opened(base, adapter)


def taken(base: Path, adapter: Path, theirs: torch.Tensor, work: Path) -> list[str]:
    """Merged, and through Megatron into PEFT again, it gives PEFT's logits; what was said of it."""
    said: list[str] = []
    assert kit.apart(kit.merged(base, adapter, work / "merged", said), theirs) <= BOUND
    assert kit.apart(kit.through_megatron(base, adapter, work), theirs) <= BOUND
    assert kit.apart(kit.logits(load_model(base)), theirs) > 1e-2
    return said


def test_factors_of_layers_that_share_kv(toy: Toy, tmp_path: Path) -> None:
    """They act on nothing, in PEFT too, and are left out with a notice."""
    base = toy("e2b", text_only=True)
    folder, theirs = made(base, tmp_path / "peft")
    kit.with_idle_factors(folder)
    adapter = folder.save(tmp_path / "idle")
    assert kit.apart(kit.peft_loaded(base, adapter), theirs) == 0
    said = taken(base, adapter, theirs, tmp_path)
    shared = sum(layer.shares_kv for layer in folder.geometry.layers)
    assert f"{4 * shared} tensors act on nothing and are left out: layers that share K/V" in said[0]
    assert not any("sharing" in module for module in opened(base, adapter).spec.targets)


@pytest.mark.parametrize(
    ("variant", "text_only"),
    [
        ("e2b", False),
        pytest.param("12b", False, marks=pytest.mark.slow),
        pytest.param("26b-a4b", True, marks=pytest.mark.slow),
    ],
)
def test_an_adapter_of_the_other_class(variant: str, text_only: bool, toy: Toy, tmp_path: Path) -> None:
    """PEFT saved it for the text class and the base has towers, or the reverse."""
    base, other = toy(variant, text_only=text_only), toy(variant, text_only=not text_only)
    saved, _ = made(other, tmp_path / "other", rank_pattern={"k_proj": 3}, alpha_pattern={"o_proj": 2})
    renamed = kit.Folder(other, dict(saved.tensors), dict(saved.config))
    kit.of_other_class(renamed)
    renamed.config["target_modules"] = LINEARS if text_only else LANGUAGE
    theirs = kit.peft_loaded(base, renamed.save(tmp_path / "renamed"))
    said = taken(base, tmp_path / "other", theirs, tmp_path)
    assert "names are those of another class of the model" in said[0]
    kit.of_headless_class(saved)
    assert kit.apart(kit.merged(base, saved.save(tmp_path / "headless"), tmp_path / "no-head"), theirs) <= BOUND


def test_towers_that_the_base_has_not(toy: Toy, tmp_path: Path) -> None:
    made(toy("e2b"), tmp_path / "towers", target_modules="all-linear")
    refused(toy("e2b", text_only=True), tmp_path / "towers", "matches nothing|tower or projector that this base")
    folder, _ = made(toy("e2b"), tmp_path / "one", target_modules=LANGUAGE + "|.*embedding_projection")
    folder.config["target_modules"] = LANGUAGE
    refused(toy("e2b", text_only=True), folder.save(tmp_path / "one"), "embedding_projection.*tower or projector that")
    folder.tensors |= {name.replace("language_model.", ""): tensor for name, tensor in folder.tensors.items()}
    refused(toy("e2b"), folder.save(tmp_path / "both"), "several classes of models")


@pytest.mark.parametrize("room", ["experts", pytest.param("moe.experts", marks=pytest.mark.slow)])
def test_experts_one_by_one(room: str, toy: Toy, tmp_path: Path) -> None:
    """Gate and up with an A each, against sums made by hand; rsLoRA and ranks and alphas by their own names."""
    base = toy("26b-a4b", text_only=True)
    weights, generator = load_file(base / "model.safetensors"), torch.Generator().manual_seed(1)
    tensors, names, changed = {}, ("gate_proj", "up_proj", "down_proj"), dict(weights)
    for name in (name for name in weights if name.endswith(EXPERTS)):
        layer, kind = name.split(".experts.")
        for expert in range(len(weights[name])):
            start, deltas = f"{layer}.{room}.{expert}", []
            for projection in names[:2] if kind == "gate_up_proj" else names[2:]:
                rank, rows = (3 if projection == "down_proj" else 4), weights[name].shape[1] // (2 - (kind[0] == "d"))
                a = torch.randn(rank, weights[name].shape[2], generator=generator) * 0.1
                b = torch.randn(rows, rank, generator=generator) * 0.1
                for part, value in (("A", a), ("B", b)):
                    tensors[f"{kit.PREFIX}{start}.{projection}.lora_{part}.weight"] = value
                deltas.append(b @ a * (6 / rank**0.5))
            changed[name] = changed[name].clone()
            changed[name][expert] += torch.cat(deltas)
    shutil.copytree(base, tmp_path / "by-hand")
    save_file(changed, tmp_path / "by-hand" / "model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.1}
    config |= {"target_modules": r".*\.experts\.\d+\.\w+_proj", "rank_pattern": {"down_proj": 3}}
    adapter = kit.Folder(base, tensors, config).save(tmp_path / "adapter")
    said = taken(base, adapter, kit.logits(load_model(tmp_path / "by-hand")), tmp_path)
    assert "one by one" in said[0] and "twice the rank" in said[0] and "experts have none here" in said[1]
    assert {target.rank for target in opened(base, adapter).targets} == {8, 3}
    first = min(name for name in tensors if name.endswith("3.up_proj.lora_B.weight"))
    config["alpha_pattern"] = {r"experts\.3\.up_proj": 1}
    refused(base, kit.Folder(base, tensors, config).save(tmp_path / "uneven"), "several ranks or alphas")
    del tensors[first], config["alpha_pattern"]
    refused(base, kit.Folder(base, tensors, config).save(tmp_path / "less"), r"has no .*3\.up_proj\.lora_B")


def test_one_parameter_of_the_experts(toy: Toy, tmp_path: Path) -> None:
    """A stack of one alone; where the config names the other one too, of which there is nothing, half is missing."""
    base = toy("26b-a4b", text_only=True)
    folder, theirs = made(base, tmp_path / "peft", target_parameters=[EXPERTS[1]], target_modules=["q_proj"])
    kit.as_stacks(folder)
    taken(base, folder.save(tmp_path / "stack"), theirs, tmp_path)
    folder.config["target_modules"].append("gate_up_proj")
    refused(base, folder.save(tmp_path / "half"), r"has no .*experts\.gate_up_proj\.lora_A.*: incomplete")


def test_fields_of_a_config() -> None:
    """Each of PEFT's is read, without effect, or refused: one that PEFT adds is none of them until it is looked at."""
    known = peft_config._READ | peft_config._WITHOUT_EFFECT | peft_config._REFUSED.keys()
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known
    assert not peft_config._REFUSED.keys() & (peft_config._READ | peft_config._WITHOUT_EFFECT)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({name: [1]}, rf"{name} is \[1\], which is not supported: it \w+") for name in peft_config._REFUSED),
        ({"something_new": 0}, "something_new is 0, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base model"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS': a model with another head"),
    ],
)
def test_fields_that_make_another_adapter(changes: dict[str, Any], words: str, toy: Toy, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]} | changes
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    refused(toy("31b", text_only=True), tmp_path, words)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "lora_only"},
        *(pytest.param(o, marks=pytest.mark.slow) for o in ({"bias": "all"}, {"init_lora_weights": "mica"})),
    ],
)
def test_options_without_tensors_of_their_own(options: dict[str, Any], toy: Toy, tmp_path: Path) -> None:
    """No linear of the decoder has a bias; and factors are factors however they began."""
    base = toy("31b", text_only=True)
    _, theirs = made(base, tmp_path / "peft", **options)
    said = taken(base, tmp_path / "peft", theirs, tmp_path)
    assert ["no bias is stored: read as 'none'" in line for line in said] == [True] * ("bias" in options)


def test_fan_in_fan_out(toy: Toy, tmp_path: Path) -> None:
    """PEFT sets it back for every linear."""
    base = toy("31b", text_only=True)
    folder, theirs = made(base, tmp_path / "peft")
    folder.config["fan_in_fan_out"] = True
    adapter = folder.save(tmp_path / "turned")
    assert kit.apart(kit.peft_loaded(base, adapter), theirs) == 0
    assert "fan_in_fan_out" in taken(base, adapter, theirs, tmp_path)[0]


def test_trained_biases_and_rows(toy: Toy, tmp_path: Path) -> None:
    made(toy("12b"), tmp_path / "biases", bias="all")
    refused(toy("12b"), tmp_path / "biases", r"holds .*bias, a bias that was trained")
    base = toy("31b", text_only=True)
    folder, _ = made(base, tmp_path / "rows", trainable_token_indices=[3, 4])
    refused(base, tmp_path / "rows", "trainable_token_indices is .* rows of the embedding")
    del folder.config["trainable_token_indices"]
    refused(base, folder.save(tmp_path / "rows"), "trainable_tokens_delta.*rows of an embedding trained beside")


def test_the_embedding_beside_factors(toy: Toy, tmp_path: Path) -> None:
    """The base's own, as PEFT saves it; another one is refused, and so is one that nothing says was trained."""
    base = toy("31b", text_only=True)
    model = make_adapter(base, tmp_path / "peft", target_modules=LINEARS)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    folder = kit.Folder.load(base, tmp_path / "peft")
    name = f"{kit.PREFIX}model.embed_tokens.weight"
    assert {name, f"{kit.PREFIX}lm_head.weight"} <= folder.tensors.keys()
    said = taken(base, tmp_path / "peft", kit.logits(model.eval()), tmp_path)
    assert len([line for line in said if "is the base's own weight and left out" in line]) == 2
    folder.tensors[name] = folder.tensors[name] * 1.5
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight \(F32\) is not the .*modules_to_save has to"):
        kit.merged(base, folder.save(tmp_path / "trained"), tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight \(F32\) is not the"):
        kit.through_megatron(base, tmp_path / "trained", tmp_path / "work")
    assert not (tmp_path / "no").exists() and not (tmp_path / "work" / "imported").exists()
    folder.tensors[name] = folder.tensors[name][:-3]
    refused(base, folder.save(tmp_path / "resized"), "the base was resized for this adapter")


def test_a_head_and_an_embedding_without_tying(toy: Toy, tmp_path: Path) -> None:
    """PEFT unties them: taken where they are the same all the same, or where the base is untied."""
    base, untied = toy("31b", text_only=True), toy("31b", text_only=True, untied=True)
    options: dict[str, Any] = {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": LINEARS}
    folder, _ = made(base, tmp_path / "apart", **options)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not the same as .*trained apart.*untie it first"):
        kit.merged(base, tmp_path / "apart", tmp_path / "no")
    folder.tensors[f"{kit.PREFIX}lm_head.weight"] = folder.tensors[f"{kit.PREFIX}model.embed_tokens.weight"]
    adapter = folder.save(tmp_path / "same")
    taken(base, adapter, kit.peft_loaded(base, adapter), tmp_path / "tied")
    _, theirs = made(untied, tmp_path / "untied", **options)
    taken(untied, tmp_path / "untied", theirs, tmp_path / "own")
    made(base, tmp_path / "head", target_modules=LINEARS, modules_to_save=["lm_head"])
    refused(base, tmp_path / "head", "'lm_head' is tied to")


def test_other_files(toy: Toy, tmp_path: Path) -> None:
    """Shards, an adapter beside a model, folders of adapters, a pickle."""
    base = toy("31b", text_only=True)
    folder, theirs = made(base, tmp_path / "peft")
    names = sorted(folder.tensors)
    for index in (f"{WEIGHTS_FILE}.index.json", "model.safetensors.index.json"):
        shards = tmp_path / index.partition(".")[0]
        shards.mkdir()
        files = {name: f"adapter_model-{1 + number % 2:05}-of-00002.safetensors" for number, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: folder.tensors[name] for name in names if files[name] == file}, shards / file)
        (shards / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))
        shutil.copy(tmp_path / "peft" / CONFIG_FILE, shards)
        assert kit.apart(kit.merged(base, shards, tmp_path / f"merged-{shards.name}"), theirs) <= BOUND
    beside = tmp_path / "beside"
    shutil.copytree(base, beside)
    (beside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    shutil.copytree(tmp_path / "peft", beside, dirs_exist_ok=True)
    assert kit.apart(kit.merged(base, beside, tmp_path / "merged-beside"), theirs) <= BOUND
    (tmp_path / "many" / "first").mkdir(parents=True)
    shutil.copytree(tmp_path / "peft", tmp_path / "many" / "second")
    for look in (lambda path: opened(base, path), lambda path: base_of(path, None), _megatron):
        with pytest.raises(CheckpointError, match="there are adapters in its folders second: name one"):
            look(tmp_path / "many")
    (tmp_path / "peft" / WEIGHTS_FILE).rename(tmp_path / "peft" / "adapter_model.bin")
    refused(base, tmp_path / "peft", r"only adapter_model\.bin, a pickle.*save_pretrained")


def _megatron(path: Path) -> Any:
    with ExitStack() as stack:
        return open_megatron(stack, path)


def test_the_revision_of_a_base(toy: Toy, tmp_path: Path) -> None:
    folder, _ = made(toy("31b", text_only=True), tmp_path / "peft")
    folder.config |= {"base_model_name_or_path": "some/model", "revision": "abc"}
    folder.save(tmp_path / "peft")
    assert (base_of(tmp_path / "peft", None), revision_of(tmp_path / "peft", None)) == ("some/model", "abc")
    assert revision_of(tmp_path / "peft", "other/model") is None


KINDS: dict[str, dict[str, Any]] = {
    "e2b": {"text_only": True},
    "e4b": {},
    "12b": {},
    "26b-a4b": {"text_only": True},
    "31b": {"text_only": True, "untied": True},
}


def composed(chance: random.Random, toy: Toy, work: Path) -> tuple[kit.Folder, torch.Tensor, list[str]]:
    """A random adapter that PEFT saved, changed in several random ways; PEFT's logits with it before; the ways."""
    variant = chance.choice(sorted(KINDS))
    base = toy(variant, **KINDS[variant])
    geometry = Geometry.from_folder(base)
    options: dict[str, Any] = {"r": chance.choice([2, 4]), "lora_alpha": chance.choice([3, 8])}
    options |= chance.choice(
        [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}}, {"alpha_pattern": {"v_proj": 5}}]
    )
    if geometry.moe is not None and chance.random() < 0.8:
        options["target_parameters"] = chance.choice([list(EXPERTS), [EXPERTS[0]], [EXPERTS[1]]])
    if not geometry.multimodal:
        options["target_modules"] = chance.sample(LINEARS, chance.randint(1, len(LINEARS)))
        options |= chance.choice([{}, {"modules_to_save": ["norm"]}])
    folder, theirs = made(base, work / "peft", **options)
    names = [kit.with_idle_fields, kit.with_idle_factors, kit.of_other_class, kit.with_adapter_name, kit.without_prefix]
    ways: list[Callable[[kit.Folder], None]] = [kit.with_the_embedding] if geometry.tied else []
    if options.get("target_parameters"):
        fused = chance.random() < 0.5
        room = chance.choice(["experts", "moe.experts", "mlp.experts"])
        ways.append(chance.choice([kit.as_stacks, lambda folder: kit.one_by_one(folder, room, fused)]))
    changes = [way for way in (*ways, *names) if chance.random() < 0.5]
    wrong = chance.choice([None, None, None, kit.without_a_tensor, kit.with_a_stranger, kit.with_a_field])
    if wrong is kit.without_a_tensor:
        wrong(folder, chance)  # of those that count
    for change in changes:
        change(folder)
    if wrong is not None and wrong is not kit.without_a_tensor:
        wrong(folder, chance)
    said = [getattr(change, "__name__", "experts") for change in changes]
    return folder, theirs, [variant, json.dumps(options), *said, wrong.__name__ if wrong is not None else ""]


def one_composition(seed: int, toy: Toy, work: Path) -> bool:
    """Whether it was taken: then it gives PEFT's logits; what is wrong has to be refused, what is not to be taken."""
    folder, theirs, ways = composed(random.Random(seed), toy, work)
    adapter = folder.save(work / "adapter")
    try:
        ours = kit.merged(folder.base, adapter, work / "merged")
    except BridgeError as error:
        assert ways[-1], (seed, ways, str(error))
        assert "\n" not in str(error) and str(adapter) in str(error), (seed, str(error))
        return False
    assert kit.apart(ours, theirs) <= BOUND, (seed, ways)
    assert not ways[-1], (seed, ways)
    assert kit.apart(kit.through_megatron(folder.base, adapter, work), theirs) <= BOUND, (seed, ways)
    return True


def test_compositions(toy: Toy, tmp_path: Path) -> None:
    """Any of the dialects together: PEFT's logits, or a refusal by name; never another adapter in silence."""
    assert len({one_composition(seed, toy, tmp_path / str(seed)) for seed in range(6)}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 200, 10))
def test_many_compositions(start: int, toy: Toy, tmp_path: Path) -> None:
    for seed in range(start, start + 10):
        one_composition(seed, toy, tmp_path / str(seed))
