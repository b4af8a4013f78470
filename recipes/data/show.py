"""A look at the data as the model will see it: samples with their supervision in colour, and the statistics."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridge.geometry.towers import SOFT_TOKEN_KINDS
from recipes.data.chat import Encoded
from recipes.data.collate import IGNORE
from recipes.data.corpus import Corpus
from recipes.data.packing import plan_epoch
from recipes.data.report import formats, unread, warnings
from recipes.data.statistics import Statistics

_LEARNT, _CONTEXT, _SOFT = "bold green", "dim", "magenta"
_SOFT_NAMES = dict(enumerate(SOFT_TOKEN_KINDS, 1))


def show(corpus: Corpus, count: int, console: Console) -> None:
    """Print the first `count` samples, what is learnt in green (in ⟦ ⟧ where there is no colour), and statistics."""
    brackets = not console.is_terminal or console.no_color
    learnt_looks = "in ⟦ ⟧" if brackets else "green"
    console.print(f"what is learnt is {learnt_looks}; soft tokens are counted", style=_CONTEXT)
    for index in range(min(count, len(corpus))):
        sample = corpus[index]
        learnt = int(sample.supervised.sum())
        console.rule(Text(f"{corpus.where(index)} · {len(sample)} tokens, {learnt} learnt"), align="left")
        console.print(coloured(sample, corpus.tokenizer, brackets=brackets), soft_wrap=True)
    console.rule("statistics", align="left")
    console.print(statistics_table(corpus.statistics))
    packing = packing_figures(corpus)
    console.print(
        f"packed into rows of {corpus.options.seq_length}: {packing['rows']} rows, "
        f"{packing['efficiency']:.1%} real tokens; one sample a row: {packing['unpacked_efficiency']:.1%}"
    )
    for warning in warnings(corpus.statistics, corpus.options):
        console.print(Text(warning), soft_wrap=True)
    for message in corpus.statistics.skipped:
        console.print(Text(f"dropped: {message}"), soft_wrap=True)


def show_sources(sources: Mapping[str, Corpus], count: int, console: Console) -> None:
    """The same of each source, by what it is called; of one without a name, of it alone."""
    for name, corpus in sources.items():
        if name:
            console.rule(Text(f"source {name}"), characters="═", align="left")
        show(corpus, count, console)


def sources_to_json(sources: Mapping[str, Corpus], count: int) -> dict[str, Any]:
    """For programs: of several sources by their names."""
    found = {name: to_json(corpus, count) for name, corpus in sources.items()}
    return found[""] if list(found) == [""] else {"sources": found}


def to_json(corpus: Corpus, count: int) -> dict[str, Any]:
    """The same for programs. `labels` stand at the tokens that are learnt, -100 elsewhere: not shifted yet, as a batch
    has them."""
    statistics = corpus.statistics
    samples = [corpus[index] for index in range(min(count, len(corpus)))]
    return statistics.to_json() | {
        "format": formats(statistics),
        "sample_count": statistics.samples,
        "samples": [
            {
                "input_ids": sample.ids.tolist(),
                "labels": np.where(sample.supervised, sample.ids, IGNORE).tolist(),
                "text": corpus.tokenizer.decode(sample.ids, skip_special_tokens=False),
            }
            for sample in samples
        ],
        "packing": packing_figures(corpus),
        "warnings": warnings(statistics, corpus.options),
    }


def coloured(sample: Encoded, tokenizer: Any, *, brackets: bool = False) -> Text:
    """A sample as text, coloured by supervision; runs of soft tokens as their number."""
    text = Text()
    at = 0
    for (kind, learnt), run in groupby(zip(sample.types.tolist(), sample.supervised.tolist(), strict=True)):
        size = len(list(run))
        if kind:
            text.append(f"[{size} × {_SOFT_NAMES[kind]}]", _SOFT)
        else:
            ids = sample.ids[at : at + size].tolist()
            words = tokenizer.decode(ids, skip_special_tokens=False)
            text.append(f"⟦{words}⟧" if learnt and brackets else words, _LEARNT if learnt else _CONTEXT)
        at += size
    return text


def statistics_table(statistics: Statistics) -> Table:
    """The statistics, a row each."""
    table = Table(show_header=False)
    table.add_row("records", f"{statistics.read} read, {statistics.kept} kept ({formats(statistics)})")
    for reason, count in statistics.dropped.items():
        table.add_row(f"dropped: {reason}", str(count))
    if statistics.unread:
        table.add_row("not read", unread(statistics))
    if statistics.pieces_dropped:
        table.add_row("dropped: pieces of split records", str(statistics.pieces_dropped))
    if statistics.blank_lines:
        table.add_row("blank lines", str(statistics.blank_lines))
    table.add_row("samples", str(statistics.samples))
    fraction = statistics.supervised_fraction
    table.add_row("tokens", f"{statistics.tokens}, {statistics.supervised} of them learnt ({fraction:.1%})")
    most = max(statistics.lengths.values(), default=1)
    for bound, count in statistics.lengths.items():
        table.add_row(f"up to {bound} tokens", f"{count:>9} {'█' * round(30 * count / most)}")
    table.add_row("longest", str(statistics.longest))
    for kind, count in statistics.media.items():
        table.add_row(f"{kind} items", str(count))
    if statistics.thoughts_left_out:
        table.add_row("thoughts that the template leaves out", str(statistics.thoughts_left_out))
    return table


def packing_figures(corpus: Corpus) -> dict[str, Any]:
    """How full rows of the corpus's `seq_length` get: packed in the first epoch of seed 0, and one sample a row.

    Pairs that do not fit into one row are left out of the packed ones."""
    length = corpus.options.seq_length
    lengths = corpus.lengths.reshape(-1, corpus.options.together)
    plan = plan_epoch(lengths[lengths.sum(1) <= length], epoch=0, seed=0, shuffle=True, packing=True, seq_length=length)
    unpacked = float(corpus.lengths.sum()) / (len(corpus) * length)
    return {"rows": len(plan), "efficiency": plan.efficiency, "unpacked_efficiency": unpacked}
