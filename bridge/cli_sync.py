"""`sync`: the weights of a checkpoint into a vLLM server that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridge.cli_kit import JsonOption, epilog, err, out, wrote_json
from bridge.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=epilog("sync runs/first http://127.0.0.1:8000"))(sync)


def sync(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, a Megatron checkpoint, an adapter, an HF folder.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a vLLM server on this machine.")],
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="An adapter beside the served base, not merged into it.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="With --adapter-only: what requests call it; default: the name of RUN.")
    ] = None,
    adapter_dir: Annotated[
        Path | None,
        typer.Option(help="With --adapter-only: where the server reads it from; default: RUN-vllm."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Of an adapter; default: what it names.")] = None,
    bucket_size: Annotated[
        str, typer.Option(metavar="SIZE", help="How much is sent at once; a larger tensor is sent alone.")
    ] = "1GiB",
    json_file: JsonOption = None,
) -> None:
    """Push the weights of a checkpoint into a running vLLM server, which goes on serving with them.

    The server is started with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend": "gemma4_bridge"}', and
    has this package beside it (docs/engines.md). With --adapter-only: with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and
    --enable-lora.
    """
    from bridge.hf.writer import parse_size
    from bridge.progress import shown_progress
    from bridge.sync.stored import push, push_adapter

    if not adapter_only and (name is not None or adapter_dir is not None):
        raise UsageError("--name and --adapter-dir are of --adapter-only")
    if adapter_only:
        name = Path(run).name if name is None else name
        if adapter_dir is None and not Path(run).is_dir():
            raise UsageError(f"{run}: no folder here; say with --adapter-dir where the server is to read the adapter")
        folder = Path(run).absolute().with_name(f"{Path(run).absolute().name}-vllm")
        folder = folder if adapter_dir is None else adapter_dir
        server = push_adapter(run, url, name=name, folder=folder, base=base, notify=err.print)
        if not wrote_json(json_file, {"url": server, "adapter": name, "folder": str(folder)}):
            out.print(f"{server}: serves the adapter as {name}, from {folder}")
        return
    size = parse_size(bucket_size)
    with shown_progress(err, "sync") as progress:
        done = push(run, url, base=base, bucket_bytes=size, progress=progress)
    sent = done.sent
    result = {"url": done.url, "version": done.version, "tensors": sent.tensors}
    if wrote_json(json_file, result | {"bytes": sent.nbytes, "buckets": sent.buckets}):
        return
    version = "" if done.version is None else f", {done.version}"
    out.print(
        f"{done.url}: serves {sent.tensors} tensors, {sent.nbytes / 1e9:.3f} GB in {sent.buckets} buckets{version}"
    )
