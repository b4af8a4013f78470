"""Checkpoints of a run: complete or not there, loadable in any layout, the last few kept.

OUTPUT/hf/                                    what export needs besides weights (see bridge/convert/manifest.py)
OUTPUT/iter_0000010/                          a Megatron distributed checkpoint: weights, optimizer, random states
OUTPUT/latest_checkpointed_iteration.txt      the newest of them

A LoRA run has adapters in place of the weights, and OUTPUT/adapter.json (see bridge/lora/checkpoint.py).
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from bridge.convert.atomic import check_target
from bridge.convert.folders import write_beside
from bridge.convert.live import METADATA, load_from_megatron
from bridge.convert.manifest import ADAPTER_FILE, TRACKER_FILE
from bridge.convert.replace import recover, replace_folder, sync_tree
from bridge.errors import BridgeError, CheckpointError, MappingError, UsageError
from bridge.hf.tensors import fsync_folder
from bridge.hf.writer import write_text
from bridge.mapping.table import DRAFTER
from bridge.torch_dist.reader import DistReader, is_dist_checkpoint
from recipes.train.lora import describe
from recipes.train.media import modality_of
from recipes.train.optimizer_state import live_tensors, make_states, set_state, sharded_state
from recipes.train.setup import Run
from recipes.train.sole import check_sole
from recipes.train.writing import Live, Writing

_NAME = re.compile(r"iter_(\d{7,})")
_PROGRESS_FILE = "progress.json"
_REPLACED = ".replaced"


@dataclass
class RunProgress:
    """How far a run is. `step`: of the schedule; `updates`: Adam's, less those left out; `data`: the position in it.

    `sense_updates`: those of the towers, by modality: fewer than `updates` where steps were without media for them.

    `best_eval`, `best_step`: the best value of `best_of` (`eval.best`) of an evaluation, and after which step it was;
    `evaluated`: the step of the last one. `unlogged`: sums of the steps since the last line of the log. `schedule`: the
    last step's learning rate, the next one's, and the number of steps that they were made for. `vision_mask`: of the
    last step. `sources`: rows and tokens of each source of the data.
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    best_eval: float | None = None
    best_of: str = "loss"
    evals_since_best: int = 0
    skipped_in_row: int = 0
    norm_mean: float = 0.0
    sense_updates: dict[str, int] = field(default_factory=dict)
    best_step: int = 0
    evaluated: int = 0
    unlogged: list[float] = field(default_factory=list)
    schedule: dict[str, float] = field(default_factory=dict)
    vision_mask: str | None = None
    sources: dict[str, list[int]] = field(default_factory=dict)


def checkpoints(output: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by their step, in order."""
    if not output.is_dir():
        return {}
    found = {int(match[1]): entry for entry in output.iterdir() if (match := _NAME.fullmatch(entry.name))}
    return {step: found[step] for step in sorted(found) if is_dist_checkpoint(found[step])}


def prepare_output(run: Run) -> None:
    """Write `hf/` of the run's folder, where it is not there. Collective; raises what rank 0 raised, on every rank."""

    def write() -> None:
        output = Path(run.recipe.output)
        said = run.recipe.export
        drafter = None if run.drafting is None else run.drafting.bridge
        for bridge, target in ((run.trained, said.hf), (drafter, said.drafter)):
            if bridge is not None and target is not None:
                # Said now, and not when there is a model to write.
                source = bridge.hf_dir or bridge.megatron.hf  # type: ignore[union-attr]
                check_target(Path.cwd() / target, True, source.rglob("*"))
        output.mkdir(parents=True, exist_ok=True)
        _tidy(output)
        if run.lora is not None:
            describe(run.recipe, run.lora, output)
        origin = run.trained.hf_dir or run.trained.megatron
        assert origin is not None
        write_beside(origin, output, dtype=run.recipe.model.dtype)

    on_rank_0(write)


@dataclass
class Save:
    """A checkpoint that is written: it appears by one rename when every rank is done. `record`: of its progress."""

    step: int
    output: Path
    record: str
    keep: int
    best: int
    writing: Writing = field(init=False)

    @property
    def target(self) -> Path:
        return self.output / f"iter_{self.step:07d}"

    @property
    def partial(self) -> Path:
        return self.output / f".{self.target.name}.partial"

    def finish(self) -> Path:
        """Wait for it, and let it appear. Collective. Raises CheckpointError."""
        with self.reported():
            self.writing.finish()
        on_rank_0(self._appear)
        return self.target

    def give_up(self) -> None:
        """Leave it, and nothing of it. Collective."""
        self.writing.give_up()
        dist.barrier()
        on_rank_0(lambda: shutil.rmtree(self.partial, ignore_errors=True))

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """What fails on a rank, as one line on every one."""
        try:
            yield
        except (CheckpointException, OSError) as error:
            on_rank_0(lambda: shutil.rmtree(self.partial, ignore_errors=True))
            free = shutil.disk_usage(self.output).free / 1e9
            why = f"cannot be written ({_why(error)}); {free:.1f} GB are free there"
            raise CheckpointError(f"{self.target}: {why}") from None

    def _appear(self) -> None:
        output, target = self.output, self.target
        (self.partial / _PROGRESS_FILE).write_text(self.record + "\n", encoding="utf-8")
        sync_tree(self.partial)
        check_sole(output)
        # The same step may have been saved before: by an interrupted run that was resumed from an earlier one, or that
        # still had to evaluate it.
        replace_folder(self.partial, target, output / f".{target.name}{_REPLACED}")
        tracker = output / f".{TRACKER_FILE}.partial"
        write_text(tracker, str(self.step))
        tracker.rename(output / TRACKER_FILE)
        fsync_folder(output)
        _prune(output, self.keep, self.best)


def begin_save(run: Run, progress: RunProgress) -> Save:
    """Write the checkpoint of `progress.step`, or begin to (`checkpoint.async`). Collective. Raises CheckpointError."""
    record = json.dumps(asdict(progress) | {"world_size": dist.get_world_size()}, indent=1)
    wanted, best = run.recipe.checkpoint, progress.best_step if run.recipe.train.patience else 0
    save = Save(progress.step, Path(run.recipe.output), record, wanted.keep, best)

    def begin() -> None:
        shutil.rmtree(save.partial, ignore_errors=True)
        save.partial.mkdir(parents=True)

    on_rank_0(begin)
    run.gather_weights()
    state: dict[str, Any] = {"iteration": progress.step, "checkpoint_version": 3.0}
    for number, model in enumerate(run.stored):
        items = model.sharded_state_dict(metadata=dict(METADATA)).items()
        stored = {name: item for name, item in items if run.table.covers(item.key) or item.key.startswith(DRAFTER)}
        state[f"model{number}"] = stored
    state["optimizer"] = sharded_state(run.optimizer, run.stored, fill=True)
    state["rng"] = _rng_object(_random_states())
    with save.reported():
        save.writing = Writing(state, save.partial, live_of(run) if wanted.async_ else None)
    return save


def live_of(run: Run) -> Live:
    """What goes on changing while a checkpoint is written."""
    parameters = [parameter for model in run.stored for parameter in model.parameters()]
    buffers = [buffer for model in run.stored for buffer in model.buffers()]
    return Live([*parameters, *live_tensors(run.optimizer)], buffers)


def load(run: Run, folder: Path) -> RunProgress:
    """Bring a run to where a checkpoint was made, in whatever layout. Collective. Raises CheckpointError."""
    try:
        said = json.loads((folder / _PROGRESS_FILE).read_text(encoding="utf-8"))
        world_size = said.pop("world_size")
        progress = RunProgress(**said)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / _PROGRESS_FILE}: not a record of a run ({error})") from None
    adapters = (folder.parent / ADAPTER_FILE).is_file()
    if adapters != (run.lora is not None):
        raise UsageError(
            f"{folder.parent}: holds a run that trains {'adapters' if adapters else 'the model itself'}, which this "
            "recipe does not; choose another output"
        )
    make_states(run.optimizer)
    load_weights(run, folder)
    state: dict[str, Any] = {"optimizer": sharded_state(run.optimizer, run.stored, fill=False)}
    if world_size == dist.get_world_size():
        state["rng"] = _rng_object(None)
    loaded = _loaded(state, folder)
    modalities = modality_of(run.models)

    def updates(parameter: torch.Tensor | None) -> int:
        modality = None if parameter is None else modalities.get(parameter)
        return progress.updates if modality is None else progress.sense_updates.get(modality, 0)

    set_state(run.optimizer, loaded["optimizer"], updates)
    if "rng" in loaded:
        # At another number of ranks they start from the seed: only the dropout of adapters draws numbers.
        _set_random_states(loaded["rng"])
    run.scheduler.step(progress.step)
    return progress


def load_weights(run: Run, folder: Path) -> None:
    """Give the models their weights (or adapters) of a checkpoint. Collective. Raises CheckpointError."""
    with DistReader(folder) as reader:
        try:
            run.table.check_keys({key: tensor.shape for key, tensor in reader.tensors.items()}, folder)
        except MappingError as error:
            raise CheckpointError(f"{error}; is {folder.parent} the run of another model or other adapters?") from None
        load_from_megatron(run.stored, run.table, reader)
    if run.drafting is not None and not run.drafting.frozen:
        drafter = run.drafting
        with DistReader(folder, within=DRAFTER) as reader:
            try:
                drafter.bridge.table.check_keys({key: t.shape for key, t in reader.tensors.items()}, folder)
            except MappingError as error:
                raise CheckpointError(f"{error}; is {folder.parent} the run of another drafter, or of none?") from None
            load_from_megatron(drafter.held, drafter.bridge.table, reader)


def on_rank_0(function: Callable[[], None]) -> None:
    """Call it there, and raise what it raises on every rank."""
    failure: list[BridgeError | None] = [None]
    if dist.get_rank() == 0:
        try:
            function()
        except BridgeError as error:
            failure[0] = error
        except OSError as error:
            failure[0] = CheckpointError(f"{error.filename}: {error.strerror}")
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def _loaded(state: dict[str, Any], folder: Path) -> Any:
    """What Megatron reads of `folder` for `state`. Raises CheckpointError, or what a signal raised on any rank."""
    try:
        return dist_checkpointing.load(state, str(folder))
    except CheckpointException as error:
        # What a signal raised on a rank is handed to all of them as a failure to read.
        for cause, _ in error.failures.values():
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
        raise CheckpointError(f"{folder}: its optimizer state cannot be read ({_why(error)})") from None
    except (RuntimeError, KeyError, ValueError, dist_checkpointing.core.CheckpointingException) as error:
        raise CheckpointError(f"{folder}: its optimizer state does not fit this model ({_why(error)})") from error


def _why(error: BaseException) -> str:
    """One line; where torch gathered what went wrong on every rank, the first of it."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, failure = next(iter(error.failures.items()))
        return f"rank {rank}: {_why(failure[0])}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _prune(output: Path, keep: int, best: int) -> None:
    for step, folder in list(checkpoints(output).items())[: -keep if keep else 0]:
        if step == best:
            continue
        # Renamed first: one that is half removed must not look complete.
        doomed = output / f".{folder.name}.removed"
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _tidy(output: Path) -> None:
    """Put back a checkpoint that an interrupted save had moved aside, and remove what such a save left."""
    for path in list(output.glob(f".iter_*{_REPLACED}")):
        recover(output / path.name.removeprefix(".").removesuffix(_REPLACED), path)
    for path in [*output.glob(".iter_*.partial"), *output.glob(".iter_*.removed")]:
        shutil.rmtree(path, ignore_errors=True)


def _rng_object(data: Any) -> ShardedObject:
    return ShardedObject("rng_state", data, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def _random_states() -> dict[str, Any]:
    states = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
