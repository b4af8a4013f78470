"""Weights into a running vLLM server, by its own protocol over HTTP: init, start, update, finish.

What is posted are names, shapes and dtypes; the values of a bucket go another way, which is the server's *back end*
(`--weight-transfer-config '{"backend": …}'`): a file in shared memory (`gemma4_bridge`, ours: `integrations.vllm`), or
CUDA IPC (`ipc`, vLLM's own). The server has to be on this machine for both, and to be started with
VLLM_SERVER_DEV_MODE=1, which opens these endpoints.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import pickle
import socket
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bridge.errors import EngineError, UsageError
from bridge.geometry import Geometry
from bridge.sync.buckets import Bucket

# What the back end opens, in this folder and no other.
SHARED_MEMORY, PREFIX = Path("/dev/shm"), "gemma4-bridge-sync-"
START = (
    'start it with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config \'{"backend": "%s"}\' (docs/engines.md, «Sync»)'
)


class VllmServer:
    """A vLLM server by its URL. Raises EngineError: one line, with what the server said."""

    def __init__(self, url: str, timeout_s: float = 600.0) -> None:
        parsed = urllib.parse.urlsplit(url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname:
            raise UsageError(f"{url}: expected the URL of a server, such as http://127.0.0.1:8000")
        self.url, self.host, self._timeout_s = url.rstrip("/"), parsed.hostname, timeout_s

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, absent: str = "") -> None:
        """POST JSON. `absent`: what to do about an endpoint that is not there."""
        self._ask("POST", path, None if body is None else json.dumps(body).encode(), absent)

    def get(self, path: str, *, absent: str = "") -> Any:
        """What it answers, JSON."""
        return self._json(path, self._ask("GET", path, None, absent))

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST JSON; what it answers, JSON."""
        return self._json(path, self._ask("POST", path, json.dumps(body).encode(), ""))

    def _json(self, path: str, text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise EngineError(f"{self.url}{path}: answers otherwise than with JSON: no vLLM server?") from None

    def _ask(self, method: str, path: str, data: bytes | None, absent: str) -> bytes:
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            if error.code == 404 and absent:
                raise EngineError(f"{self.url}: {absent}") from None
            raise EngineError(f"{self.url}{path}: {error.code}, {_said(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            what = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise EngineError(f"{self.url}: cannot be reached ({what})") from None

    def check(self) -> str:
        """The version of vLLM that answers."""
        found = self.get("/version", absent="no vLLM server: it has no /version")
        if not isinstance(found, dict) or "version" not in found:
            raise EngineError(f"{self.url}: no vLLM server: its /version does not say one")
        return str(found["version"])

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine, as far as its name says."""
        try:
            addresses = {info[4][0] for info in socket.getaddrinfo(self.host, None)}
        except OSError as error:
            raise EngineError(f"{self.url}: cannot be reached ({error.strerror or error})") from None
        for address in addresses:
            family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind((address, 0))  # only an address of this machine can be bound
                return True
        return False


def _said(error: urllib.error.HTTPError) -> str:
    """What a server gave as the reason: the message in its JSON, or the first lines of its text."""
    text = error.read().decode(errors="replace")
    with contextlib.suppress(ValueError, TypeError, KeyError):
        found = json.loads(text)["error"]
        text = found["message"] if isinstance(found, dict) else str(found)
    return " ".join(text.split())[:500] or error.reason


class Transport(Protocol):
    """How the values of a bucket come to the server. `backend`: what the server calls it."""

    backend: str

    def init_info(self, config: Mapping[str, int]) -> dict[str, Any]:
        """What the back end is told first. `config`: facts of the model, by their names in its text config."""
        ...

    def room(self, nbytes: int) -> Tensor:
        """See `Sink.room`."""
        ...

    def where(self, bucket: Bucket) -> dict[str, Any]:
        """What the back end is told of the buffer that `room` gave."""
        ...

    def release(self) -> None:
        """Of that buffer there is no more need here."""
        ...


class SharedMemory:
    """A bucket is a file in shared memory, which is gone from there when the server has opened it.

    The back end is `gemma4_bridge` of `integrations.vllm`, for servers on a CPU and on GPUs.
    """

    backend = "gemma4_bridge"

    def __init__(self, folder: Path = SHARED_MEMORY) -> None:
        self._folder = folder
        self._file: Path | None = None

    def init_info(self, config: Mapping[str, int]) -> dict[str, Any]:
        """See `Transport.init_info`."""
        return {"config": dict(config)}

    def room(self, nbytes: int) -> Tensor:
        """See `Transport.room`. Raises EngineError where shared memory is full."""
        try:
            number, name = tempfile.mkstemp(prefix=PREFIX, dir=self._folder)
            self._file = Path(name)
            try:
                # A mapped file without its pages would end this process, instead of saying that there is no room.
                os.posix_fallocate(number, 0, nbytes)
            finally:
                os.close(number)
        except OSError as error:
            self.release()
            raise EngineError(
                f"{self._folder}: a bucket of {nbytes} bytes has no room there ({error.strerror}); smaller ones are "
                "bucket_bytes (--bucket-size)"
            ) from None
        return torch.from_file(str(self._file), shared=True, size=nbytes, dtype=torch.uint8)

    def where(self, bucket: Bucket) -> dict[str, Any]:
        """See `Transport.where`."""
        assert self._file is not None
        return {"file": self._file.name}

    def release(self) -> None:
        """See `Transport.release`."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None


class CudaIpc:
    """A bucket is one buffer on the GPU that it shares with a server of tensor-parallel size 1: vLLM's own `ipc`.

    The server needs VLLM_ALLOW_INSECURE_SERIALIZATION=1: vLLM takes handles over HTTP as pickles. Was not run: there
    was no GPU.
    """

    backend = "ipc"

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._handle: dict[str, Any] = {}

    def init_info(self, config: Mapping[str, int]) -> dict[str, Any]:
        """See `Transport.init_info`. The back end of vLLM compares no model."""
        return {"packed": True}

    def room(self, nbytes: int) -> Tensor:
        """See `Transport.room`. One buffer, and one handle, for all buckets that fit: the server copies them out."""
        from torch.multiprocessing.reductions import reduce_tensor

        if self._buffer is None or len(self._buffer) < nbytes:
            device = torch.cuda.current_device()
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = {uuid: reduce_tensor(self._buffer)[1]}
        return self._buffer

    def where(self, bucket: Bucket) -> dict[str, Any]:
        """See `Transport.where`."""
        torch.cuda.current_stream().synchronize()
        return self.described(bucket)

    def described(self, bucket: Bucket) -> dict[str, Any]:
        """The buffer's handle as vLLM takes it over HTTP, and how long each tensor in it is."""
        return {
            "ipc_handles_pickled": base64.b64encode(pickle.dumps(self._handle)).decode(),
            "tensor_sizes": [tensor.nbytes for tensor in bucket.tensors],
        }

    def release(self) -> None:
        """See `Transport.release`. The buffer is kept for the next bucket."""


class VllmSink:
    """A running vLLM server as a `Sink`. Requests that run are waited for, and new ones wait, until all is there.

    `version`: what the server says of its weights from then on (`/weight_info`). After a failure in the middle the
    server stays paused, with a part of the new weights: sending again mends it. Raises EngineError, and UsageError for
    a server on another machine.
    """

    def __init__(
        self,
        url: str,
        geometry: Geometry,
        *,
        transport: Transport | None = None,
        version: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.server = VllmServer(url, timeout_s)
        self.version = version
        self._transport: Transport = SharedMemory() if transport is None else transport
        self._config = model_facts(geometry)

    def begin(self, buckets: Sequence[Bucket]) -> None:
        """See `Sink.begin`."""
        server, backend = self.server, self._transport.backend
        version, start = server.check(), START % backend
        if not server.is_here:
            raise UsageError(f"{server.url}: another machine, which {backend} does not reach")
        absent = f"vLLM {version} without weight transfer; {start}"
        try:
            server.post(
                "/init_weight_transfer_engine", {"init_info": self._transport.init_info(self._config)}, absent=absent
            )
        except EngineError as error:
            if "Weight transfer not configured" in str(error) or "Invalid init_info" in str(error):
                raise EngineError(
                    f"{server.url}: vLLM {version} with another weight transfer, or none; {start}"
                ) from None
            raise
        server.post("/pause?mode=wait")
        try:
            server.post("/start_weight_update")
        except EngineError:
            server.post("/resume")
            raise

    def room(self, nbytes: int) -> Tensor:
        """See `Sink.room`."""
        return self._transport.room(nbytes)

    def take(self, bucket: Bucket, views: Mapping[str, Tensor]) -> None:
        """See `Sink.take`."""
        described = {
            "names": [tensor.name for tensor in bucket.tensors],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.tensors],
            "shapes": [list(tensor.shape) for tensor in bucket.tensors],
        }
        try:
            self._post("/update_weights", {"update_info": described | self._transport.where(bucket)})
        finally:
            self._transport.release()

    def end(self) -> None:
        """See `Sink.end`."""
        self._post("/finish_weight_update", None if self.version is None else {"weight_version": self.version})
        self.server.post("/resume")

    def _post(self, path: str, body: Mapping[str, Any] | None) -> None:
        try:
            self.server.post(path, body)
        except EngineError as error:
            raise EngineError(f"{error}; the server stays paused, with a part of the new weights") from None

    def abort(self) -> None:
        """See `Sink.abort`."""
        self._transport.release()


def model_facts(geometry: Geometry) -> dict[str, int]:
    """Facts that tell a model from others, by their names in a text config; 0 of what it does not have."""
    return {
        "hidden_size": geometry.hidden_size,
        "num_hidden_layers": geometry.num_layers,
        "vocab_size": geometry.vocab_size,
        "num_experts": 0 if geometry.moe is None else geometry.moe.num_experts,
        "hidden_size_per_layer_input": 0 if geometry.ple is None else geometry.ple.dim,
    }
