"""LoRA runs for the tests: the same adapters, batches and steps in PEFT on transformers and here.

What ranks call lives here, so that they import nothing but this.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridge.geometry import Geometry
from bridge.hf.folder import HfFolder
from bridge.lora.initial import initial_values
from bridge.lora.spec import Factor, LoraSpec, Target
from bridge.lora.table import Values, adapter_table, part_name
from bridge.lora.targets import resolve
from bridge.mapping import table_for
from bridge.verify.sample import IGNORE, VerificationSample

from .training_kit import RouterMargins

LR, WEIGHT_DECAY, CLIP, SEED = 1e-3, 0.01, 1.0, 1
# Adam makes a whole step of a gradient above eps: this one keeps it from doing so with float32 noise (1e-8 here).
BETAS, EPS = (0.9, 0.95), 1e-6


def whole_spec(geometry: Geometry, **options: Any) -> LoraSpec:
    """Everything that can have an adapter: all linears, experts too, of unequal ranks."""
    parameters = ("experts.gate_up_proj", "experts.down_proj") if geometry.moe is not None else ()
    said: dict[str, Any] = {
        "rank": 4,
        "alpha": 8.0,
        "targets": "all-linear",
        "parameters": parameters,
        "rank_pattern": {"self_attn.k_proj": 2, "mlp.up_proj": 6},
        "alpha_pattern": {"o_proj": 3.0},
    }
    return LoraSpec(**(said | options))


def moved_values(seed: int, toy: Path) -> Values:
    """PEFT's initial values, but what begins at zero does not, so that the first step has a gradient for all.

    Magnitudes: the norms of the weights and a little.
    """
    initial, weights = initial_values(seed), HfFolder(toy)

    def value(target: Target, part: Factor) -> Tensor:
        if part == "weight":
            whole = np.empty(target.shape, dtype=np.float32)
            weights.read_rows(target.name, 0, target.shape[0], whole)
            return torch.from_numpy(whole)
        if part == ("B" if target.kind == "embedding" else "A"):
            return initial(target, part) * (0.1 if part == "B" else 1)
        digest = hashlib.sha256(f"{part} {seed} {target.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        noise = torch.randn(target.shape_of(part), generator=generator) * 0.05
        if part != "magnitude":
            return noise
        whole = np.empty(target.shape, dtype=np.float32)
        weights.read_rows(target.name, 0, target.shape[0], whole)
        return torch.from_numpy(whole).norm(dim=0 if target.kind == "embedding" else 1) * (1 + noise)

    return value


@dataclass(frozen=True)
class Training:
    """`samples`: a global batch for every step in turn. `seed` and `moved`: of the initial values."""

    toy: Path
    spec: LoraSpec
    samples: Sequence[VerificationSample]
    steps: int
    moved: bool = False
    seed: int = SEED

    @property
    def rows(self) -> int:
        return self.samples[0].input_ids.shape[0]

    def sample(self, step: int) -> VerificationSample:
        return self.samples[step % len(self.samples)]

    def values(self) -> Values:
        return moved_values(self.seed, self.toy) if self.moved else initial_values(self.seed)


@dataclass
class Result:
    """Losses and gradient norms a step; by the names of an adapter table, the first gradients and the last values.

    Where several ranks hold a replica, each has its part of the summed gradients only: then there are none here.
    `margin`: see `training_kit.Plain`.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    margin: float = math.inf
    gradients: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)


def peft_config(spec: LoraSpec, geometry: Geometry) -> Any:
    """The same adapters as PEFT says them."""
    import peft

    return peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
        target_parameters=list(spec.parameters) or None,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        modules_to_save=list(spec.modules_to_save) or None,
        ensure_weight_tying=geometry.tied and "embed_tokens" in spec.modules_to_save,
        lora_dropout=spec.dropout,
    )


def peft_training(training: Training) -> Result:
    """The training with PEFT, transformers and torch alone."""
    import peft

    from bridge.verify.reference import load_hf, with_masks

    geometry = Geometry.from_folder(training.toy)
    spec = training.spec
    config = peft_config(spec, geometry)
    model = peft.get_peft_model(load_hf(training.toy, geometry, torch.float32), config).train()
    targets = resolve(spec, table_for(geometry))
    places = dict(_places(model, targets))
    for name, module in model.named_modules():
        if spec.dropout_pattern and hasattr(module, "lora_dropout"):
            # PEFT has one for all: so each is replaced by what it would have made of that number.
            p = spec.dropout_of(name.removeprefix("base_model.model."))
            module.lora_dropout["default"] = torch.nn.Dropout(p) if p else torch.nn.Identity()
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Everything that PEFT trains has a target here, and the other way round.
    assert {id(p) for p in parameters} == {id(p) for p in places.values()}
    values = training.values()
    with torch.no_grad():
        for (target, part), parameter in places.items():
            if part == "magnitude" and not training.moved:
                continue  # it has the norms of the weights
            parameter.copy_(_to_peft(values(target, part), target, part))
    # No weight decay of vectors: see `OptimizerConfig`.
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    result, margins = Result(), RouterMargins(model, geometry)
    for step in range(training.steps):
        sample = training.sample(step)
        margins.real = sample.attention_mask.flatten().bool()
        optimizer.zero_grad()
        torch.manual_seed(step)
        logits = model(**with_masks(model, sample.inputs()), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), sample.labels.flatten())
        loss.backward()
        if step == 0:
            result.gradients = {part_name(t.name, part): _from_peft(p.grad, t, part) for (t, part), p in places.items()}
        result.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        result.losses.append(loss.item())
    result.margin = margins.smallest
    result.trained = {part_name(t.name, part): _from_peft(p.detach(), t, part) for (t, part), p in places.items()}
    return result


def _places(model: torch.nn.Module, targets: Sequence[Target]) -> Iterator[tuple[tuple[Target, Factor], Tensor]]:
    held = {name.replace(".modules_to_save.default", ""): p for name, p in model.named_parameters()}
    experts = [t.module for t in targets if t.kind == "experts"]
    for target in targets:
        module = target.module
        if target.kind == "experts":
            # One wrapper of the module in another: gate_up_proj is the inner one where both are there.
            module, _, name = module.rpartition(".")
            inner = name == "gate_up_proj" and f"{module}.down_proj" in experts
            module += ".base_layer" if inner else ""
        if target.kind == "saved":
            yield (target, "weight"), held[f"base_model.model.{module}"]
            continue
        for part in target.parts:
            place = f"lora_{part}.default.weight"
            if part == "magnitude":
                place = "lora_magnitude_vector.default.weight"
            elif target.kind == "embedding":
                place = f"lora_embedding_{part}.default"
            yield (target, part), held[f"base_model.model.{module}.{place}"]


def _to_peft(value: Tensor, target: Target, part: Factor) -> Tensor:
    if target.kind != "experts":
        return value
    return value.flatten(0, 1) if part == "A" else value.permute(1, 2, 0).flatten(1)


def _from_peft(value: Tensor | None, target: Target, part: Factor) -> Tensor:
    shape = target.shape_of(part)
    if value is None:
        return torch.zeros(shape)
    if target.kind != "experts":
        return value.clone()
    experts, rows, columns = shape
    if part == "A":
        return value.reshape(shape).clone()
    return value.reshape(rows, columns, experts).permute(2, 0, 1).contiguous()


def recipe_of(training: Training, parallel: dict[str, Any]) -> dict[str, Any]:
    """The same training as a recipe says it."""
    spec = training.spec
    return {
        "output": "unused",
        "model": {"hf": str(training.toy), "dtype": "float32"},
        "parallel": parallel,
        "train": {"steps": training.steps, "global_batch_size": training.rows, "seed": training.seed},
        "optimizer": {
            "lr": LR,
            "min_lr": LR,
            "schedule": "constant",
            "weight_decay": WEIGHT_DECAY,
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "eps": EPS,
            "clip": CLIP,
        },
        "lora": {
            "rank": spec.rank,
            "alpha": spec.alpha,
            "targets": spec.targets if isinstance(spec.targets, str) else list(spec.targets),
            "parameters": list(spec.parameters),
            "rank_pattern": dict(spec.rank_pattern),
            "alpha_pattern": dict(spec.alpha_pattern),
            "dropout_pattern": dict(spec.dropout_pattern),
            "rslora": spec.rslora,
            "dora": spec.dora,
            "modules_to_save": list(spec.modules_to_save),
            "dropout": spec.dropout,
        },
    }


def gathered(run: Any, value: Any) -> dict[str, Tensor]:
    """By the names of the adapter table and in PEFT's shapes, what `value` says of every parameter. Collective."""
    from bridge.convert.live import Gatherer, iter_hf
    from bridge.lora.table import peft_view

    names = {part_name(t.name, part): (t, part) for t in run.table.targets for part in t.parts}
    found = {}
    for name, tensor in iter_hf(Gatherer(run.models, run.table, value)):
        target, part = names[name]
        view = peft_view(tensor, target, part)
        assert tensor.count_nonzero() == view.count_nonzero(), f"{name}: its filling is not zero"
        found[name] = view.clone()
    return found


def our_training(training: Training, parallel: dict[str, Any], micro_batch_size: int = 2) -> Result | None:
    """The same training here, in a layout; the result on rank 0. Runs on every rank."""
    import torch.distributed as dist

    from bridge.lora.inject import fill
    from bridge.lora.table import AdapterTable
    from recipes.config import resolve as resolve_recipe
    from recipes.train.setup import assemble, start_ranks
    from recipes.train.step import clear_gradients, reduce_sums, update

    start_ranks()
    run = assemble(resolve_recipe(recipe_of(training, parallel)), 1, load=True)
    assert isinstance(run.table, AdapterTable) and run.lora == training.spec
    if training.moved:
        fill(run.models, run.table, training.values())
        run.optimizer.reload_model_params()
    groups = run.groups
    per_rank = training.rows // groups.dp.size()
    first = groups.dp.rank() * per_rank
    result = Result()
    for step in range(training.steps):
        sample = training.sample(step)
        starts = range(first, first + per_rank, micro_batch_size)
        clear_gradients(run)
        torch.manual_seed(step)
        sums = _passes(run, [sample.rows(slice(start, start + micro_batch_size)) for start in starts])
        loss, tokens = reduce_sums(sums)
        replicas = groups.dp_cp.size() * (groups.expt_dp.size() if run.bridge.geometry.moe is not None else 1)
        if step == 0 and replicas == 1:
            result.gradients = gathered(run, lambda p: getattr(p, "main_grad", None))
        run.scheduler.step(1)
        norm, changed = update(run, float("inf"))
        assert changed
        result.norms.append(norm)
        result.losses.append(loss / tokens)
    run.gather_weights()
    result.trained = gathered(run, lambda p: p.data)
    return result if dist.get_rank() == 0 else None


def _passes(run: Any, batches: Sequence[VerificationSample]) -> Tensor:
    """Forward and backward passes over microbatches; this rank's part of the sum of losses and of tokens."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from bridge.megatron.context_parallel import take

    def forward_step(iterator: Iterator[VerificationSample], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        losses = chunk(batch.input_ids, None, batch.attention_mask, labels=batch.labels, **batch.features())

        def total(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            tokens = (take(batch.labels, run.groups.cp) != IGNORE).sum()
            return losses.sum(), tokens.to(torch.int), {"sums": torch.stack([losses.detach().sum(), tokens]).double()}

        return losses, total

    for chunk in run.chunks:
        chunk.train()
    rows, length = batches[0].input_ids.shape
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in run.chunks],
        model=run.chunks,
        num_microbatches=len(batches),
        seq_length=length * run.config.pipeline_payload,
        micro_batch_size=rows,
        forward_only=False,
    )
    sums = torch.zeros(2, dtype=torch.float64)
    if run.groups.tp.rank() == 0:
        for report in reports:
            sums += report["sums"]
    return sums


def threads() -> int:
    """How many threads this rank has; Linux only."""
    return len(list(Path("/proc/self/task").iterdir()))


def compare(ours: Result, theirs: Result) -> dict[str, Any]:
    """Largest relative differences: of losses and norms per step, of each gradient and trained factor by its norm."""

    def per_step(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))

    def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
        assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:3]
        found = []
        for name, tensor in a.items():
            difference, norm = float((tensor - b[name]).norm()), float(b[name].norm())
            found.append((difference / norm if norm else difference, name))
        return max(found)

    return {
        "loss": per_step(ours.losses, theirs.losses),
        "norm": per_step(ours.norms, theirs.norms),
        "gradients": worst(ours.gradients, theirs.gradients) if ours.gradients else (0.0, ""),
        "trained": worst(ours.trained, theirs.trained),
    }


def adapters_of(toy: Path, spec: LoraSpec) -> Any:
    """The adapter table of a toy."""
    table = table_for(Geometry.from_folder(toy))
    return adapter_table(table, resolve(spec, table))
