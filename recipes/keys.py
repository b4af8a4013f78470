"""The keys of a recipe: whether a nested dictionary has only such, and which one a wrong key was meant to be."""

from __future__ import annotations

import difflib
import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bridge.errors import UsageError

# What transformers, PEFT and TRL call the same thing.
_ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "min_learning_rate": "optimizer.min_lr",
    "warmup_steps": "optimizer.warmup",
    "lr_scheduler_type": "optimizer.schedule",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.clip",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "max_length": "train.seq_length",
    "max_seq_length": "train.seq_length",
    "gradient_accumulation_steps": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "eval_steps": "train.eval_every",
    "eval_path": "data.eval",
    "eval_file": "data.eval",
    "eval_dataset": "data.eval",
    "validation_file": "data.eval",
    "eval_batches": "train.eval_rows",
    "max_eval_samples": "train.eval_rows",
    "val_split": "data.val_fraction",
    "val_set_size": "data.val_fraction",
    "validation_split": "data.val_fraction",
    "test_size": "data.val_fraction",
    "early_stopping_patience": "train.patience",
    "compute_metrics": "eval.metrics",
    "metric_for_best_model": "eval.best",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "checkpoint.resume",
    "async_save": "checkpoint.async",
    "logging_steps": "log.every",
    "output_dir": "output",
    "model_name_or_path": "model.hf",
    "train_file": "data.path",
    "files": "data.path",
    "data_files": "data.path",
    "datasets": "data.sources",
    "dataset_mixer": "data.sources",
    "blend": "data.sources",
    "interleave_probs": "data.sources",
    "max_train_samples": "data.sources",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "target_parameters": "lora.parameters",
    "exclude_modules": "lora.exclude",
    "use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
    "loraplus_lr_ratio": "optimizer.lr_groups",
    "teacher_model_name_or_path": "distill.teacher",
    "loss_type": "preference.loss",
    "reward_funcs": "grpo.rewards",
    "max_completion_length": "grpo.max_new_tokens",
    "use_vllm": "grpo.engine",
    "vllm_server_base_url": "grpo.engine_url",
    "precompute_ref_log_probs": "preference.reference",
    "ref_model": "preference.reference",
}


# What a run minimises: a key of one of them means nothing in another.
_OBJECTIVES = ("preference.", "grpo.", "distill.", "drafter.")


def key_of(name: str) -> str:
    """The key of a field, which Python lets have no name of its own syntax: `async_` is `async`."""
    return name[:-1] if name.endswith("_") and keyword.iskeyword(name[:-1]) else name


def by_field(said: Any, schema: Any) -> Any:
    """A nested dictionary of keys (`check_keys`) by the names of the fields of `schema`."""
    return _renamed(said, schema, {key_of(name): name for name in get_type_hints(schema)}, by_field)


def by_key(said: Any, schema: Any) -> Any:
    """The inverse of `by_field`."""
    return _renamed(said, schema, {name: key_of(name) for name in get_type_hints(schema)}, by_key)


def _renamed(said: Any, schema: Any, names: Mapping[str, str], within: Callable[[Any, Any], Any]) -> Any:
    types = {key: kind for name, kind in get_type_hints(schema).items() for key in (name, key_of(name))}
    return {names[key]: within(value, types[key]) if is_dataclass(types[key]) else value for key, value in said.items()}


def check_keys(said: Any, schema: Any, where: str) -> None:
    """Every key of the nested dictionary `said` is one of the dataclass `schema`. Raises UsageError."""
    _check_group(said, schema, where, "", _all_keys(schema))


def meant(name: str, known: Sequence[str]) -> str:
    """«; did you mean …?» of the name that comes closest; nothing where none does."""
    close = difflib.get_close_matches(name, known, 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _check_group(said: Any, schema: Any, where: str, prefix: str, every: Sequence[str]) -> None:
    if not isinstance(said, dict):
        raise UsageError(f"{where}: {prefix.rstrip('.') or 'the recipe'} is a group of keys, not a value")
    types = {key_of(name): kind for name, kind in get_type_hints(schema).items()}
    names = [key_of(f.name) for f in fields(schema)]
    for key, value in said.items():
        if key not in names:
            raise UsageError(f"{where}: unknown key {prefix}{key}{_meant_key(prefix, str(key).lower(), names, every)}")
        if is_dataclass(types[key]):
            _check_group(value, types[key], where, f"{prefix}{key}.", every)
        elif (kind := _group_of_list(types[key])) is not None:
            if not isinstance(value, list):
                raise UsageError(f"{where}: {prefix}{key} is a list: {prefix}{key}=[{{path: FILE, weight: 1}}, ...]")
            for number, each in enumerate(value):
                at = f"{prefix}{key}[{number}]."
                _check_group(each, kind, where, at, every)
                try:
                    OmegaConf.merge(OmegaConf.structured(kind), each)
                except OmegaConfBaseException as error:  # which knows no more than the key within the element
                    raise UsageError(f"{where}: {at}{error.full_key}: {str(error.msg).splitlines()[0]}") from None


def _group_of_list(kind: Any) -> Any:
    """The group that a list is of; None of anything else."""
    of = get_args(kind)
    return of[0] if get_origin(kind) is list and is_dataclass(of[0]) else None


def _all_keys(schema: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, kind in get_type_hints(schema).items():
        keys += _all_keys(kind, f"{prefix}{name}.") if is_dataclass(kind) else [f"{prefix}{key_of(name)}"]
    return keys


def _meant_key(prefix: str, key: str, siblings: Sequence[str], every: Sequence[str]) -> str:
    """The key of the same group that looks like `key`, else the one of any group, else what the group has."""
    others = tuple(of for of in _OBJECTIVES if of != prefix) if prefix in _OBJECTIVES else ()
    elsewhere = _ELSEWHERE | {whole.rpartition(".")[2]: whole for whole in every if not whole.startswith(others)}
    whole = f"{prefix}{key}" if key in siblings else elsewhere.get(key)
    if whole is not None and (last := whole.rpartition(".")[2]) in siblings:
        whole = f"{prefix}{last}"  # groups may have a key of the same name
    if whole is not None:
        return f"; did you mean {whole}?"
    close = difflib.get_close_matches(key, siblings, 1, 0.6)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    # Another group's key is a guess: it has to be closer, and few mistype the first letter (`type` is not `dtype`).
    close = [near for near in difflib.get_close_matches(key, list(elsewhere), 3, 0.8) if near[0] == key[0]]
    return f"; did you mean {elsewhere[close[0]]}?" if close else f"; there are {', '.join(siblings)}"
