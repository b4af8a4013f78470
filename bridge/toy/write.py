"""`write_toy`: a random checkpoint of a Gemma 4 variant, as transformers would have saved it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, Unpack

from bridge.convert.atomic import staged
from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.hf.tensors import TensorSpec
from bridge.hf.writer import HfWriter
from bridge.toy.assets import write_assets
from bridge.toy.config import VARIANTS, ToyConfig, toy_config
from bridge.toy.weights import Shape, chunks, is_float32_in_mixed, is_integer

__all__ = ["VARIANTS", "write_toy"]

_ON_DISK: dict[str, str] = {"bfloat16": "BF16", "float32": "F32"}


class ToyOptions(TypedDict, total=False):
    """What a toy is of: see `toy_config`.

    text_only: the causal-LM class instead of the multimodal one.
    full_size: the published geometry, streamed: memory stays bounded.
    untied: with an `lm_head.weight` of its own.
    vocab_size: rows of the embedding tables and the head; the tokenizer stays as it is.
    ple_vocab_size: rows of the per-layer table, where they are to be others.
    head_dim: of sliding layers, with global heads of twice as much and a window of 16.
    drafter: the toy's drafter in its place: a small model that drafts its tokens (docs/drafters.md).
    ordered: whether the drafter's head computes the logits of a part of the vocabulary, as the published ones of e2b
        and e4b do; None: as those do.
    """

    text_only: bool
    full_size: bool
    untied: bool
    vocab_size: int | None
    ple_vocab_size: int | None
    head_dim: int | None
    drafter: bool
    ordered: bool | None


def write_toy(
    variant: str,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    mixed_dtypes: bool = False,
    dead_kv: bool = True,
    overwrite: bool = False,
    max_shard_size: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
    **options: Unpack[ToyOptions],
) -> None:
    """Write a checkpoint with random weights: safetensors, config, tokenizer, chat template, processor.

    Args:
        variant: one of `VARIANTS`.
        folder: the target; complete when this returns, untouched when it raises.
        seed: weights depend on variant, seed, tensor name and dtype only.
        dtype: of all tensors, and in config.json.
        mixed_dtypes: norms, router scales and some projections in float32, the rest in bfloat16.
        dead_kv: with the k_proj, v_proj and k_norm that published E2B and E4B files carry in KV-shared layers, and
            that no model reads.
        overwrite: replace an existing folder.
        max_shard_size: of a weight file, in bytes.
        progress: called with (bytes written, bytes in all).
        options: see `ToyOptions`.

    Raises:
        UsageError: an unknown variant or dtype, options that exclude each other, an existing target.
        CheckpointError: the folder cannot be written.
    """
    _check_dtype(dtype, mixed_dtypes)
    toy = toy_config(variant, **options)
    config, shapes = build(toy, dtype, dead_kv=dead_kv)
    specs = [TensorSpec(name, _stored(name, dtype, mixed_dtypes), shape) for name, shape in shapes.items()]
    total = sum(spec.nbytes for spec in specs)
    with staged(folder, plan=f"toy {uuid.uuid4()}", sources=[], needed_bytes=total, overwrite=overwrite) as stage:
        config.save_pretrained(stage.folder)
        write_assets(stage.folder, toy, full_size=options.get("full_size", False))
        with HfWriter(stage.folder, specs, max_shard_size) as writer:
            done = 0
            for spec in specs:
                for start, rows in chunks(spec.name, spec.shape, spec.dtype, variant, seed):
                    writer.write_rows(spec.name, start, rows)
                    done += rows.nbytes
                    if progress is not None:
                        progress(done, total)
            writer.finish()


def _check_dtype(dtype: str, mixed_dtypes: bool) -> None:
    if dtype not in _ON_DISK:
        raise UsageError(f"unknown dtype {dtype!r}, expected one of {', '.join(_ON_DISK)}")
    if mixed_dtypes and dtype != "bfloat16":
        raise UsageError(f"mixed_dtypes adds float32 tensors to bfloat16 ones, which dtype {dtype!r} excludes")


def _stored(name: str, dtype: str, mixed_dtypes: bool) -> str:
    if is_integer(name):
        return "I64"
    return "F32" if mixed_dtypes and is_float32_in_mixed(name) else _ON_DISK[dtype]


def build(toy: ToyConfig, dtype: str, *, dead_kv: bool) -> tuple[Any, dict[str, Shape]]:
    """The transformers config to save, and the tensors on disk (name -> shape), sorted by name.

    Both come from the transformers class itself, built without memory, and its own way of naming tensors on disk.
    """
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    geometry = Geometry.from_dict(toy.written)
    config = transformers.CONFIG_MAPPING[toy.model_type].from_dict(toy.written)
    model_class = getattr(transformers, geometry.architecture)
    config.architectures = [geometry.architecture]
    # As after from_pretrained: the sub-configs say the dtype too.
    parts = [getattr(config, name) for name in config.sub_configs]
    for part in [config, *(part for part in parts if part is not None)]:
        part.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        model = model_class(config)
    state = model.state_dict()
    for name in model.all_tied_weights_keys if geometry.tied else ():
        state.pop(name, None)
    shapes = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
    if dead_kv and geometry.drafter is None:
        shapes |= _dead_kv(geometry)
    return config, dict(sorted(shapes.items()))


def _dead_kv(geometry: Geometry) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for layer in geometry.layers:
        if layer.shares_kv:
            attention = f"{geometry.prefix}layers.{layer.index}.self_attn."
            shapes[f"{attention}k_proj.weight"] = (layer.kv_size, geometry.hidden_size)
            shapes[f"{attention}v_proj.weight"] = (layer.kv_size, geometry.hidden_size)
            shapes[f"{attention}k_norm.weight"] = (layer.head_dim,)
    return shapes
