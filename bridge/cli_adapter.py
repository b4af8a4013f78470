"""`gemma4-bridge adapter`: adapters between training runs, PEFT, inference engines and merged models."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bridge.cli_kit import JsonOption, OverwriteOption, QuantizeOption, WorkersOption, epilog, err, report

adapter = typer.Typer(
    help="LoRA adapters: out of a run, into one, merged, and as PEFT, vLLM and SGLang read them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
FormatOption = Annotated[str, typer.Option("--format", metavar="NAME", help="peft, vllm or sglang")]


@adapter.command("export", epilog=epilog("adapter export runs/lora out/my-adapter"))
def export_command(
    megatron_dir: Annotated[
        Path, typer.Argument(metavar="MEGATRON_DIR", help="The output of a LoRA run, or an imported adapter.")
    ],
    peft_dir: Annotated[Path, typer.Argument(metavar="PEFT_DIR", help="The folder to write.")],
    adapter_format: FormatOption = "peft",
    base_model: Annotated[
        str | None, typer.Option(help="What adapter_config.json calls the base; default: as the run named it.")
    ] = None,
    overwrite: OverwriteOption = False,
    json_file: JsonOption = None,
) -> None:
    """Write a trained adapter as a PEFT folder, or in the format of an engine; needs no weights of the base."""
    from bridge.lora.peft_folder import write_peft
    from bridge.lora.source import open_megatron
    from bridge.progress import shown_progress

    with ExitStack() as stack, shown_progress(err, "adapter export") as progress:
        opened = open_megatron(stack, megatron_dir)
        opened = opened if base_model is None else replace(opened, base=base_model)
        done = write_peft(
            peft_dir, opened, adapter_format=adapter_format, overwrite=overwrite, progress=progress, notify=err.print
        )
    report(done, "exported", json_file)


@adapter.command("import", epilog=epilog("adapter import my-adapter ckpt/adapter --base ckpt/26b-megatron"))
def import_command(
    peft_dir: Annotated[Path, typer.Argument(metavar="PEFT_DIR", help="A PEFT folder, or one in a format.")],
    megatron_dir: Annotated[Path, typer.Argument(metavar="MEGATRON_DIR", help="The adapter checkpoint to write.")],
    base: Annotated[Path, typer.Option(help="The imported model that it adapts, as `import` wrote it.")],
    overwrite: OverwriteOption = False,
    json_file: JsonOption = None,
) -> None:
    """Turn an adapter trained elsewhere into a Megatron one, for a run to go on with (`lora.adapter=MEGATRON_DIR`)."""
    from bridge.lora.source import import_peft
    from bridge.progress import shown_progress

    with shown_progress(err, "adapter import") as progress:
        done = import_peft(peft_dir, megatron_dir, base, overwrite=overwrite, progress=progress, notify=err.print)
    report(done, "imported", json_file)


@adapter.command("merge", epilog=epilog("adapter merge runs/lora out/merged --base google/gemma-4-26B-A4B-it"))
def merge_command(
    adapter_dir: Annotated[
        Path, typer.Argument(metavar="ADAPTER_DIR", help="The output of a LoRA run, an imported adapter or PEFT's.")
    ],
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="The Hugging Face folder to write.")],
    base: Annotated[
        str | None, typer.Option(help="An HF folder, hub id or Megatron checkpoint; default: what the adapter names.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of a weight file, such as 5GB.")] = "5GB",
    quantize: QuantizeOption = None,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = 2,
    json_file: JsonOption = None,
) -> None:
    """Add an adapter to its base: a Hugging Face folder, computed in float32 and rounded once."""
    from bridge.hf.writer import parse_size
    from bridge.lora.merge import merge_adapter
    from bridge.lora.source import open_both
    from bridge.progress import shown_progress

    size = parse_size(max_shard_size)
    with ExitStack() as stack, shown_progress(err, "adapter merge") as progress:
        model, opened = open_both(stack, adapter_dir, base)
        done = merge_adapter(
            model,
            opened,
            hf_dir,
            max_shard_size=size,
            quantize=quantize,
            overwrite=overwrite,
            progress=progress,
            notify=err.print,
            workers=workers,
        )
    report(done, "merged", json_file)


@adapter.command("convert", epilog=epilog("adapter convert my-adapter my-adapter-vllm --format vllm"))
def convert_command(
    source: Annotated[Path, typer.Argument(metavar="PEFT_DIR", help="A PEFT folder, or one in a format.")],
    target: Annotated[Path, typer.Argument(metavar="PEFT_DIR2", help="The folder to write.")],
    adapter_format: FormatOption = "peft",
    base: Annotated[str | None, typer.Option(help="The model that it adapts; default: what the adapter names.")] = None,
    overwrite: OverwriteOption = False,
    json_file: JsonOption = None,
) -> None:
    """Write an adapter in another format: vLLM's, SGLang's, or PEFT's. Reads the base's config only."""
    from bridge.lora.peft_folder import write_peft
    from bridge.lora.source import open_with_table
    from bridge.progress import shown_progress

    with ExitStack() as stack, shown_progress(err, "adapter convert") as progress:
        opened = open_with_table(stack, source, base)
        done = write_peft(
            target, opened, adapter_format=adapter_format, overwrite=overwrite, progress=progress, notify=err.print
        )
    report(done, "converted", json_file)
