"""SIGKILL at random moments of conversions of a 1 GB checkpoint. `pytest -m slow tests/functional/test_killed.py`"""

from __future__ import annotations

import filecmp
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.geometry import Geometry
from bridge.hf.tensors import TensorSpec
from bridge.hf.writer import HfWriter
from bridge.mapping import table_for
from bridge.toy import write_toy

pytestmark = pytest.mark.slow

KILLS = 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text toy of E2B with the published vocabulary and wider embeddings: 1.0 GB."""
    folder = tmp_path_factory.mktemp("killed") / "source"
    write_toy("e2b", folder, text_only=True, dead_kv=False)
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 262_144, "vocab_size_per_layer_input": 262_144}
    config |= {"hidden_size": 640, "hidden_size_per_layer_input": 128}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    table = table_for(Geometry.from_folder(folder))
    tensors = [TensorSpec(s.name, "BF16", s.shape) for entry in table.entries.values() for s in entry.sources]
    block = np.random.default_rng(0).integers(0, 256, 1 << 25, dtype=np.uint8)
    with HfWriter(folder, tensors, max_shard_size=200_000_000) as writer:
        for spec in tensors:
            size = spec.nbytes // spec.shape[0]
            step = max(1, len(block) // size)
            for start in range(0, spec.shape[0], step):
                stop = min(start + step, spec.shape[0])
                writer.write_rows(spec.name, start, block[: (stop - start) * size])
        writer.finish()
    return folder


def same_files(ours: Path, theirs: Path) -> bool:
    names = sorted(str(path.relative_to(theirs)) for path in theirs.rglob("*") if path.is_file())
    if names != sorted(str(path.relative_to(ours)) for path in ours.rglob("*") if path.is_file()):
        return False
    _, different, missing = filecmp.cmpfiles(ours, theirs, names, shallow=False)
    return not different and not missing


@pytest.mark.parametrize("command", ["import", "export"])
def test_killed_at_random_moments(source: Path, tmp_path: Path, command: str) -> None:
    """The target is absent or whole; the next run's result is the same to the byte as one that was never killed."""
    reference = tmp_path / "reference"
    if command == "import":
        given, options = source, []
        import_hf(source, reference)
    else:
        given, options = tmp_path / "megatron", ["--max-shard-size", "200MB"]
        import_hf(source, given)
        export_hf(given, reference, max_shard_size=200_000_000)
    target = tmp_path / "target"
    arguments = [sys.executable, "-m", "bridge.cli", command, str(given), str(target), *options]
    started = time.monotonic()
    subprocess.run(arguments, check=True, capture_output=True)
    whole = time.monotonic() - started
    shutil.rmtree(target)
    moments, survived, resumed = random.Random(7), 0, 0
    for _ in range(KILLS):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.05, whole))
        process.kill()
        process.wait()
        if target.exists():
            survived += 1
        else:
            result = subprocess.run(arguments, capture_output=True, text=True, check=True)
            resumed += "GB of them from an earlier run" in result.stdout
        assert same_files(target, reference)
        assert not list(tmp_path.glob(".*")) or survived, "leftovers"
        shutil.rmtree(target)
        for leftover in tmp_path.glob(".*"):
            shutil.rmtree(leftover)
    assert survived < KILLS, "every run finished before it was killed"
    print(
        f"{command}: {KILLS} kills over {whole:.1f} s, {survived} after the end, {resumed} resumed from finished files"
    )
