"""What can be said of `grpo` in a recipe before anything is built."""

from __future__ import annotations

from dataclasses import fields

from bridge.errors import UsageError
from recipes.config import GrpoConfig, Recipe
from recipes.keys import meant
from recipes.rewards.named import RewardOptions, check_names, find_rewards

LOSSES = ("grpo", "dapo", "dr_grpo", "gspo", "rloo")


def reward_options(config: GrpoConfig) -> RewardOptions:
    """The rewards of a recipe, as their processes are told."""
    return RewardOptions(tuple(config.rewards), config.reward_pattern, config.reward_schema, config.reward_length)


def check_grpo(recipe: Recipe) -> None:
    """Raise UsageError that names the key, and what would work."""
    said = recipe.grpo
    if not said.rewards:
        for key in (f.name for f in fields(GrpoConfig)):
            if getattr(said, key) != getattr(GrpoConfig(), key):
                raise UsageError(f"grpo.{key} needs grpo.rewards")
        return
    options = reward_options(said)
    find_rewards(options)
    check_names(said.rewards, options)
    if said.reward_weights and len(said.reward_weights) != len(said.rewards):
        raise UsageError(f"grpo.reward_weights={said.reward_weights}: there are {len(said.rewards)} rewards")
    _check_choices(said)
    _check_numbers(said)
    _check_reference(recipe)
    _check_rows(recipe)
    _check_others(recipe)


def _check_choices(said: GrpoConfig) -> None:
    if said.loss not in LOSSES:
        raise UsageError(
            f"grpo.loss={said.loss}: there is none{meant(said.loss, LOSSES)}; there are {', '.join(LOSSES)}"
        )
    scales = ("auto", "group", "batch", "none")
    if said.scale_rewards not in scales:
        raise UsageError(f"grpo.scale_rewards={said.scale_rewards}: is one of {', '.join(scales)}")
    if said.scale_rewards != "auto" and said.loss == "rloo":
        raise UsageError(f"grpo.scale_rewards={said.scale_rewards}: rloo's advantages are not scaled; leave it out")
    if said.engine not in ("own", "vllm"):
        raise UsageError(f"grpo.engine={said.engine}: is one of own, vllm")
    if (said.engine == "vllm") != (said.engine_url is not None):
        raise UsageError("grpo.engine=vllm and grpo.engine_url, such as http://127.0.0.1:8000, go together")
    if said.router_replay:
        raise UsageError("grpo.router_replay: is not there yet; grpo.importance_cap corrects for other experts")


def _check_numbers(said: GrpoConfig) -> None:
    for key, least in (
        ("num_generations", 2),
        ("max_new_tokens", 1),
        ("steps_per_generation", 1),
        ("num_iterations", 1),
        ("max_rows", 1),
        ("beta", 0),
        ("importance_cap", 0),
        ("samples_every", 0),
        ("epsilon", 0),
        ("epsilon_high", 0),
    ):
        value = getattr(said, key)
        if value is not None and value < least:
            raise UsageError(f"grpo.{key}={value}: must be at least {least}")
    if said.epsilon >= 1:
        raise UsageError(f"grpo.epsilon={said.epsilon:g}: must be below 1")
    if said.reward_timeout <= 0:
        raise UsageError(f"grpo.reward_timeout={said.reward_timeout:g}: must be above 0")


def _check_reference(recipe: Recipe) -> None:
    said, lora = recipe.grpo, recipe.lora
    if not said.beta:
        return
    if said.loss == "rloo":
        raise UsageError(f"grpo.beta={said.beta:g}: with rloo the KL is part of the reward, which is not there yet")
    if not lora.rank or lora.adapter is not None or lora.modules_to_save:
        raise UsageError(
            f"grpo.beta={said.beta:g}: the reference is the model without new adapters (lora.rank), no other yet"
        )


def _check_rows(recipe: Recipe) -> None:
    said, train = recipe.grpo, recipe.train
    rows = train.global_batch_size * said.steps_per_generation
    if rows % said.num_generations:
        nearest = max(1, round(rows / said.num_generations)) * said.num_generations
        raise UsageError(
            f"train.global_batch_size × grpo.steps_per_generation = {rows} answers are not divisible by "
            f"grpo.num_generations={said.num_generations}; {nearest} would work"
        )
    if said.max_new_tokens >= train.seq_length:
        raise UsageError(
            f"grpo.max_new_tokens={said.max_new_tokens}: leaves no room for a prompt in train.seq_length="
            f"{train.seq_length}"
        )


def _check_others(recipe: Recipe) -> None:
    """Keys of other ways to train."""
    for key, value, why in (
        ("preference.loss", recipe.preference.loss, "is of answers that are there"),
        ("drafter.path", recipe.drafter.path, "trains a drafter on data"),
        ("train.epochs", recipe.train.epochs, "count rows of data, and these are sampled; set train.steps"),
        ("train.z_loss", recipe.train.z_loss, "is added to token losses"),
        ("data.overlong", recipe.data.overlong != "drop" and recipe.data.overlong, "a question cannot be cut"),
    ):
        if value:
            raise UsageError(f"{key}={value}: {why}; leave it out with grpo.rewards")
    if not all((recipe.data.supervise_thinking, recipe.data.supervise_tool_calls)):
        raise UsageError(
            "data.supervise_*: what is learnt of an answer is the reference; leave it out with grpo.rewards"
        )
