"""Weights and adapters into vLLM servers that run: what they say then is what the exported folder says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bridge.cli import app
from bridge.errors import EngineError
from bridge.lora.merge import merge_adapter
from bridge.lora.source import open_both
from bridge.ranks import RankPool
from tests.engines.kit import ENGINES, ENVIRONMENT, HEAD_DIM, ROOT, Answer, Server, expected, furthest, prompts, serving
from tests.functional.adapter_kit import make_adapter
from tests.functional.conftest import Toy
from tests.functional.sync_kit import Allocations, trained_run
from tests.functional.test_lora_training import TEXT

pytestmark = pytest.mark.engine

BOUND, APART, STEPS, BUCKET = 1e-5, 0.1, 10, 1 << 20
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2+SP PP2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "EP2": {"ep": 2},
}


@contextmanager
def vllm(folder: Path, said: Path, options: Sequence[str], environment: dict[str, str]) -> Iterator[Server]:
    """A server of a folder, in float32; this package is on its path, as if it were installed there."""

    def command(port: int) -> list[str]:
        place = ["--model", str(folder), "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256"]
        exact = ["--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching", "--max-logprobs", "-1"]
        media = ["--limit-mm-per-prompt", json.dumps({"image": 0, "video": 0, "audio": 0})]
        python = str(ENGINES / "bin" / "python")
        return [python, "-m", "vllm.entrypoints.openai.api_server", *place, *exact, *media, *options]

    own = {name: value for name, value in ENVIRONMENT.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with serving(command, said, {**own, "PYTHONPATH": str(ROOT), **environment}) as server:
        yield server


def ask(server: Server, model: str, ids: Sequence[Sequence[int]]) -> list[Answer]:
    """The log-probabilities of prompts, by the server's OpenAI-compatible endpoint."""
    answers = []
    for prompt in ids:
        body = {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0, "prompt_logprobs": -1}
        (choice,) = server.post("/v1/completions", body)["choices"]
        rows = choice["prompt_logprobs"][1:]
        values = [[row[str(token)]["logprob"] for token in range(len(row))] for row in rows]
        answers.append(Answer(torch.tensor(values), []))
    return answers


def train_and_sync(folder: Path, parallel: dict[str, Any], url: str, out: Path) -> tuple[int, int, int, int]:
    """On a rank: ten steps, everything sent; one step more, what is not frozen sent; saved as an export.

    Returns (bytes allocated at most beside the shard, the largest bucket, tensors sent first, and then).
    """
    from bridge.sync.vllm import VllmSink
    from recipes.train.step import clear_gradients, run_microbatches, update
    from tests.functional.training_kit import collate

    run = trained_run(folder, parallel, STEPS, model={"freeze": ["router", "vision"]})
    sync = run.bridge.weight_sync(run.chunks, bucket_bytes=BUCKET)
    sink = VllmSink(url, run.bridge.geometry, version=f"step {STEPS}") if sync.receives else None
    largest = max(bucket.nbytes for bucket in sync.plan())
    with Allocations() as counted:
        first = sync.send(sink)
    clear_gradients(run)
    rows = range(2 * STEPS, 2 * STEPS + 2)
    mine = [row for row in rows if row % run.groups.dp.size() == run.groups.dp.rank()]
    run_microbatches(run, [collate(run.bridge.geometry, 1, range(row, row + 1)) for row in mine], train=True)
    run.scheduler.step(1)
    update(run, float("inf"))
    with counted:
        again = sync.send(sink)
    run.bridge.save_hf(run.models, out)
    return counted.peak, largest, first.tensors, again.tensors


def sync(*arguments: object) -> None:
    result = CliRunner().invoke(app, ["sync", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_a_model_in_training(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """One server takes the weights of two runs in two layouts, and then those that it began with, by the command."""
    base = toy("26b-a4b", head_dim=HEAD_DIM)
    ids, options = prompts(base), ["--weight-transfer-config", json.dumps({"backend": "gemma4_bridge"})]
    with vllm(base, tmp_path / "vllm.log", options, {"VLLM_SERVER_DEV_MODE": "1"}) as server:
        of_base = expected(base, ids, 1)
        assert furthest(ask(server, str(base), ids), of_base) <= BOUND
        for number, (layout, parallel) in enumerate(LAYOUTS.items()):
            world, out = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("ep", 1), tmp_path / str(number)
            found = ranks.run(train_and_sync, base, parallel, server.url, out, world_size=world)
            peak, largest, first, again = found[0]
            assert max(rank[0] for rank in found) <= 2 * max(BUCKET, largest)
            assert 0 < again < first
            of_trained = expected(out, ids, 1)
            difference = furthest(ask(server, str(base), ids), of_trained)
            print(f"{layout}: {difference:.1e} from the exported folder; {peak} bytes of 2 * {max(BUCKET, largest)}")
            assert difference <= BOUND
            assert furthest(of_trained, of_base) > APART
            assert server.get("/weight_info") == {"weight_version": f"step {STEPS}"}
        with pytest.raises(EngineError, match="another model is served: its "):
            sync(toy("e4b", head_dim=HEAD_DIM), server.url)
        assert furthest(ask(server, str(base), ids), of_trained) <= BOUND
        sync(base, server.url, "--bucket-size", "1MB")
        assert furthest(ask(server, str(base), ids), of_base) <= BOUND


def test_an_adapter_beside_its_base(toy: Toy, tmp_path: Path) -> None:
    """A server that loads adapters while it runs; without dev mode it takes no weights, and says so."""
    base = toy("e4b", head_dim=HEAD_DIM)
    make_adapter(base, tmp_path / "adapter", target_modules=TEXT)
    with ExitStack() as stack:
        merge_adapter(*open_both(stack, tmp_path / "adapter", None), tmp_path / "merged")
    options = ["--enable-lora", "--max-lora-rank", "8"]
    with vllm(base, tmp_path / "vllm.log", options, {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}) as server:
        with pytest.raises(EngineError, match=r"without weight transfer; start it with VLLM_SERVER_DEV_MODE=1"):
            sync(base, server.url)
        sync(tmp_path / "adapter", server.url, "--adapter-only", "--name", "tuned")
        ids = prompts(base)
        difference = furthest(ask(server, "tuned", ids), expected(tmp_path / "merged", ids, 1))
        print(f"adapter: {difference:.1e} from the merged folder")
        assert difference <= BOUND
        assert furthest(ask(server, "tuned", ids), expected(base, ids, 1)) > APART


def test_handles_of_cuda_are_as_vllm_reads_them(tmp_path: Path) -> None:
    """The message of the transport over CUDA IPC, by vLLM's own class: all of it that needs no GPU."""
    import subprocess

    from bridge.sync.buckets import SyncTensor, plan_buckets
    from bridge.sync.vllm import CudaIpc

    bucket, transport = plan_buckets([(SyncTensor("a", "a", torch.bfloat16, (2, 3)),)])[0], CudaIpc()
    transport._handle = {"GPU-0": ("rebuild", 1)}
    described = {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]} | transport.described(bucket)
    (tmp_path / "info.json").write_text(json.dumps({"init": transport.init_info({}), "update": described}))
    program = (
        "import json, sys; from vllm.distributed.weight_transfer.ipc_engine import *; "
        "said = json.load(open(sys.argv[1])); init = IPCWeightTransferInitInfo(**said['init']); "
        "update = IPCWeightTransferUpdateInfo(**said['update']); "
        "print(json.dumps([init.packed, update.ipc_handles, update.tensor_sizes]))"
    )
    done = subprocess.run(
        [str(ENGINES / "bin" / "python"), "-c", program, str(tmp_path / "info.json")],
        capture_output=True,
        text=True,
        env={"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [True, {"GPU-0": ["rebuild", 1]}, [12]]
