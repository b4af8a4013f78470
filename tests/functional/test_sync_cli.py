"""`gemma4-bridge sync`, against a server of the test's own: the protocol, the bytes, and errors in one line.

A vLLM server itself takes the same in tests/engines/test_vllm_sync.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from bridge.cli import app
from bridge.convert.folders import import_hf
from bridge.errors import BridgeError, EngineError, UsageError
from bridge.lora.merge import merge_adapter
from bridge.lora.source import open_both
from bridge.sync.vllm import PREFIX, SHARED_MEMORY

from .adapter_kit import make_adapter
from .conftest import Toy


@dataclass
class Stub:
    """A server that answers as vLLM does. `failing`: (code, message) by path; what is not in `paths` is a 404.

    `model`: what is served, for adapters.
    """

    paths: tuple[str, ...] = (
        *("/version", "/init_weight_transfer_engine", "/pause", "/start_weight_update", "/update_weights"),
        *("/finish_weight_update", "/resume", "/v1/models", "/v1/load_lora_adapter"),
    )
    failing: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    url: str = ""
    model: str = ""

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        bare = path.partition("?")[0]
        self.asked.append((path, body))
        if bare not in self.paths:
            return 404, {"detail": "Not Found"}
        if bare in self.failing:
            code, message = self.failing[bare]
            return code, {"error": {"message": message, "code": code}}
        if bare == "/update_weights":
            self.take(body["update_info"])
        cards = [{"id": "served", "root": self.model, "parent": None}, {"id": "x", "root": "x", "parent": "served"}]
        said: dict[str, Any] = {"/version": {"version": "0.32.0"}, "/v1/models": {"data": cards}}
        return 200, said.get(bare, {"message": "done"})

    def take(self, info: dict[str, Any]) -> None:
        """A bucket, as the back end of `integrations.vllm` reads it."""
        self.files.append(SHARED_MEMORY / info["file"])
        assert info["file"].startswith(PREFIX)
        data, offset = bytearray(self.files[-1].read_bytes()), 0
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            like = torch.empty(shape, dtype=getattr(torch, dtype))
            part = torch.frombuffer(data, dtype=like.dtype, count=like.numel(), offset=offset)
            self.tensors[name] = part.view(shape)
            offset += like.nbytes
        assert offset == len(data)


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            code, answer = stub.answer(self.path, body)
            text = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        stub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield stub
        finally:
            server.shutdown()
            thread.join()


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["sync", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def left() -> set[Path]:
    return set(SHARED_MEMORY.glob(f"{PREFIX}*"))


def test_a_checkpoint(toy: Toy, tmp_path: Path) -> None:
    """Phases in order, requests held back between; tensors of the folder to the bit; no file stays."""
    before, folder = left(), toy("26b-a4b", dtype="bfloat16", mixed_dtypes=True)
    import_hf(folder, tmp_path / "m")
    with serving(Stub()) as stub:
        run(tmp_path / "m", stub.url + "/", "--bucket-size", "200KB", "--json", tmp_path / "said.json")
    stored = load_file(folder / "model.safetensors")
    assert stub.tensors.keys() == stored.keys()
    assert all(torch.equal(stub.tensors[name], tensor) for name, tensor in stored.items())
    buckets = len(stub.files)
    paths = [path for path, _ in stub.asked]
    assert paths == [
        *("/version", "/init_weight_transfer_engine", "/pause?mode=wait", "/start_weight_update"),
        *["/update_weights"] * buckets,
        *("/finish_weight_update", "/resume"),
    ]
    assert buckets > 5 and left() == before
    config = json.loads((folder / "config.json").read_text())["text_config"]
    facts = stub.asked[1][1]["init_info"]["config"]
    assert facts == {name: config[name] for name in facts}
    assert facts.keys() > {"hidden_size", "num_hidden_layers", "vocab_size", "num_experts"}
    assert stub.asked[-2][1] == {"weight_version": "release"}
    said = json.loads((tmp_path / "said.json").read_text())
    assert said == {
        "url": stub.url,
        "version": "release",
        "tensors": len(stored),
        "bytes": sum(tensor.nbytes for tensor in stored.values()),
        "buckets": buckets,
    }


def test_an_adapter(toy: Toy, tmp_path: Path) -> None:
    """Merged on the way, as `adapter merge` merges it; or alone, as a folder that the server is told of."""
    base = toy("e4b")
    make_adapter(base, tmp_path / "adapter", target_modules=r".*language_model\.layers\.\d+\.self_attn\.[qv]_proj")
    with ExitStack() as stack:
        merge_adapter(*open_both(stack, tmp_path / "adapter", None), tmp_path / "merged")
    with serving(Stub(model=str(base))) as stub:
        run(tmp_path / "adapter", stub.url)
        run(tmp_path / "adapter", stub.url, "--adapter-only", "--name", "tuned")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert stub.tensors.keys() <= merged.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in stub.tensors.items())
    path, body = stub.asked[-1]
    folder = tmp_path / "adapter-vllm"
    assert (path, body) == (
        "/v1/load_lora_adapter",
        {"lora_name": "tuned", "lora_path": str(folder), "load_inplace": True},
    )
    assert (folder / "adapter_model.safetensors").is_file()


def test_an_adapter_of_another_model(toy: Toy, tmp_path: Path) -> None:
    """vLLM compares no shapes; where it serves what is not here, that is said."""
    make_adapter(toy("31b", text_only=True), tmp_path / "adapter", target_modules=["q_proj"])
    options = (tmp_path / "adapter", "--adapter-only", "--adapter-dir", tmp_path / "written")
    with serving(Stub(model=str(toy("26b-a4b", text_only=True)))) as stub:
        with pytest.raises(
            EngineError, match=r"another model is served, .*: its \w+ is \d+, that of the adapter's \d+"
        ):
            run(options[0], stub.url, *options[1:])
        assert not (tmp_path / "written").exists()
        stub.model = str(tmp_path / "elsewhere")
        said = run(options[0], stub.url, *options[1:]).stderr
    assert "the model that is served was not compared: " in " ".join(said.split())
    assert (tmp_path / "written").is_dir() and stub.asked[-1][0] == "/v1/load_lora_adapter"


OTHER = "another model is served: its hidden_size is 48, that of the weights 64"
CASES: dict[str, tuple[Stub, list[str], str]] = {
    "no dev mode": (
        Stub(paths=("/version",)),
        [],
        "URL: vLLM 0.32.0 without weight transfer; start it with VLLM_SERVER_DEV_MODE=1",
    ),
    "no vLLM": (Stub(paths=()), [], "URL: no vLLM server: it has no /version"),
    "another back end": (
        Stub(failing={"/init_weight_transfer_engine": (500, "Invalid init_info for NCCLWeightTransferEngine: x")}),
        [],
        "URL: vLLM 0.32.0 with another weight transfer, or none; start it with",
    ),
    "another model": (
        Stub(failing={"/init_weight_transfer_engine": (400, OTHER)}),
        [],
        f"URL/init_weight_transfer_engine: 400, {OTHER}",
    ),
    "in the middle": (
        Stub(failing={"/update_weights": (500, "out of memory")}),
        [],
        "URL/update_weights: 500, out of memory; the server stays paused, with a part of the new weights",
    ),
    "no room for adapters": (
        Stub(paths=("/version", "/v1/models")),
        ["--adapter-only"],
        "URL: vLLM 0.32.0 takes no adapters while it runs; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_server_refuses(toy: Toy, tmp_path: Path, case: str) -> None:
    """One line that names the server; a server that refused before anything was sent goes on as it was."""
    stub, options, said = CASES[case]
    before, folder = left(), toy("31b", text_only=True)
    if options:
        make_adapter(folder, tmp_path / "adapter", target_modules=["q_proj"])
        folder = tmp_path / "adapter"
    with serving(stub), pytest.raises(EngineError) as failed:
        run(folder, stub.url, *options)
    assert str(failed.value).replace(stub.url, "URL").startswith(said)
    assert "\n" not in str(failed.value)
    paths = [path for path, _ in stub.asked]
    assert ("/pause?mode=wait" in paths) == (case == "in the middle") and "/resume" not in paths
    assert left() == before


def test_wrong_urls(toy: Toy, tmp_path: Path) -> None:
    folder = toy("31b", text_only=True)
    for url, error, said in (
        ("localhost:8000", UsageError, "localhost:8000: expected the URL of a server"),
        ("http://127.0.0.1:9", EngineError, "http://127.0.0.1:9: cannot be reached (Connection refused)"),
        ("http://no-such-host.invalid", EngineError, "http://no-such-host.invalid: cannot be reached ("),
    ):
        with pytest.raises(error) as failed:
            run(folder, url)
        assert str(failed.value).startswith(said)
    with pytest.raises(BridgeError, match="no such folder"):
        run(tmp_path / "nothing", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match="say with --adapter-dir where"):
        run("someone/adapter", "http://127.0.0.1:9", "--adapter-only")
    with pytest.raises(UsageError, match="--name and --adapter-dir are of --adapter-only"):
        run(folder, "http://127.0.0.1:9", "--name", "x")
