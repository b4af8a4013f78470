"""Adapter folders as people hold them: what PEFT saved, renamed and laid out as other classes and tools do.

Every change here keeps what the adapter computes, unless its name says otherwise.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridge.convert.folders import import_hf
from bridge.geometry import Geometry
from bridge.lora.merge import merge_adapter, open_base
from bridge.lora.peft_config import CONFIG_FILE
from bridge.lora.peft_folder import WEIGHTS_FILE, open_peft, write_peft
from bridge.lora.source import import_peft, open_megatron
from tests.functional.adapter_kit import load_model

PREFIX = "base_model.model."
IDS = torch.randint(1, 500, (2, 24), generator=torch.Generator().manual_seed(0))


@dataclass
class Folder:
    """A PEFT folder in memory; `base` is the model that it is for."""

    base: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @classmethod
    def load(cls, base: Path, path: Path) -> Folder:
        return cls(base, load_file(path / WEIGHTS_FILE), json.loads((path / CONFIG_FILE).read_text()))

    def save(self, path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}, path / WEIGHTS_FILE)
        (path / CONFIG_FILE).write_text(json.dumps(self.config))
        return path

    def rename(self, change: Callable[[str], str]) -> None:
        self.tensors = {change(name): tensor for name, tensor in self.tensors.items()}

    @property
    def geometry(self) -> Geometry:
        return Geometry.from_folder(self.base)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def peft_loaded(base: Path, adapter: Path) -> Tensor:
    """The logits of a base with an adapter, as PEFT loads it."""
    return logits(peft.PeftModel.from_pretrained(load_model(base), adapter, autocast_adapter_dtype=False).eval())


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def merged(base: Path, adapter: Path, out: Path, said: list[str] | None = None) -> Tensor:
    """The logits of transformers on what `adapter merge` makes."""
    with ExitStack() as stack:
        opened = open_base(stack, base)
        notify = None if said is None else said.append
        merge_adapter(opened, open_peft(stack, adapter, opened.table), out, notify=notify)
    return logits(load_model(out))


def through_megatron(base: Path, adapter: Path, work: Path) -> Tensor:
    """The logits of PEFT on what comes out again of `adapter import`."""
    import_hf(base, work / "megatron")
    import_peft(adapter, work / "imported", work / "megatron")
    with ExitStack() as stack:
        write_peft(work / "again", open_megatron(stack, work / "imported"))
    return peft_loaded(base, work / "again")


def without_prefix(folder: Folder) -> None:
    """As transformers' own adapters may be saved."""
    folder.rename(lambda name: name.removeprefix(PREFIX))


def with_adapter_name(folder: Folder) -> None:
    """As they are named in memory."""
    folder.rename(lambda name: re.sub(r"(\.lora_[AB])\.weight$", r"\1.default.weight", name))
    folder.rename(lambda name: re.sub(r"(\.lora_embedding_[AB])$", r"\1.default", name))


def of_other_class(folder: Folder) -> None:
    """Under the names of the text class for a multimodal base, or the reverse; targets are endings."""
    text, whole = f"{PREFIX}model.", f"{PREFIX}model.language_model."
    if folder.geometry.multimodal:
        folder.rename(lambda name: name.replace(whole, text))
        targets = folder.config["target_modules"]
        if isinstance(targets, str):
            folder.config["target_modules"] = targets.replace(r"language_model\.", "")
    else:
        folder.rename(lambda name: name if "lm_head" in name else name.replace(text, whole))
        names = [re.sub(r"^model\.layers", "model.language_model.layers", n) for n in folder.config["target_modules"]]
        folder.config["target_modules"] = names


def of_headless_class(folder: Folder) -> None:
    """As PEFT names the modules of a model without a head."""
    folder.rename(lambda name: name.replace(f"{PREFIX}model.", PREFIX))


def with_idle_factors(folder: Folder) -> None:
    """Factors of k and v in the layers that share K/V, and their full names beside the targets."""
    generator = torch.Generator().manual_seed(5)
    prefix, rank = PREFIX + folder.geometry.prefix, folder.config["r"]
    for layer in folder.geometry.layers:
        if layer.shares_kv:
            for name in ("k_proj", "v_proj"):
                module = f"{prefix}layers.{layer.index}.self_attn.{name}"
                for part, shape in (("A", (rank, folder.geometry.hidden_size)), ("B", (layer.kv_size, rank))):
                    folder.tensors[f"{module}.lora_{part}.weight"] = torch.randn(shape, generator=generator)
                if isinstance(folder.config["target_modules"], list):
                    folder.config["target_modules"].append(module.removeprefix(PREFIX))


def with_idle_fields(folder: Folder) -> None:
    """What PEFT reads without doing anything else."""
    folder.config |= {"bias": "lora_only", "fan_in_fan_out": not folder.config.get("target_parameters")}
    folder.config |= {"megatron_config": {"tensor_model_parallel_size": 2}, "init_lora_weights": "gaussian"}
    folder.config |= {"something_new": None, "other_new": [], "task_type": "CAUSAL_LM", "qalora_group_size": 32}


def with_the_embedding(folder: Folder) -> None:
    """The base's embedding beside the factors: PEFT's `save_embedding_layers`."""
    name = f"{folder.geometry.prefix}embed_tokens.weight"
    folder.tensors[PREFIX + name] = load_file(folder.base / "model.safetensors")[name]
    folder.tensors[f"{PREFIX}lm_head.weight"] = folder.tensors[PREFIX + name].clone()


def one_by_one(folder: Folder, room: str = "experts", fused: bool = False) -> None:
    """Experts under names of their own; the fused A of gate and up stands under both."""
    _experts(folder, lambda module, part, value: _singles(module, part, value, room, fused))


def as_stacks(folder: Folder) -> None:
    """Experts as matrices [E, r, in] and [E, out, r]."""
    _experts(folder, lambda module, part, value: {f"{module}.lora_{part}.weight": value})


def _singles(module: str, part: str, value: Tensor, room: str, fused: bool) -> dict[str, Tensor]:
    layer, _, name = module.rpartition(".experts.")
    found = {}
    for expert, matrix in enumerate(value):
        start = f"{layer}.{room}.{expert}"
        if name == "down_proj" or fused:
            found[f"{start}.{name}.lora_{part}.weight"] = matrix
            continue
        gate, up = matrix.chunk(2) if part == "B" else (matrix, matrix)
        found |= {f"{start}.gate_proj.lora_{part}.weight": gate, f"{start}.up_proj.lora_{part}.weight": up}
    return found


def _experts(folder: Folder, change: Callable[[str, str, Tensor], dict[str, Tensor]]) -> None:
    moe, both = folder.geometry.moe, len(folder.config["target_parameters"]) == 2
    assert moe is not None
    alone = folder.config["target_parameters"][0].rpartition(".")[2]
    tensors: dict[str, Tensor] = {}
    for name, tensor in folder.tensors.items():
        module, _, rest = name.partition(".lora_")
        if not module.removesuffix(".base_layer").endswith(".experts"):
            tensors[name] = tensor
            continue
        kind = ("gate_up_proj" if module.endswith(".base_layer") else "down_proj") if both else alone
        part = rest[0]
        if part == "A":
            value = tensor.reshape(moe.num_experts, -1, tensor.shape[1])
        else:
            value = tensor.reshape(tensor.shape[0], -1, moe.num_experts).permute(2, 0, 1)
        tensors |= change(f"{module.removesuffix('.base_layer')}.{kind}", part, value)
    folder.tensors = tensors
    # No tool lists a module that it has no factors of; and every layer has a down_proj beside its experts'.
    named = "gate_up_proj" if both or alone == "gate_up_proj" else "experts.down_proj"
    folder.config["target_modules"] = [*folder.config["target_modules"], named]
    folder.config["target_parameters"] = None


def without_a_tensor(folder: Folder, chance: random.Random) -> None:
    """Another adapter: PEFT would begin that tensor anew."""
    del folder.tensors[chance.choice(sorted(folder.tensors))]


def with_a_stranger(folder: Folder, chance: random.Random) -> None:
    """Another adapter, or none: PEFT would leave that tensor out."""
    name = chance.choice(sorted(folder.tensors))
    stranger = chance.choice(["q_norm", "input_layernorm", "experts.0.w1", "token_adapter", "score"])
    folder.tensors[name.replace("self_attn", "other", 1) + f".{stranger}"] = torch.ones(2, 2)


def with_a_field(folder: Folder, chance: random.Random) -> None:
    """Another adapter, or one that is not known here."""
    folder.config |= chance.choice(
        [
            {"layer_replication": [[0, 2]]},
            {"alora_invocation_tokens": [5, 6]},
            {"lora_bias": True},
            {"init_lora_weights": "pissa"},
            {"trainable_token_indices": [3]},
            {"something_new": 0},
            {"task_type": "SEQ_CLS"},
            {"use_dora": True},
        ]
    )
