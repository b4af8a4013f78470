"""The commands that look at training data and prepare it: parse, call, print."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bridge.cli_kit import (
    AllowUrlsOption,
    ChatTemplateOption,
    ColumnOption,
    FormatOption,
    FunctionOption,
    JsonOption,
    MediaRootOption,
    OnErrorOption,
    SplitOption,
    TokensOption,
    columns_of,
    epilog,
    err,
    out,
    wrote_json,
)
from bridge.errors import UsageError

if TYPE_CHECKING:
    from recipes.data.caches import Cache
    from recipes.data.options import CorpusOptions

data = typer.Typer(
    help="Look at training data, prepare it; list and clean what is prepared.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


RecipeArgument = Annotated[
    str | None, typer.Argument(metavar="[RECIPE]", help="A recipe, whose data and model are shown.")
]
OverridesArgument = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Of the recipe.")]
NamedOption = Annotated[
    list[str] | None,
    typer.Option("--data", help="Without a recipe: JSONL or Parquet, a folder, a glob, a dataset; repeat."),
]
ModelOption = Annotated[str | None, typer.Option(help="Without a recipe: an HF folder or hub id.")]
CountOption = Annotated[int, typer.Option("-n", "--samples", min=0, help="How many samples to print.")]
SeqLengthOption = Annotated[int, typer.Option(min=2, help="Longer samples are dropped, or split.")]
TurnsOption = Annotated[
    str, typer.Option(help="all or last: the model's turns that are learnt; everything: what is asked too.")
]
ThinkingOption = Annotated[bool, typer.Option(help="Learn thoughts.")]
ToolCallsOption = Annotated[bool, typer.Option(help="Learn tool calls.")]
OverlongOption = Annotated[str, typer.Option(help="drop or split")]
PlotOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also draw the statistics, as .svg; needs a model.")
]


@data.command("show", epilog=epilog("data show sft/e2b data.path=chats.jsonl -n 5"))
def data_show(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    named: NamedOption = None,
    model: ModelOption = None,
    count: CountOption = 3,
    seq_length: SeqLengthOption = 4096,
    split: SplitOption = "train",
    format_: FormatOption = None,
    column: ColumnOption = None,
    function: FunctionOption = None,
    turns: TurnsOption = "all",
    thinking: ThinkingOption = True,
    tool_calls: ToolCallsOption = True,
    overlong: OverlongOption = "drop",
    on_error: OnErrorOption = "skip",
    chat_template: ChatTemplateOption = None,
    media_root: MediaRootOption = None,
    allow_urls: AllowUrlsOption = False,
    cache: TokensOption = None,
    plot: PlotOption = None,
    json_file: JsonOption = None,
) -> None:
    """Print samples as the model sees them, what is learnt in green, and statistics: lengths, fractions, drops.

    A recipe says all of it by its own keys; data is named in its place, by itself or with --data, and the other options
    count. Without --model it is said what the records are, in words and not in tokens.
    """
    from recipes.data import CorpusOptions, Supervise
    from recipes.data.formats import FormatOptions
    from recipes.data.preference import of_its_kind
    from recipes.data.preparation import asked

    given = asked([*([recipe] if recipe is not None else []), *(overrides or [])], named or [])
    if given.recipe is not None:
        if model:
            raise UsageError("a recipe names data and model itself: write data.path=... and model.hf=...")
        sources, model = _sources_of_recipe(given.recipe, given.overrides)
    elif given.overrides:
        raise UsageError(f"{given.overrides[0]}: is a key of a recipe, and there is none")
    else:
        options = CorpusOptions(
            given.paths,
            seq_length,
            split=split,
            supervise=Supervise(turns, thinking, tool_calls),
            on_error=on_error,
            overlong=overlong,
            allow_urls=allow_urls,
            media_root=media_root,
            chat_template=chat_template,
            cache=cache,
            format=FormatOptions(format_, columns_of(column), function),
        )
        sources = {"": of_its_kind(options)}
    _show(sources, model, count, plot, json_file)


def _sources_of_recipe(name: str, overrides: Sequence[str]) -> tuple[dict[str, CorpusOptions], str]:
    """The sources of its data by their names, and its model."""
    from recipes.config import load_recipe
    from recipes.data.source_keys import source_options
    from recipes.data.training import corpus_options, model_folder

    recipe = load_recipe(name, overrides)
    model = model_folder(recipe)
    return {one.name: one.options for one in source_options(recipe.data, corpus_options(recipe))}, model


def _show(
    sources: Mapping[str, CorpusOptions], model: str | None, count: int, plot: Path | None, json_file: str | None
) -> None:
    from recipes.data import open_corpus
    from recipes.data.plot import check_plot, write_plot
    from recipes.data.recognition import lines, recognise
    from recipes.data.report import ProgressLines
    from recipes.data.show import show_sources, sources_to_json

    if plot is not None:
        check_plot(plot)
        if model is None:
            raise UsageError("--plot: draws tokens, which are those of a model: --model")
    progress = ProgressLines(err.print, doing="reading" if model is None else "tokenising")
    if model is None:
        found = recognise(sources[""], count, progress.read)
        if not wrote_json(json_file, found.to_json()):
            for line in lines(found):
                out.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    if plot is not None and len(sources) > 1:
        raise UsageError("--plot: draws one source, and there are several: name it, data.path=...")
    corpora = {name: open_corpus(one, model, progress=progress.read) for name, one in sources.items()}
    if plot is not None:
        write_plot(next(iter(corpora.values())), plot)
        err.print(f"wrote {plot}")
    if not wrote_json(json_file, sources_to_json(corpora, count)):
        show_sources(corpora, count, out)


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
    format_: Annotated[
        str,
        typer.Option("--format", help="cache, what `train` reads; or megatron, also: whole documents as .bin, .idx."),
    ] = "cache",
    out_prefix: Annotated[
        str | None, typer.Option("--out", metavar="PREFIX", help="With --format megatron: of the two files.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Make the tokens that `train` makes first, so that a run, on any number of ranks, starts at once.

    The same recipe and keys have to be given. Whatever ends it: the same command goes on behind what is done.
    """
    from recipes.data.preparation import asked, lines, prepare, recipe_of, targets, to_json, to_megatron

    if format_ not in ("cache", "megatron"):
        raise UsageError(f"--format {format_}: is cache or megatron; how records are written says data.format=...")
    if (format_ == "megatron") != (out_prefix is not None):
        raise UsageError("--out PREFIX goes with --format megatron")
    given = asked(arguments or [], named or [])
    recipe = recipe_of(given, model, seq_length, workers)
    if out_prefix is not None:
        recipe = targets(recipe, out_prefix, seq_length)
    sets, notes = prepare(recipe, of_unknown_kind=given.recipe is None)
    written, said = to_megatron(sets, out_prefix) if out_prefix is not None else ({}, [])
    if not wrote_json(json_file, to_json(sets) | ({"megatron": written} if written else {})):
        for line in [*lines(sets), *notes, *said]:
            out.print(line, markup=False, highlight=False, soft_wrap=True)


CacheOption = Annotated[Path | None, typer.Option("--cache", metavar="DIR", help="data.cache; else the user's own.")]


@data.command("list", epilog=epilog("data list"))
def data_list(cache: CacheOption = None, json_file: JsonOption = None) -> None:
    """Say which prepared data there is: of which files, for which run, how large and since when it was not used."""
    from recipes.data.caches import find
    from recipes.data.uses import default_folder

    folder = cache or default_folder()
    found = find(folder)
    if wrote_json(json_file, {"folder": str(folder), "caches": [one.to_json() for one in found]}):
        return
    _print_caches(found)
    out.print(f"{folder}: {len(found)} caches, {sum(one.bytes for one in found) / 1e9:.3f} GB")


@data.command("clean", epilog=epilog("data clean --older-than 30d"))
def data_clean(
    cache: CacheOption = None,
    older: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="Those not used for so long: 12h, 30d, 8w.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove prepared data, unfinished too; never what a process that lives makes or uses. Asks first."""
    from recipes.data.caches import find, older_than, remove, tidy
    from recipes.data.uses import default_folder

    if (older is None) == (not every):
        raise UsageError("say which: --older-than AGE or --all")
    limit = time.time() - (older_than(older) if older is not None else 0.0)
    folder = cache or default_folder()
    chosen = [one for one in find(folder) if every or one.used < limit]
    _print_caches(chosen)
    size = sum(one.bytes for one in chosen) / 1e9
    if chosen and not yes and not typer.confirm(f"remove {len(chosen)} caches, {size:.3f} GB?"):
        raise typer.Exit(1)
    gone = list(remove(chosen, err.print))
    tidy(folder)
    out.print(f"{folder}: removed {len(gone)} of {len(chosen)} caches, {sum(one.bytes for one in gone) / 1e9:.3f} GB")


def _print_caches(caches: list[Cache]) -> None:
    if not caches:
        return
    table = Table("cache", "size", "not used for", "samples", "of", "for")
    for one in caches:
        files = ", ".join(one.files[:2]) + (f" and {len(one.files) - 2} more" if len(one.files) > 2 else "")
        state = files if one.state == "complete" else one.state
        used_by = " ".join(str(one.said[key]) for key in ("for", "model") if one.said.get(key))
        hours = (time.time() - one.used) / 3600
        age = "in use" if one.live else f"{hours / 24:.0f} d" if hours >= 48 else f"{hours:.0f} h"
        table.add_row(one.folder.name[:8], f"{one.bytes / 1e6:.1f} MB", age, str(one.samples), state, used_by)
    out.print(table)
