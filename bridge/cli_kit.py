"""What the modules of the command line share: options, consoles, and how a result is printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bridge.errors import BridgeError, UsageError

# No markup: a path or an override may hold brackets, which rich would take for a style and leave out.
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
# Where nobody sees a terminal's edge, tables keep their width.
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)


def _writable(target: str | None) -> str | None:
    """Say before the work what would fail after it."""
    if target is not None and target != "-" and (Path(target).is_dir() or not Path(target).parent.is_dir()):
        raise BridgeError(f"--json {target}: {'is a folder' if Path(target).is_dir() else 'its folder does not exist'}")
    return target


def _one_of_dtypes(value: str) -> str:
    if value not in ("float32", "bfloat16"):
        raise UsageError(f"--dtype {value}: float32 or bfloat16")
    return value


JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is stdout.", callback=_writable),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing target, once all is written.")]
QuantizeOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Quantize the decoder's linears: fp8-dynamic, w4a16 or nvfp4.")
]
# Layouts.
TpOption = Annotated[int, typer.Option(help="tensor-parallel ranks")]
PpOption = Annotated[int, typer.Option(help="pipeline-parallel ranks")]
VppOption = Annotated[int, typer.Option(help="model chunks per pipeline rank")]
EpOption = Annotated[int, typer.Option(help="expert-parallel ranks")]
EtpOption = Annotated[int, typer.Option(help="expert-tensor-parallel ranks")]
SequenceParallelOption = Annotated[bool, typer.Option("--sequence-parallel", help="Split the sequence over TP.")]
# Models that run.
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="An HF folder or hub id, a Megatron checkpoint, a run.")
]
AdapterOption = Annotated[str | None, typer.Option(metavar="DIR", help="A PEFT folder, or a Megatron adapter.")]
DtypeOption = Annotated[str, typer.Option(help="float32 or bfloat16", callback=_one_of_dtypes)]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="The longest answer.")]
MaxRowsOption = Annotated[int, typer.Option(min=1, help="Answers that are written at once, on a replica.")]
AllowUrlsOption = Annotated[bool, typer.Option("--allow-urls", help="Fetch media from the network.")]
# Data.
FormatOption = Annotated[str | None, typer.Option("--format", help="Of all records, where they do not show it.")]
ColumnOption = Annotated[
    list[str] | None, typer.Option(metavar="OURS=THEIRS", help="A column by the data's own name; repeatable.")
]
FunctionOption = Annotated[
    str | None, typer.Option(metavar="MODULE:FUNCTION", help="Makes a record of a known format of each.")
]
SplitOption = Annotated[str, typer.Option(help="Of a dataset that is named, or a folder of splits.")]
OnErrorOption = Annotated[str, typer.Option(help="fail or skip, at a record that cannot be used.")]
ChatTemplateOption = Annotated[str | None, typer.Option(metavar="FILE", help="Instead of the model's own.")]
MediaRootOption = Annotated[str | None, typer.Option(metavar="DIR", help="What media paths are relative to.")]
TokensOption = Annotated[str | None, typer.Option("--cache", metavar="DIR", help="Where tokens are kept.")]
WorkersOption = Annotated[int, typer.Option(min=1, max=64, help="Threads that copy.")]


def epilog(example: str) -> str:
    """The example under a command's --help."""
    return f"Example: `gemma4-bridge {example}`"


def report(done: Any, verb: str, json_file: str | None) -> None:
    """What a conversion did, as JSON or as a line."""
    result = {
        "target": str(done.target),
        "tensors": done.tensors,
        "bytes": done.bytes_total,
        "bytes_resumed": done.bytes_resumed,
    }
    if wrote_json(json_file, result):
        return
    resumed = f", {done.bytes_resumed / 1e9:.2f} GB of them from an earlier run" if done.bytes_resumed else ""
    out.print(f"{verb} {done.tensors} tensors, {done.bytes_total / 1e9:.3f} GB{resumed}: {done.target}")


def wrote_json(target: str | None, result: dict[str, Any]) -> bool:
    """Write a result to a file, or to stdout for `-`; False where none was asked for."""
    if target is None:
        return False
    text = json.dumps(result, indent=1)
    if target == "-":
        print(text)
    else:
        try:
            Path(target).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise BridgeError(f"{target}: cannot be written ({error.strerror})") from None
    return True


def columns_of(given: list[str] | None) -> dict[str, str]:
    """--column as {ours: theirs}. Raises UsageError."""
    for one in given or ():
        if "=" not in one:
            raise UsageError(f"--column {one}: is written OURS=THEIRS")
    return dict(one.split("=", 1) for one in given or ())
