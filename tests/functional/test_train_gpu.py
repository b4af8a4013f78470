"""The benchmark of training on a GPU, at toy size on a CPU: both sides, the processes, the table and the bounds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import train_gpu
from benchmarks.kernel_groups import breakdown, group_of
from benchmarks.train_gpu_report import BEGIN, END, LEAST_MFU, misses, same_losses, table, write_between
from benchmarks.training_sides import RECOMPUTE, Case
from bridge.ranks import RankPool


def measured(cases: list[Case]) -> list[dict[str, Any]]:
    """Runs on a rank."""
    return [train_gpu.measure(case) for case in cases]


def test_both_sides_train_the_same_model(ranks: RankPool) -> None:
    cases = [case for case in train_gpu.toy_cases() if case.mode != "loss"]
    (found,) = ranks.run(measured, cases, world_size=1)
    rows = {case.name: {"side": case.side, **row} for case, row in zip(cases, found, strict=True)}
    assert same_losses(rows) == []
    for row in rows.values():
        assert row["status"] == "ok" and row["tokens_per_s"] > 0 and row["peak_gb"] > 0
        assert sum(row["breakdown"].values()) == pytest.approx(1, abs=0.01)
        assert {"gemm", "norm and elementwise", "optimizer", "loss"} <= set(row["breakdown"])
        # Three steps of the same batches: adapters begin with other values, and have moved little.
        assert len(row["losses"]) == 3
    ours, theirs = (row["losses"] for row in rows.values())
    assert ours == pytest.approx(theirs, rel=1e-3) and ours[0] != ours[1]


def as_child(case: Case, out: Path) -> None:
    """Runs on a rank."""
    train_gpu.child(case, out)


def test_a_case_is_a_process_and_a_line(ranks: RankPool, tmp_path: Path) -> None:
    (loss,) = (case for case in train_gpu.toy_cases() if case.mode == "loss")
    ranks.run(as_child, loss, tmp_path / "row.json", world_size=1)
    row = json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
    # On a CPU it is what the process grew by, which is nothing where it has been larger before.
    assert row["status"] == "ok" and row["peak_gb"] < 0.5 and row["torch"]
    # A process of its own, which fails before it has imported much.
    out, wrong = tmp_path / "rows.jsonl", Case("e2b", "lora", 48, "nobody", size="toy")
    for _ in range(2):  # a failure is tried again
        ((name, row),) = train_gpu.run_all([wrong], out, None, 60)
        assert name == "lora/e2b/48/nobody" and row["status"] == "failed: KeyError: 'nobody'"
    assert [json.loads(line)["case"] for line in out.read_text(encoding="utf-8").splitlines()] == [name] * 2
    out.write_text(json.dumps({"case": name, "status": "ok"}) + "\n", encoding="utf-8")
    assert list(train_gpu.run_all([wrong], out, None, 60)) == []  # what was measured is not


def test_a_case_that_hangs_ends_with_what_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = tmp_path / "started"
    program = f"import subprocess, sys\nchild = subprocess.Popen(['sleep', '600'])\nopen({str(started)!r}, 'w')."
    program += "write(str(child.pid))\nchild.wait()"
    (tmp_path / "hangs").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}"\n', encoding="utf-8")
    (tmp_path / "hangs").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "hangs"))
    assert train_gpu.run_child(Case("e2b", "lora", 48), 5)["status"] == "failed: not done after 5 s"
    status = Path(f"/proc/{started.read_text(encoding='utf-8')}/stat")
    assert not status.exists() or status.read_text(encoding="utf-8").split()[2] == "Z"


def test_a_profile_that_fails_costs_no_measurement() -> None:
    def run() -> None:
        raise RuntimeError("no profiler\nhere")

    assert train_gpu.profiled(run) == {"not_profiled": "RuntimeError: no profiler here"}


def test_out_of_memory_tries_more_recompute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def run_child(case: Case, seconds: float) -> dict[str, Any]:
        tried.append(case.recompute)
        return {"status": "ok" if case.recompute == RECOMPUTE[-1] else train_gpu.MEMORY}

    monkeypatch.setattr(train_gpu, "run_child", run_child)
    case = Case("12b", "lora", 8192)
    ((_, row),) = train_gpu.run_all([case], tmp_path / "rows.jsonl", None, 60)
    assert tried == list(RECOMPUTE) and row["status"] == "ok" and row["recompute"] == "full"
    # What the estimate rules out is not tried, and what is not installed is said to be.
    tried.clear()
    rows = dict(train_gpu.run_all([case, Case("12b", "lora", 8192, "liger")], tmp_path / "b.jsonl", 20e9, 60))
    assert tried == []
    assert rows["lora/12b/8192/ours"]["status"] == "not run: the estimate says it does not fit"
    assert rows["lora/12b/8192/liger"]["status"] == "not run: liger_kernel is not installed"
    assert list(train_gpu.run_all([case], tmp_path / "c.jsonl", None, -1)) == []  # no time left


def test_cases_are_what_is_asked_for() -> None:
    cases = train_gpu.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) and set(names[:4]) == set(LEAST_MFU)
    for length in (4096, 16_384, 65_536):
        for side in ("ours", "transformers", "liger"):
            assert {f"sft/{variant}/{length}/{side}" for variant in ("e2b", "e4b")} <= set(names)
            assert {f"lora/{v}/{length}/{side}" for v in ("e2b", "e4b", "12b", "26b-a4b", "31b")} <= set(names)
            assert {f"lora/{variant}+media/{length}/{side}" for variant in ("e4b", "26b-a4b")} <= set(names)
    assert {f"{name}+torch" for name in LEAST_MFU} <= set(names)
    estimates = {case.name: train_gpu.ladder(case, 141e9) for case in cases[:4]}
    assert all(need is not None and need > 20e9 for _, need in estimates.values())


def good_rows() -> dict[str, dict[str, Any]]:
    """Rows that keep every bound."""

    def row(case: Case, peak: float, mfu: float = 0.5, rate: float = 1000.0) -> tuple[str, dict[str, Any]]:
        said = {"side": case.side, "mode": case.mode, "length": case.length, "recompute": "full"}
        return case.name, {**said, "status": "ok", "mfu": mfu, "peak_gb": peak, "tokens_per_s": rate}

    cases = {case.name: case for case in train_gpu.cases()}
    rows = dict(row(cases[name], 80.0) for name in LEAST_MFU)
    for length, peak in ((4096, 30.0), (16_384, 36.0), (65_536, 60.0)):
        rows |= dict([row(cases[f"lora/12b/{length}/ours"], peak)])
    rows |= dict([row(cases["lora/12b/16384/liger"], 61.0, rate=499.0)])
    return rows | dict(row(case, 0.5) for case in cases.values() if case.mode == "loss")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("lora/26b-a4b/8192/ours", {"mfu": 0.24}, "MFU 0.240, bound 0.25"),
        ("lora/31b/8192/ours", None, "MFU not run"),
        ("lora/12b/16384/liger", {"tokens_per_s": 501.0}, "2.00 × tokens/s with 0.59 × memory"),
        ("lora/12b/16384/liger", {"peak_gb": 59.0}, "0.61 × memory"),
        ("lora/12b/16384/liger", None, "no case of 16384 tokens was measured with liger-kernel"),
        ("lora/12b/65536/ours", {"peak_gb": 64.0}, "memory grows 1.17 × a straight line"),
        ("lora/12b/65536/ours", None, "lora/12b/65536/ours: not run"),
        ("lora/12b/4096/ours", {"recompute": "none"}, "memory cannot be compared"),
        ("loss/26b-a4b/8192/head frozen", {"peak_gb": 0.61}, "0.61 GB, bound 0.6 GB"),
    ],
)
def test_bounds(name: str, change: dict[str, Any] | None, said: str) -> None:
    rows = good_rows()
    assert misses(rows) == []
    if change is None:
        del rows[name]
    else:
        rows[name] |= change
    (missed,) = misses(rows)
    assert said in missed


def test_sides_that_disagree_are_named() -> None:
    rows = {f"lora/e2b/48/{side}": {"side": side, "losses": [6.0]} for side in ("ours", "transformers")}
    assert same_losses(rows) == []
    rows["lora/e2b/48/transformers"]["losses"] = [6.001]
    assert same_losses(rows) == ["lora/e2b/48/transformers: first loss 6.001, ours 6.0"]
    assert same_losses({"lora/e2b/48/ours": rows["lora/e2b/48/ours"]}) == ["nothing was compared"]


def test_the_table_goes_between_its_markers(tmp_path: Path) -> None:
    docs = tmp_path / "page.md"
    docs.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    row = {"status": "ok", "device": "a GPU", "torch": "2", "tokens_per_s": 12.4, "breakdown": {"gemm": 0.7}}
    write_between(docs, table({"lora/e2b/48/ours": row, "b": {"status": "out of memory"}}))
    page = docs.read_text(encoding="utf-8")
    assert page.startswith(f"before\n{BEGIN}\na GPU, ") and page.endswith(f"{END}\nafter\n") and "old" not in page
    assert "| lora/e2b/48/ours | 12 | " in page and "gemm 70 %" in page and "| b | out of memory |" in page
    docs.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="has no"):
        write_between(docs, "x")


@pytest.mark.parametrize(
    ("kernel", "ranges", "group"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", ["aten::mm"], "gemm"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", ["aten::mm", "_LinearCrossEntropy"], "loss"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", ["aten::bmm", "_BlockwiseBackward"], "attention"),
        ("triton_tem_fused_flex_attention_0", [], "attention"),
        ("void at::native::vectorized_elementwise_kernel<4>", ["aten::mul"], "norm and elementwise"),
        ("multi_tensor_apply_kernel", ["Optimizer.step#AdamW.step"], "optimizer"),
        ("cutlass::GemmUniversal<GroupProblemShape<Shape<int>>>", [], "grouped gemm"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", [], "communication"),
        ("Memcpy HtoD (Pageable -> Device)", [], "copies"),
        ("a_kernel_nobody_knows", [], "other"),
    ],
)
def test_kernels_have_groups(kernel: str, ranges: list[str], group: str) -> None:
    assert group_of(kernel, ranges) == group


def test_kernels_belong_to_what_launched_them() -> None:
    def event(name: str, parent: Any = None, kernels: dict[str, float] | None = None) -> Any:
        listed = [SimpleNamespace(name=kernel, duration=time) for kernel, time in (kernels or {}).items()]
        return SimpleNamespace(name=name, cpu_parent=parent, kernels=listed, self_cpu_time_total=1000.0)

    optimizer = event("optimizer", None, {"optimizer": 5.0})  # a range, timed on the device too
    loss = event("_LinearCrossEntropy")
    events = [
        optimizer,
        event("aten::add_", optimizer, {"vectorized_elementwise_kernel": 1.0}),
        event("aten::mm", loss, {"nvjet_x": 2.0}),
        event("aten::mm", None, {"nvjet_x": 6.0}),
        event("aten::add", None, {"vectorized_elementwise_kernel": 1.0}),
    ]
    found = breakdown(SimpleNamespace(events=lambda: events))
    assert found == {"gemm": 0.6, "norm and elementwise": 0.1, "loss": 0.2, "optimizer": 0.1}
