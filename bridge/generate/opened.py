"""What `generate` is pointed at: a Hugging Face folder or id, a Megatron checkpoint, a run, with or without adapter."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bridge.api import Gemma4Bridge
from bridge.convert.manifest import ADAPTER_FILE, MegatronFolder, is_megatron_folder
from bridge.errors import CheckpointError, GeometryError, UsageError
from bridge.generate.task import ModelTask
from bridge.geometry import bound
from bridge.hf.hub import resolve
from bridge.hf.json_file import read_object
from bridge.mapping import table_for
from bridge.megatron.layout import check_layout, drafter_layout
from bridge.megatron.parallel import Parallel

# Without a generation_config.json: end of text, end of a turn.
_STOP_IDS = (1, 106)
# Where a drafter's generation_config.json does not say how many tokens it proposes at once.
_DRAFT_TOKENS = 4


@dataclass(frozen=True)
class OpenedModel:
    """`assets`: the folder with tokenizer, processor, template and generation config.

    `notices`: what of the model's folder is not followed, and of the adapter's left out.
    """

    task: ModelTask
    assets: Path
    notices: tuple[str, ...] = ()


def stop_token_ids(assets: Path) -> tuple[int, ...]:
    """What ends an answer: `eos_token_id` of a folder's generation_config.json. Raises CheckpointError."""
    path = assets / "generation_config.json"
    if not path.is_file():
        return _STOP_IDS
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON with an eos_token_id ({error})") from None
    ids = [found] if isinstance(found, int) else found or []
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"{path}: eos_token_id is {found!r}, expected token ids")
    return tuple(ids)


def open_model(
    name: str,
    *,
    adapter: str | None = None,
    parallel: Parallel | None = None,
    dtype: str = "bfloat16",
    drafter: bool = False,
) -> OpenedModel:
    """Find out what `name` is; of a LoRA run the base comes from where the run says.

    Raises a BridgeError: also for a layout that the model does not allow, before ranks are there.

    `drafter`: whether it is to be one.
    """
    path = resolve(name)
    held = Path(adapter) if adapter is not None else None
    if held is not None and not held.is_dir():
        raise UsageError(f"--adapter {adapter}: not a folder")
    if is_megatron_folder(path) and (MegatronFolder.open(path).path / ADAPTER_FILE).is_file():
        from bridge.lora.source import base_of

        if held is not None:
            raise UsageError(f"{name}: is an adapter itself; with --adapter name its base, {base_of(path, None)}")
        return _with_adapter(open_model(base_of(path, None), parallel=parallel, dtype=dtype), path)
    layout = parallel or Parallel()
    if is_megatron_folder(path):
        checkpoint = MegatronFolder.open(path)
        opened = OpenedModel(ModelTask(checkpoint.geometry, checkpoint.weights, True, layout, dtype), checkpoint.hf)
    else:
        # A head on disk is compared with the embedding: where they differ the model is untied, as in transformers.
        bridge = Gemma4Bridge.from_hf(path)
        opened = OpenedModel(ModelTask(bridge.geometry, path, False, layout, dtype), path, bridge.notices)
    if drafter != (opened.task.geometry.drafter is not None):
        what = "is no drafter" if drafter else "is a drafter, which says nothing alone; generate takes it as --drafter"
        raise UsageError(f"{name}: {what}")
    if not drafter:  # that of a drafter depends on its target
        check_layout(opened.task.geometry, layout)
    return opened if held is None else _with_adapter(opened, held)


def with_drafter(opened: OpenedModel, name: str, draft_tokens: int | None) -> OpenedModel:
    """With a drafter: an HF folder or id, a Megatron checkpoint, a run. Raises a BridgeError.

    `draft_tokens`: how many tokens it proposes at once; None: what its generation config says, or 4.
    """
    target = opened.task
    found = open_model(name, parallel=drafter_layout(target.parallel), dtype=target.dtype, drafter=True)
    try:
        geometry = bound(found.task.geometry, target.geometry)
    except GeometryError as error:
        raise GeometryError(f"--drafter {name}: {error}") from None
    check_layout(geometry, found.task.parallel)
    tokens = _draft_tokens(found.assets) if draft_tokens is None else draft_tokens
    if tokens < 1:
        raise UsageError(f"--draft-tokens {tokens}: at least one token is proposed")
    task = replace(target, drafter=replace(found.task, geometry=geometry), draft_tokens=tokens)
    return replace(opened, task=task, notices=(*opened.notices, *found.notices))


def _draft_tokens(assets: Path) -> int:
    path = assets / "generation_config.json"
    given = read_object(path).get("num_assistant_tokens") if path.is_file() else None
    if given is not None and (type(given) is not int or given < 1):
        raise CheckpointError(f"{path}: num_assistant_tokens is {given!r}, expected a number above 0")
    return _DRAFT_TOKENS if given is None else given


def _with_adapter(opened: OpenedModel, path: Path) -> OpenedModel:
    """With an adapter that was looked at: what is wrong with it is said before ranks start."""
    from bridge.lora.peft_folder import open_peft
    from bridge.lora.source import is_peft_folder, open_megatron

    with ExitStack() as stack:
        if is_peft_folder(path):
            adapter = open_peft(stack, path, table_for(opened.task.geometry))
        else:
            adapter = open_megatron(stack, path)
    return replace(opened, task=replace(opened.task, adapter=path), notices=(*opened.notices, *adapter.notes))
