"""The commands that look at training data and prepare it: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridge.cli_kit import (
    ColumnOption,
    FormatOption,
    FunctionOption,
    JsonOption,
    columns_of,
    epilog,
    err,
    out,
    wrote_json,
)
from bridge.errors import UsageError

data = typer.Typer(help="Look at training data, prepare it.", no_args_is_help=True, rich_markup_mode="markdown")


@data.command("show", epilog=epilog("data show sft/e2b data.path=chats.jsonl -n 5"))
def data_show(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A recipe, whose data and model are shown.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Of the recipe.")] = None,
    named: Annotated[
        list[str] | None,
        typer.Option("--data", help="Without a recipe: JSONL or Parquet, a folder, a glob, a dataset; repeat."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Without a recipe: an HF folder or hub id.")] = None,
    count: Annotated[int, typer.Option("-n", "--samples", min=0, help="How many samples to print.")] = 3,
    seq_length: Annotated[int, typer.Option(min=2, help="Longer samples are dropped, or split.")] = 4096,
    split: Annotated[str, typer.Option(help="Of a dataset that is named, or a folder of splits.")] = "train",
    format_: FormatOption = None,
    column: ColumnOption = None,
    function: FunctionOption = None,
    turns: Annotated[
        str, typer.Option(help="all or last: the model's turns that are learnt; everything: what is asked too.")
    ] = "all",
    thinking: Annotated[bool, typer.Option(help="Learn thoughts.")] = True,
    tool_calls: Annotated[bool, typer.Option(help="Learn tool calls.")] = True,
    overlong: Annotated[str, typer.Option(help="drop or split")] = "drop",
    on_error: Annotated[str, typer.Option(help="fail or skip")] = "skip",
    chat_template: Annotated[str | None, typer.Option(metavar="FILE", help="Instead of the model's own.")] = None,
    media_root: Annotated[str | None, typer.Option(metavar="DIR", help="What media paths are relative to.")] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch media from the network.")] = False,
    cache: Annotated[str | None, typer.Option(metavar="DIR", help="Where tokens are kept.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Print samples as the model sees them, what is learnt in green, and statistics: lengths, fractions, drops.

    A recipe says all of it by its own keys; data is named in its place, by itself or with --data, and the other options
    count. Without --model it is said what the records are, in words and not in tokens.
    """
    from recipes.config import load_recipe
    from recipes.data import CorpusOptions, Supervise, open_corpus
    from recipes.data.formats import Layout
    from recipes.data.preference import of_its_kind
    from recipes.data.recognition import lines, recognise
    from recipes.data.report import Progress
    from recipes.data.show import show, to_json
    from recipes.data.sources import is_data
    from recipes.data.training import corpus_options, model_folder

    if recipe is not None and is_data(recipe, bool(named)):
        # Data alone, or what a shell makes of --data data/*.parquet.
        absent = [name for name in overrides or () if not Path(name).exists()]
        if absent:
            raise UsageError(f"{absent[0]}: no such file; without a recipe, what stands beside --data is data too")
        named, recipe = [*(named or ()), recipe, *(overrides or ())], None
    if recipe is not None:
        if named or model:
            raise UsageError("a recipe names data and model itself: write data.path=... and model.hf=...")
        said = load_recipe(recipe, overrides or [])
        options, model = corpus_options(said), model_folder(said)
    elif not named:
        raise UsageError("name a recipe, or data: a file, or --data")
    else:
        options = CorpusOptions(
            tuple(named),
            seq_length,
            split=split,
            supervise=Supervise(turns, thinking, tool_calls),
            on_error=on_error,
            overlong=overlong,
            allow_urls=allow_urls,
            media_root=media_root,
            chat_template=chat_template,
            cache=cache,
            layout=Layout(format_, columns_of(column), function),
        )
        options = of_its_kind(options)
    progress = Progress(err.print, doing="reading" if model is None else "tokenising")
    if model is None:
        found = recognise(options, count, progress.read)
        if not wrote_json(json_file, found.to_json()):
            for line in lines(found):
                out.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    corpus = open_corpus(options, model, progress=progress.read)
    if not wrote_json(json_file, to_json(corpus, count)):
        show(corpus, count, out)


@data.command("prepare", epilog=epilog("data prepare sft/e2b data.path=chats.jsonl --workers 32"))
def data_prepare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE|FILE... [KEY=VALUE]...", help="A recipe, or data; keys are those of recipes."),
    ] = None,
    named: Annotated[list[str] | None, typer.Option("--data", help="Data, in the place of a recipe; repeat.")] = None,
    model: Annotated[str | None, typer.Option(help="An HF folder or hub id; needed without a recipe.")] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=2, help="train.seq_length: longer samples are dropped, or split.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="data.workers: processes that tokenise.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Make the tokens that `train` makes first, so that a run, on any number of ranks, starts at once.

    The same recipe and keys have to be given. Whatever ends it: the same command goes on behind what is done.
    """
    from recipes.data.preparation import asked, lines, prepare, recipe_of, to_json

    given = asked(arguments or [], named or [])
    sets, notes = prepare(recipe_of(given, model, seq_length, workers), alone=given.recipe is None)
    if not wrote_json(json_file, to_json(sets)):
        for line in [*lines(sets), *notes]:
            out.print(line, markup=False, highlight=False, soft_wrap=True)
