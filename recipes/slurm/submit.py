"""Hand a job script to Slurm."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import UsageError
from recipes.slurm.job import Job


@dataclass(frozen=True)
class Submitted:
    """A job in the queue: its number, the script, and the logs that will be (a sweep has one per task)."""

    number: int
    script: Path
    logs: tuple[Path, ...]


def submit(job: Job) -> Submitted:
    """Write the script into the log folder, which Slurm does not make, and submit it.

    Raises UsageError with what sbatch said; then nothing is left behind.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UsageError("sbatch: not found; --submit needs a machine that Slurm takes jobs from")
    folder = Path(job.log_folder)
    script = folder / f"{job.job_name}.sbatch"
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    partial = folder / f".{script.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(job.render(), encoding="utf-8")
        done = subprocess.run([sbatch, "--parsable", str(partial)], capture_output=True, text=True)
    except OSError as error:
        raise UsageError(f"{error.filename or script}: {error.strerror}") from None
    if done.returncode:
        partial.unlink()
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UsageError(f"not submitted: {said}")
    partial.rename(script)
    # With several clusters the number is followed by a name.
    number = int(done.stdout.strip().split(";")[0])
    tasks = [f"{number}_{task}" for task in range(len(job.sweep))] or [str(number)]
    return Submitted(number, script, tuple(folder / f"{job.job_name}-{task}.log" for task in tasks))
