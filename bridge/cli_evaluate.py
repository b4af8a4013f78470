"""`evaluate`: how well a model says what data holds, in Megatron, wherever its weights are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge.cli_kit import (
    AdapterOption,
    AllowUrlsOption,
    ChatTemplateOption,
    ColumnOption,
    DtypeOption,
    EpOption,
    EtpOption,
    FormatOption,
    FunctionOption,
    JsonOption,
    MaxNewTokensOption,
    MaxRowsOption,
    MediaRootOption,
    ModelArgument,
    OnErrorOption,
    PpOption,
    SequenceParallelOption,
    SplitOption,
    TokensOption,
    TpOption,
    VppOption,
    columns_of,
    epilog,
    err,
    out,
    wrote_json,
)

if TYPE_CHECKING:
    from bridge.generate.opened import OpenedModel
    from bridge.megatron.parallel import Parallel
    from recipes.data.options import CorpusOptions
    from recipes.evaluate import EvaluationTask


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=epilog("evaluate runs/receipts --data test.jsonl --metrics exact_match,json_tree"))(evaluate)


DataOption = Annotated[list[str], typer.Option(help="JSONL or Parquet, a folder, a glob, a dataset; repeat.")]
MetricsOption = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Of answers, with commas: exact_match, token_f1, json_valid, json_tree, module:function.",
    ),
]
RowsOption = Annotated[int, typer.Option(min=0, help="Of the first so many samples; 0: of all.")]
SeqLengthOption = Annotated[int, typer.Option(min=2, help="Longer samples are left out.")]
SubsetOption = Annotated[str | None, typer.Option(help="Of a dataset that is named.")]
TurnsOption = Annotated[str, typer.Option(help="all or last: the model's turns that the loss is of.")]
CpOption = Annotated[int, typer.Option(help="context-parallel ranks; without --metrics")]
MicroBatchSizeOption = Annotated[int, typer.Option(min=1, help="Samples that go through at once, for the loss.")]


def evaluate(
    model: ModelArgument,
    data: DataOption,
    adapter: AdapterOption = None,
    metrics: MetricsOption = "",
    rows: RowsOption = 0,
    max_new_tokens: MaxNewTokensOption = 256,
    seq_length: SeqLengthOption = 4096,
    split: SplitOption = "test",
    subset: SubsetOption = None,
    format_: FormatOption = None,
    column: ColumnOption = None,
    function: FunctionOption = None,
    turns: TurnsOption = "all",
    on_error: OnErrorOption = "fail",
    chat_template: ChatTemplateOption = None,
    media_root: MediaRootOption = None,
    allow_urls: AllowUrlsOption = False,
    cache: TokensOption = None,
    dtype: DtypeOption = "bfloat16",
    tp: TpOption = 1,
    pp: PpOption = 1,
    vpp: VppOption = 1,
    ep: EpOption = 1,
    etp: EtpOption = 1,
    cp: CpOption = 1,
    sequence_parallel: SequenceParallelOption = False,
    micro_batch_size: MicroBatchSizeOption = 4,
    max_rows: MaxRowsOption = 16,
    json_file: JsonOption = None,
) -> None:
    """Measure a model on data: loss and accuracy of the tokens it should say, and metrics of what it does say.

    The loss is the mean over all learnt tokens, as training has it; a token is right where it is the likeliest behind
    the true ones before it. For --metrics the model answers what stands before its last turn, greedily.
    """
    from bridge.megatron.parallel import Parallel
    from recipes.data.formats import FormatOptions
    from recipes.data.options import CorpusOptions, Supervise

    names = tuple(name.strip() for name in metrics.split(",") if name.strip())
    options = CorpusOptions(
        tuple(data),
        seq_length,
        split=split,
        subset=subset,
        supervise=Supervise(turns),
        on_error=on_error,
        chat_template=chat_template,
        media_root=media_root,
        allow_urls=allow_urls,
        cache=cache,
        format=FormatOptions(format_, columns_of(column), function),
    )
    opened = _open(model, adapter, Parallel(tp, pp, vpp, ep, etp, cp, sequence_parallel), dtype, names)
    task = _task(opened, options, names, max_new_tokens, rows, micro_batch_size, max_rows)
    result = _measure(replace(task, longest=_prepared(task)))
    if not wrote_json(json_file, result) or json_file != "-":
        _print(result, model)


def _open(model: str, adapter: str | None, parallel: Parallel, dtype: str, metrics: Sequence[str]) -> OpenedModel:
    from bridge.generate.opened import open_model
    from recipes.metrics.named import find_metrics

    find_metrics(metrics, "--metrics")
    opened = open_model(model, adapter=adapter, parallel=parallel, dtype=dtype)
    for notice in opened.notices:
        err.print(notice)
    return opened


def _task(
    opened: OpenedModel,
    options: CorpusOptions,
    metrics: tuple[str, ...],
    max_new_tokens: int,
    rows: int,
    micro_batch_size: int,
    max_rows: int,
) -> EvaluationTask:
    from bridge.generate.opened import stop_token_ids
    from bridge.generate.sampling import SamplingOptions
    from recipes.evaluate import EvaluationTask

    sampling = SamplingOptions(max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids(opened.assets))
    return EvaluationTask(opened.task, opened.assets, options, sampling, 0, metrics, rows, micro_batch_size, max_rows)


def _prepared(task: EvaluationTask) -> int:
    """Tokenise the data, and say what is wrong or left out of it; how long its longest sample is."""
    from recipes.data.corpus import open_corpus
    from recipes.data.questions import Questions, check_questions
    from recipes.data.report import ProgressLines
    from recipes.data.selection import first_samples
    from recipes.metrics.named import find_metrics

    err.print(f"reading data: {', '.join(task.data.paths)}")
    progress = ProgressLines(err.print)
    corpus = open_corpus(task.data, task.assets, progress=progress.read, notify=progress.line)
    for reason, count in corpus.statistics.dropped.items():
        err.print(f"{count} records are left out: {reason}")
    samples = first_samples(corpus, task.rows)
    if task.metrics:
        check_questions(find_metrics(task.metrics, "--metrics"), Questions(samples), "--metrics")
    return int(samples.lengths.max())


def _measure(task: EvaluationTask) -> dict[str, Any]:
    from bridge.progress import followed
    from bridge.ranks import RankPool
    from recipes.evaluate import evaluate_model

    model = task.model
    world = model.parallel.world_size
    threads = max(1, (os.cpu_count() or 1) // world)
    err.print(f"loading {model.weights}{f' with {model.adapter}' if model.adapter else ''} ({model.parallel})")
    with (
        followed(err.print) as progress,
        RankPool(world, threads_per_rank=threads, timeout_s=1e6) as pool,
    ):
        return asdict(pool.run(evaluate_model, replace(task, progress=progress))[0])


def _print(result: dict[str, Any], model: str) -> None:
    from rich.table import Table

    table = Table(title=f"{model}: {result['tokens']} tokens", title_justify="left")
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for name, value in [("loss", result["loss"]), ("token_accuracy", result["token_accuracy"])]:
        table.add_row(name, f"{value:.6g}")
    for name, value in result["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    out.print(table)
