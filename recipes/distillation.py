"""What can be said of `distill` in a recipe before anything is built."""

from __future__ import annotations

from dataclasses import fields

from bridge.errors import UsageError
from recipes.config import DistillConfig, Recipe


def check_distill(recipe: Recipe) -> None:
    """Raise UsageError that names the key, and what would work."""
    said = recipe.distill
    if said.teacher is None:
        for key in (f.name for f in fields(DistillConfig)):
            if getattr(said, key) != getattr(DistillConfig(), key):
                raise UsageError(f"distill.{key} needs distill.teacher")
        return
    if "://" in said.teacher:
        raise UsageError(
            f"distill.teacher={said.teacher}: a server's log-probabilities are not there yet; name a folder or hub id, "
            "and distill.cache=true if it does not fit beside the model"
        )
    _check_numbers(said)
    _check_ways(said)
    _check_others(recipe)


def _check_numbers(said: DistillConfig) -> None:
    for key in ("beta", "lmbda"):
        if not 0 <= getattr(said, key) <= 1:
            raise UsageError(f"distill.{key}={getattr(said, key):g}: must be from 0 to 1")
    if said.temperature <= 0:
        raise UsageError(f"distill.temperature={said.temperature:g}: must be above 0")
    for key, least in (("top_k", 0), ("cross_entropy", 0), ("max_new_tokens", 1), ("max_rows", 1)):
        if getattr(said, key) < least:
            raise UsageError(f"distill.{key}={getattr(said, key)}: must be at least {least}")


def _check_ways(said: DistillConfig) -> None:
    if said.cache and not said.top_k:
        raise UsageError("distill.cache=true: all of a teacher's words would fill a disk; set distill.top_k (64, say)")
    if said.cache and said.lmbda:
        raise UsageError(
            f"distill.cache=true: is of the data, and with distill.lmbda={said.lmbda:g} answers are the model's own; "
            "leave one out"
        )
    if not said.lmbda:
        for key in ("max_new_tokens", "max_rows"):
            if getattr(said, key) != getattr(DistillConfig(), key):
                raise UsageError(f"distill.{key}: is of own answers; set distill.lmbda")


def _check_others(recipe: Recipe) -> None:
    """Keys of other ways to train."""
    on_policy = bool(recipe.distill.lmbda)
    for key, value, why in (
        ("preference.loss", recipe.preference.loss, "is another loss; leave it out with distill.teacher"),
        ("grpo.rewards", recipe.grpo.rewards, "are another loss; leave them out with distill.teacher"),
        ("drafter.path", recipe.drafter.path, "has a teacher already (drafter.kl); leave it out with distill.teacher"),
        ("train.z_loss", recipe.train.z_loss, "is not added to divergences; leave it out with distill.teacher"),
        (
            "data.packing",
            on_policy and recipe.data.packing,
            "own answers have rows of their own yet; set distill.lmbda=0",
        ),
        (
            "data.overlong",
            on_policy and recipe.data.overlong != "drop",
            "a question cannot be cut; set distill.lmbda=0",
        ),
    ):
        if value:
            raise UsageError(f"{key}: {why}")
    said, train = recipe.distill, recipe.train
    if on_policy and said.max_new_tokens >= train.seq_length:
        raise UsageError(
            f"distill.max_new_tokens={said.max_new_tokens}: leaves no room for a prompt in train.seq_length="
            f"{train.seq_length}"
        )
    if on_policy and not all((recipe.data.supervise_thinking, recipe.data.supervise_tool_calls)):
        raise UsageError("data.supervise_*: what is learnt of an answer is what is asked for; leave it out")
