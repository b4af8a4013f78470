"""The job scripts under scripts/slurm: what `launch` prints for two recipes. `make docs` writes them."""

from __future__ import annotations

from pathlib import Path

from recipes.slurm.job import Job


def _eight_gpus(recipe: str, output: str) -> Job:
    return Job(
        recipe=recipe,
        output=output,
        nodes=1,
        ranks=8,
        gpus=8,
        cpus=8,
        overrides=("data.path=chats.jsonl", f"output={output}"),
        options=(("time", "08:00:00"),),
        logs=".",
        program=(".venv/bin/gemma4-bridge",),
        command_line=(
            *("gemma4-bridge", "launch", recipe, "--nodes", "1", "--gpus-per-node", "8", "--cpus-per-rank", "8"),
            *("--time", "08:00:00", "--logs", ".", "data.path=chats.jsonl", f"output={output}"),
        ),
    )


PUBLISHED = {"sft.sbatch": _eight_gpus("sft/e4b", "runs/e4b"), "lora.sbatch": _eight_gpus("lora/e4b", "runs/lora-e4b")}


def write(folder: Path) -> None:
    """Write every script into `folder`."""
    for name, job in PUBLISHED.items():
        (folder / name).write_text(job.render(), encoding="utf-8")


if __name__ == "__main__":
    write(Path("scripts/slurm"))
