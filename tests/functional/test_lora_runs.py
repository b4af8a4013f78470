"""Runs of LoRA: what they hold, go on from, end with and refuse, and what they take of memory."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from bridge import Gemma4Bridge
from bridge.convert.folders import import_hf
from bridge.errors import BridgeError, UsageError
from bridge.geometry import Geometry
from bridge.lora.checkpoint import AdapterFolder, write_adapter
from bridge.lora.initial import initial_values
from bridge.lora.merge import merge_adapter
from bridge.lora.source import open_both
from bridge.lora.spec import LoraSpec
from bridge.lora.targets import resolve
from bridge.mapping import table_for
from bridge.ranks import RankPool
from bridge.torch_dist.reader import DistReader
from recipes.config import resolve as resolve_recipe
from recipes.memory.estimate import estimate
from recipes.memory.recipe import plan_of
from recipes.train.lora import spec_of, table_of
from recipes.training_config import LoraConfig

from .conftest import Toy
from .lora_kit import EPS
from .test_lora_training import TEXT, WITH_TABLES
from .training_kit import Trouble, losses, recipe, train_toy


def lora_recipe(toy: Path, output: Path, steps: int, **lora: Any) -> dict[str, Any]:
    said = recipe(toy, output, steps) | {"lora": {"rank": 4, "alpha": 8, "targets": TEXT, **lora}}
    said["optimizer"]["eps"] = EPS
    return said


def adapters(run: Path) -> dict[tuple[str, str], torch.Tensor]:
    return {(name, part): tensor for name, part, tensor in AdapterFolder.open(run).tensors()}


def test_runs_hold_adapters_only_and_go_on_in_other_layouts(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    folder, steps = toy("26b-a4b"), 8
    experts = {"parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    whole = lora_recipe(folder, tmp_path / "whole", steps, **experts)
    ranks.run(train_toy, whole, [], world_size=1)
    said = lora_recipe(folder, tmp_path / "run", steps, **experts)
    layouts: list[tuple[int, list[str]]] = [
        (2, ["parallel.ep=2"]),
        (2, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.etp=2"]),
        (2, ["parallel.pp=2"]),
    ]
    for turn, (world, overrides) in enumerate(layouts, 1):
        leave = Trouble(2 * turn, 0, signal.SIGTERM)
        assert ranks.run(train_toy, said, overrides, leave, world_size=world)[0] == (True, 2 * turn)
    ranks.run(train_toy, said, [], world_size=1)
    ours, theirs = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) <= 1e-5

    opened = AdapterFolder.open(tmp_path / "run")
    assert opened.manifest.hf == str(folder) and opened.manifest.spec.parameters == tuple(experts["parameters"])
    with DistReader(opened.checkpoint.weights, lambda key: True) as reader:
        states = {key.removeprefix("optimizer.state.").partition(".")[2] for key in reader.tensors if "state." in key}
        weights = {key for key in reader.tensors if not key.startswith("optimizer.")}
    assert weights == states == set(opened.table.entries)
    before, after = adapters(tmp_path / "whole"), adapters(tmp_path / "run")
    assert before.keys() == after.keys() and all(tensor.any() for tensor in after.values())
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, atol=1e-4, rtol=1e-3)

    with pytest.raises(UsageError, match=r"other adapters \(lora.alpha was 8.0, is 9.0\)"):
        ranks.run(train_toy, said, ["lora.alpha=9", "train.steps=9"], world_size=1)
    with pytest.raises(BridgeError, match=r"lora_A has shape|lora_B has shape"):
        ranks.run(train_toy, said, ["lora.rank=8", "train.steps=9"], world_size=1)


def test_stopped_with_dropout_and_resumed_is_bit_identical(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """bf16 with tensor and sequence parallelism: random states of both kinds, and the optimizer's float32 copies.

    Of DoRA, of tables and of whole modules, too.
    """
    overrides = ["model.dtype=bfloat16", "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.recompute=full"]
    options = {"dropout": 0.1, "dora": True, "targets": WITH_TABLES, "modules_to_save": ["norm"]}
    said = {name: lora_recipe(toy("e4b"), tmp_path / name, 6, **options) for name in ("whole", "stopped")}
    ranks.run(train_toy, said["whole"], overrides, world_size=2)
    ranks.run(train_toy, said["stopped"], overrides, Trouble(3, 1, signal.SIGUSR1), world_size=2)
    ranks.run(train_toy, said["stopped"], overrides, world_size=2)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    before, after = adapters(tmp_path / "whole"), adapters(tmp_path / "stopped")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_run_goes_on_from_an_adapter(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    options = {"dora": True, "targets": WITH_TABLES, "modules_to_save": ["language_model.norm"]}
    ranks.run(train_toy, lora_recipe(toy("e4b"), tmp_path / "first", 2, **options), [], world_size=1)
    said = lora_recipe(toy("e4b"), tmp_path / "second", 1)
    said["lora"] = {"adapter": str(tmp_path / "first")}
    still = ["optimizer.lr=0", "optimizer.min_lr=0", "parallel.tp=2", "parallel.sequence_parallel=true"]
    ranks.run(train_toy, said, still, world_size=2)
    first, second = adapters(tmp_path / "first"), adapters(tmp_path / "second")
    assert first.keys() == second.keys() and any(part == "B" and tensor.any() for (_, part), tensor in first.items())
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())
    with pytest.raises(UsageError, match=r"lora.rslora is True, there False: add lora.rslora=false"):
        spec_of(LoraConfig(adapter=str(tmp_path / "first"), rslora=True))
    same = LoraConfig(adapter=str(tmp_path / "first"), dora=True, alpha=8, modules_to_save=["language_model.norm"])
    assert spec_of(same) == AdapterFolder.open(tmp_path / "first").manifest.spec
    with pytest.raises(BridgeError, match="first: the adapter of another model"):
        ranks.run(train_toy, said | {"model": {"hf": str(toy("31b"))}, "output": str(tmp_path / "x")}, [], world_size=1)


def test_a_run_ends_with_a_merged_model(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """And towers that had nothing to read come out as they were, whatever the weight decay.

    A run that goes on beside another base is merged into that.
    """
    said = lora_recipe(toy("e2b"), tmp_path / "run", 3, targets="all-linear") | {
        "export": {"hf": str(tmp_path / "out")}
    }
    said["optimizer"]["weight_decay"] = 0.1
    ranks.run(train_toy, said, ["parallel.tp=2", "parallel.sequence_parallel=true"], world_size=2)
    geometry = Geometry.from_folder(toy("e2b"))
    initial = initial_values(said["train"]["seed"])
    targets = {target.name: target for target in resolve(LoraSpec(4, 8.0, "all-linear"), table_for(geometry))}
    idle = 0
    for (name, part), tensor in adapters(tmp_path / "run").items():
        same = torch.equal(tensor, initial(targets[name], part))  # type: ignore[arg-type]
        assert same == (".language_model." not in name), name
        idle += same
    assert idle > 50
    with ExitStack() as stack:
        base, adapter = open_both(stack, tmp_path / "run", None)
        assert base.path == toy("e2b")
        merge_adapter(base, adapter, tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != (toy("e2b") / "model.safetensors").read_bytes()

    other = tmp_path / "other"
    shutil.copytree(toy("e2b"), other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors")
    ranks.run(train_toy, said | {"model": said["model"] | {"hf": str(other)}}, [], world_size=1)
    with ExitStack() as stack:
        base, adapter = open_both(stack, tmp_path / "run", None)
        assert base.path == other
        merge_adapter(base, adapter, tmp_path / "of-other")
    assert contents(tmp_path / "out") == contents(tmp_path / "of-other") != contents(tmp_path / "again")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_adapter_of_the_head_is_refused(toy: Toy) -> None:
    bridge, spec = Gemma4Bridge.from_hf(toy("31b", text_only=True, untied=True)), LoraSpec(4, 8.0, ("lm_head",))
    with pytest.raises(UsageError, match=r"lm_head can have no adapter here.*modules_to_save"):
        table_of(LoraConfig(), spec, bridge)
    whole = LoraSpec(4, 8.0, ("q_proj",), modules_to_save=("lm_head",))
    assert "output_layer.weight" in table_of(LoraConfig(), whole, bridge).entries


def memory_of(said: dict[str, Any]) -> dict[str, int]:
    """Train a step, and count: trained parameters, elements of gradient buffers, bytes of gradients of the base."""
    from recipes.config import resolve
    from recipes.train.setup import build
    from recipes.train.step import clear_gradients, run_microbatches, update

    from .training_kit import Corpus

    run = build(resolve(said), load=True)
    corpus = Corpus(run.bridge.geometry, 1, 0, 1, 2)
    clear_gradients(run)
    run_microbatches(run, [next(corpus) for _ in range(run.microbatches)], train=True)
    update(run, float("inf"))
    parameters = [p for model in run.models for p in model.parameters()]
    frozen = [p for p in parameters if not p.requires_grad]
    buffers = [b for chunk in run.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]  # type: ignore
    states = [s for part in run.optimizer.chained_optimizers for s in part.optimizer.state.values()]
    return {
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "buffered": sum(p.numel() for buffer in buffers for p in buffer.params),
        "gradient elements": sum(buffer.grad_data.numel() for buffer in buffers),
        "moments": sum(state["exp_avg"].numel() for state in states),
        "of the base": sum(p.grad is not None or getattr(p, "main_grad", None) is not None for p in frozen),
        "frozen": sum(p.numel() for p in frozen),
    }


def test_the_base_takes_no_gradient_memory(ranks: RankPool, toy: Toy, tmp_path: Path, record_property: Any) -> None:
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    said = lora_recipe(toy("26b-a4b"), tmp_path, 1, targets="all-linear", parameters=experts)
    found = ranks.run(memory_of, said, world_size=1)[0]
    checked = [(said, found["trained"])]
    tables = said | {"lora": said["lora"] | {"targets": WITH_TABLES, "parameters": [], "dora": True}}
    tables["lora"] |= {"modules_to_save": ["router", "embed_vision"]}
    checked.append((tables, ranks.run(memory_of, tables, world_size=1)[0]["trained"]))
    for each, trained in checked:
        plan = plan_of(resolve_recipe(each), 1, table_for(Geometry.from_folder(toy("26b-a4b"))))
        assert estimate(table_for(Geometry.from_folder(toy("26b-a4b"))), plan).trained == trained
    full = ranks.run(memory_of, recipe(toy("26b-a4b"), tmp_path, 1), world_size=1)[0]
    record_property("memory", f"{found} against {full}")
    spec = LoraSpec(4, 8.0, "all-linear", parameters=tuple(experts))
    table = table_for(Geometry.from_folder(toy("26b-a4b")))
    # Per target: rank x (in + out), for every expert.
    expected = sum(math.prod(t.shape[:-2]) * t.rank * sum(t.shape[-2:]) for t in resolve(spec, table))
    assert found["trained"] == found["buffered"] == found["moments"] == expected
    assert found["gradient elements"] <= expected + 4096 and found["of the base"] == 0
    assert full["gradient elements"] > 4 * found["gradient elements"]


def full_size(variant: str, spec: LoraSpec) -> tuple[int, int, int]:
    """Trained and frozen parameters of a published geometry on the meta device; the trained ones by the formula."""
    import bridge
    from bridge.lora.inject import attach
    from bridge.lora.table import adapter_table
    from bridge.megatron.parallel import Parallel, initialize
    from bridge.megatron.provider import Gemma4Provider

    path = Path(bridge.__file__).parent / "variants" / f"{variant}.json"
    geometry = Geometry.from_dict(json.loads(path.read_text(encoding="utf-8")))
    table = table_for(geometry)
    targets = resolve(spec, table)
    groups = initialize(Parallel())
    provider = Gemma4Provider(geometry, overrides={"perform_initialization": False})
    with torch.device("meta"):
        models = provider.build(groups)
        attach(models, adapter_table(table, targets))
    trained = sum(p.numel() for m in models for p in m.parameters() if p.requires_grad)
    frozen = sum(p.numel() for m in models for p in m.parameters() if not p.requires_grad)
    return trained, frozen, sum(math.prod(t.shape[:-2]) * t.rank * sum(t.shape[-2:]) for t in targets)


def test_trained_parameters_of_26b(ranks: RankPool, record_property: Any) -> None:
    spec = LoraSpec(8, 16.0, "all-linear", parameters=("experts.gate_up_proj", "experts.down_proj"))
    trained, frozen, formula = ranks.run(full_size, "26b-a4b", spec, world_size=1)[0]
    record_property("parameters", f"{trained} trained, {frozen} frozen")
    assert trained == formula and 25e9 < frozen < 26e9


def test_an_adapter_says_what_a_run_adapts(toy: Toy, tmp_path: Path) -> None:
    """What the recipe says otherwise is refused at once, with what takes it back; the same is no contradiction."""
    import_hf(toy("31b", text_only=True), tmp_path / "base")
    spec, where = LoraSpec(4, 8.0, ("o_proj",)), str(tmp_path / "adapter")
    write_adapter(where, tmp_path / "base", spec, initial_values(0), lambda *_: torch.float32)
    assert spec_of(LoraConfig(adapter=where)) == spec
    assert spec_of(LoraConfig(rank=4, alpha=8, targets=["o_proj"], adapter=where)) == spec
    with pytest.raises(UsageError) as refused:
        spec_of(LoraConfig(rank=8, alpha=16, targets=".*_proj", exclude=["q_proj"], adapter=where))
    text = str(refused.value)
    assert "lora.rank is 8, there 4" in text and "lora.exclude is ['q_proj'], there ()" in text
    command = shlex.split(text.partition(": add ")[2])
    assert command == ["lora.rank=0", "lora.alpha=32.0", "lora.targets=all-linear", "lora.exclude=[]"]
    assert spec_of(LoraConfig(**OmegaConf.from_dotlist(command).lora, adapter=where)) == spec


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4, "modules_to_save": ["q_proj"]}, "q_proj.weight is one weight with .*k_proj"),
        ({"rank": 4, "targets": ["q_prj"]}, "'q_prj' matches nothing"),
        ({"adapter": "nowhere"}, "nowhere"),
        ({"rank": -1}, "lora.rank=-1"),
    ],
)
def test_refused(ranks: RankPool, toy: Toy, tmp_path: Path, lora: dict[str, Any], message: str) -> None:
    said = recipe(toy("e4b"), tmp_path / "run", 1) | {"lora": lora}
    with pytest.raises(BridgeError, match=message):
        ranks.run(train_toy, said, [], world_size=1)
    assert not (tmp_path / "run").exists()
