"""The command line: parse, call, print. `gemma4-bridge --help` lists the commands."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bridge import __version__, cli_evaluate, cli_generate, cli_launch, cli_plan, cli_sync
from bridge.cli_adapter import adapter
from bridge.cli_data import data
from bridge.cli_kit import (
    EpOption,
    EtpOption,
    JsonOption,
    OverwriteOption,
    PpOption,
    QuantizeOption,
    SequenceParallelOption,
    TpOption,
    VppOption,
    WorkersOption,
    epilog,
    err,
    out,
    report,
    wrote_json,
)
from bridge.errors import BridgeError, UsageError
from bridge.megatron.silence import silence_warnings

if TYPE_CHECKING:
    from bridge.verify.result import Check

ALL_CHECKS = "round-trip,logits,gradients"

app = typer.Typer(
    name="gemma4-bridge",
    help="Gemma 4 between Hugging Face and Megatron-Core: lossless conversion, and proof of parity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data, name="data")
app.add_typer(adapter, name="adapter")
cli_launch.register(app)
cli_plan.register(app)
cli_generate.register(app)
cli_evaluate.register(app)
cli_sync.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"gemma4-bridge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """--debug is taken off the arguments by `main`, wherever it stands; this declares it for --help."""


@app.command(epilog=epilog("toy 26b-a4b /tmp/toy-26b --dtype float32"))
def toy(
    variant: Annotated[str, typer.Argument(help="e2b, e4b, 12b, 26b-a4b or 31b; e2b-assistant: its drafter")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    text_only: Annotated[bool, typer.Option("--text-only", help="The causal-LM class, without towers.")] = False,
    full_size: Annotated[bool, typer.Option("--full-size", help="The published geometry, streamed to disk.")] = False,
    untied: Annotated[bool, typer.Option("--untied", help="With a head of its own.")] = False,
    mixed_dtypes: Annotated[bool, typer.Option("--mixed-dtypes", help="Some tensors float32, the rest bf16.")] = False,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Rows of embedding and head.")] = None,
    ple_vocab_size: Annotated[int | None, typer.Option(min=1, help="Rows of the per-layer table, if others.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Of sliding layers; global twice that, window 16.")] = None,
    drafter: Annotated[
        bool, typer.Option("--drafter", help="Its drafter, a small model that drafts its tokens, as -assistant.")
    ] = False,
    ordered: Annotated[
        bool | None, typer.Option("--ordered/--plain", help="The drafter's head; as the published one's if absent.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a small random checkpoint with every structural feature of the real model, tokenizer and all."""
    from bridge.progress import shown_progress
    from bridge.toy import write_toy

    model = variant.removesuffix("-assistant")
    with shown_progress(err, f"toy {variant}") as progress:
        write_toy(
            model,
            folder,
            seed=seed,
            dtype=dtype,
            text_only=text_only,
            full_size=full_size,
            untied=untied,
            mixed_dtypes=mixed_dtypes,
            vocab_size=vocab_size,
            ple_vocab_size=ple_vocab_size,
            head_dim=head_dim,
            drafter=drafter or model != variant,
            ordered=ordered,
            overwrite=overwrite,
            progress=lambda done, total: progress(done, total, variant),
        )
    out.print(f"wrote {folder}")


@app.command(epilog=epilog("inspect google/gemma-4-E2B-it"))
def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="An HF folder or hub id, or a Megatron checkpoint.")],
    json_file: JsonOption = None,
) -> None:
    """Show geometry, one row per layer kind, parameters, and that the tables account for every tensor."""
    from bridge.hf.hub import resolve
    from bridge.inspection import inspect_folder, short_range

    result = inspect_folder(resolve(folder))
    if wrote_json(json_file, result.to_json()):
        return
    g = result.geometry
    out.print(f"{result.path}: {g.architecture}, {result.format}, {result.files} file(s)")
    out.print(
        f"{result.parameters / 1e9:.3f} B parameters in {result.tensors} tensors, {result.bytes / 1e9:.2f} GB "
        f"({', '.join(f'{n} {d}' for d, n in result.dtypes.items())}); hidden {g.hidden_size}, vocabulary "
        f"{g.vocab_size}, head {'tied' if g.tied else 'untied'}, softcap {g.logit_softcap}"
    )
    if g.moe is not None:
        out.print(f"experts: {g.moe.num_experts} of width {g.moe.ffn_hidden_size}, top {g.moe.topk}, in every layer")
    if g.ple is not None:
        out.print(f"per-layer embeddings: {g.num_layers} layers of {g.ple.dim}")
    if g.drafter is not None:
        head = "every token's logit"
        if g.drafter.num_centroids is not None:
            head = f"the logits of {g.drafter.topk} of {g.drafter.num_centroids} clusters of tokens"
        out.print(f"drafter of a model of hidden size {g.drafter.backbone_hidden_size}; its head computes {head}")
    table = Table()
    for heading in ("layers", "kind", "head dim", "heads", "groups", "window", "FFN", "K/V"):
        table.add_column(heading)
    for row in result.rows:
        e = row.example
        shared = "the target's" if e.external_kv else f"of layer {e.kv_source}"
        kv = shared if e.shares_kv else "V is K" if e.k_eq_v else "own"
        table.add_row(
            short_range(row.layers),
            e.kind,
            str(e.head_dim),
            str(e.num_attention_heads),
            str(e.num_query_groups),
            "" if e.window is None else str(e.window),
            str(e.ffn_hidden_size),
            kv,
        )
    out.print(table)
    out.print(f"tables: {result.mapped} tensors mapped, {result.carried} carried beside, none unaccounted for")
    if result.unknown_tokens:
        listed = ", ".join(f"{token} ({number}, {table})" for number, token, table in result.unknown_tokens[:5])
        more = f" and {len(result.unknown_tokens) - 5} more" if len(result.unknown_tokens) > 5 else ""
        out.print(f"tokens that the model has no row for: {listed}{more}; text that holds one is refused")
    for notice in result.notices:
        err.print(notice)


@app.command("import", epilog=epilog("import google/gemma-4-26B-A4B-it ckpt/26b-megatron"))
def import_command(
    hf_dir: Annotated[str, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder or hub id.")],
    megatron_dir: Annotated[Path, typer.Argument(metavar="MEGATRON_DIR", help="The checkpoint to write.")],
    dtype: Annotated[str, typer.Option(help="keep, bfloat16 or float32")] = "keep",
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave the towers of a multimodal model out.")] = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = 2,
    json_file: JsonOption = None,
) -> None:
    """Turn a Hugging Face folder into a Megatron distributed checkpoint that loads at any parallel layout."""
    from bridge.convert.folders import import_hf
    from bridge.hf.hub import resolve
    from bridge.progress import shown_progress

    with shown_progress(err, "import") as progress:
        done = import_hf(
            resolve(hf_dir),
            megatron_dir,
            dtype=dtype,
            text_only=text_only,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
            notify=err.print,
        )
    report(done, "imported", json_file)


@app.command("export", epilog=epilog("export ckpt/26b-megatron out/gemma-4-26b --max-shard-size 5GB"))
def export_command(
    megatron_dir: Annotated[Path, typer.Argument(metavar="MEGATRON_DIR", help="An imported checkpoint, or a run.")],
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="The Hugging Face folder to write.")],
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of a weight file, such as 5GB.")] = "5GB",
    check_files: Annotated[
        bool, typer.Option("--check-files", help="First hold every stored item against its checksum.")
    ] = False,
    multimodal: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Of a text model: the multimodal folder or id whose language model it is."),
    ] = None,
    quantize: QuantizeOption = None,
    unchanged_from: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="With --quantize: linears that still have this folder's weights keep its bytes."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = 2,
    json_file: JsonOption = None,
) -> None:
    """Turn a Megatron checkpoint back into a Hugging Face folder; needs nothing but MEGATRON_DIR."""
    from bridge.convert.export import export_hf
    from bridge.hf.hub import resolve
    from bridge.hf.writer import parse_size
    from bridge.progress import shown_progress

    size = parse_size(max_shard_size)
    with shown_progress(err, "export") as progress:
        done = export_hf(
            megatron_dir,
            hf_dir,
            max_shard_size=size,
            overwrite=overwrite,
            check_files=check_files,
            multimodal=None if multimodal is None else resolve(multimodal),
            quantize=quantize,
            unchanged_from=None if unchanged_from is None else resolve(unchanged_from),
            workers=workers,
            progress=progress,
            notify=err.print,
        )
    report(done, "exported", json_file)


@app.command(epilog=epilog("verify /tmp/toy-26b --tp 2 --sequence-parallel --check logits,gradients"))
def verify(
    hf_dir: Annotated[str, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder or hub id.")],
    megatron: Annotated[Path | None, typer.Option(help="Its Megatron checkpoint; imported afresh if absent.")] = None,
    check: Annotated[str, typer.Option(help="Which of these, with commas.")] = ALL_CHECKS,
    tp: TpOption = 1,
    pp: PpOption = 1,
    vpp: VppOption = 1,
    ep: EpOption = 1,
    etp: EtpOption = 1,
    cp: Annotated[int, typer.Option(help="context-parallel ranks")] = 1,
    sequence_parallel: SequenceParallelOption = False,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of both models")] = "float32",
    seed: Annotated[int, typer.Option(help="of the tokens")] = 0,
    streamed: Annotated[
        bool, typer.Option("--streamed", help="Layer by layer, one in memory at a time: a model of any size, float32.")
    ] = False,
    layers: Annotated[str | None, typer.Option(metavar="A-B", help="With --streamed: these alone, from 0.")] = None,
    workdir: Annotated[
        Path | None,
        typer.Option(
            help="For temporary files as large as the model; with --streamed, where transformers' side stays."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare with the source: every byte, the logits, the gradients. Starts its own ranks; fails if a row fails.

    With --streamed one row a layer and the logits: the first layer that is wrong is the first that fails.
    """
    from bridge.hf.hub import resolve
    from bridge.megatron.parallel import Parallel
    from bridge.progress import shown_progress
    from bridge.verify.run import verify as run
    from bridge.verify.streamed_run import verify_streamed

    parallel = Parallel(tp, pp, vpp, ep, etp, cp, sequence_parallel)
    if layers is not None and not streamed:
        raise UsageError("--layers is a part of --streamed")
    if streamed:
        if parallel != Parallel() or dtype != "float32" or check != ALL_CHECKS:
            raise UsageError("--streamed runs on one rank, in float32, layer by layer: no layout, --dtype or --check")
        checks = verify_streamed(
            resolve(hf_dir), megatron_dir=megatron, layers=layers, seed=seed, workdir=workdir, notify=err.print
        )
    else:
        with shown_progress(err, "round trip") as progress:
            checks = run(
                resolve(hf_dir),
                megatron_dir=megatron,
                checks=[name.strip() for name in check.split(",") if name.strip()],
                parallel=parallel,
                dtype=dtype,
                seed=seed,
                workdir=workdir,
                progress=progress,
                notify=err.print,
            )
    _report(checks, json_file)


def _report(checks: Sequence[Check], json_file: str | None) -> None:
    """Print them or write them; exit with 1 where one failed."""
    from bridge.verify.result import print_checks, to_json

    result = to_json(checks)
    if not wrote_json(json_file, result) or json_file != "-":
        print_checks(checks, out)
    if not result["passed"]:
        raise typer.Exit(1)


@app.command(epilog=epilog("train sft/e4b data.path=chats.jsonl output=runs/first train.steps=200"))
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name under recipes/configs, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.steps=200; cluster=8x141 for its layout there."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it, and say what it needs of a GPU.")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="With --dry-run: of how many ranks.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, metavar="GB", help="With --dry-run: what a GPU has.")
    ] = None,
) -> None:
    """Train a recipe, or go on with it; alone, or on every rank under torchrun or srun.

    SIGTERM and SIGUSR1 save a checkpoint and end the run with exit code 75.
    """
    # The recipes are built on the bridge: it does not know them until one is asked for.
    if dry_run:
        cli_launch.dry_run(recipe, overrides or [], ranks, gpu_memory)
        return
    from recipes.launch import run_recipe

    code = run_recipe(recipe, overrides or [])
    if code:
        raise typer.Exit(code)


_INTERRUPTED = 130


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    # Unwinds like Ctrl-C does, so that what is half-written goes away.
    raise KeyboardInterrupt("terminated")


def _on_unraisable(lost: sys.UnraisableHookArgs) -> None:
    # An interrupt may come where nothing can be raised: in a destructor, inside of a library's C code. It comes again,
    # a little later, because it would be lost in here as well.
    if issubclass(lost.exc_type, KeyboardInterrupt):
        again = threading.Timer(0.02, _thread.interrupt_main)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(lost)


def main() -> None:
    """The console script. A BridgeError becomes one line on stderr and exit code 1."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    silence_warnings()
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.unraisablehook = _on_unraisable
    try:
        if "" in arguments:
            # A path of "" would be the folder that one stands in.
            raise UsageError(f"argument {arguments.index('') + 1} is empty: a shell variable that is not set?")
        app(arguments, prog_name="gemma4-bridge", standalone_mode=True)
    except (KeyboardInterrupt, SystemExit) as error:
        # Typer makes the one into the other.
        if isinstance(error, SystemExit) and error.code != _INTERRUPTED:
            raise
        err.print("interrupted: nothing is left half-written")
        sys.exit(_INTERRUPTED)
    except BridgeError as error:
        if debug:
            raise
        err.print(f"error: {_one_line(error)}", style="red")
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(141)
    except BaseException as error:  # torch has errors that are no Exception
        if debug:
            raise
        err.print(
            f"internal error: {type(error).__name__}: {_one_line(error)} (run again with --debug for the traceback)"
        )
        sys.exit(70)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()
