"""The training loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from bridge.errors import TrainingError, UsageError
from bridge.mapping.modalities import MODALITIES
from bridge.megatron.fake_quant import round_frozen
from recipes.config import Recipe
from recipes.data.training import prepared
from recipes.data.training import say as say_once
from recipes.losses.objective import objective_of
from recipes.losses.policy import training_objective
from recipes.train import checkpoint, header
from recipes.train.answers import AnswerMetrics
from recipes.train.best import BestEvaluation, logged_name
from recipes.train.checkpoint import RunProgress
from recipes.train.data import DataFactory, Streams
from recipes.train.engine import WeightPushes
from recipes.train.evaluate import evaluate
from recipes.train.expert_load import forget_auxiliary_loss, load_values, take_auxiliary_loss, take_load
from recipes.train.export import export
from recipes.train.log import Log
from recipes.train.media import mask_change, modalities_in, modality_of
from recipes.train.meter import Meter, peak_flops, peak_memory
from recipes.train.reference import reference_of
from recipes.train.rollouts import Rollouts, RolloutStopped
from recipes.train.samples import Samples, acceptance_values, metrics_of
from recipes.train.saver import Saver
from recipes.train.schedule import advance, group_rates, rate, rate_change, shortened
from recipes.train.setup import Run, build
from recipes.train.signals import INTERRUPTED, STOPPED, StopSignal, held_back
from recipes.train.sinks import Values
from recipes.train.sources import add_counts, counts_in, source_values, total_values
from recipes.train.start import start_logps
from recipes.train.step import SUMS, any_rank, clear_gradients, reduce_sums, run_microbatches, update
from recipes.train.step_flops import step_flops
from recipes.train.student import with_teacher
from recipes.train.teacher import open_teacher

# Of the mean gradient norm that spikes are held against, and after how many updates it means something.
_NORM_MEMORY, _NORM_WARM = 0.95, 20


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended: after which step, with which mean loss of its last step, and whether a signal stopped it.

    `interrupted`: it was Ctrl-C.
    """

    step: int
    loss: float
    stopped: bool = False
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        return (INTERRUPTED if self.interrupted else STOPPED) if self.stopped else 0


def train(recipe: Recipe, data: DataFactory | None = None, signalled: StopSignal | None = None) -> RunOutcome:
    """Run a recipe on every rank: from its model, or from its latest checkpoint, to its last step.

    `data`: what to train on in the place of the recipe's data; the recipe says `train.steps` then.

    Raises a BridgeError; what was saved before stays. SIGTERM and SIGUSR1 end the run after the current step, with a
    checkpoint. `signalled`: who listens for them already.
    """
    with contextlib.nullcontext(signalled) if signalled is not None else StopSignal() as signalled:
        if data is None:
            recipe, data = prepared(recipe)
        resumable = _resumable(recipe)
        samples = Samples.of(recipe)
        log: Log | None = None
        teacher = open_teacher(recipe) if recipe.distill.teacher is not None else None
        run = build(recipe, load=not resumable)
        streams = data(recipe, run.bridge.geometry, run.groups.dp.rank(), run.groups.dp.size())
        rollouts = None
        if streams.trained is not None and recipe.grpo.rewards:
            rollouts = Rollouts(run, streams.trained, signalled, lambda: log)
            streams = rollouts.streams(streams)
        if objective_of(recipe.preference).referenced and reference_of(recipe) == "start":
            # Adapters are as they began: it is a checkpoint that moves them.
            begin = partial(run.bridge.load_hf_weights, run.models) if resumable and run.lora is None else None
            start_logps(run, streams, begin, say_once)
        if teacher is not None:
            streams = with_teacher(run, teacher, streams, signalled)
        progress = RunProgress()
        if resumable:
            progress = checkpoint.load(run, resumable[max(resumable)])
            streams.train.load_state_dict(progress.data)
        if run.lora is None:
            round_frozen(run.models, in_place=False)
        checkpoint.prepare_output(run)

        def open_log() -> None:
            nonlocal log
            log = Log(recipe, progress.step)

        with held_back():
            checkpoint.on_rank_0(open_log)
        try:
            say = log.say if log is not None else _to_nobody
            checkpoint.on_rank_0(lambda: _say_first(run, streams, progress, say))
            samples = samples or Samples.of_evaluation(recipe, streams)
            progress.vision_mask = recipe.model.vision_mask
            loop = _Loop(run, streams, progress, log, signalled, samples, metrics_of(recipe, streams))
            with signalled.noted():
                outcome = loop.run()
            if not outcome.stopped:
                export(run, loop.best.checkpoint(), say)
        finally:
            if rollouts is not None:
                rollouts.close()
            if log is not None:
                log.close()
        # A launcher ends the others when the first rank has stopped: none goes before rank 0's log is closed.
        dist.barrier()
    return outcome


def _resumable(recipe: Recipe) -> dict[int, Path]:
    """The checkpoints, by step, of which the last is gone on from. Raises UsageError where none may be."""
    if not recipe.train.steps:
        raise UsageError("train.epochs are of the recipe's own data; set train.steps")
    found = checkpoint.checkpoints(Path(recipe.output))
    if found and not recipe.checkpoint.resume:
        raise UsageError(
            f"{recipe.output}: holds a run's checkpoints; choose another output, or checkpoint.resume=true to go on"
        )
    return found


def _say_first(run: Run, streams: Streams, progress: RunProgress, say: Callable[[str], None]) -> None:
    """What the run is about to do, on rank 0."""
    said = header.header(run, streams.facts, progress.step)
    notices = dict.fromkeys((*run.bridge.notices, *run.trained.notices))
    header.write(said, Path(run.recipe.output))
    for line in (*notices, *streams.notes, *header.lines(said), *shortened(run.recipe)):
        say(line)
    if progress.step:
        say(f"resuming after step {progress.step}")
        if change := rate_change(run.recipe, run.scheduler, progress.step, progress.schedule):
            say(change)
        seen = progress.sense_updates.get("vision", 0)
        if change := mask_change(run.bridge.geometry, run.recipe.model.vision_mask, progress.vision_mask, seen):
            say(change)


def _to_nobody(text: str) -> None:
    """What ranks without a log say."""


class _Loop:
    """One run of the loop on one rank. Every decision is made from numbers that all ranks share."""

    def __init__(
        self,
        run: Run,
        streams: Streams,
        progress: RunProgress,
        log: Log | None,
        signalled: StopSignal,
        samples: Samples | None = None,
        metrics: AnswerMetrics | None = None,
    ) -> None:
        self.run_ = run
        self._samples, self._metrics = samples, metrics
        self.recipe = run.recipe
        self._objective = training_objective(run.recipe)
        self.streams = streams
        self.progress = progress
        self.log = log
        self.signalled = signalled
        self._saver = Saver(run, self._say)
        self._pushes = None if run.recipe.sync.url is None else WeightPushes(run, run.recipe.sync.url)
        self._meter = Meter(peak_flops(run.recipe.log.peak_tflops), dist.get_world_size())
        self._logged = progress.step
        self.best = BestEvaluation(run.recipe, progress, self._say)
        forget_auxiliary_loss()
        # Only the first stage knows, which is also the one that counts.
        self._modalities = modality_of(run.models)
        self._frozen = set(MODALITIES) - set(self._modalities.values())

    def run(self) -> RunOutcome:
        """Steps until the last one, a signal, or an early stop; a checkpoint is the last thing in any case.

        A signal leaves an evaluation that is due, or under way, to the run that goes on.
        """
        try:
            return self._run()
        finally:
            self._saver.abandon()

    def _run(self) -> RunOutcome:
        progress, steps, every = self.progress, self.recipe.train.steps, self.recipe.checkpoint.every
        loss, stop = math.nan, False
        saved = asdict(progress)
        if self._evaluation_is_due() and not self.best.too_long_ago():
            stop = self._evaluate()
        while progress.step < steps and not stop and not self.best.too_long_ago():
            loss, stop = self._step()
            if self._pushes is not None:
                with self._meter.paused():
                    self._pushes.after(progress.step, self._say)
            if not stop and self._evaluation_is_due():
                stop = self._evaluate()
            if self.best.is_this_step() or (every and progress.step % every == 0):
                stop = not self._save() or stop
                saved = asdict(progress)
                stop = stop or self._told()
        written = (saved == asdict(progress) or self._save()) and self._saver.finish()
        stop = stop or not written or self._told()
        if self.best.too_long_ago():
            self.best.say_why()
        return RunOutcome(progress.step, loss, stop, self.signalled.interrupted)

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log.say(text)

    def _step(self) -> tuple[float, bool]:
        """One step; its loss, and whether any rank was told to stop."""
        run, progress = self.run_, self.progress
        batches = self._next(run.microbatches)
        if batches is None:
            return math.nan, True
        clear_gradients(run)
        sources, names = self.streams.sources, self._objective.names
        sums = run_microbatches(run, batches, train=True, objective=self._objective, sources=max(1, len(sources)))
        counts = counts_in(batches, len(sources), run.groups)
        flops = step_flops(run, batches, self._objective, self._frozen)
        told = [float(bool(self.signalled)), float(self._saver.writing), flops]
        told += [*modalities_in(batches), *counts]
        asked = torch.tensor(told, dtype=sums.dtype, device=sums.device)
        found = reduce_sums(torch.cat([sums, asked]))
        figures, (real, slots, squares, _) = found[: len(names)], found[len(names) : len(names) + len(SUMS)]
        of_sources, told = found[len(names) + len(SUMS) : len(sums)], found[len(sums) :]
        (stop, writing, flops), used, counts = told[:3], told[3 : 3 + len(MODALITIES)], told[3 + len(MODALITIES) :]
        if not figures[1]:
            raise TrainingError(f"step {progress.step + 1}: no token of the batch has a label")
        loss, norm, changed = self._values(figures)["loss"], math.nan, False
        progress.step += 1
        progress.tokens += int(real)
        add_counts(progress.sources, sources if counts else (), counts)
        self._unlogged(figures[0], squares, *figures[1:], *of_sources)
        self._meter.add(real, slots, flops)
        if math.isfinite(loss):
            unused = [modality for modality, count in zip(MODALITIES, used, strict=True) if not count]
            idle = [parameter for parameter, modality in self._modalities.items() if modality in unused]
            self._saver.before_update()
            norm, changed = update(run, self._largest_norm(), idle)
        self._count(norm, changed, used)
        if progress.step % self.recipe.log.every == 0 or progress.step == self.recipe.train.steps or not changed:
            self._log(norm, changed)
        progress.schedule = advance(self.recipe, run.scheduler)
        with self._meter.paused():
            self._saver.stepped(progress.step, writing > 0)
        if progress.skipped_in_row >= self.recipe.train.nan_limit:
            self._saver.finish()
            raise TrainingError(
                f"step {progress.step}: {progress.skipped_in_row} updates in a row were left out (loss {loss:.4g}, "
                f"gradient norm {norm:.4g}); the last checkpoint is as it was"
            )
        return loss, stop > 0

    def _values(self, figures: Sequence[float]) -> dict[str, float]:
        return self._objective.values(dict(zip(self._objective.names, figures, strict=True)))

    def _unlogged(self, *figures: float) -> None:
        """Add a step's figures to those since the last line of the log (of another objective: none)."""
        before = self.progress.unlogged
        before = before if len(before) == len(figures) else [0.0] * len(figures)
        self.progress.unlogged = [a + b for a, b in zip(before, figures, strict=True)]

    def _next(self, count: int) -> list[dict[str, torch.Tensor]] | None:
        """The microbatches of a step; None where a signal came while answers were sampled."""
        try:
            return [next(self.streams.train) for _ in range(count)]
        except RolloutStopped:
            return None
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
        for modality, count in zip(MODALITIES, used, strict=True):
            progress.sense_updates[modality] = progress.sense_updates.get(modality, 0) + bool(count)
        progress.skipped_in_row = 0

    def _log(self, norm: float, changed: bool) -> None:
        """A line: losses since the last one (of an earlier process too), and what this process did since then."""
        run = self.run_
        size = len(self._objective.names) + 1
        (total, squares, count, *others), of_sources = self.progress.unlogged[:size], self.progress.unlogged[size:]
        self.progress.unlogged = []
        geometry, steps = run.bridge.geometry, self.progress.step - self._logged
        self._logged = self.progress.step
        load = take_load(run.trained.geometry, run.models, run.device)
        balance = math.nan
        if self.recipe.train.aux_loss:
            balance = take_auxiliary_loss(geometry, steps * run.microbatches, run.groups.dp.size(), run.device)
        if self.log is None:
            return
        losses, more = source_values(self._objective, self.streams.sources if of_sources else (), of_sources)
        values: Values = {
            **self._values((total, count, *others)),
            **losses,
            "lr": rate(run.scheduler),
            **group_rates(self.recipe, run.scheduler),
            "grad_norm": norm,
            **self._meter.read(),
            "tokens": self.progress.tokens,
            self._objective.counted: int(count),
            "memory_gb": peak_memory() / 1e9,
        }
        if self.recipe.train.z_loss:
            values["z_loss"] = squares / count
        if self.recipe.train.aux_loss:
            values["aux_loss"] = balance
        more |= total_values(self.progress.sources)
        if load is not None:
            spread, of_experts = load_values(load)
            values, more = values | spread, more | of_experts
        if not changed:
            values["skipped"] = 1.0
        self.log.write(self.progress.step, values, more)

    def _evaluation_is_due(self) -> bool:
        step, every = self.progress.step, self.recipe.train.eval_every
        at_end = step == self.recipe.train.steps
        return bool(every and step) and (step % every == 0 or at_end) and self.progress.evaluated != step

    def _evaluate(self) -> bool:
        """Mean loss over the evaluation data, and whether it is the best so far; whether a signal cut it off."""
        run, progress = self.run_, self.progress
        if not self.streams.evaluation:
            raise TrainingError("train.eval_every is set, but there is no evaluation data; set data.eval")
        with self._meter.paused():
            values = evaluate(run, self.streams.evaluation, self.signalled)
            if values is not None and self._metrics is not None:
                found = self._metrics.measure(run, self.signalled, self._say)
                values = None if found is None else values | {logged_name(name): value for name, value in found.items()}
        if values is None:
            return True
        progress.evaluated = progress.step
        if self.log is not None:
            self.log.write(progress.step, values)
        if self._samples is not None:
            with self._meter.paused():
                said = self._samples.answer(run, progress.step, self.signalled, self._say)
            if said is None:
                return True
            if self.log is not None:
                if run.drafting is not None:
                    self.log.write(progress.step, acceptance_values(said))
                self.log.texts(progress.step, {str(answer.index): answer.text for answer in said})
        self.best.compare(values[self.best.name])
        return False

    def _told(self) -> bool:
        """Whether any rank was told to stop. Collective."""
        return any_rank(bool(self.signalled), self.run_.device)

    def _save(self) -> bool:
        """Save, or begin to; False where time is up."""
        self.progress.data = self.streams.train.state_dict()
        with self._meter.paused():
            return self._saver.save(self.progress)
