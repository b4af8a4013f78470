"""Drafters for the tests: what ranks run, and what transformers' classes give for the same."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from bridge.convert.live import load_from_hf
from bridge.geometry import Geometry, bound, producers
from bridge.hf.folder import HfFolder
from bridge.mapping import table_for
from bridge.megatron.drafter import Gemma4Drafter, TargetEmbedding, drafter_groups, drafter_layout
from bridge.megatron.drafting import TargetPass, draft, run_target
from bridge.megatron.model import Gemma4Model
from bridge.megatron.parallel import Parallel, initialize
from bridge.megatron.provider import Gemma4Provider
from bridge.verify.reference import load_hf


@dataclass(frozen=True)
class Pair:
    """A target and its drafter, HF folders, and the layout of the target."""

    target: Path
    drafter: Path
    parallel: Parallel = field(default_factory=Parallel)


def load_drafter(folder: Path) -> Any:
    """transformers' own, float32, eager."""
    name = Geometry.from_folder(folder).architecture
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def build_pair(pair: Pair) -> tuple[list[Gemma4Model], Gemma4Drafter | None]:
    """This rank's chunks of the target, and on the last stage the drafter; float32."""
    groups = initialize(pair.parallel)
    target = Geometry.from_folder(pair.target)
    geometry = bound(Geometry.from_folder(pair.drafter), target)
    overrides: dict[str, Any] = {"perform_initialization": False}
    published = tuple(producers(target.layers).values())
    provider = Gemma4Provider(target, pair.parallel, torch.float32, overrides=overrides | {"published_kv": published})
    chunks = provider.build(groups)
    with HfFolder(pair.target) as folder:
        load_from_hf(chunks, table_for(target), folder)
    alone = drafter_groups(groups)
    if not chunks[-1].post_process:
        return chunks, None
    own = Gemma4Provider(geometry, drafter_layout(pair.parallel), torch.float32, overrides=overrides)
    (drafter,) = own.build(alone)
    assert isinstance(drafter, Gemma4Drafter)
    with HfFolder(pair.drafter) as folder:
        load_from_hf([drafter], table_for(geometry), folder)
    return chunks, drafter


def drafted(pair: Pair, input_ids: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """On a rank of one stage: (logits [b, s, vocab], states [b, s, H]) of each step behind every token."""
    (chunk,), drafter = build_pair(pair)
    assert drafter is not None
    found = []
    with torch.no_grad():
        target = run_target(chunk, input_ids)
        assert isinstance(target, TargetPass)
        for hidden, states in draft(drafter, TargetEmbedding([chunk]), target, steps):
            if pair.parallel.sequence_parallel:
                hidden, states = (
                    gather_from_sequence_parallel_region(x, group=drafter.pg_collection.tp) for x in (hidden, states)
                )
            logits = drafter.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
            found.append((logits.transpose(0, 1).clone(), states.transpose(0, 1).clone()))
    return found


def drafted_with_transformers(pair: Pair, input_ids: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """The same of transformers, one position after the other; of positions that have `steps` tokens behind them."""
    target, drafter = (
        load_hf(pair.target, Geometry.from_folder(pair.target), torch.float32).eval(),
        load_drafter(pair.drafter),
    )
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(steps)]
    with torch.no_grad():
        output = target(
            input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False, output_hidden_states=True,
            return_shared_kv_states=True,
        )  # fmt: skip
        embeddings = target.get_input_embeddings()(input_ids)
        for t in range(input_ids.shape[1] - steps):
            kv = {kind: tuple(x[:, :, : t + 1] for x in pair) for kind, pair in output.shared_kv_states.items()}
            states = output.hidden_states[-1][:, t : t + 1]
            for step in range(1, steps + 1):
                given = torch.cat([embeddings[:, t + step : t + step + 1], states], dim=-1)
                position = torch.full((len(input_ids), 1), t + 1)
                made = drafter(inputs_embeds=given, position_ids=position, shared_kv_states=kv, use_cache=False)
                states = made.last_hidden_state
                # What it fills the words of other clusters with is below all that it computes in the call.
                filler = made.logits.amin() if drafter.config.use_ordered_embeddings else torch.inf
                found[step - 1][0].append(made.logits.masked_fill(made.logits == filler, -torch.inf))
                found[step - 1][1].append(states)
    return [(torch.cat(logits, 1), torch.cat(states, 1)) for logits, states in found]


def with_layout(pair: Pair, parallel: Parallel) -> Pair:
    return replace(pair, parallel=parallel)
