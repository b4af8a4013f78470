"""How many steps so many epochs are."""

from __future__ import annotations

import math
from dataclasses import replace

from recipes.config import Recipe
from recipes.data.batches import Batches


def with_steps(recipe: Recipe, batches: Batches) -> Recipe:
    """The recipe with `train.steps` in the place of `train.epochs`, where it has those: every row that is asked for is
    seen, so that the last step may take rows of the next epoch."""
    epochs = recipe.train.epochs
    if not epochs:
        return recipe
    whole = math.floor(epochs)
    rows = sum(batches.rows(epoch) for epoch in range(whole))
    if epochs > whole:
        # What binary fractions add must not cost a row more.
        rows += math.ceil(round((epochs - whole) * batches.rows(whole), 6))
    steps = max(1, math.ceil(rows / recipe.train.global_batch_size))
    return replace(recipe, train=replace(recipe.train, steps=steps, epochs=0.0))
