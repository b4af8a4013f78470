"""SGLang's own loader of adapters, on a CPU: what it holds of `--format sglang` is what was written, as PEFT's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bridge.lora.peft_folder import write_peft
from bridge.lora.source import open_with_table
from bridge.toy import VARIANTS
from tests.engines.kit import ROOT, SECONDS
from tests.functional.adapter_kit import EXPERTS, make_adapter
from tests.functional.conftest import Toy
from tests.functional.test_lora_training import TEXT

pytestmark = pytest.mark.engine
NEEDS = ".venv-sglang/.ready"

STACKS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
RANK, ALPHA = 4, 6
# Of B @ A, which is computed in other shapes on the two sides.
BOUND, APART = 1e-6, 1e-3


def factors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """module -> (A, B)."""
    return {
        name.partition(".lora_A.")[0]: (tensor, tensors[name.replace(".lora_A.", ".lora_B.")])
        for name, tensor in tensors.items()
        if ".lora_A." in name
    }


def changes_of_peft(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(module, B @ A) of PEFT's own file, before scaling; experts [experts, out, in]."""
    for module, (a, b) in factors(load_file(folder / "adapter_model.safetensors")).items():
        if ".experts" not in module:
            yield module, b @ a
            continue
        # One is wrapped around the other: down has the plain name.
        inner = module.endswith(".experts.base_layer")
        experts = len(a) // RANK
        by_expert = b.reshape(len(b), RANK, experts).permute(2, 0, 1)
        name = module.removesuffix(".base_layer") + (".gate_up_proj" if inner else ".down_proj")
        yield name, by_expert @ a.reshape(experts, RANK, -1)


def parts_of_sglang(held: Mapping[str, Tensor], rows: Mapping[str, int]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(module, (A, B)) of the stacks that its kernels take: a part's factors come behind those of the part before.

    `rows`: how many a module's output has.
    """
    for whole, (a, b) in factors(held).items():
        layer, _, module = whole.rpartition(".")
        parts = STACKS.get(module, ())
        assert a.shape[-2] == RANK * max(len(parts), 1), whole
        if not parts:
            yield whole, (a, b)
        elif a.dim() == 3:
            # Experts have one A for gate and up, which it doubles.
            assert torch.equal(a[:, :RANK], a[:, RANK:]), whole
            yield whole, (a[:, :RANK], b)
        else:
            names = [f"{layer}.{part}" for part in parts]
            # Where a layer has no K it makes one, of V's size.
            outputs = b.split([rows.get(name) or rows[f"{layer}.v_proj"] for name in names])
            yield from zip(names, zip(a.split(RANK), outputs, strict=True), strict=True)


def check(held: Mapping[str, Tensor], written: Path, peft: Path) -> int:
    """Every tensor that was written is held as it is, and changes its module as PEFT's does. How many modules."""
    stored = factors(load_file(written / "adapter_model.safetensors"))
    ours = dict(parts_of_sglang(held, {module: b.shape[-2] for module, (_, b) in stored.items()}))
    made = ours.keys() - stored.keys()
    assert ours.keys() >= stored.keys() and all(module.endswith(".k_proj") for module in made)
    for module, pair in ours.items():
        wanted = stored.get(module) or tuple(map(torch.zeros_like, pair))
        assert all(map(torch.equal, pair, wanted)), module
    theirs = dict(changes_of_peft(peft))
    assert theirs.keys() <= ours.keys()
    for module, (a, b) in ours.items():
        change = b @ a
        if module in theirs:
            expected = theirs[module]
            assert expected.abs().max() > APART, module
        else:
            # K serves as V, or a layer that shares another's K and V has zeros under both.
            assert module.endswith((".k_proj", ".v_proj")), module
            expected = theirs.get(module.replace(".v_proj", ".k_proj"), torch.zeros_like(change))
        torch.testing.assert_close(change, expected, rtol=0, atol=BOUND)
    return len(ours)


def test_its_loader(toy: Toy, tmp_path: Path) -> None:
    """All five, in one process of SGLang's: attention, FFN and experts."""
    jobs: list[dict[str, Any]] = []
    for variant in VARIANTS:
        base, peft, folder = toy(variant), tmp_path / f"{variant}-peft", tmp_path / variant
        parameters = list(EXPERTS) if variant == "26b-a4b" else None
        make_adapter(base, peft, target_modules=TEXT, target_parameters=parameters, r=RANK, lora_alpha=ALPHA)
        with ExitStack() as stack:
            write_peft(folder, open_with_table(stack, peft, None), adapter_format="sglang")
        jobs.append({"adapter": str(folder), "base": str(base), "out": str(tmp_path / f"{variant}.safetensors")})
    (tmp_path / "job.json").write_text(json.dumps(jobs))
    worker = [str(ROOT / ".venv-sglang" / "bin" / "python"), str(Path(__file__).with_name("sglang_worker.py"))]
    done = subprocess.run([*worker, str(tmp_path / "job.json")], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    for variant, job in zip(VARIANTS, jobs, strict=True):
        with safe_open(job["out"], "pt") as file:
            told, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert told["scaling"] == str(ALPHA / RANK)
        assert json.loads(told["targets"]) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
        modules = check(held, tmp_path / variant, tmp_path / f"{variant}-peft")
        print(f"{variant}: {len(held)} tensors held, {modules} modules")
