"""lm-evaluation-harness: its HF model class on the exported folder, and ours on the run, say the same."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.ranks import RankPool
from tests.engines.kit import ROOT, SECONDS
from tests.functional.conftest import Toy
from tests.functional.generation_kit import run_recipe

pytestmark = pytest.mark.engine
NEEDS = ".venv/.lm-eval"

WORDS = [f"{animal} in the {place}" for animal in ("cat", "dog", "owl") for place in ("barn", "house", "wood", "sea")]
# Printed figures have four digits; these are of sums of log-probabilities, in which noise is of 1e-5.
SUM_BOUND = 1e-4
TASKS: dict[str, dict[str, Any]] = {
    "toy_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Where is the {{animal}}?",
        "doc_to_target": "answer",
        "doc_to_choice": ["the barn", "the house, which is by the sea", "wood", "sea"],
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "num_fewshot": 2,
    },
    "toy_words": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "toy_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{animal}}",
        "generation_kwargs": {"until": [" in", "<turn|>"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> Path:
    """Tasks on a local file, and what a model is taught of them."""
    folder.mkdir()
    dice = random.Random(0)
    rows = []
    for text in WORDS:
        animal = text.split()[0]
        question = f"Where is the {animal}?"
        rows.append({"text": text, "animal": animal, "question": question, "answer": dice.randrange(4)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        said = {"task": name, "dataset_path": "json", "test_split": "train", "fewshot_split": "train"}
        files = {"dataset_kwargs": {"data_files": str(folder / "rows.jsonl")}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(said | files | task))
    chats = [{"prompt": row["question"], "completion": row["text"]} for row in rows]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return folder


def scores(workdir: Path, model: str, arguments: str, tasks: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """The table that lm-eval prints, and its samples."""
    output = workdir / model
    command = [sys.executable, "-m", "integrations.lm_eval", "run", "--model", model, "--model_args", arguments]
    said = ["--tasks", *TASKS, "--include_path", str(tasks), "--output_path", str(output), "--log_samples"]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(workdir / "hf")}
    done = subprocess.run(
        [*command, *said, "--device", "cpu", "--batch_size", "3", *options],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    samples: dict[str, Any] = {}
    for name in TASKS:
        (file,) = output.rglob(f"samples_{name}_*.jsonl")
        samples[name] = [json.loads(line)["resps"] for line in file.read_text().splitlines()]
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith("|")), samples


CASES = {
    "texts, TP2+SP": (",tp=2,sequence_parallel=True", ()),
    "chats": ("", ("--apply_chat_template", "--fewshot_as_multiturn", "True")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_scores(ranks: RankPool, toy: Toy, case: str, tmp_path: Path) -> None:
    layout, template = CASES[case]
    tasks = write_tasks(tmp_path / "tasks")
    said = {
        "output": str(tmp_path / "run"),
        "model": {"hf": str(toy("e4b")), "dtype": "float32"},
        "data": {"path": str(tasks / "chats.jsonl"), "cache": str(tmp_path / "cache")},
        "train": {"steps": 30, "global_batch_size": 12, "micro_batch_size": 12, "seq_length": 64},
        "optimizer": {"lr": 4e-3},
        "export": {"hf": str(tmp_path / "trained")},
    }
    ranks.run(run_recipe, said, [], world_size=1)
    table, theirs = scores(tmp_path, "hf", f"pretrained={tmp_path / 'trained'},dtype=float32", tasks, *template)
    arguments = f"pretrained={tmp_path / 'run'},dtype=float32{layout}"
    own_table, ours = scores(tmp_path, "gemma4_bridge", arguments, tasks, *template)
    print(table)
    assert own_table == table
    assert table.count("\n") == 6, "a line for every metric"
    assert ours["toy_answer"] == theirs["toy_answer"] and any(answer != [[""]] for answer in ours["toy_answer"])
    for name in ("toy_choice", "toy_words"):
        assert figures(ours[name]) == pytest.approx(figures(theirs[name]), rel=0, abs=SUM_BOUND)


def figures(samples: Any) -> list[float]:
    """The numbers of nested answers: log-probabilities, and whether they are greedy."""
    if isinstance(samples, list):
        return [figure for sample in samples for figure in figures(sample)]
    return [float(samples) if not isinstance(samples, str) else float({"True": 1, "False": 0}.get(samples, samples))]
