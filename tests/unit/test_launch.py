"""Job scripts: what is in them, what no user can put into them, and how a plan is found."""

from __future__ import annotations

import json
import shlex
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bridge.cli import app
from bridge.errors import BridgeError, UsageError
from bridge.geometry import Geometry
from bridge.mapping import table_for
from bridge.megatron.parallel import Parallel
from bridge.toy.config import VARIANTS, published
from recipes.config import load_recipe
from recipes.memory.activations import Load
from recipes.memory.estimate import RESERVE, TrainingPlan, estimate, passes_under_way
from recipes.memory.recipe import geometry_of, plan_of, report
from recipes.memory.search import search
from recipes.slurm.job import Job, read_sweep, seconds
from recipes.slurm.published import PUBLISHED

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "slurm"
NASTY = "a b'c\"$(touch pwned)`touch pwned`\\;\nd"

JOB = Job(recipe="sft/e4b", output="runs/e4b", nodes=2, ranks=8, gpus=8)


def bash(script: str, folder: Path, **environment: str) -> str:
    """What a job script runs, with srun and scontrol that only say what they were given."""
    said = f'srun() {{ printf \'%s\\n\' "$@"; return ${{SRUN:-0}}; }}\nscontrol() {{ echo "scontrol $*"; }}\n{script}'
    known = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_PER_TASK": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", said], cwd=folder, env=known | environment, capture_output=True, text=True)
    return done.stdout + done.stderr + f"exit {done.returncode}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_scripts_are_what_launch_prints(name: str) -> None:
    assert (SCRIPTS / name).read_text() == PUBLISHED[name].render(), "run `make docs`"


def test_the_shared_environment_is_in_every_script() -> None:
    shared = (SCRIPTS / "env.sh").read_text().rstrip()
    assert all(shared in (SCRIPTS / name).read_text() for name in PUBLISHED)


def test_whatever_a_user_writes_stays_one_word(tmp_path: Path) -> None:
    job = replace(
        JOB,
        recipe=NASTY,
        name="job",
        output=f"runs/{NASTY}",
        logs="logs",
        overrides=(f"model.hf={NASTY}", "train.steps=3"),
        exports=(("TOKEN", NASTY),),
        program=(NASTY,),
        container=f"image{NASTY}",
        mounts=(f"/a{NASTY}:/b",),
        command_line=("gemma4-bridge", "launch", NASTY),
        notes=(NASTY,),
    )
    said = bash(job.render() + "\n", tmp_path)
    words = [NASTY, "train", NASTY, f"model.hf={NASTY}", "train.steps=3"]
    assert "\n".join([f"--container-image=image{NASTY}", f"--container-mounts=/a{NASTY}:/b", *words]) in said
    assert not list(tmp_path.iterdir()), "something of it was run"
    directives = [line for line in job.render().splitlines() if line.startswith("#SBATCH")]
    assert not any("touch" in line for line in directives)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "a b"},
        {"logs": "a\n#SBATCH --account=other"},
        {"options": (("partition", "gpu --qos=high"),)},
        {"exports": (("A;B", "1"),)},
        {"nodes": 0},
        {"options": (("time", "5"),)},
        {"container": "x", "runtime": "docker"},
        {"launcher": "mpirun"},
    ],
)
def test_what_cannot_be_quoted_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        replace(JOB, **wrong)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False), (137, False)])
def test_only_a_run_that_saved_on_a_signal_goes_back(tmp_path: Path, code: int, requeued: bool) -> None:
    said = bash(JOB.render() + "\n", tmp_path, SRUN=str(code))
    assert ("scontrol requeue 7" in said) == requeued and said.endswith(f"exit {code}")
    assert (f"error: a rank failed (exit code {code})" in said) == (code in (1, 137))


def test_one_torchrun_on_every_node(tmp_path: Path) -> None:
    job = replace(JOB, launcher="torchrun", python="/venv/bin/python", cpus=3)
    said = bash(job.render() + "\n", tmp_path, SLURM_JOB_NUM_NODES="2", SLURM_CPUS_PER_TASK="3")
    assert "--ntasks=2\n--ntasks-per-node=1\n--cpus-per-task=24\n--label\n" in said
    assert "/venv/bin/python\n-m\nrecipes.slurm.torchrun\n8\ngemma4-bridge\ntrain\nsft/e4b\n" in said


@pytest.mark.parametrize(
    ("end", "told"), [("2030-01-01T00:00:00", "1893456000"), ("NONE", "unset"), ("", "unset"), ("N/A", "unset")]
)
def test_ranks_are_told_when_the_time_limit_is(tmp_path: Path, end: str, told: str) -> None:
    script = JOB.render().replace("srun ", 'echo "ends ${SLURM_JOB_END_TIME:-unset}"; srun ', 1) + "\n"
    said = bash(f"squeue() {{ echo {end}; }}\n{script}", tmp_path, TZ="UTC")
    assert f"ends {told}\n" in said and said.endswith("exit 0")


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [("90", 5400), ("1:30", 90), ("08:00:00", 28800), ("1-2", 93600), ("1-2:3:4", 93784), ("UNLIMITED", None)],
)
def test_time_limits(limit: str, wanted: float | None) -> None:
    assert seconds(limit) == wanted


def test_a_container_or_an_environment() -> None:
    plain, pyxis = JOB.render(), replace(JOB, container="nvcr.io#x", mounts=("/data:/data",)).render()
    apptainer = replace(JOB, container="x.sif", runtime="apptainer", mounts=("/data:/data",)).render()
    assert "container" not in plain and "--label \\\n    gemma4-bridge train" in plain
    assert "--container-image=nvcr.io#x --container-mounts=/data:/data \\\n" in pyxis.replace("'", "")
    assert "apptainer exec --nv --bind /data:/data x.sif \\\n" in apptainer


def test_a_sweep(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# two rates\noptimizer.lr=1e-3\noptimizer.lr=4e-3 output=runs/high\n")
    arguments = ["launch", "sft/smoke", "--nodes", "1", "--gpus-per-node", "0", "--venv", str(tmp_path)]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gemma4-bridge").touch()
    common = ["--sweep", str(sweep), "model.hf=toy", "data.path=d.jsonl", "output=runs/rate", "export.hf=out"]
    done = CliRunner().invoke(app, [*arguments, *common])
    assert "#SBATCH --array=0-1\n" in done.stdout and "%x-%A_%a.log" in done.stdout
    for task, words in (("0", "optimizer.lr=1e-3\noutput=runs/rate-0"), ("1", "optimizer.lr=4e-3\noutput=runs/high")):
        said = bash(done.stdout, tmp_path, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_JOB_ID="6")
        assert f"export.hf=out\n{words}\nexport.hf=out-{task}\n" in said
    for key in ("output", "export.hf"):
        sweep.write_text(f"{key}=same\n{key}=same\n")
        refused = CliRunner().invoke(app, [*arguments, *common])
        assert isinstance(refused.exception, UsageError) and f"two runs in same; give every line an {key}=" in str(
            refused.exception
        )
    with pytest.raises(UsageError, match="line 2"):
        read_sweep(["a=1", "b='"])


@pytest.mark.parametrize(("variant", "billions"), zip(VARIANTS, (5.104, 7.941, 11.960, 25.806, 31.273), strict=True))
def test_the_published_sizes(variant: str, billions: float) -> None:
    """One rank holds every parameter, each once."""
    table = table_for(Geometry.from_dict(published(variant)))
    found = estimate(table, TrainingPlan(Parallel(), 1, Load(1, 1024)))
    assert found.counts.parameters == pytest.approx(billions * 1e9, abs=1e6)
    assert found.weights == 2 * (found.counts.parameters + found.counts.buffers)
    assert (found.gradients, found.optimizer) == (4 * found.counts.trained, 12 * found.counts.trained)


def test_the_pipeline_holds_more_microbatches_in_front() -> None:
    one, two = Parallel(pp=4), Parallel(pp=4, vpp=2)
    assert [passes_under_way(one, rank, 16) for rank in range(4)] == [4, 3, 2, 1]
    assert passes_under_way(one, 0, 2) == 2
    # Of two chunks, each half of the layers.
    assert [passes_under_way(two, rank, 16) for rank in range(4)] == [5.5, 4.5, 3.5, 2.5]


def test_proposals_fit_and_the_best_is_first() -> None:
    table = table_for(geometry_of("google/gemma-4-26B-A4B-it"))
    found = search(table, TrainingPlan(Parallel(), 16, Load(1, 8192)), 80 * 10**9, 64)
    assert found and all(one.estimate.total + RESERVE <= 80e9 for one in found)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert all(16 % one.plan.parallel.world_size == 0 for one in found)
    assert not search(table, TrainingPlan(Parallel(), 1, Load(1, 8192)), 80 * 10**9, 64)


@pytest.mark.parametrize("asked", [["train.samples=8"], ["eval.metrics=[exact_match]", "eval.metric_tokens=128"]])
def test_answers_at_evaluations_are_counted(asked: list[str]) -> None:
    """The keys and values of a replica's rows: a window in sliding layers, the whole length in global ones."""
    said = ["data.path=x", "parallel.tp=2", "train.seq_length=8064"]
    table = table_for(geometry_of("31b"))
    moment = "keys and values of answers"
    assert moment not in estimate(table, plan_of(load_recipe("lora/31b", said), 2, table)).peaks
    found = estimate(table, plan_of(load_recipe("lora/31b", [*said, *asked]), 2, table)).peaks[moment]
    layers = table.geometry.layers
    columns = {layer.kind: (8192 if layer.window is None else layer.window) for layer in layers}
    each = (2 * layer.num_query_groups // 2 * layer.head_dim * columns[layer.kind] for layer in layers)
    assert found == 16 * 2 * sum(each)


@pytest.mark.parametrize("name", ["sft/e4b", "sft/12b", "sft/26b-a4b", "lora/31b", "pretrain/e2b"])
def test_a_proposal_written_as_overrides_is_that_proposal(name: str) -> None:
    """Read back over the recipe that was asked about, all that it says about the layout included, it needs as much."""
    said = ["data.path=x", "parallel.vpp=1", "parallel.etp=1"]
    recipe = load_recipe(name, said)
    table = table_for(geometry_of(recipe.model.hf or ""))
    wanted = plan_of(recipe, 8, table)
    found = search(table, wanted, 141 * 10**9, recipe.train.global_batch_size)
    assert found
    for one in found:
        again = plan_of(load_recipe(name, [*said, *one.overrides(recipe.parallel)]), 8, table)
        assert again.parallel == one.plan.parallel
        assert (again.load.recompute, again.load.rows) == (one.plan.load.recompute, one.plan.load.rows)
        assert estimate(table, again) == one.estimate


def test_a_recipe_that_does_not_fit_says_what_would() -> None:
    recipe = load_recipe("sft/12b", ["data.path=x", "parallel.tp=1", "parallel.sequence_parallel=false"])
    lines, fits = report(recipe, 8, 80)
    assert not fits and "GB too much" in " ".join(lines) and "would fit: parallel." in lines[-1]
    assert report(load_recipe("sft/12b", ["data.path=x"]), 8, 80)[1]


def test_launch_refuses_what_does_not_fit() -> None:
    arguments = ["launch", "sft/31b", "--nodes", "1", "--gpus-per-node", "8", "--gpu-memory", "40", "data.path=x"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, BridgeError) and "does not fit into 40 GB" in str(done.exception)


def test_what_plan_prints_can_be_copied() -> None:
    """The brackets of lists are in it, and each line of overrides is one that a recipe takes."""
    done = CliRunner().invoke(app, ["plan", "e2b", "--gpus", "2", "--gpu-memory", "80"])
    rows = [line.split("│")[-2].strip() for line in done.stdout.splitlines() if line.startswith("│")]
    assert any("parallel.recompute_modules=[" in row for row in rows), done.stdout
    for row in rows:
        load_recipe("sft/e2b", shlex.split(row))


def test_a_wheel_has_all_that_is_not_python() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package, patterns in said["tool"]["setuptools"]["package-data"].items():
        packed = {path for pattern in patterns for path in (ROOT / package).glob(pattern)}
        there = {path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        assert {path for path in there if path.suffix != ".py"} == packed
        assert ROOT / package / "py.typed" in packed


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "give --hardware NAME"),
        (["--hardware", "h101"], "hardware h101: neither a file nor one of b200, h100, h200"),
        (["--hardware", "h100", "--plot", "x.svg"], "--plot shows a simulated step: add --simulate"),
    ],
)
def test_plan_refuses(asked: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["plan", "e2b", "--gpus", "8", *asked])
    assert isinstance(done.exception, UsageError) and said in str(done.exception)


def test_plan_of_a_recipe() -> None:
    """Its rows, tokens, adapters and optimizer count; its layout does not."""
    asked = ["--gpus", "64", "--hardware", "h100", "--json", "-"]
    done = CliRunner().invoke(app, ["plan", "sft/31b", *asked])
    proposals = json.loads(done.stdout)["proposals"]
    seconds = [row["predicted_seconds"] for row in proposals]
    assert len(proposals) == 5 and seconds == sorted(seconds)
    for row in proposals:
        recipe = load_recipe(
            "sft/31b",
            [
                "data.path=x",
                "parallel.tp=1",
                "parallel.sequence_parallel=false",
                "parallel.recompute=none",
                *row["overrides"],
            ],
        )
        table = table_for(geometry_of("31b"))
        assert (estimate(table, plan_of(recipe, 64, table)).total + RESERVE) / 1e9 == pytest.approx(row["gb"], abs=0.01)


def test_plan_as_json() -> None:
    done = CliRunner().invoke(app, ["plan", "e2b", "--gpus", "8", "--gpu-memory", "80", "-n", "2", "--json", "-"])
    proposals = json.loads(done.stdout)["proposals"]
    assert len(proposals) == 2 and all(row["gb"] <= 80 for row in proposals)
    with pytest.raises(UsageError, match="neither a folder"):
        geometry_of("meta/llama")
