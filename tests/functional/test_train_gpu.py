"""The benchmark of training on a GPU, at toy size on a CPU: both sides, the processes, the table and the bounds."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import case_process, lines, train_gpu, training_sides, workers
from benchmarks import cases as gpu_cases
from benchmarks.case import RECOMPUTE, Case
from benchmarks.case_process import _needed
from benchmarks.cases import estimated, ladder, toy_cases
from benchmarks.kernel_groups import GROUPS, breakdown, group_of
from benchmarks.step_profile import profiled
from benchmarks.train_gpu_report import BEGIN, END, LEAST_MFU, kernel_table, misses, same_losses, table, write_between
from bridge.errors import UsageError
from bridge.ranks import RankPool


def measured(cases: list[Case]) -> list[list[tuple[str, dict[str, Any]]]]:
    """The phases of each. Runs on a rank."""
    found = []
    for case in cases:
        phases: list[tuple[str, dict[str, Any]]] = []
        case_process.measure(case, lambda phase, phases=phases, **values: phases.append((phase, values)))
        found.append(phases)
    return found


def rows_of_phases(case: Case, phases: list[tuple[str, dict[str, Any]]], folder: Path) -> dict[str, dict[str, Any]]:
    """As they come out of a file."""
    file = folder / "rows.jsonl"
    lines.append(file, case.name, "start", **asdict(case))
    for phase, values in phases:
        lines.append(file, case.name, phase, **values)
    return lines.rows_of(file)


def test_both_sides_train_the_same_model(ranks: RankPool, tmp_path: Path) -> None:
    both = [case for case in toy_cases() if case.mode != "loss"]
    (found,) = ranks.run(measured, both, world_size=1)
    rows: dict[str, dict[str, Any]] = {}
    for case, phases in zip(both, found, strict=True):
        assert [phase for phase, _ in phases] == ["built", "step", "step", "measured", "profile", "groups"]
        rows = rows_of_phases(case, phases, tmp_path)
    assert same_losses(rows) == []
    for row in rows.values():
        assert row["status"] == "ok" and row["tokens_per_s"] > 0 and row["peak_gb"] > 0 and row["wall_ms"] > 0
        assert sum(row["breakdown"].values()) == pytest.approx(1, abs=0.01)
        assert {"gemm", "norm and elementwise", "optimizer", "loss"} <= set(row["breakdown"])
        assert len(row["losses"]) == len(row["step_seconds"]) == 2
    # Adapters begin with other values, and have moved little.
    ours, theirs = (row["losses"] for row in rows.values())
    assert ours == pytest.approx(theirs, rel=1e-3) and ours[0] != ours[1]
    assert "| lora/e2b/48/ours+full | " in table(rows) and "a step of " in kernel_table(rows)


def failing_profile() -> list[tuple[str, dict[str, Any]]]:
    """Runs on a rank."""

    def run() -> None:
        raise RuntimeError("no profiler\nhere")

    return list(profiled(run))


def test_a_profile_that_fails_costs_no_measurement(ranks: RankPool) -> None:
    (((phase, said),),) = ranks.run(failing_profile, world_size=1)
    assert phase == "profile" and said["not_profiled"].startswith("Traceback")
    assert said["not_profiled"].endswith("RuntimeError: no profiler\nhere\n")


def as_process(request: workers.Request) -> None:
    """Runs on a rank."""
    case_process.run(request)


def test_a_case_is_a_process_and_lines(ranks: RankPool, tmp_path: Path) -> None:
    (loss,) = (case for case in toy_cases() if case.mode == "loss")
    out, wrong = tmp_path / "rows.jsonl", Case("e2b", "lora", 48, "nobody", size="toy")
    ranks.run(as_process, workers.Request(loss.name, loss, out), world_size=1)
    row = lines.rows_of(out)[loss.name]
    # On a CPU it is what the process grew by, which is nothing where it has been larger before.
    assert row["status"] == "ok" and row["peak_gb"] < 0.5 and row["torch"] and row["mode"] == "loss"
    # A process of its own; a failure is said with its traceback, and tried again.
    for _ in range(2):
        ((name, row),) = train_gpu.run_all([wrong, loss], out, None)
        assert name == "lora/e2b/48/nobody" and row["status"] == "failed: KeyError: 'nobody'"
        assert "in step_of\n" in row["traceback"] and row["traceback"].endswith("KeyError: 'nobody'\n")
    assert sorted(lines.done(out)) == [loss.name]
    assert list(train_gpu.run_all([loss], out, None)) == []  # what was measured is not
    before = out.read_text(encoding="utf-8")
    assert list(train_gpu.run_all([wrong], out, None, budget=5)) == []  # nor what has no time left
    assert lines.rows_of(out)[name]["status"] == workers.NO_TIME
    assert out.read_text(encoding="utf-8").startswith(before)


def test_out_of_memory_tries_more_recompute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def run(self: workers.Workers, request: workers.Request, another: bool = False) -> str:
        tried.append(request.case.recompute)
        status = "ok" if request.case.recompute == RECOMPUTE[-1] else lines.MEMORY
        lines.append(request.out, request.name, "start", **asdict(request.case), status=status)
        return status

    monkeypatch.setattr(workers.Workers, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    case = Case("12b", "lora", 8192)
    ((_, row),) = train_gpu.run_all([case], tmp_path / "rows.jsonl", None)
    assert tried == list(RECOMPUTE) and row["status"] == "ok" and row["recompute"] == "full"
    # What the estimate rules out is not tried, and what is not installed is said to be.
    tried.clear()
    rows = dict(train_gpu.run_all([case, Case("12b", "lora", 8192, "liger")], tmp_path / "b.jsonl", 20e9))
    assert tried == []
    assert rows["lora/12b/8192/ours"]["status"] == "not run: the estimate says it does not fit"
    assert rows["lora/12b/8192/liger"]["status"] == "not run: liger_kernel is not installed"


def test_a_row_that_could_be_too_large_begins_with_more_recompute() -> None:
    """The estimate may be 3 % off, and a process takes some of a GPU itself."""
    case = Case("12b", "lora", 8192)
    least, most = (estimated(replace(case, recompute=r)) for r in (RECOMPUTE[0], RECOMPUTE[-1]))
    for memory, first in ((least + 1e9, "selective"), (1.03 * least + 2e9, "none")):
        rungs, _ = ladder(case, memory)
        assert rungs[0].recompute == first
    assert [rung.recompute for rung in ladder(case, most + 1)[0]] == ["full"]  # there is nothing else to try
    assert ladder(case, most - 1)[0] == []


def test_liger_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, _ = toy_cases()
    assert not training_sides.changed_by_liger()
    replaced = type("LigerRMSNorm", (), {"__module__": "liger_kernel.transformers.rms_norm"})
    monkeypatch.setattr("transformers.models.gemma4.modeling_gemma4.Gemma4RMSNorm", replaced)
    for case in (ours, theirs):
        with pytest.raises(UsageError, match=f"{re.escape(case.name)}: liger-kernel has replaced"):
            training_sides.step_of(case)


def test_cases_are_what_is_asked_for() -> None:
    cases = gpu_cases.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) and set(names[:4]) == set(LEAST_MFU)
    for length in (4096, 16_384, 65_536):
        for side in ("ours", "transformers", "liger"):
            assert {f"sft/{variant}/{length}/{side}" for variant in ("e2b", "e4b")} <= set(names)
            assert {f"lora/{v}/{length}/{side}" for v in ("e2b", "e4b", "12b", "26b-a4b", "31b")} <= set(names)
            assert {f"lora/{variant}+media/{length}/{side}" for variant in ("e4b", "26b-a4b")} <= set(names)
    assert {f"{name}+torch" for name in LEAST_MFU} <= set(names)
    estimates = {case.name: ladder(case, 141e9) for case in cases[:4]}
    assert all(need is not None and need > 20e9 for _, need in estimates.values())


def good_rows() -> dict[str, dict[str, Any]]:
    """Rows that keep every bound."""

    def row(case: Case, peak: float, mfu: float = 0.5, rate: float = 1000.0) -> tuple[str, dict[str, Any]]:
        said = {"side": case.side, "mode": case.mode, "length": case.length, "recompute": "full"}
        return case.name, {**said, "status": "ok", "mfu": mfu, "peak_gb": peak, "tokens_per_s": rate}

    cases = {case.name: case for case in gpu_cases.cases()}
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


def test_kernels_of_this_project_are_told_apart() -> None:
    """A profile names a kernel by its function alone."""
    folder = Path(train_gpu.ROOT) / "bridge" / "megatron" / "kernels"
    names = re.findall(r"def (\w+_kernel)\(", "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py")))
    assert len(names) == len(set(names)) > 10
    groups = {name: group_of(name, ["aten::add", "_Anything"]) for name in names}
    assert set(groups.values()) == {"norm and elementwise", "loss", "attention"} < set(GROUPS), groups


def test_kernels_belong_to_what_launched_them() -> None:
    def event(name: str, parent: Any = None, kernels: dict[str, float] | None = None) -> Any:
        listed = [SimpleNamespace(name=kernel, duration=time) for kernel, time in (kernels or {}).items()]
        return SimpleNamespace(
            name=name,
            cpu_parent=parent,
            kernels=listed,
            self_cpu_time_total=1000.0,
            is_user_annotation=name == "optimizer",
        )

    optimizer = event("optimizer", None, {"optimizer": 5.0})  # a range, timed on the device too
    loss = event("_LinearCrossEntropy")
    events = [
        optimizer,
        event("aten::add_", optimizer, {"vectorized_elementwise_kernel": 1.0}),
        event("aten::mm", loss, {"nvjet_x": 2.0}),
        event("aten::mm", None, {"nvjet_x": 6.0}),
        event("aten::add", None, {"vectorized_elementwise_kernel": 1.0}),
        # Inductor's operators have the names of their kernels.
        event("triton_tem_fused_0", None, {"triton_tem_fused_0": 10.0}),
    ]
    found = breakdown(SimpleNamespace(events=lambda: events))
    assert found == {"attention": 0.5, "gemm": 0.3, "norm and elementwise": 0.05, "loss": 0.1, "optimizer": 0.05}


def test_a_first_step_that_compiles_does_not_foretell_the_next() -> None:
    """On an H200 one of 16.8 s was followed by steps of well under a second, and none was tried."""
    assert _needed([16.8], profile=True) < 25 < _needed([16.8, 16.8], profile=True)
