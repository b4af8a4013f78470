"""A checkpoint on a disk, pushed into a running server: a run of weights, one of adapters, a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bridge.convert.atomic import Notify
from bridge.convert.live import CHUNK_BYTES
from bridge.convert.manifest import ADAPTER_FILE, MegatronFolder, is_megatron_folder
from bridge.convert.torch_dtypes import TORCH_DTYPES
from bridge.errors import BridgeError, EngineError
from bridge.geometry import Geometry
from bridge.hf.hub import resolve
from bridge.hf.tensors import RowReader, num_rows, row_bytes
from bridge.lora.merge import MergedReader, check_copies, open_base
from bridge.lora.peft_folder import write_peft
from bridge.lora.source import is_peft_folder, open_both, open_megatron, open_with_table, table_of
from bridge.mapping import Table
from bridge.sync.buckets import BUCKET_BYTES, Bucket, SyncTensor, plan_buckets
from bridge.sync.send import Sent, send
from bridge.sync.vllm import VllmServer, VllmSink, model_facts

Progress = Callable[[int, int, str], None]


class StoredWeights:
    """The tensors of an open checkpoint, by their Hugging Face names, as a `WeightSource`."""

    def __init__(self, reader: RowReader, table: Table) -> None:
        self._reader = reader
        self.groups = [
            tuple(
                SyncTensor(source.name, key, TORCH_DTYPES[reader.tensors[source.name].dtype], tuple(source.shape))
                for source in entry.sources
            )
            for key, entry in table.entries.items()
        ]

    def fill(self, bucket: Bucket, views: Mapping[str, Tensor] | None) -> None:
        """See `WeightSource.fill`."""
        for name, view in (views or {}).items():
            info = self._reader.tensors[name]
            size, rows = row_bytes(info), num_rows(tuple(info.shape))
            values = view.view(-1).view(TORCH_DTYPES["U8"]).numpy()
            step = max(1, CHUNK_BYTES // max(1, size))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                self._reader.read_rows(name, start, stop, values[start * size : stop * size])


@dataclass(frozen=True)
class Pushed:
    """What was sent where. `version`: what the server says of its weights now, if that was set."""

    url: str
    version: str | None
    sent: Sent


def push(
    run: str,
    url: str,
    *,
    base: str | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    progress: Progress | None = None,
) -> Pushed:
    """Send the weights of a checkpoint, its adapter merged into its base, to a vLLM server on this machine.

    `run`: a run, a Megatron checkpoint, an adapter (Megatron's or PEFT's), a Hugging Face folder or hub id. Raises a
    BridgeError: what opening it does, and EngineError.
    """
    with ExitStack() as stack:
        path = resolve(run)
        if _is_adapter(path):
            opened, adapter = open_both(stack, path, base)
            check_copies(adapter, opened.reader)
            reader: RowReader = MergedReader(opened.reader, opened.table, adapter)
        else:
            opened = open_base(stack, path)
            reader = opened.reader
        weights = StoredWeights(reader, opened.table)
        sink = VllmSink(url, opened.table.geometry, version=_version(path))
        return Pushed(
            sink.server.url, sink.version, send(weights, plan_buckets(weights.groups, bucket_bytes), sink, progress)
        )


def push_adapter(
    run: str, url: str, *, name: str, folder: Path, base: str | None = None, notify: Notify | None = None
) -> str:
    """Write an adapter to `folder` as vLLM reads it, and let a server load it under `name`, in the place of another.

    The server keeps reading the folder, whenever it has dropped the adapter from its memory. Returns the server's URL.
    Raises a BridgeError.
    """
    server = VllmServer(url)
    version = server.check()
    path = resolve(run)
    with ExitStack() as stack:
        adapter = open_with_table(stack, path, base) if is_peft_folder(path) else open_megatron(stack, path)
        _check_served(server, adapter.table.geometry, notify)
        write_peft(folder, adapter, adapter_format="vllm", overwrite=True, notify=notify)
    server.post(
        "/v1/load_lora_adapter",
        {"lora_name": name, "lora_path": str(folder.absolute()), "load_inplace": True},
        absent=f"vLLM {version} takes no adapters while it runs; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and "
        "--enable-lora",
    )
    return server.url


def _check_served(server: VllmServer, geometry: Geometry, notify: Notify | None) -> None:
    """Raise EngineError where another model is served: by its code vLLM compares no shapes."""
    answer = server.get("/v1/models", absent="no vLLM server: it has no /v1/models")
    roots = [str(card["root"]) for card in answer["data"] if card.get("parent") is None]
    for root in roots:
        try:
            served = model_facts(table_of(root).geometry)
        except BridgeError as error:
            if notify is not None:
                notify(f"{server.url}: whether the adapter is of the model that is served was not compared: {error}")
            continue
        for name, ours in model_facts(geometry).items():
            if served[name] != ours:
                raise EngineError(
                    f"{server.url}: another model is served, {root}: its {name} is {served[name]}, "
                    f"that of the adapter's {ours}"
                )


def _is_adapter(path: Path) -> bool:
    if is_peft_folder(path):
        return True
    return is_megatron_folder(path) and (MegatronFolder.open(path).path / ADAPTER_FILE).is_file()


def _version(path: Path) -> str | None:
    """The checkpoint's name, as the server is to say it: `iter_0000020`."""
    return MegatronFolder.open(path).weights.name if is_megatron_folder(path) else None
