"""Adapter tables, initial values, and adapters on disk: without a model, ranks or Megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.convert.folders import import_hf
from bridge.convert.manifest import ADAPTER_FILE
from bridge.errors import BridgeError, CheckpointError, UsageError
from bridge.geometry import Geometry
from bridge.lora.adapter import Adapter
from bridge.lora.checkpoint import AdapterFolder, write_adapter
from bridge.lora.initial import initial_values
from bridge.lora.spec import Factor, LoraSpec, Target
from bridge.lora.table import AdapterTable, adapter_table, part_name, peft_view
from bridge.lora.targets import resolve
from bridge.mapping import table_for
from bridge.toy import write_toy

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
LAYER = "model.language_model.layers.0."
SPEC = LoraSpec(
    4, 8.0, "all-linear", parameters=EXPERTS, rank_pattern={"k_proj": 2, "experts.down_proj": 3}, rslora=True
)

DORA = LoraSpec(
    4, 8.0, ("embed_tokens", "k_proj", "v_proj"), exclude=".*vision.*", rank_pattern={"k_proj": 2}, dora=True
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy of 26B as a Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("lora")
    write_toy("26b-a4b", folder / "hf")
    import_hf(folder / "hf", folder / "megatron")
    return folder / "megatron"


def table(base: Path, spec: LoraSpec = SPEC) -> AdapterTable:
    model = table_for(Geometry.from_folder(base / "hf"))
    return adapter_table(model, resolve(spec, model))


def values(target: Target, part: Factor) -> Tensor:
    """Numbers that bf16 holds exactly, another for every place."""
    shape = target.shape_of(part)
    start = len(target.name) + target.parts.index(part)
    return (torch.arange(torch.Size(shape).numel()) + start).remainder(251).view(shape).to(torch.bfloat16)


def test_one_adapter_for_each_projection_of_a_fused_linear(base: Path) -> None:
    found = table(base)
    geometry = found.geometry
    layer, hidden = geometry.layers[0], geometry.hidden_size
    key = "decoder.layers.0.self_attention.linear_qkv"
    rows = layer.q_size + 2 * layer.kv_size
    a, b = found.entries[f"{key}.lora_A"], found.entries[f"{key}.lora_B"]
    assert a.shape == (3 * 4, hidden) and b.shape == (rows, 4)
    assert [s.shape for s in b.sources] == [(layer.q_size, 4), (layer.kv_size, 4), (layer.kv_size, 4)]
    # B's rows lie where the rows of the weight lie.
    weight = table_for(geometry).entries[f"{key}.weight"]
    assert b.blocks == weight.blocks and [block.row for block in a.blocks] == [0, 4, 8]
    # A layer without v_proj has no adapter for it.
    last = next(each.index for each in geometry.layers if each.k_eq_v)
    assert len(found.entries[f"decoder.layers.{last}.self_attention.linear_qkv.lora_A"].sources) == 2
    moe = geometry.moe
    assert moe is not None
    fc1 = "decoder.layers.0.moe.experts.experts.linear_fc1"
    assert found.entries[f"{fc1}.lora_A"].shape == (moe.num_experts, 4, hidden)
    assert found.entries[f"{fc1}.lora_B"].shape == (moe.num_experts, 2 * moe.ffn_hidden_size, 4)
    assert found.entries[f"{fc1}.lora_B"].row.shard == ("ep", "etp", None)
    assert found.by_hf_name[part_name(LAYER + "mlp.up_proj.weight", "B")][1] == 1


def test_embeddings_lie_as_their_weights(base: Path) -> None:
    found = table(base, DORA)
    vocab, hidden = found.geometry.vocab_size, found.geometry.hidden_size
    a, b, magnitude = (found.entries[f"embedding.word_embeddings.lora_{part}"] for part in ("A", "B", "magnitude"))
    assert (a.shape, b.shape, magnitude.shape) == ((vocab, 4), (4, hidden), (hidden,))
    assert (a.row.shard, b.row.shard, magnitude.row.shard) == (("tp", None), (None, None), (None,))
    # Of q there is none: its rows are in neither.
    layer, qkv = found.geometry.layers[0], "decoder.layers.0.self_attention.linear_qkv"
    for part in ("B", "magnitude"):
        assert sum(block.num_rows for block in found.entries[f"{qkv}.lora_{part}"].blocks) == 2 * layer.kv_size


def test_a_projection_without_an_adapter_has_no_rows(base: Path) -> None:
    found = table(base, LoraSpec(4, 8.0, ("self_attn.q_proj",), exclude=r".*vision.*|.*\.[1-9]\d*\.self_attn.q_proj"))
    key = "decoder.layers.0.self_attention.linear_qkv"
    assert list(found.entries) == [f"{key}.lora_A", f"{key}.lora_B"]
    layer = found.geometry.layers[0]
    assert found.entries[f"{key}.lora_A"].shape[0] == 4
    assert sum(block.num_rows for block in found.entries[f"{key}.lora_B"].blocks) == layer.q_size
    assert found.covers(f"{key}.lora_A") and not found.covers(f"{key}.weight")
    assert table_for(found.geometry).covers(f"{key}.weight")


def test_initial_values_are_of_a_name_and_a_seed(base: Path) -> None:
    targets = {target.name: target for target in table(base).targets}
    query, experts = targets[LAYER + "self_attn.q_proj.weight"], targets[LAYER + "experts.down_proj"]
    first, again, other = (initial_values(seed)(query, "A") for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, initial_values(1)(targets[LAYER + "self_attn.v_proj.weight"], "A"))
    for target in (query, experts):
        value, bound = initial_values(1)(target, "A"), target.shape[-1] ** -0.5
        assert tuple(value.shape) == target.shape_a and value.abs().max() <= bound
        # torch.nn.init.kaiming_uniform_(a=sqrt(5)), as in PEFT.
        assert value.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not initial_values(1)(target, "B").any()


@pytest.mark.parametrize(("spec", "dtype"), [(SPEC, torch.float32), (SPEC, torch.bfloat16), (DORA, torch.float32)])
def test_written_and_read_again(base: Path, tmp_path: Path, spec: LoraSpec, dtype: torch.dtype) -> None:
    write_adapter(tmp_path / "adapter", base, spec, values, lambda target, part: dtype)
    opened = AdapterFolder.open(tmp_path / "adapter")
    assert opened.manifest.spec == spec and opened.manifest.megatron == str(base)
    targets = {target.name: target for target in opened.table.targets}
    read = {(name, part): tensor for name, part, tensor in opened.tensors()}
    assert read.keys() == {(name, part) for name, target in targets.items() for part in target.parts}
    again = opened.values()
    for (name, part), tensor in read.items():
        target = targets[name]
        assert tensor.dtype is dtype and tuple(tensor.shape) == target.shape_of(part)
        assert torch.equal(tensor, values(target, part).to(dtype)), (name, part)
        assert torch.equal(again(target, part), tensor)
    assert {target.rank for target in targets.values()} == ({2, 4} if spec.dora else {2, 3, 4})


def test_no_byte_is_read_twice(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order the tensors of a fused weight are asked for: a merge goes by the names on disk."""
    from bridge.torch_dist.reader import DistReader

    write_adapter(tmp_path / "adapter", base, SPEC, values, lambda *_: torch.float32)
    opened, read = AdapterFolder.open(tmp_path / "adapter"), []
    plain = DistReader.read_rows

    def counted(self: DistReader, name: str, start: int, stop: int, out: Any) -> None:
        read.extend((name, row) for row in range(start, stop))
        plain(self, name, start, stop, out)

    monkeypatch.setattr(DistReader, "read_rows", counted)
    value = opened.values()
    for target in sorted(opened.table.targets, key=lambda target: target.name):
        for part in target.parts:
            assert torch.equal(value(target, part).to(torch.bfloat16), values(target, part))
    assert len(read) == len(set(read)) == sum(entry.shape[0] for entry in opened.table.entries.values())


def test_an_error_names_a_tensor_for_each_dtype(base: Path) -> None:
    """The factors of one target too."""
    model = table_for(Geometry.from_folder(base / "hf"))
    targets = resolve(LoraSpec(2, 4.0, ("q_proj",), exclude=".*vision.*"), model)
    kinds = {"A": "F32", "B": "BF16"}
    adapter = Adapter(base, model, SPEC, targets, values, lambda target, part: kinds[part], (), None)
    with pytest.raises(CheckpointError, match=r"BF16 \(B of \S+layers.0.self_attn.q_proj\), F32 \(A of \S+q_proj\)"):
        adapter.common_dtype()


def test_the_filling_is_cut_off() -> None:
    target = Target("t", (6, 5), 2, 4.0, False, "t")
    assert peft_view(torch.ones(4, 5), target, "A").shape == (2, 5) and peft_view(
        torch.ones(6, 4), target, "B"
    ).shape == (6, 2)
    table = Target("t", (6, 5), 2, 4.0, False, "t", "embedding")
    assert peft_view(torch.ones(6, 2), table, "A").shape == table.shape_a and peft_view(
        torch.ones(2, 5), table, "B"
    ).shape == (
        5,
        2,
    )


def test_what_is_no_adapter_of_the_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter.json: not found"):
        AdapterFolder.open(base)
    model = table_for(Geometry.from_folder(base / "hf"))
    with pytest.raises(UsageError, match="no weight of this model"):
        adapter_table(model, [Target("model.nowhere.weight", (2, 2), 2, 4.0, False, "nowhere")])
    with pytest.raises(CheckpointError, match=r"\.lora_A is \[3, 2\]"):
        write_adapter(tmp_path / "bad", base, SPEC, lambda target, part: torch.ones(3, 2), lambda *_: torch.float32)
    assert not list(tmp_path.iterdir())

    write_adapter(tmp_path / "good", base, LoraSpec(2, 4.0, "all-linear"), values, lambda *_: torch.float32)
    path = tmp_path / "good" / ADAPTER_FILE
    said = json.loads(path.read_text())
    for change, message in (
        ({"spec": said["spec"] | {"rank": 3}}, "has shape"),
        ({"spec": said["spec"] | {"rank": 0}}, "rank is 0"),
        ({"version": 9}, "version 9"),
        ({"base": {"hf": 3, "megatron": None}}, "not an adapter's manifest"),
    ):
        path.write_text(json.dumps(said | change))
        with pytest.raises(BridgeError, match=message):
            list(AdapterFolder.open(tmp_path / "good").tensors())


def test_scalings_are_not_rounded_to_bf16() -> None:
    """scaling · B is rounded to bf16 once, as a whole."""
    from bridge.lora.linear import LinearAdapter, Placement

    weight, scalings = torch.zeros(64, 8, dtype=torch.bfloat16), torch.tensor([16 / 6**0.5, 0.1])
    rows = torch.arange(64) % 3 - 1
    adapter = LinearAdapter(weight, 1, rows, scalings.tolist(), Placement(None, None, False), [0.0, 0.0], False)
    b = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        adapter.lora_A[:, 0] = 1.0
        adapter.lora_B.copy_(b)
    x = torch.zeros(1, 8, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    expected = torch.where(rows < 0, 0.0, scalings[rows.clamp(min=0)]) * b[:, 0].float()
    assert torch.equal(adapter(x, weight.new_zeros(1, 64), weight)[0], expected.to(torch.bfloat16))
    twice = torch.where(rows < 0, 0.0, scalings.to(torch.bfloat16)[rows.clamp(min=0)]) * b[:, 0].float()
    assert not torch.equal(twice.to(torch.bfloat16), expected.to(torch.bfloat16))


def dora(weight: Tensor, projections: Tensor, dropout: float) -> Any:
    """DoRA of rank 4 of a weight [out, in], with magnitudes that are its norms."""
    from bridge.lora.linear import LinearAdapter, Placement

    count = int(projections.max()) + 1
    place = Placement(None, None, False)
    adapter = LinearAdapter(weight, 4, projections, [2.0] * count, place, [dropout] * count, True)
    torch.nn.init.normal_(adapter.lora_A)
    adapter.start_magnitude(weight)
    return adapter


@pytest.mark.parametrize("projections", [1, 2])
def test_dropout_beside_magnitudes_keeps_no_copy_of_the_weight(projections: int) -> None:
    weight = torch.nn.Parameter(torch.randn(1536, 512), requires_grad=False)
    adapter = dora(weight, torch.arange(1536) // 4 % projections, 0.5)
    x = torch.randn(3, 512, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    output = torch.nn.functional.linear(x, weight)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapted = adapter(x, output, weight)
    kept.pop(weight.untyped_storage().data_ptr(), None)
    assert 0 < sum(kept.values()) < weight.nbytes / 8
    adapted.sum().backward()
    assert x.grad is not None and x.grad.any()


def test_norms_are_taken_of_a_few_rows_at_a_time() -> None:
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.dtype is torch.float32:
                largest = max(largest, made.numel())
            return made

    weight = torch.randn(5000, 64, dtype=torch.bfloat16)
    adapter = dora(weight, torch.zeros(5000, dtype=torch.int64), 0.0)
    torch.nn.init.normal_(adapter.lora_B)
    with Sizes():
        adapter.start_magnitude(weight)
    assert 0 < largest < weight.numel() / 2
    expected = (weight.double() + 2 * adapter.lora_B.double() @ adapter.lora_A.double()).norm(dim=1)
    torch.testing.assert_close(
        adapter.lora_magnitude, expected.bfloat16(), rtol=torch.finfo(torch.bfloat16).eps, atol=0
    )


def test_some_rows_of_a_weight() -> None:
    from bridge.lora.linear import _rows_product

    weight, x = torch.randn(7, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    for rows in (torch.tensor([1, 2, 6]), torch.arange(7), torch.arange(0)):
        ours, expected = _rows_product(x, weight, rows), torch.nn.functional.linear(x, weight[rows])
        grad = torch.randn_like(expected)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, x, grad), torch.autograd.grad(expected, x, grad))


def test_magnitudes_in_bf16_are_those_of_peft() -> None:
    """With `autocast_adapter_dtype=False`: norms are rounded to bf16, so that a run begins at the base exactly."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(96, 64, bias=False)).to(torch.bfloat16)
    weight = base[0].weight
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = theirs.base_model.model[0]
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    magnitude = layer.lora_magnitude_vector["default"].weight
    adapter = dora(weight, torch.zeros(64, dtype=torch.int64), 0.0)
    assert {p.dtype for p in (*factors, magnitude, *adapter.parameters())} == {torch.bfloat16}
    x = torch.randn(8, 96, dtype=torch.bfloat16)
    output = torch.nn.functional.linear(x, weight)
    adapter.lora_A.data.copy_(factors[0])
    assert torch.equal(adapter.lora_magnitude, magnitude)
    assert torch.equal(adapter(x, output, weight), output) and torch.equal(theirs(x), output)

    torch.nn.init.normal_(factors[1], std=0.3)
    adapter.lora_B.data.copy_(factors[1])
    found, expected = adapter(x, output, weight), theirs(x)
    found.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert [p.shape for p in adapter.parameters()] == [p.shape for p in (*factors, magnitude)]
    grads = [(ours.grad, others.grad) for ours, others in zip(adapter.parameters(), (*factors, magnitude), strict=True)]
    for ours, others in [(found, expected), *grads]:
        # What roundings in another order come to.
        assert (ours - others).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * others.abs().max()
    assert (found - output).abs().max() > 0.5 * output.abs().max()
