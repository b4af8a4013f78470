"""One call of generation for ranks that start for it: what model, in which layout, and the rows.

The process that asks does not import Megatron: that takes seconds, and only the ranks need it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron.core.process_groups_config import ProcessGroupCollection

    from bridge.generate.speculative import Speculator
    from bridge.megatron.model import Gemma4Model
    from bridge.megatron.provider import Gemma4Provider


@dataclass(frozen=True)
class ModelTask:
    """A model for ranks to build. `weights` is an HF folder, or the weights folder of a Megatron checkpoint.

    `adapter`: a PEFT folder or a Megatron adapter, which the model gets beside its weights; `dtype` is torch's name.
    `drafter`: a drafter of it, bound to it, which proposes `draft_tokens` tokens at once.
    """

    geometry: Geometry
    weights: Path
    megatron: bool
    parallel: Parallel = field(default_factory=Parallel)
    dtype: str = "bfloat16"
    adapter: Path | None = None
    drafter: ModelTask | None = None
    draft_tokens: int = 4


def provider_of(task: ModelTask) -> Gemma4Provider:
    """What builds the model of a task. Raises ParallelError where the layout does not fit it."""
    import torch

    from bridge.megatron.provider import Gemma4Provider

    overrides: dict[str, Any] = {"perform_initialization": False}
    return Gemma4Provider(task.geometry, task.parallel, getattr(torch, task.dtype), overrides=overrides)


def build_model(task: ModelTask) -> tuple[list[Gemma4Model], ProcessGroupCollection]:
    """This rank's chunks, with their weights and adapters. torch.distributed must be initialised. Collective."""
    from bridge.lora.inject import attach, fill
    from bridge.lora.merge import check_copies, open_base
    from bridge.lora.peft_folder import open_peft
    from bridge.lora.source import is_peft_folder, open_megatron
    from bridge.lora.table import adapter_table
    from bridge.mapping import table_for
    from bridge.megatron.parallel import initialize

    groups = initialize(task.parallel)
    model = provider_of(task).build(groups)
    table = table_for(task.geometry)
    with ExitStack() as stack:
        _load(stack, task, model)
        if task.adapter is not None:
            peft = is_peft_folder(task.adapter)
            adapter = open_peft(stack, task.adapter, table) if peft else open_megatron(stack, task.adapter)
            if adapter.copies:
                check_copies(adapter, open_base(stack, task.weights).reader)
            adapters = adapter_table(table, adapter.targets)
            attach(model, adapters)
            fill(model, adapters, adapter.value)
    return model, groups


def build_speculator(task: ModelTask, chunks: list[Gemma4Model], groups: ProcessGroupCollection) -> Speculator | None:
    """What proposes tokens for a model that was built of `task`; None without a drafter. Collective."""
    from bridge.generate.speculative import Speculator
    from bridge.megatron.drafter import Gemma4Drafter, drafter_groups

    if task.drafter is None:
        return None
    drafter = None
    single_rank = drafter_groups(groups)
    if chunks[-1].post_process:
        (drafter,) = provider_of(task.drafter).build(single_rank)
        assert isinstance(drafter, Gemma4Drafter)
        drafter.eval()
        with ExitStack() as stack:
            _load(stack, task.drafter, [drafter])
    return Speculator(drafter, chunks, groups, task.draft_tokens)


def _load(stack: ExitStack, task: ModelTask, model: Sequence[Gemma4Model]) -> None:
    from bridge.convert.live import load_from_hf, load_from_megatron
    from bridge.convert.quantized_folder import open_hf_folder
    from bridge.mapping import table_for
    from bridge.torch_dist.reader import DistReader

    if task.megatron:
        load_from_megatron(model, table_for(task.geometry), stack.enter_context(DistReader(task.weights)))
    else:
        load_from_hf(model, table_for(task.geometry), stack.enter_context(open_hf_folder(task.weights)))
