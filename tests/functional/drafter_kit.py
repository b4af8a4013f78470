"""Drafters for the tests: what ranks run, and what transformers' classes give for the same."""

from __future__ import annotations

import unittest.mock
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from bridge import Gemma4Bridge
from bridge.convert.live import Gatherer, iter_hf, load_from_hf
from bridge.generate import speculative
from bridge.generate.loop import Generator
from bridge.generate.row import GeneratedRow
from bridge.generate.rows import Completion, Prompt
from bridge.generate.sampling import SamplingOptions, draw
from bridge.generate.task import ModelTask, build_model, build_speculator
from bridge.geometry import Geometry, bound, producers
from bridge.hf.folder import HfFolder
from bridge.mapping import table_for
from bridge.megatron.draft_loss import DraftLoss, draft_loss
from bridge.megatron.drafter import Gemma4Drafter, TargetEmbedding, drafter_groups
from bridge.megatron.drafting import TargetPass, draft, run_target, shifted
from bridge.megatron.layout import drafter_layout
from bridge.megatron.loss import LossContext
from bridge.megatron.model import Gemma4Model
from bridge.megatron.parallel import Parallel, initialize
from bridge.megatron.provider import Gemma4Provider
from bridge.verify.media import media_sample
from bridge.verify.reference import load_hf, with_masks


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
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
            output_hidden_states=True,
            return_shared_kv_states=True,
        )
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


def task_of(pair: Pair, draft_tokens: int) -> ModelTask:
    """The pair as `generate` builds it, float32."""
    target = Geometry.from_folder(pair.target)
    geometry = bound(Geometry.from_folder(pair.drafter), target)
    own = ModelTask(geometry, pair.drafter, False, drafter_layout(pair.parallel), "float32")
    return ModelTask(target, pair.target, False, pair.parallel, "float32", drafter=own, draft_tokens=draft_tokens)


def answer_with_drafter(
    task: ModelTask, prompts: Sequence[Prompt], options: SamplingOptions, **settings: Any
) -> list[Completion]:
    """On a rank. Without a drafter in `task`: one token at a time."""
    model, groups = build_model(task)
    return Generator(model, groups, speculator=build_speculator(task, model, groups), **settings).generate(
        prompts, options
    )


def answer_accepting_all(
    task: ModelTask, prompts: Sequence[Prompt], options: SamplingOptions, **settings: Any
) -> list[Completion]:
    """`answer_with_drafter` that is wrong: every token that is drafted counts as accepted."""

    def sampled(wanted: Tensor, proposed: list[int], _: Any, row: GeneratedRow, options: SamplingOptions) -> list[int]:
        return [*proposed, int(draw(wanted[-1:], [row.drawn(options, len(proposed))]))]

    with unittest.mock.patch.object(speculative, "sampled", sampled):
        return answer_with_drafter(task, prompts, options, **settings)


def fit(pair: Pair, rows: Sequence[Sequence[int]], out: Path, steps: int = 120, drafts: int = 4) -> float:
    """On a rank: a drafter that was tuned to guess `rows`, written to `out` as an HF folder; the last loss.

    Plain torch around `draft`, so that tests of generation need no trainer.
    """
    (chunk,), drafter = build_pair(pair)
    assert drafter is not None
    drafter.train()
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    target = run_target(chunk, ids, attention_mask=mask)
    assert isinstance(target, TargetPass)
    embed, optimizer = TargetEmbedding([chunk]), torch.optim.Adam(drafter.parameters(), 4e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for step, (hidden, _) in enumerate(draft(drafter, embed, target, drafts), 1):
            labels = torch.where(shifted(mask, step + 1, 0) > 0, shifted(ids, step + 1, 0), -100).t().flatten()
            hidden = hidden.flatten(0, 1)
            loss = loss + torch.nn.functional.cross_entropy(hidden @ drafter.head.t(), labels)
            if drafter.masked_embedding is not None:
                clusters = drafter.masked_embedding.token_ordering.argsort() // (
                    drafter.config.geometry.vocab_size // drafter.masked_embedding.centroids.out_features
                )
                own = torch.where(labels >= 0, clusters[labels.clamp(min=0)], -100)
                loss = loss + torch.nn.functional.cross_entropy(drafter.masked_embedding.centroids(hidden), own)
        loss.backward()
        optimizer.step()
    bridge = Gemma4Bridge.from_hf(pair.drafter)
    bridge.save_hf([drafter], out, overwrite=True)
    return float(loss)


class _Counted(SinglePositionMultiTokenCandidateGenerator):  # type: ignore[misc]
    """transformers' own, which notes [proposed, accepted] of each pass.

    `as_meant`: without the keys and values of tokens that were not accepted. transformers 5.24 leaves those of the last
    pass in what it hands to the drafter: one of them before the window is full, and behind that all.
    """

    as_meant = True
    rounds: list[tuple[int, int]] = []  # noqa: RUF012 - of the run in progress

    def get_candidates(self, input_ids: Tensor, model_outputs: Any = None, n_last_matches: int = 0, **more: Any) -> Any:
        wrong = self._proposed - int(n_last_matches) if hasattr(self, "_proposed") else 0
        if self.as_meant and wrong:
            kept = {kind: [x[:, :, :-wrong] for x in kv] for kind, kv in model_outputs.shared_kv_states.items()}
            model_outputs.shared_kv_states = kept
        found = super().get_candidates(input_ids, model_outputs=model_outputs, n_last_matches=n_last_matches, **more)
        self._proposed = found[0].shape[1] - input_ids.shape[1]
        return found

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        if scores.shape[1] > 1 or self.rounds or not self.is_main_model_prefill:
            self.rounds.append((self._proposed, int(num_matches)))


def counted_with_transformers(
    pair: Pair, prompts: Sequence[Prompt], tokens: int, drafts: int, as_meant: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """On a rank: greedy answers with an assistant model, and the counts of each pass behind the prompt's."""
    target = load_hf(pair.target, Geometry.from_folder(pair.target), torch.float32).eval()
    drafter = load_drafter(pair.drafter)
    drafter.generation_config.num_assistant_tokens = drafts
    found = []
    with unittest.mock.patch.object(
        transformers.generation.utils, "SinglePositionMultiTokenCandidateGenerator", _Counted
    ):
        for prompt in prompts:
            _Counted.as_meant, _Counted.rounds = as_meant, []
            ids = torch.tensor([prompt.ids])
            output = target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                assistant_model=drafter,
            )
            found.append((output[0, len(prompt.ids) :].tolist(), list(_Counted.rounds)))
    return found


@dataclass(frozen=True)
class Rows:
    """Rows [b, s] of documents that begin at `starts` of each row, and their labels: the token behind each.

    `media`: what a model takes beside them; placeholders are no labels.
    """

    input_ids: Tensor
    starts: tuple[int, ...] = (0,)
    packed: bool = False
    media: dict[str, Tensor] = field(default_factory=dict)
    placeholders: tuple[int, ...] = ()

    @classmethod
    def of_kind(cls, folder: Path, kind: str) -> Rows:
        """One row with media and, in the place of its padding, text behind it, as long as every layout can divide."""
        geometry = Geometry.from_folder(folder)
        sample = media_sample(folder, geometry, 3, [kind], 8)
        more = 16 + int((sample.attention_mask == 0).sum())
        ids = sample.input_ids[:, : int(sample.attention_mask.sum())]
        ids = torch.cat([ids, 8 + torch.arange(more)[None] * 5 % 100], dim=1)
        features = sample.features()
        kinds = torch.nn.functional.pad(features["mm_token_type_ids"], (0, 16))
        return cls(ids, media=features | {"mm_token_type_ids": kinds}, placeholders=tuple(geometry.placeholder_ids))

    @property
    def text(self) -> Tensor:
        """What a drafter is given: padding where a placeholder stands."""
        return self.input_ids.masked_fill(torch.isin(self.input_ids, torch.tensor(self.placeholders)), 0)

    @property
    def documents(self) -> list[tuple[int, int]]:
        return list(zip(self.starts, (*self.starts[1:], self.input_ids.shape[1]), strict=True))

    @property
    def labels(self) -> Tensor:
        """Without the last token of a document, and some in its middle."""
        labels = shifted(self.input_ids, 1, -100)
        for start, stop in self.documents:
            labels[:, stop - 1] = -100
            labels[:, start + 1 : start + 3] = -100
        return labels.masked_fill(torch.isin(labels, torch.tensor(self.placeholders)), -100)

    def given(self) -> dict[str, Any]:
        """What the model takes: packed, in one row; else documents of a row are not told apart."""
        if not self.packed:
            return {"input_ids": self.input_ids, **self.media}
        assert len(self.input_ids) == 1
        bounds = torch.tensor([*self.starts, self.input_ids.shape[1]], dtype=torch.int32)
        return {"input_ids": self.input_ids, "packed_seq_params": PackedSeqParams("thd", bounds, bounds)}


def gradients(pair: Pair, rows: Rows, asked: DraftLoss) -> dict[str, Tensor]:
    """On every rank: the gradients of a drafter's parameters, of the mean over tokens with a label, by HF names; and
    of one rank alone the "loss"."""
    chunks, drafter = build_pair(pair)
    config = chunks[0].config
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stage, stages = groups.pp.rank(), groups.pp.size()
    given = rows.given()
    (chunk,) = chunks
    if stage:
        length = rows.input_ids.shape[1] // (pair.parallel.tp if pair.parallel.sequence_parallel else 1)
        payload = torch.empty(length * config.pipeline_payload, len(rows.input_ids), config.hidden_size)
        dist.recv(payload, group=groups.pp, group_src=stage - 1)
        chunk.set_input_tensor(payload)
    target = run_target(chunk, **given)
    if stage < stages - 1:
        assert isinstance(target, Tensor)
        dist.send(target.contiguous(), group=groups.pp, group_dst=stage + 1)
    held: list[torch.nn.Module] = []
    if drafter is not None:
        assert isinstance(target, TargetPass)
        alone = drafter.pg_collection
        ddp = DistributedDataParallel(
            drafter.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), drafter, pg_collection=alone
        )
        drafter.config.finalize_model_grads_func = None
        losses = draft_loss(ddp, TargetEmbedding(chunks), chunk, target, rows.labels, asked)
        losses.sum().backward()
        count = (target.take(rows.labels) != -100).sum()
        finalize_model_grads([ddp], count, pg_collection=alone)
        held, loss = [drafter], losses.detach().sum() / count
    table = table_for(bound(Geometry.from_folder(pair.drafter), Geometry.from_folder(pair.target)))
    found = iter_hf(Gatherer(held, table, lambda p: getattr(p, "main_grad", None)))
    alone_too = {"loss": loss} if dist.get_world_size() == 1 else {}
    return {name: gradient.clone() for name, gradient in found} | alone_too


def joint_gradients(pair: Pair, rows: Rows, asked: DraftLoss, detach: bool) -> dict[str, dict[str, Tensor]]:
    """On one rank: those of a "target" and its "drafter", trained at once, of the mean over tokens with a label."""
    (chunk,), drafter = build_pair(pair)
    assert drafter is not None
    target = run_target(chunk, **rows.given(), labels=rows.labels, loss=LossContext())
    assert isinstance(target, TargetPass) and target.losses is not None
    seen = target.detached() if detach else target
    drafts = draft_loss(drafter, TargetEmbedding([chunk]), chunk, seen, rows.labels, asked)
    loss = (target.losses.sum() + drafts.sum()) / (rows.labels != -100).sum()
    loss.backward()
    tables = table_for(Geometry.from_folder(pair.target)), table_for(drafter.config.geometry)
    found = {
        name: {key: gradient.clone() for key, gradient in iter_hf(Gatherer([model], table, lambda p: p.grad))}
        for name, model, table in zip(("target", "drafter"), (chunk, drafter), tables, strict=True)
    }
    found["drafter"]["loss"] = loss.detach()
    return found


def gradients_with_transformers(
    pair: Pair, rows: Rows, asked: DraftLoss, target: torch.nn.Module | None = None, detach: bool = True
) -> dict[str, Tensor]:
    """On a rank: the drafter's of a plain loop over transformers' classes, one token after the other.

    A `target` that is given gets its own gradients as well, those of its own losses and, unless `detach`, of drafts.
    """
    joint = target is not None
    target = target or load_hf(pair.target, Geometry.from_folder(pair.target), torch.float32).eval()
    drafter = load_drafter(pair.drafter)
    ordered, drafter.config.use_ordered_embeddings = drafter.config.use_ordered_embeddings, False
    seen: list[Tensor] = []
    drafter.post_projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    labels, count, total = rows.labels, int((rows.labels != -100).sum()), torch.zeros(())
    # That of the centroids is differentiated, and not told.
    untold = torch.zeros(())
    for start, stop in rows.documents if rows.packed else [(0, rows.input_ids.shape[1])]:
        ids, own = rows.input_ids[:, start:stop], labels[:, start:stop]
        with torch.set_grad_enabled(joint):
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **rows.media}
            given = with_masks(target, given) if rows.media else given
            output = target(**given, use_cache=False, output_hidden_states=True, return_shared_kv_states=True)
        with torch.no_grad():
            embeddings = target.get_input_embeddings()(rows.text[:, start:stop])
            wanted = output.logits.float().log_softmax(-1)
        if joint:
            losses = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), own.flatten(), reduction="sum")
            total = total + asked.steps * losses
        for t in range(stop - start):
            kv = {kind: tuple(x[:, :, : t + 1] for x in both) for kind, both in output.shared_kv_states.items()}
            states = output.hidden_states[-1][:, t : t + 1]
            if detach:
                kv, states = {kind: tuple(x.detach() for x in both) for kind, both in kv.items()}, states.detach()
            for step in range(1, min(asked.steps, stop - start - 1 - t) + 1):
                inputs = torch.cat([embeddings[:, t + step : t + step + 1], states], dim=-1)
                position = torch.full((len(ids), 1), t + 1)
                made = drafter(inputs_embeds=inputs, position_ids=position, shared_kv_states=kv, use_cache=False)
                states, label = made.last_hidden_state, own[:, t + step]
                log_q = made.logits[:, 0].float().log_softmax(-1)
                here = (label != -100).float()
                loss = asked.cross_entropy * -log_q.gather(1, label.clamp(min=0)[:, None])[:, 0]
                log_p = wanted[:, t + step]
                loss = loss + asked.kl * (log_p.exp() * (log_p - log_q)).sum(-1)
                if ordered and asked.centroids:
                    size = len(log_q[0]) // drafter.config.num_centroids
                    cluster = drafter.masked_embedding.token_ordering.argsort()[label.clamp(min=0)] // size
                    centroids = drafter.masked_embedding.centroids(seen[-1][:, 0].detach()).log_softmax(-1)
                    untold = untold - asked.centroids * (centroids.gather(1, cluster[:, None])[:, 0] * here).sum()
                total = total + (loss * here).sum()
    loss = total / asked.steps / count
    (loss + untold / asked.steps / count).backward()
    return {name: p.grad for name, p in drafter.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


def joint_gradients_with_transformers(
    pair: Pair, rows: Rows, asked: DraftLoss, detach: bool
) -> dict[str, dict[str, Tensor]]:
    """On a rank: `joint_gradients` of transformers' classes."""
    target = load_hf(pair.target, Geometry.from_folder(pair.target), torch.float32).eval()
    drafter = gradients_with_transformers(pair, rows, asked, target, detach)
    return {
        "target": {name: p.grad for name, p in target.named_parameters() if p.grad is not None},
        "drafter": drafter,
    }
