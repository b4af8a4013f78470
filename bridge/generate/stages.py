"""One step through all pipeline stages: what each rank does with its chunks of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from bridge.megatron.embedding import head_weight
from bridge.megatron.kv_cache import CachedStep
from bridge.megatron.model import Gemma4Model


class StepOutput(NamedTuple):
    """Of [n] tokens: logits [n, vocab], float32, and states [n, h] behind the final norm."""

    logits: Tensor
    states: Tensor


def run_step(
    chunks: Sequence[Gemma4Model],
    groups: ProcessGroupCollection,
    step: CachedStep,
    input_ids: Tensor,
    embeddings: Tensor | None,
) -> StepOutput | None:
    """What the model gives of the tokens whose output is wanted, on every rank of the last stage; None elsewhere."""
    return through_stages(
        chunks,
        groups,
        input_ids,
        embeddings,
        visibility=step,
        output_processor=_output,
        output_processor_context=step.outputs,
    )


def through_stages(
    chunks: Sequence[Gemma4Model],
    groups: ProcessGroupCollection,
    input_ids: Tensor,
    embeddings: Tensor | None,
    **inputs: Any,
) -> Any:
    """What the last stage's output processor gives, on every rank of that stage; None elsewhere.

    `input_ids` [1, n] on every stage; `embeddings` [n (/tp), 1, h] on the first, None elsewhere; `inputs`: other
    arguments of the model. Stage after stage, as many as there are chunks on all pipeline ranks: a step is short, and
    one alone is in flight.
    """
    pp_rank, pp_size = groups.pp.rank(), groups.pp.size()
    config = chunks[0].config
    tokens = input_ids.shape[1] // (groups.tp.size() if config.sequence_parallel else 1)
    payload: Tensor | None = None
    for stage in range(pp_size * len(chunks)):
        if stage % pp_size != pp_rank:
            continue
        chunk = chunks[stage // pp_size]
        if stage:
            shape = (tokens * config.pipeline_payload, 1, config.hidden_size)
            payload = torch.empty(shape, dtype=config.params_dtype, device=input_ids.device)
            dist.recv(payload, group=groups.pp, group_src=(stage - 1) % pp_size)
            chunk.set_input_tensor(payload)
        output = chunk(
            input_ids,
            decoder_input=embeddings if stage == 0 else None,
            **inputs,
        )
        if stage == pp_size * len(chunks) - 1:
            return output
        dist.send(output.contiguous(), group=groups.pp, group_dst=(stage + 1) % pp_size)
    return None


def _output(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    scale_logits: Any,
    config: Any,
    context: int,
    **unused: Any,
) -> StepOutput:
    """As Megatron's GPTModel calls an `output_processor`; `hidden_states` are of `context` tokens, and padding.

    `unused` are the arguments of other output processors.
    """
    if config.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=output_layer.tp_group)
    weight = head_weight(output_layer, output_weight)
    states = hidden_states[:context, 0]
    logits = scale_logits(states @ weight.t())
    whole = gather_from_tensor_model_parallel_region(logits, group=output_layer.tp_group)
    # Ranks may hold rows behind the vocabulary, so that it divides among them.
    return StepOutput(whole[:, : config.geometry.vocab_size].float(), states)
