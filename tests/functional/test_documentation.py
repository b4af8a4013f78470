"""Every command that README.md and the examples show, run as it stands there, in toy mode.

Toy mode: an empty folder in which `google/gemma-4-…` is a folder with a toy, so that hub ids need no network.
`gemma4-bridge`, that of `.venv` too, is forked with its imports made (`command_server`). The blocks of a file run in
order, in one shell that stops at the first error. A block with `<!-- not run: why -->` on the line above it is left
out, and its reason printed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import ParallelError
from bridge.ranks import RankPool
from bridge.toy import write_toy
from tests.functional.command_server import CommandServer
from tests.functional.conftest import Toy

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", *sorted(ROOT.glob("examples/*/README.md"))]
_BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>.+?) -->\n)?^```bash\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_HUB_ID = re.compile(r"google/gemma-4-([\w-]+?)(?:-it)?\b(?![\w-])")


@dataclass(frozen=True)
class Block:
    text: str
    why_not: str | None


def blocks(path: Path) -> list[Block]:
    return [Block(found["text"], found["why"]) for found in _BLOCK.finditer(path.read_text(encoding="utf-8"))]


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_block_escapes() -> None:
    """Every fenced block with a command of ours says that it is bash: one that did not would not be run."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("```bash\n") == len(blocks(path)), shown(path)
        for fence in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            assert fence[0] in ("bash", "python", "json", "text", "yaml"), f"{shown(path)}: a block without a language"
            assert fence[0] == "bash" or "gemma4-bridge " not in fence[1], f"{shown(path)}: {fence[1]}"
    assert any(block.why_not is None for path in FILES for block in blocks(path))


def python_of_the_readme(model: Path, target: Path) -> tuple[int, str]:
    """Run the first Python block; how many tensors came by, and what is said of a layout that the groups are not of."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from bridge.megatron import cpu_runtime
    from bridge.megatron.parallel import Parallel

    cpu_runtime.enable()
    parallel_state.destroy_model_parallel()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]
    block = block.replace("google/gemma-4-26B-A4B-it", str(model)).replace('"out/"', repr(str(target)))
    if dist.is_initialized():  # the pool's ranks are
        block = block.replace("torch.distributed.init_process_group()", "")
    names: dict[str, Any] = {}
    exec(block.replace("    ...", "    count = globals().get('count', 0) + 1"), names)
    bridge = names["bridge"]
    try:
        bridge.build(bridge.provider(Parallel(tp=4, sequence_parallel=True)))
    except ParallelError as error:
        return names["count"], str(error)
    return names["count"], ""


def test_the_python_of_the_readme(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    model = toy("26b-a4b", dtype="bfloat16")
    for count, refused in ranks.run(python_of_the_readme, model, tmp_path / "out", world_size=4):
        assert count > 100 and "tp=4: Megatron's groups were made with tp=2" in refused
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_its_commands_run(path: Path, tmp_path: Path, commands: CommandServer) -> None:
    todo = [block for block in blocks(path) if block.why_not is None]
    for block in blocks(path):
        if block.why_not is not None:
            print(f"{shown(path)}: not run ({block.why_not}): {block.text.splitlines()[0]}")
    if not todo:
        pytest.skip("no block of it can be run here")
    script = "\n".join(block.text for block in todo)
    for found in set(_HUB_ID.finditer(script)):
        folder = tmp_path / found[0]
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            write_toy(found[1].lower(), folder)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(commands.bin)
    # Copies, so that nothing is written into the repository; the code is the repository's.
    for name in ("examples", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    environment = os.environ | {
        "PATH": f"{commands.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{shown(path)}:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
