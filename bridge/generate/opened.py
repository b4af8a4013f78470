"""What `generate` is pointed at: a Hugging Face folder or id, a Megatron checkpoint, a run, with or without adapter."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bridge.api import Gemma4Bridge
from bridge.convert.manifest import ADAPTER_FILE, MegatronFolder, is_megatron_folder
from bridge.errors import CheckpointError, UsageError
from bridge.generate.task import ModelTask
from bridge.hf.hub import resolve
from bridge.mapping import table_for
from bridge.megatron.parallel import Parallel

# Without a generation_config.json: end of text, end of a turn.
_STOP_IDS = (1, 106)


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
    name: str, *, adapter: str | None = None, parallel: Parallel | None = None, dtype: str = "bfloat16"
) -> OpenedModel:
    """Find out what `name` is; of a LoRA run the base comes from where the run says. Raises a BridgeError."""
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
    return opened if held is None else _with_adapter(opened, held)


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
