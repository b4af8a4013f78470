"""Conversations on disk -> batches of tensors: sources, chat template and supervision, cache, packing, order.

`open_corpus` tokenises once into a cache, `Batches` iterates over it for one data-parallel rank.
"""

from recipes.data.batches import Batches, BatchOptions
from recipes.data.corpus import Corpus, open_corpus
from recipes.data.options import CorpusOptions, Supervise
from recipes.data.statistics import Statistics

__all__ = ["BatchOptions", "Batches", "Corpus", "CorpusOptions", "Statistics", "Supervise", "open_corpus"]
