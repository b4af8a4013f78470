"""The kernels of `bridge.megatron.kernels`: kernel_cases.py in processes of their own, and what the compiler makes of
them for a GPU that need not be there."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bridge.megatron.kernels import fused, installed
from bridge.megatron.kernels.attention_tiles import Runs

pytest.importorskip("triton")
attention_backward = importlib.import_module("bridge.megatron.kernels.attention_backward")
launches = attention_backward.launches

ROOT = Path(__file__).parents[2]
SHARED_OF_AN_H100 = 232_448
PLACES = ("rows", "columns", "row_start", "column_start", "row_tiles", "column_tiles", "groups")


def run_cases(*options: str, cases: str = "kernel_cases.py", **environment: str) -> None:
    file = Path(__file__).with_name(cases)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1500, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and "skipped" not in done.stdout, done.stdout


def test_kernels_in_the_interpreter() -> None:
    run_cases("-m", "not slow", TRITON_INTERPRET="1")


def test_the_backward_pass_of_attention_in_the_interpreter() -> None:
    run_cases("-m", "not slow", cases="attention_backward_cases.py", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_more_of_the_backward_pass_of_attention_in_the_interpreter() -> None:
    run_cases("-m", "slow", cases="attention_backward_cases.py", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_models_of_kernels_in_the_interpreter() -> None:
    run_cases(cases="kernel_model_cases.py", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
def test_kernels_and_models_of_them_on_a_gpu() -> None:
    run_cases(TRITON_INTERPRET="0")
    run_cases(cases="kernel_model_cases.py", TRITON_INTERPRET="0")


HEADS = {"GROUPS": 2, "QUERIES": 8, "FIRST": 0, "OWN": 8, "D": 512, "BLOCK": 4, "HALF": 256}
NORM = {"N": 5376, "ROWS": 1, "COLUMNS": 8192}
QKV, V_IS_K = HEADS | {"ROWS": 10, "V_IS_K": False}, HEADS | {"ROWS": 9, "V_IS_K": True}
# Kernel, warps, constants, tensors that are not given: as the launches of the largest models have them.
COMPILED: list[tuple[str, str, int, dict[str, Any], tuple[str, ...]]] = [
    ("rms_norm", "rms_norm_forward_kernel", 16, NORM, ()),
    ("rms_norm", "rms_norm_backward_kernel", 16, NORM, ()),
    ("rms_norm", "rms_norm_backward_kernel", 4, {"N": 256, "ROWS": 8, "COLUMNS": 256}, ("weight", "dw")),
    ("geglu", "geglu_forward_kernel", 4, {"HEIGHT": 1, "WIDTH": 1024}, ()),
    ("geglu", "geglu_backward_kernel", 4, {"HEIGHT": 1, "WIDTH": 1024}, ()),
    ("qkv_norm_rope", "qkv_norm_rope_forward_kernel", 4, QKV, ()),
    ("qkv_norm_rope", "qkv_norm_rope_backward_kernel", 4, QKV, ("d_weight",)),
    ("qkv_norm_rope", "qkv_norm_rope_backward_kernel", 4, V_IS_K, ()),
    ("permute", "sum_experts_kernel", 4, {"COPIES": 8, "BLOCK": 1024}, ()),
    ("scale_rows", "scale_rows_forward_kernel", 8, {"N": 2816, "ROWS": 1, "COLUMNS": 4096}, ()),
    ("scale_rows", "scale_rows_backward_kernel", 8, {"N": 2816, "ROWS": 1, "COLUMNS": 4096}, ()),
    ("fp8", "quantize_rows_kernel", 8, {"N": 2816, "ROWS": 1, "COLUMNS": 4096}, ()),
    ("fp8", "quantize_columns_kernel", 4, {"N": 1408, "M": 2816, "HEIGHT": 64, "WIDTH": 64}, ()),
    ("cross_entropy", "cross_entropy_statistics_kernel", 8, {"SOFTCAP": True, "PART": 16384, "BLOCK": 4096}, ()),
    ("cross_entropy", "cross_entropy_gradient_kernel", 8, {"SOFTCAP": True, "BLOCK": 4096}, ("weights",)),
]


@dataclass(frozen=True)
class Made:
    """A kernel for a Hopper GPU: bytes of its stack, registers and shared memory, PTX and machine code."""

    stack: int
    registers: int
    shared: int
    ptx: str
    sass: str


def for_hopper(kernel: Any, values: dict[str, Any], options: dict[str, Any], folder: Path) -> Made:
    """What Triton and ptxas make of it, for bf16 tensors; pointers and strides are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget

    types = {parameter.name: _type(parameter.name) for parameter in kernel.params}
    types |= dict.fromkeys(values, "constexpr")
    unknown = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, type_) in enumerate(types.items())
        if type_ not in ("constexpr", "fp32") and name not in unknown
    }
    source = triton.compiler.ASTSource(kernel, types, values, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    (folder / "cubin").write_bytes(made.asm["cubin"])

    def said(option: str) -> str:
        command = [triton.knobs.nvidia.cuobjdump.path, option, folder / "cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said("-res-usage"))}
    stack = numbers["STACK"] + numbers["LOCAL"]
    return Made(stack, numbers["REG"], made.metadata.shared, made.asm["ptx"], said("-sass"))


@pytest.mark.parametrize(("module", "name", "warps", "constants", "absent"), COMPILED)
def test_a_hopper_gpu_keeps_it_in_registers(
    module: str,
    name: str,
    warps: int,
    constants: dict[str, Any],
    absent: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton and ptxas take it, for bf16 tensors; nothing is spilled, and every load of bf16 is of 16 bytes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source_module = importlib.import_module(f"bridge.megatron.kernels.{module}")
    options = {"num_warps": warps, **getattr(source_module, "OPTIONS", {})}
    made = for_hopper(getattr(source_module, name), constants | dict.fromkeys(absent), options, tmp_path)
    assert made.stack == 0
    assert made.registers * 32 * warps <= 65536
    # torch rounds a product before it is added to another.
    assert not re.findall(r"fma\S*bf16", made.ptx)
    loads = re.findall(r"ld\.global\S*", made.ptx)
    assert not [load for load in loads if load.endswith(".b16") and ".v" not in load], loads


ATTENTION = [(name, d, repeat) for d, repeat in ((512, 16), (256, 2)) for name in launches(d, repeat)]


@pytest.mark.parametrize(("name", "d", "repeat"), ATTENTION)
def test_a_hopper_gpu_multiplies_attentions_gradients_with_wgmma(
    name: str, d: int, repeat: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are launched: no other matrix instruction, no stack, shared memory that there is, copies of 16 bytes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    values = launches(d, repeat)[name]
    options = {key: values.pop(key) for key in ("num_warps", "num_stages") if key in values}
    made = for_hopper(getattr(attention_backward, name), values, options, tmp_path)
    assert made.stack == 0
    assert made.shared <= SHARED_OF_AN_H100
    assert "mma.sync.aligned.m16" not in made.ptx and "HMMA" not in made.sass
    instructions = set(re.findall(r"HGMMA\.(\w+)", made.sass))
    if name == "attention_delta_kernel":
        assert not instructions and "LDG.E.128" in made.sass
    else:
        assert instructions == {"64x128x16" if name == "attention_weights_kernel" else "64x256x16"}
        assert set(re.findall(r"LDGSTS\S*", made.sass)) == {"LDGSTS.E.BYPASS.128"}


def _type(name: str) -> str:
    if name in ("eps", "cap", "z_loss"):
        return "fp32"
    if name in (*PLACES, "n", "tokens", "words") or name.endswith(("_stride", "_s", "_b", "_h")):
        return "i32"
    if name in Runs._fields:
        return "*i32"
    if name in (
        "dw",
        "d_weight",
        "lse",
        "delta",
        "d_key",
        "d_value",
        "weights",
        "d_weights",
        "top",
        "total",
        "target",
        "scales",
    ):
        return "*fp32"
    if name == "values":
        return "*fp8e4nv"
    return "*i64" if name in ("column", "places") else "*bf16"


def test_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU torch, unless asked otherwise; never a kernel for a dtype that it has not got, or without Triton."""
    x = torch.ones(2)
    assert [fused(kernels, x) for kernels in ("auto", "torch", "triton")] == [False, False, True]
    assert not fused("triton", x.double())
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = torch.empty(2, device="cuda")
    assert [fused(kernels, on_gpu) for kernels in ("auto", "torch", "triton")] == [True, False, True]
    monkeypatch.setitem(sys.modules, "triton", None)  # not found
    installed.cache_clear()
    assert not fused("auto", on_gpu)
    installed.cache_clear()
