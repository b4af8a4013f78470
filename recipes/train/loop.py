"""The training loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from bridge.errors import TrainingError, UsageError
from bridge.megatron.multimodal import SENSES
from recipes.config import Recipe
from recipes.data.training import prepared
from recipes.train import checkpoint
from recipes.train.checkpoint import Progress
from recipes.train.data import DataFactory, Streams
from recipes.train.expert_load import forget_auxiliary_loss, load_values, take_auxiliary_loss, take_load
from recipes.train.log import Log, Values
from recipes.train.lora import export_merged
from recipes.train.media import sense_of, senses_in
from recipes.train.meter import Meter, peak_flops, peak_memory
from recipes.train.setup import Run, build
from recipes.train.signals import StopSignal, held_back
from recipes.train.step import Batch, clear_gradients, reduce_sums, run_microbatches, update
from recipes.train.workload import training_flops

# The exit code of a run that a signal ended, after its checkpoint: «try again» in sysexits.h.
STOPPED = 75
# Of the mean gradient norm that spikes are held against, and after how many updates it means something.
_NORM_MEMORY, _NORM_WARM = 0.95, 20


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after which step, with which mean loss of its last step, and whether a signal stopped it."""

    step: int
    loss: float
    stopped: bool = False

    @property
    def exit_code(self) -> int:
        return STOPPED if self.stopped else 0


def train(recipe: Recipe, data: DataFactory | None = None, signalled: StopSignal | None = None) -> Outcome:
    """Run a recipe on every rank: from its model, or from its latest checkpoint, to its last step.

    `data`: what to train on in the place of the recipe's data; the recipe says `train.steps` then.

    Raises a BridgeError; what was saved before stays. SIGTERM and SIGUSR1 end the run after the current step, with a
    checkpoint. `signalled`: who listens for them already.
    """
    with contextlib.nullcontext(signalled) if signalled is not None else StopSignal() as signalled:
        if data is None:
            recipe, data = prepared(recipe)
        if not recipe.train.steps:
            raise UsageError("train.epochs are of the recipe's own data; set train.steps")
        resumable = checkpoint.checkpoints(Path(recipe.output))
        if resumable and not recipe.checkpoint.resume:
            raise UsageError(
                f"{recipe.output}: holds a run's checkpoints; choose another output, or checkpoint.resume=true to go on"
            )
        run = build(recipe, load=not resumable)
        streams = data(recipe, run.bridge.geometry, run.groups.dp.rank(), run.groups.dp.size())
        progress = Progress()
        if resumable:
            progress = checkpoint.load(run, resumable[max(resumable)])
            streams.train.load_state_dict(progress.data)
        checkpoint.prepare_output(run)
        log: Log | None = None

        def open_log() -> None:
            nonlocal log
            log = Log(recipe, progress.step)

        with held_back():
            checkpoint.on_rank_0(open_log)
        try:
            if log is not None and resumable:
                log.say(f"resuming after step {progress.step}")
            outcome = _Loop(run, streams, progress, log, signalled).run()
            if recipe.export.hf is not None and not outcome.stopped:
                _export(run, Path(recipe.export.hf), log)
        finally:
            if log is not None:
                log.close()
        # A launcher ends the others when the first rank has stopped: none goes before rank 0's log is closed.
        dist.barrier()
    return outcome


def _export(run: Run, target: Path, log: Log | None) -> None:
    """Write the model as an HF folder. Collective."""
    if run.lora is not None:
        checkpoint.on_rank_0(lambda: export_merged(run.recipe, target, None if log is None else log.say))
        return
    run.gather_weights()
    run.bridge.save_hf(run.models, target, overwrite=True)


class _Loop:
    """One run of the loop on one rank. Every decision is made from numbers that all ranks share."""

    def __init__(self, run: Run, streams: Streams, progress: Progress, log: Log | None, signalled: StopSignal) -> None:
        self.run_ = run
        self.recipe = run.recipe
        self.streams = streams
        self.progress = progress
        self.log = log
        self.signalled = signalled
        self._meter = Meter(peak_flops(run.recipe.log.peak_tflops), dist.get_world_size())
        self._logged = progress.step
        forget_auxiliary_loss()
        # Only the first stage knows, which is also the one that counts.
        self._senses = sense_of(run.models)
        self._frozen = set(SENSES) - set(self._senses.values())

    def run(self) -> Outcome:
        """Steps until the last one, a signal, or an early stop; a checkpoint is the last thing in any case."""
        steps, every = self.recipe.train.steps, self.recipe.checkpoint.every
        loss, stop, saved = math.nan, False, self.progress.step
        patience = self.recipe.train.patience
        if patience and self.progress.evals_since_best >= patience:
            return Outcome(self.progress.step, loss)  # ended early before
        while self.progress.step < steps and not stop:
            loss, stop = self._step()
            step = self.progress.step
            evaluate = self.recipe.train.eval_every
            if evaluate and (step % evaluate == 0 or step == steps) and self._evaluate():
                break
            if every and step % every == 0:
                self._save()
                saved = step
        if saved != self.progress.step:
            self._save()
        return Outcome(self.progress.step, loss, stop)

    def _step(self) -> tuple[float, bool]:
        """One step; its loss, and whether any rank was told to stop."""
        run, progress = self.run_, self.progress
        clear_gradients(run)
        batches = self._next(run.microbatches)
        sums = run_microbatches(run, batches, train=True)
        told = [float(bool(self.signalled)), self._flops(batches), *senses_in(batches)]
        asked = torch.tensor(told, dtype=sums.dtype, device=sums.device)
        total, supervised, real, slots, stop, flops, *used = reduce_sums(torch.cat([sums, asked]))
        if not supervised:
            raise TrainingError(f"step {progress.step + 1}: no token of the batch has a label")
        loss, norm, changed = total / supervised, math.nan, False
        run.scheduler.step(1)
        progress.step += 1
        progress.tokens += int(real)
        self._meter.add(real, slots, flops)
        if math.isfinite(loss):
            unused = [sense for sense, count in zip(SENSES, used, strict=True) if not count]
            idle = [parameter for parameter, sense in self._senses.items() if sense in unused]
            norm, changed = update(run, self._largest_norm(), idle)
        self._count(norm, changed, used)
        if progress.step % self.recipe.log.every == 0 or progress.step == self.recipe.train.steps or not changed:
            self._log(loss, norm, changed, int(supervised))
        if progress.skipped_in_row >= self.recipe.train.nan_limit:
            raise TrainingError(
                f"step {progress.step}: {progress.skipped_in_row} updates in a row were left out (loss {loss:.4g}, "
                f"gradient norm {norm:.4g}); the last checkpoint is as it was"
            )
        return loss, stop > 0

    def _flops(self, batches: Sequence[Batch]) -> float:
        """Of the whole step's forward and backward passes, this rank's part: one rank counts for all of its replica."""
        groups = self.run_.groups
        if groups.tp.rank() or groups.cp.rank() or groups.pp.rank():
            return 0.0
        geometry, vision_mask = self.run_.bridge.geometry, self.run_.config.vision_mask
        return training_flops(geometry, batches, self._frozen, self.run_.lora is not None, vision_mask)

    def _next(self, count: int) -> list[dict[str, torch.Tensor]]:
        try:
            return [next(self.streams.train) for _ in range(count)]
        except StopIteration:
            raise TrainingError(f"step {self.progress.step + 1}: the data has run out") from None

    def _largest_norm(self) -> float:
        factor = self.recipe.train.spike_factor
        if not factor or self.progress.updates < _NORM_WARM:
            return math.inf
        return factor * self.progress.norm_mean

    def _count(self, norm: float, changed: bool, used: Sequence[float]) -> None:
        progress = self.progress
        if not changed:
            progress.skipped_in_row += 1
            return
        memory = _NORM_MEMORY if progress.updates else 0.0
        progress.norm_mean = memory * progress.norm_mean + (1 - memory) * norm
        progress.updates += 1
        for sense, count in zip(SENSES, used, strict=True):
            progress.sense_updates[sense] = progress.sense_updates.get(sense, 0) + bool(count)
        progress.skipped_in_row = 0

    def _log(self, loss: float, norm: float, changed: bool, supervised: int) -> None:
        run = self.run_
        geometry, steps = run.bridge.geometry, self.progress.step - self._logged
        self._logged = self.progress.step
        load = take_load(geometry, run.models, run.device)
        balance = math.nan
        if self.recipe.train.aux_loss:
            balance = take_auxiliary_loss(geometry, steps * run.microbatches, run.groups.dp.size(), run.device)
        if self.log is None:
            return
        values: Values = {
            "loss": loss,
            "lr": run.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            **self._meter.read(),
            "tokens": self.progress.tokens,
            "supervised": supervised,
            "memory_gb": peak_memory() / 1e9,
        }
        if self.recipe.train.aux_loss:
            values["aux_loss"] = balance
        if load is not None:
            values |= load_values(load)
        if not changed:
            values["skipped"] = 1.0
        self.log.write(self.progress.step, values)

    def _evaluate(self) -> bool:
        """Mean loss over the evaluation data; whether it is time to stop early."""
        if self.streams.evaluation is None:
            raise TrainingError("train.eval_every is set, but there is no evaluation data; set data.eval_path")
        run, progress = self.run_, self.progress
        batches = self.streams.evaluation()
        sums = torch.zeros(4, dtype=torch.float64, device=run.device)
        for _ in range(self.recipe.train.eval_batches):
            group = list(islice(batches, run.microbatches))
            if len(group) < run.microbatches:
                break
            sums += run_microbatches(run, group, train=False)
        total, supervised, *_ = reduce_sums(sums)
        loss = total / supervised if supervised else math.nan
        if self.log is not None:
            self.log.write(progress.step, {"eval_loss": loss})
        better = progress.best_eval is None or loss < progress.best_eval
        if better:
            progress.best_eval, progress.evals_since_best = loss, 0
        else:
            progress.evals_since_best += 1
        return bool(self.recipe.train.patience) and progress.evals_since_best >= self.recipe.train.patience

    def _save(self) -> None:
        self.progress.data = self.streams.train.state_dict()
        where = checkpoint.save(self.run_, self.progress)
        if self.log is not None:
            self.log.say(f"saved {where}")
