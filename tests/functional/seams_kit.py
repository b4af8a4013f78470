"""Commands that are disturbed: forks of a process that has imported everything, so that each costs what its work costs.

`python -m tests.functional.seams_kit` is that process ("the nursery"). It reads requests as lines of JSON and answers
each with one. It lives in a mount namespace of its own, so that disks it mounts end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT_S = 240.0


def save_hf(source: str, target: str) -> None:
    """A live model of one rank, loaded and saved."""
    import torch
    import torch.distributed as dist

    from bridge import Gemma4Bridge
    from bridge.megatron.parallel import Parallel
    from bridge.ranks import RankPool  # noqa: F401  imported here as everywhere else: before the fork

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    bridge = Gemma4Bridge.from_hf(source)
    model = bridge.build(bridge.provider(Parallel(), dtype=torch.float32))
    bridge.load_hf_weights(model)
    bridge.save_hf(model, target, overwrite=True)


def _child(request: dict[str, Any]) -> None:
    """Run one command as its own process would: signals, output, limits."""
    code: Any = 99
    try:
        os.setpgid(0, 0)
        # Whoever started the tests in the background has it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, fd in enumerate((null, log, log)):
            os.dup2(fd, number)
        if request.get("file_bytes"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
        if not request.get("exchange", True):
            from bridge.convert import replace

            replace._exchange = lambda *_: False
        sys.argv = ["gemma4-bridge", *request["command"]]
        if request["command"][0] == "save_hf":
            import bridge.cli

            # What the command line makes of errors and signals, for a call from Python.
            bridge.cli.app = lambda *_, **__: save_hf(*request["command"][1:])  # type: ignore[assignment]
        from bridge.cli import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except KeyboardInterrupt:
        code = 130
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, limit: float) -> dict[str, Any]:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return {"code": os.waitstatus_to_exitcode(status), "hang": False}
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return {"code": None, "hang": True}


def _mount(request: dict[str, Any]) -> dict[str, Any]:
    options = request["options"]
    command = (
        ["umount", request["at"]]
        if options is None
        else ["mount", "-t", "tmpfs", "-o", options, "tmpfs", request["at"]]
    )
    done = subprocess.run(command, capture_output=True, text=True)
    return {"failed": done.stderr if done.returncode else ""}


def _serve() -> None:
    from bridge.megatron import cpu_runtime

    cpu_runtime.enable()
    import importlib

    from bridge.ranks import PRELOAD

    for name in (*PRELOAD, "bridge.cli", "bridge.lora.merge", "recipes.launch", "recipes.train.loop", "recipes.data"):
        importlib.import_module(name)
    if os.getuid() == 0:
        os.unshare(os.CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    answers = os.dup(1)
    os.dup2(2, 1)
    os.write(answers, b'{"ready": true}\n')
    for line in sys.stdin:
        request = json.loads(line)
        if "command" in request:
            pid = os.fork()
            if not pid:
                _child(request)
            answer: dict[str, Any] = {"pid": pid}
        elif "wait" in request:
            answer = _wait(request["wait"], LIMIT_S)
        else:
            answer = _mount(request)
        os.write(answers, (json.dumps(answer) + "\n").encode())


class Nursery:
    """The test's side of it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.functional.seams_kit"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        assert json.loads(self._line()) == {"ready": True}

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self._line()))

    def seen(self, path: Path) -> Path:
        """A path as the nursery sees it, with what is mounted there."""
        return Path(f"/proc/{self.process.pid}/root{path}") if os.getuid() == 0 else path

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def contents(folder: Path) -> dict[str, bytes] | None:
    """Every file of a folder; None where there is no folder."""
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def emptied(folder: Path) -> None:
    """Remove all that is in a folder, which may be a mount."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


if __name__ == "__main__":
    _serve()
