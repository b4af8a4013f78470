"""The sources of a recipe: `data.sources`, or `data.path`, which is one without a share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipes.config import DataConfig, SourceConfig
from recipes.data.formats import FormatOptions
from recipes.data.options import CorpusOptions
from recipes.data.order import ALL, Share
from recipes.sources import name_of, paths


@dataclass(frozen=True)
class SourceOptions:
    """A source before it is opened. `max_samples`: the first so many; 0: all."""

    name: str
    number: int
    options: CorpusOptions
    share: Share = ALL
    max_samples: int = 0

    @property
    def key(self) -> str:
        """What a message calls it."""
        return f"data.sources[{self.number}] ({self.name})"


def source_options(data: DataConfig, options: CorpusOptions) -> tuple[SourceOptions, ...]:
    """The sources that a recipe trains on. What one does not say itself is as `options`, of all the data, have it."""
    if not data.sources:
        return (SourceOptions("", 0, options),)
    # One of weight 0 is left out, and keeps its number.
    found = []
    for number, said in enumerate(data.sources):
        if said.weight != 0:
            share = Share(said.weight, said.tokens, said.repeat)
            found.append(SourceOptions(name_of(said), number, _options(said, options), share, said.max_samples))
    return tuple(found)


def _options(said: SourceConfig, options: CorpusOptions) -> CorpusOptions:
    format_options = options.format
    if said.format is not None or said.columns or said.function is not None:
        format_options = FormatOptions(
            said.format if said.format is not None else format_options.format,
            dict(said.columns) or format_options.columns,
            said.function if said.function is not None else format_options.function,
        )
    overrides = {
        name: value for name in ("split", "subset", "media_root") if (value := getattr(said, name)) is not None
    }
    return replace(options, path=paths(said.path), format=format_options, **overrides)
