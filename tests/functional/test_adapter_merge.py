"""A merged folder against PEFT's own merge in float32, and what a merge leaves alone."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.convert.folders import Conversion, import_hf
from bridge.errors import BridgeError, CheckpointError, MappingError, UsageError
from bridge.lora.adapter import Adapter
from bridge.lora.merge import MergedReader, merge_adapter, open_base
from bridge.lora.peft_folder import WEIGHTS_FILE, open_peft
from bridge.lora.spec import Factor, LoraSpec, Target
from bridge.lora.targets import resolve
from bridge.toy import VARIANTS
from tests.functional import adapter_kit
from tests.functional.adapter_kit import load_model, make_adapter
from tests.functional.conftest import Toy

OPTIONS: dict[str, dict[str, Any]] = adapter_kit.OPTIONS | {
    "e2b": {"target_modules": "all-linear"},
    "e4b": {"target_modules": ["embed_tokens", "o_proj.linear", "up_proj"], "exclude_modules": r".*tower.*up_proj"},
    "31b": {"target_modules": r".*language_model\.(.*\.(q|k|v|o|up)_proj|embed_tokens)", "use_dora": True},
}


def merge(base: Path, adapter: Path, target: Path, **options: Any) -> Conversion:
    with ExitStack() as stack:
        opened = open_base(stack, base)
        return merge_adapter(opened, open_peft(stack, adapter, opened.table), target, **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def peft_merge(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge of a float32 model, saved by transformers: names are those on disk."""
    model.merge_and_unload().save_pretrained(folder)
    return tensors(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_the_merge_of_peft(variant: str, dtype: str, toy: Toy, tmp_path: Path) -> None:
    """In float32 to its rounding; in bf16 what PEFT's float32 merge rounds to, but for ties of that rounding."""
    base = toy(variant, dtype=dtype)
    model = make_adapter(base, tmp_path / "adapter", **OPTIONS[variant])
    expected = peft_merge(model, tmp_path / "peft")
    said: list[str] = []
    merge(base, tmp_path / "adapter", tmp_path / "merged", max_shard_size=2_000_000, notify=said.append)
    # What was trained whole was trained with its head.
    assert any("tied to the head" in line for line in said) == (variant in ("e4b", "31b"))
    before, after = tensors(base), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed, rounded, total = 0, 0, 0
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape)
        same = torch.equal(tensor.view(-1).view(torch.uint8), before[name].view(-1).view(torch.uint8))
        if name not in expected:
            assert same, f"{name}: carried, and changed"
            continue
        changed += not same
        theirs = expected[name]
        # Two float32 products may differ in their last bits: by that much a value can lie on the other side of a tie.
        slack = 1e-6 * theirs.abs().max()
        if dtype == "float32":
            assert (tensor - theirs).abs().max() <= slack, name
            continue
        nearest = theirs.bfloat16()
        rounded, total = rounded + int((tensor != nearest).sum()), total + tensor.numel()
        step = torch.finfo(torch.bfloat16).eps * theirs.abs() / 2
        assert ((tensor.float() - theirs).abs() <= step + slack).all(), name
    assert changed == len(model_targets(tmp_path / "adapter"))
    assert rounded <= 1e-4 * total
    for asset in ("config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / asset).read_bytes() == (base / asset).read_bytes()


def test_where_dora_begins_the_base_stays_as_it_is(toy: Toy, tmp_path: Path) -> None:
    """In bf16 too: norms are rounded as those were that the magnitudes began as."""
    base = toy("31b", text_only=True, dtype="bfloat16")
    before, spec = tensors(base), LoraSpec(4, 8.0, ("q_proj", "down_proj", "embed_tokens"), dora=True)

    def value(target: Target, part: Factor) -> torch.Tensor:
        if part == "magnitude":
            dim = 0 if target.kind == "embedding" else 1
            return torch.linalg.norm(before[target.name].double(), dim=dim).bfloat16()
        begins_at_zero = part == ("A" if target.kind == "embedding" else "B")
        return (torch.zeros if begins_at_zero else torch.ones)(target.shape_of(part), dtype=torch.bfloat16)

    with ExitStack() as stack:
        opened = open_base(stack, base)
        targets = resolve(spec, opened.table)
        adapter = Adapter(tmp_path / "adapter", opened.table, spec, targets, value, lambda *_: "BF16", (), None)
        merge_adapter(opened, adapter, tmp_path / "merged")
    assert {target.kind for target in targets} == {"linear", "embedding"}
    after = tensors(tmp_path / "merged")
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def model_targets(adapter: Path) -> set[str]:
    """What it changes. A tied head goes with its embedding; PEFT stores an embedding beside its adapter."""
    names = load_file(adapter / WEIGHTS_FILE)
    kept = (name for name in names if "lm_head" not in name and not name.endswith(".base_layer.weight"))
    return {name.rpartition(".lora_")[0] if ".lora_" in name else name for name in kept}


def test_logits_of_the_merged_folder(toy: Toy, tmp_path: Path) -> None:
    """The whole way once: transformers on the merged folder against PEFT on the base."""
    base = toy("26b-a4b", text_only=True)
    model = make_adapter(base, tmp_path / "adapter", **OPTIONS["26b-a4b"])
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    ids = torch.randint(1, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = load_model(tmp_path / "merged")(input_ids=ids).logits, model(input_ids=ids).logits
        with model.disable_adapter():
            without = model(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (without - theirs).abs().max() > 1e-2 * theirs.abs().max()


@pytest.mark.parametrize("variant", ["e2b", "26b-a4b"])
def test_a_megatron_base_gives_the_same_bytes(variant: str, toy: Toy, tmp_path: Path) -> None:
    base = toy(variant, dtype="bfloat16")
    make_adapter(base, tmp_path / "adapter", **OPTIONS[variant])
    import_hf(base, tmp_path / "megatron")
    merge(base, tmp_path / "adapter", tmp_path / "one")
    merge(tmp_path / "megatron", tmp_path / "adapter", tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


@pytest.mark.parametrize("untied", [False, True])
def test_an_embedding_and_its_head(untied: bool, toy: Toy, tmp_path: Path) -> None:
    """A tied head goes with the embedding where that is targeted, and stays where it is not; an untied one stays."""
    base = toy("31b", text_only=True, untied=untied)
    make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    said: list[str] = []
    merge(base, tmp_path / "adapter", tmp_path / "merged", notify=said.append)
    # Beside its adapter PEFT stores the embedding, which is not written on.
    assert "embed_tokens.base_layer.weight is the base's own weight" in said[0]
    assert ["model.embed_tokens is tied to the head, which gets" in line for line in said[1:]] == [True] * (not untied)
    before, after = tensors(base), tensors(tmp_path / "merged")
    assert [n for n in before if not torch.equal(before[n], after[n])] == ["model.embed_tokens.weight"]


def test_a_written_tied_head_is_merged_too(toy: Toy, tmp_path: Path) -> None:
    source, base = toy("31b", text_only=True), tmp_path / "base"
    base.mkdir()
    for file in source.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    whole = tensors(source)
    save_file(whole | {"lm_head.weight": whole["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    make_adapter(source, tmp_path / "adapter", target_modules=["embed_tokens"])
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    after = tensors(tmp_path / "merged")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], whole["model.embed_tokens.weight"])


def test_rows_are_merged_wherever_a_chunk_is_cut(toy: Toy, tmp_path: Path) -> None:
    base = toy("26b-a4b", text_only=True)
    make_adapter(base, tmp_path / "adapter", **OPTIONS["26b-a4b"] | {"target_modules": ["o_proj", "embed_tokens"]})
    with ExitStack() as stack:
        opened = open_base(stack, base)
        adapter = open_peft(stack, tmp_path / "adapter", opened.table)
        reader = MergedReader(opened.reader, opened.table, adapter)
        assert {t.kind for t in adapter.targets} == {"linear", "experts", "embedding"}
        for target in adapter.targets:
            rows, width = target.shape[0], math.prod(target.shape[1:])
            whole, parts = np.empty((rows, width), np.float32), np.empty((rows, width), np.float32)
            reader.read_rows(target.name, 0, rows, whole)
            for start in range(0, rows, 5):
                reader.read_rows(target.name, start, min(start + 5, rows), parts[start : start + 5])
            np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6 * np.abs(whole).max())


def test_failures_leave_nothing(toy: Toy, tmp_path: Path) -> None:
    base, other = toy("31b", text_only=True), toy("12b", text_only=True)
    make_adapter(base, tmp_path / "adapter", target_modules=["o_proj"])
    cases: list[tuple[Path, Path, type[BridgeError], str]] = [
        (tmp_path / "adapter", tmp_path / "merged", UsageError, "is an adapter, not a model"),
        (other, tmp_path / "merged", CheckpointError, "another model"),
        (base, base, UsageError, "is the source itself"),
        (base, tmp_path / "adapter", UsageError, "is the source itself"),
    ]
    for where, target, kind, words in cases:
        with pytest.raises(kind, match=words):
            merge(where, tmp_path / "adapter", target, overwrite=target.name == "adapter")
    weights = tmp_path / "adapter" / WEIGHTS_FILE
    with ExitStack() as stack:
        opened = open_base(stack, base)
        adapter = open_peft(stack, tmp_path / "adapter", opened.table)
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size - 4000)
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: ends at byte"):
            merge_adapter(opened, adapter, tmp_path / "merged")
        foreign = open_base(stack, other)
        with pytest.raises(MappingError, match=r"adapts .*o_proj"):
            merge_adapter(foreign, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
