"""What can be said of a recipe before anything is built: choices, numbers, schedule, batch, adapters, export, data."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from pathlib import Path

from bridge.errors import UsageError
from bridge.megatron.layer_options import ATTENTION, FP8_MULTIPLE, check_names
from recipes.config import PreferenceConfig, Recipe
from recipes.distillation import check_distill
from recipes.groups import RATED, compiled
from recipes.keys import meant
from recipes.losses import names as known
from recipes.losses.names import loss_names
from recipes.metrics.named import find_metrics
from recipes.rewards.check import check_grpo
from recipes.sources import check_sources
from recipes.training_config import DrafterConfig, LoraConfig


def check_recipe(recipe: Recipe, world_size: int) -> int:
    """What can be said before the model is known; the number of microbatches per step. Raises a BridgeError."""
    if (recipe.model.hf is None) == (recipe.model.megatron is None):
        raise UsageError("set exactly one of model.hf and model.megatron")
    _check_choices(recipe)
    _check_finite(recipe)
    _check_numbers(recipe)
    _check_schedule(recipe)
    _check_metrics(recipe)
    check_sources(recipe)
    _check_preference(recipe)
    check_grpo(recipe)
    check_distill(recipe)
    _check_lora(recipe)
    _check_drafter(recipe)
    _check_export(recipe)
    _check_sync(recipe)
    check_names(recipe.model.layer_spec, recipe.model.fp8)
    return _check_batch(recipe, world_size)


def _check_choices(recipe: Recipe) -> None:
    parallel, optimizer = recipe.parallel, recipe.optimizer
    for key, value, allowed in (
        ("model.dtype", recipe.model.dtype, ("bfloat16", "float32")),
        ("model.vision_mask", recipe.model.vision_mask, ("generate", "forward")),
        ("parallel.recompute", parallel.recompute, ("none", "selective", "full")),
        ("parallel.dispatcher", parallel.dispatcher, ("alltoall", "allgather")),
        ("optimizer.schedule", optimizer.schedule, ("constant", "linear", "cosine", "wsd")),
        ("optimizer.wsd_style", optimizer.wsd_style, ("linear", "cosine", "exponential", "minus_sqrt")),
        ("optimizer.moments_dtype", optimizer.moments_dtype, ("float32", "bfloat16")),
        ("data.on_change", recipe.data.on_change, ("refuse", "restart")),
    ):
        if value not in allowed:
            raise UsageError(f"{key}={value}: is one of {', '.join(allowed)}")
    for kind, value in recipe.model.attention_backends.items():
        if kind not in ("sliding", "global"):
            raise UsageError(f"model.attention_backends.{kind}: layers are sliding or global")
        if value not in ATTENTION:
            raise UsageError(f"model.attention_backends.{kind}={value}: is one of {', '.join(ATTENTION)}")


def _check_numbers(recipe: Recipe) -> None:
    train, optimizer = recipe.train, recipe.optimizer
    if not train.steps and not train.epochs:
        raise UsageError("train.steps=0: must be at least 1; or set train.epochs")
    if train.steps and train.epochs:
        raise UsageError(f"train.steps={train.steps} and train.epochs={train.epochs:g}: set one of them")
    for key, number, least in (
        ("train.steps", train.steps, 0),
        ("train.epochs", train.epochs, 0),
        ("train.global_batch_size", train.global_batch_size, 1),
        ("train.micro_batch_size", train.micro_batch_size, 1),
        ("train.seq_length", train.seq_length, 2),
        ("train.nan_limit", train.nan_limit, 1),
        ("train.sample_tokens", train.sample_tokens, 1),
        ("train.sample_temperature", train.sample_temperature, 0),
        ("eval.metric_rows", recipe.eval.metric_rows, 0),
        ("eval.metric_tokens", recipe.eval.metric_tokens, 1),
        ("data.workers", recipe.data.workers, 1),
        ("data.val_fraction", recipe.data.val_fraction, 0),
        ("lora.rank", recipe.lora.rank, 0),
        ("log.every", recipe.log.every, 1),
        *(
            (f"train.{key}", getattr(train, key), 0)
            for key in ("seed", "eval_every", "eval_rows", "patience", "z_loss", "aux_loss", "spike_factor")
        ),
        *(
            (f"optimizer.{key}", getattr(optimizer, key), 0)
            for key in ("lr", "min_lr", "warmup", "wsd_steps", "weight_decay", "beta1", "beta2", "clip")
        ),
        ("log.peak_tflops", recipe.log.peak_tflops, 0),
        *((f"checkpoint.{key}", getattr(recipe.checkpoint, key), 0) for key in ("every", "keep")),
    ):
        if number < least:
            raise UsageError(f"{key}={number}: must be at least {least}")
    for key, number in (
        ("data.val_fraction", recipe.data.val_fraction),
        ("optimizer.beta1", optimizer.beta1),
        ("optimizer.beta2", optimizer.beta2),
    ):
        if number >= 1:
            raise UsageError(f"{key}={number}: must be below 1")
    if optimizer.eps <= 0:
        raise UsageError(f"optimizer.eps={optimizer.eps}: must be above 0")


def _check_schedule(recipe: Recipe) -> None:
    train, optimizer = recipe.train, recipe.optimizer
    if train.patience and not train.eval_every:
        raise UsageError(f"train.patience={train.patience} counts evaluations: set train.eval_every")
    for name, rate in optimizer.lr_groups.items():
        if not 0 <= rate < math.inf:
            raise UsageError(f"optimizer.lr_groups.{name}={rate:g}: must be a number of at least 0")
        if not optimizer.lr:
            raise UsageError(f"optimizer.lr=0: rates of optimizer.lr_groups ({name}) follow its schedule; set it")
        if name not in RATED and name.isidentifier() and (close := meant(name, tuple(RATED))):
            raise UsageError(f"optimizer.lr_groups.{name}: there is no such group{close}")
    compiled("optimizer.lr_groups", list(optimizer.lr_groups), RATED)
    if optimizer.min_lr > optimizer.lr:
        raise UsageError(f"optimizer.min_lr={optimizer.min_lr} exceeds optimizer.lr={optimizer.lr}")
    if optimizer.schedule == "wsd" and not optimizer.wsd_steps:
        raise UsageError("optimizer.wsd_steps=0: says over how many steps the rate of schedule=wsd falls; set it")


def _check_batch(recipe: Recipe, world_size: int) -> int:
    """Length of a row, and rows of a step, against the layout; the number of microbatches."""
    train, layout, multiple = recipe.train, recipe.parallel.layout(), row_multiple(recipe)
    if train.seq_length % multiple:
        longer = train.seq_length + -train.seq_length % multiple
        raise UsageError(
            f"train.seq_length={train.seq_length} is no multiple of {multiple}, as parallel.cp={layout.cp} "
            f"(two chunks a rank) and parallel.tp={layout.tp} with sequence_parallel={layout.sequence_parallel} need"
            f"{'' if recipe.model.fp8 == 'none' else f' and model.fp8={recipe.model.fp8}'}; {longer} would work"
        )
    dp = layout.dp(world_size)
    share = train.micro_batch_size * dp
    if train.global_batch_size % share:
        nearest = max(share, round(train.global_batch_size / share) * share)
        raise UsageError(
            f"train.global_batch_size={train.global_batch_size} is not divisible by train.micro_batch_size × dp = "
            f"{train.micro_batch_size} × {dp}; {nearest} would work"
        )
    microbatches = train.global_batch_size // share
    if microbatches % layout.microbatch_multiple:
        raise UsageError(
            f"parallel.vpp={layout.vpp} needs microbatches in multiples of parallel.pp={layout.pp}, there are "
            f"{microbatches}; train.global_batch_size={share * layout.pp * max(1, round(microbatches / layout.pp))} "
            "would work"
        )
    return microbatches


def _check_finite(recipe: Recipe) -> None:
    """No comparison refuses a NaN."""
    for group in fields(recipe):
        of = getattr(recipe, group.name)
        for key in fields(of) if is_dataclass(of) else ():
            value = getattr(of, key.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{group.name}.{key.name}={value}: is no finite number")


def row_multiple(recipe: Recipe) -> int:
    """What the length of a row must be a multiple of, for the layout and for what linears multiply in."""
    return recipe.parallel.layout().row_multiple * (1 if recipe.model.fp8 == "none" else FP8_MULTIPLE)


def _check_lora(recipe: Recipe) -> None:
    if not recipe.lora.rank and recipe.lora.adapter is None:
        # What shipped recipes set stays, so that lora.rank=0 makes one of them train the model itself.
        known = ("rank", "alpha", "targets", "parameters", "exclude", "adapter")
        for key in (f.name for f in fields(LoraConfig) if f.name not in known):
            if getattr(recipe.lora, key) != getattr(LoraConfig(), key):
                raise UsageError(f"lora.{key} needs lora.rank, or lora.adapter")
        return
    for key in ("targets", "exclude"):
        value = getattr(recipe.lora, key)
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise UsageError(f"lora.{key}={value!r}: is a name, a regular expression or a list of names")
    if recipe.model.freeze:
        raise UsageError("model.freeze: with adapters all of the model is frozen; lora.targets says what is trained")


def _check_preference(recipe: Recipe) -> None:
    said, names = recipe.preference, loss_names(recipe.preference)
    if not names:
        for key in (f.name for f in fields(PreferenceConfig) if f.name != "loss"):
            if getattr(said, key) != getattr(PreferenceConfig(), key):
                raise UsageError(f"preference.{key} needs preference.loss")
        return
    for name in names:
        if name not in known.ALL:
            raise UsageError(
                f"preference.loss={name}: there is none{meant(str(name), known.ALL)}; there are {', '.join(known.ALL)}"
            )
    if len(names) > 1 and (other := [name for name in names if name not in known.DPO or names.count(name) > 1]):
        raise UsageError(
            f"preference.loss: {other[0]} cannot be added to others; of {', '.join(known.DPO)} each once can"
        )
    if said.loss_weights and len(said.loss_weights) != len(names):
        raise UsageError(f"preference.loss_weights={said.loss_weights}: there are {len(names)} losses")
    if said.loss_weights and names[0] not in known.DPO:
        raise UsageError(f"preference.loss_weights: is for DPO's losses, not for {names[0]}")
    if said.beta <= 0:
        raise UsageError(f"preference.beta={said.beta:g}: must be above 0")
    if not 0 <= said.label_smoothing < 0.5 or ("exo_pair" in names and not said.label_smoothing):
        least = "above 0 with exo_pair (1e-3, say)" if "exo_pair" in names else "at least 0"
        raise UsageError(f"preference.label_smoothing={said.label_smoothing:g}: must be {least} and below 0.5")
    if said.reference not in ("auto", "base", "start"):
        raise UsageError(f"preference.reference={said.reference}: is one of auto, base, start")
    if said.reference == "base" and not recipe.lora.rank and recipe.lora.adapter is None:
        raise UsageError("preference.reference=base: is the model without adapters, and there are none; start it is")
    sorted_pairs = len(recipe.data.sources) > 1 and "aot" in names
    for key, value, why in (
        ("train.z_loss", recipe.train.z_loss, "is added to token losses, and these are of answers"),
        (
            "data.sources",
            sorted_pairs and len(recipe.data.sources),
            "aot compares all pairs sorted, not those of a source",
        ),
        ("data.overlong", recipe.data.overlong != "drop" and recipe.data.overlong, "a pair cannot be cut"),
        ("eval.metrics", recipe.eval.metrics, "are of conversations"),
    ):
        if value:
            raise UsageError(f"{key}={value}: {why}; leave it out with preference.loss")
    if recipe.train.samples is not None and not isinstance(recipe.train.samples, str):
        raise UsageError(f"train.samples={recipe.train.samples}: name a file of prompts with preference.loss")


def _check_samples(recipe: Recipe) -> None:
    """What is answered while a model trains."""
    train = recipe.train
    asked = {"train.samples": train.samples, "eval.metrics": recipe.eval.metrics}
    for key, value in asked.items():
        if value in (None, []):
            continue
        if not train.eval_every:
            raise UsageError(f"{key}={value}: is answered at evaluations; set train.eval_every")
        if key == "eval.metrics" or isinstance(value, int):
            _check_questions(recipe, key)
    if isinstance(train.samples, str) and not Path(train.samples).is_file():
        raise UsageError(f"train.samples={train.samples}: not a file")
    if (train.samples is not None and not isinstance(train.samples, str | int)) or train.samples is True:
        raise UsageError(f"train.samples={train.samples}: is a file of prompts, or a number of samples")
    if isinstance(train.samples, int) and train.samples < 1:
        raise UsageError(f"train.samples={train.samples}: must be at least 1")


def _check_questions(recipe: Recipe, key: str) -> None:
    """Of prompts out of the evaluation data: an answer that is wanted is one that is learnt, from its beginning."""
    for name in ("supervise_thinking", "supervise_tool_calls"):
        if not getattr(recipe.data, name):
            raise UsageError(f"{key}: what is learnt of an answer is what is asked for; leave data.{name}=false out")


def _check_metrics(recipe: Recipe) -> None:
    said = recipe.eval
    find_metrics(said.metrics, "eval.metrics")
    if said.best not in ("loss", *said.metrics):
        raise UsageError(
            f"eval.best={said.best}: is loss, or one of eval.metrics ({', '.join(said.metrics) or 'none'})"
        )
    if said.best != "loss" and not recipe.train.patience:
        raise UsageError(f"eval.best={said.best}: is what train.patience goes by; set it")


def _check_drafter(recipe: Recipe) -> None:
    said, frozen = recipe.drafter, recipe.drafter.target == "frozen"
    if said.path is None:
        if said != DrafterConfig():
            raise UsageError("drafter: its keys need drafter.path")
        if recipe.export.drafter is not None:
            raise UsageError("export.drafter needs drafter.path")
        return
    for key in ("cross_entropy", "kl", "centroids"):
        if getattr(said, key) < 0:
            raise UsageError(f"drafter.{key}={getattr(said, key)}: must be at least 0")
    if said.steps < 1 or not (said.cross_entropy or said.kl):
        raise UsageError("drafter: steps is at least 1, and cross_entropy or kl above 0")
    if said.target not in ("frozen", "trained"):
        raise UsageError(f"drafter.target={said.target}: is frozen or trained")
    for key, given in (
        ("preference.loss", recipe.preference.loss),
        ("train.z_loss", recipe.train.z_loss),
        ("train.aux_loss", recipe.train.aux_loss),
        ("parallel.overlap", recipe.parallel.overlap),
    ):
        if given:
            raise UsageError(f"{key} does not go with drafter.path; leave it out")
    for key, given, why in (
        ("lora", recipe.lora.rank or recipe.lora.adapter, ""),
        ("model.freeze", recipe.model.freeze, ""),
        ("eval.metrics", recipe.eval.metrics, ", and says the same at every evaluation"),
        ("export.drafter", recipe.export.drafter, ", and export.hf is the drafter"),
        ("drafter.detach=false", not said.detach, ""),
    ):
        if frozen and given:
            raise UsageError(f"{key}: the model is frozen{why}; drafter.target=trained trains it with its drafter")


def _check_export(recipe: Recipe) -> None:
    """An export replaces the folder that it names, when all is done."""
    said = recipe.export
    others = {
        "output": recipe.output,
        "model.hf": recipe.model.hf,
        "model.megatron": recipe.model.megatron,
        "drafter.path": recipe.drafter.path,
    }
    for export_key, where in (("export.hf", said.hf), ("export.drafter", said.drafter)):
        if where is None:
            continue
        target = Path(where).resolve()
        for key, name in others.items():
            folder = None if name is None else Path(name).resolve()
            if folder is not None and (target.is_relative_to(folder) or folder.is_relative_to(target)):
                raise UsageError(f"{export_key}={where}: is {key}={name}, or one lies inside the other")
        others[export_key] = where


def _check_sync(recipe: Recipe) -> None:
    said = recipe.sync
    if said.every < 1:
        raise UsageError(f"sync.every={said.every}: must be at least 1")
    if said.url is None and said.every != 1:
        raise UsageError(f"sync.every={said.every}: needs sync.url, a vLLM server")
    if said.url is not None and recipe.drafter.path is not None and recipe.drafter.target == "frozen":
        raise UsageError(f"sync.url={said.url}: the weights of the model do not change with drafter.target=frozen")


def check_startable(recipe: Recipe, world_size: int) -> None:
    """`check_recipe`, and that there is data. Raises a BridgeError."""
    check_recipe(recipe, world_size)
    check_data(recipe)


def check_data(recipe: Recipe) -> None:
    """Raise UsageError where a recipe names no data, none to evaluate on, or some that it would never use."""
    if recipe.data.path is None and not recipe.data.sources:
        raise UsageError("data.path is not set; add data.path=FILE (JSONL or Parquet of conversations)")
    check_sources(recipe)
    data, every = recipe.data, recipe.train.eval_every
    named = {"data.eval": data.eval, "data.eval_split": data.eval_split, "data.val_fraction": data.val_fraction}
    given = [key for key, value in named.items() if value]
    if every and not given:
        raise UsageError(f"train.eval_every={every} needs data: set {', '.join(named)}")
    _check_samples(recipe)
    if given and not every:
        raise UsageError(f"{given[0]} is evaluated every train.eval_every steps, which is 0; set it")
