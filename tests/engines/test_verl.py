"""verl's Megatron engine on this bridge, on CPU ranks: an actor update is the GRPO step of this project's trainer."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bridge.geometry import Geometry
from bridge.ranks import RankPool
from bridge.verify.reference import load_hf
from tests.engines.kit import ROOT, SECONDS
from tests.engines.verl_kit import Row, make_rows, our_step
from tests.functional.conftest import Toy

pytestmark = pytest.mark.engine
NEEDS = ".venv-verl/.ready"

VERL = ROOT / ".venv-verl" / "bin" / "python"
BOUND, APART = 1e-5, 1e-4
CASES: dict[str, tuple[str, dict[str, int], dict[str, Any], tuple[str, ...]]] = {
    "e4b PP2, pictures": (
        "e4b",
        {"pp": 2},
        {"pipeline_model_parallel_size": 2},
        ("image", "text", "two images", "text"),
    ),
    "26b EP2": ("26b-a4b", {"ep": 2}, {"expert_model_parallel_size": 2}, ()),
}


def verl_step(job: dict[str, Any], work: Path) -> list[dict[str, Any]]:
    """What ranks of verl answer, those that have outputs."""
    job |= {"store": str(work / "store"), "answer": str(work / "answer"), "out": str(work / "theirs")}
    (work / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VERL_ENGINE_VENDOR": "gemma4_bridge", "OMP_NUM_THREADS": "1"}
    worker = [str(VERL), str(Path(__file__).with_name("verl_worker.py")), str(work / "job.json")]
    logs = [(work / f"rank{rank}.log").open("w+") for rank in range(job["world"])]
    ranks = [
        subprocess.Popen([*worker, str(rank)], stdout=log, stderr=subprocess.STDOUT, env=environment)
        for rank, log in enumerate(logs)
    ]
    try:
        for rank, (process, log) in enumerate(zip(ranks, logs, strict=True)):
            code = process.wait(SECONDS)
            log.seek(0)
            assert code == 0, f"rank {rank}: {log.read()[-4000:]}"
    finally:
        for process in ranks:
            process.kill()
    return [json.loads(path.read_text()) for path in sorted(work.glob("answer-*"))]


def values_of(folder: Path, rows: list[Row]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every text row, by transformers: log-probabilities of the tokens behind the first, and entropies before."""
    model = load_hf(folder, Geometry.from_folder(folder), torch.float32).eval()
    found = []
    for row in rows:
        with torch.no_grad():
            logps = model(input_ids=row["ids"][None], use_cache=False).logits[0].log_softmax(-1)
        told = logps[:-1].gather(1, row["ids"][1:, None])[:, 0]
        found.append((told, -(logps.exp() * logps).sum(-1)[:-1]))
    return found


@pytest.mark.parametrize("case", CASES)
def test_an_actor_update(ranks: RankPool, toy: Toy, tmp_path: Path, case: str) -> None:
    """Loss and weights of the step; log-probabilities and entropies before it are those of transformers."""
    variant, parallel, engine, kinds = CASES[case]
    folder = toy(variant)
    rows = make_rows(folder, kinds)
    torch.save(rows, tmp_path / "rows.pt")
    loss, *_ = ranks.run(our_step, folder, tmp_path / "rows.pt", parallel, tmp_path / "ours", world_size=2)
    job = {"model": str(folder), "rows": str(tmp_path / "rows.pt"), "world": 2, "engine": engine, "lora": {}}
    answers = verl_step(job, tmp_path)
    assert answers[0]["engine"] == "integrations.verl.engine.Gemma4Engine"
    assert answers[0]["summed_loss"] == pytest.approx(loss, abs=BOUND)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    before = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys() == before.keys()
    apart = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    moved = max((ours[name] - before[name]).abs().max().item() for name in ours)
    print(f"{case}: loss {abs(answers[0]['summed_loss'] - loss):.1e}, weights {apart:.1e} apart, moved by {moved:.1e}")
    assert apart <= BOUND < APART < moved
    assert set(answers[0]["names"]) <= set(before)
    told = [row for answer in answers for row in answer.get("log_probs", ())]
    entropies = [row for answer in answers for row in answer.get("entropy", ())]
    assert len(told) == len(entropies) == len(rows)
    texts = [number for number, row in enumerate(rows) if not row["media"]]
    assert texts
    expected = values_of(folder, [rows[number] for number in texts])
    for number, (logps, entropy) in zip(texts, expected, strict=True):
        for values, of_model in ((told[number], logps), (entropies[number], entropy)):
            assert (torch.tensor(values)[:-1] - of_model).abs().max() <= BOUND


def test_adapters(toy: Toy, tmp_path: Path) -> None:
    """A LoRA of verl's default modules: the base is streamed once, then the adapters, which a PEFT folder has too."""
    folder = toy("e4b")
    torch.save(make_rows(folder, ()), tmp_path / "rows.pt")
    lora = {"rank": 4, "alpha": 8, "target_modules": ["linear_qkv", "linear_proj"]}
    job = {"model": str(folder), "rows": str(tmp_path / "rows.pt"), "world": 1, "engine": {}, "lora": lora}
    (answer,) = verl_step(job, tmp_path)
    assert answer["peft"] == {"r": 4, "lora_alpha": 8}
    before = load_file(folder / "model.safetensors")
    assert set(answer["names"]) <= set(before)
    saved = load_file(tmp_path / "theirs-adapter" / "adapter_model.safetensors")
    stream = torch.load(tmp_path / "theirs-stream-0.pt", weights_only=True)
    assert all(torch.equal(stream[name], tensor) for name, tensor in saved.items())
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name), "nothing was learnt"
    merged = load_file(tmp_path / "theirs" / "model.safetensors")
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert changed and all(
        name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")) for name in changed
    )
