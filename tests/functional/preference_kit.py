"""Preference runs for the tests: the same pairs and steps in TRL on transformers and here.

What ranks call lives here, so that they import nothing but this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridge.geometry import Geometry
from bridge.lora.spec import LoraSpec

LENGTH, SEED = 40, 3
LR, WEIGHT_DECAY, CLIP, BETAS, EPS = 5e-3, 0.01, 1.0, (0.9, 0.95), 1e-6
LINEARS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
SPEC = LoraSpec(4, 8.0, LINEARS)
UNREFERENCED = ("orpo", "cpo", "simpo")
# Figures of a log line that no two runs share.
TIMED = ("tokens_per_s", "tflops_per_device", "memory_gb", "data_efficiency")


@dataclass(frozen=True)
class AnswerBatches:
    """A prompt with its answers, as ids: of a pair the chosen one first; or one answer and whether it is wanted."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    desirable: bool = False


@dataclass(frozen=True)
class Preferences:
    """`steps` of `batch` records (pairs, or answers with a label). `said`: keys of `preference`, as TRL has them."""

    toy: Path
    said: dict[str, Any]
    steps: int = 20
    batch: int = 4
    spec: LoraSpec | None = None
    adapter: Path | None = None

    @property
    def single(self) -> bool:
        return self.said["loss"] in ("kto", "apo_zero_unpaired")

    def records(self) -> list[AnswerBatches]:
        """Of all steps, in order."""
        generator = torch.Generator().manual_seed(SEED)

        def some(least: int, most: int) -> tuple[int, ...]:
            count = int(torch.randint(least, most, (1,), generator=generator))
            return tuple((8 + torch.randint(0, 120, (count,), generator=generator)).tolist())

        # So few that they are learnt: of new ones every time rewards stay near 0, where sums of log-probabilities
        # in float32 (TRL's: -100, rounded to 4e-6) differ by more than a hundred-thousandth.
        few = [
            AnswerBatches(some(3, 14), tuple(some(2, 22) for _ in range(1 if self.single else 2)), index % 3 != 1)
            for index in range(2 * self.batch)
        ]
        return [few[index % len(few)] for index in range(self.steps * self.batch)]


def encoded(records: Sequence[AnswerBatches]) -> list[Any]:
    """As the data has them: each answer behind its prompt."""
    from recipes.data.chat import Encoded

    found = []
    for record in records:
        for answer in record.answers:
            ids = np.asarray([*record.prompt, *answer], np.int32)
            learnt = np.arange(len(ids)) >= len(record.prompt)
            found.append(Encoded(ids, learnt, np.zeros(len(ids), np.uint8), desirable=record.desirable))
    return found


class Records:
    """The records of an epoch, as `Batches` takes a corpus."""

    def __init__(self, work: Preferences, folder: Path) -> None:
        from recipes.data.options import CorpusOptions

        kind = "labelled" if work.single else "pairs"
        self.options, self.folder = CorpusOptions("records", 4096, records=kind), folder
        self._samples = encoded(work.records()[: 2 * work.batch])
        self.pad_id, self.has_media, self.fingerprint, self.inputs = 0, False, f"records {work.said['loss']}", {}
        self.tokenizer = None

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, sample: int) -> Any:
        return self._samples[sample]

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray([len(sample) for sample in self._samples])


def streams(work: Preferences, recipe: Any, dp_rank: int, dp_size: int) -> Any:
    """What the loop asks of data."""
    from recipes.data.batches import Batches
    from recipes.data.training import batch_options, once
    from recipes.train.data import AnswerBatches, Streams

    folder = Path(recipe.output).with_name("ref_logps")
    folder.mkdir(exist_ok=True)
    records: Any = Records(work, folder)
    options = replace(batch_options(recipe, dp_rank, dp_size), shuffle=False)
    known: dict[str, np.ndarray] = {}
    train = Batches(records, options, ref_logps=known)
    evaluation = {"": partial(once, records, options, known)}
    return Streams(
        train, evaluation, answers=(AnswerBatches(records, partial(once, records, options)),), ref_logps=known
    )


def recipe(work: Preferences, output: Path) -> dict[str, Any]:
    said: dict[str, Any] = {
        "output": str(output),
        "model": {"hf": str(work.toy), "dtype": "float32"},
        "preference": dict(work.said),
        "train": {
            "steps": work.steps,
            "global_batch_size": work.batch,
            "micro_batch_size": work.batch,
            "seq_length": LENGTH,
        },
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
    }
    if work.adapter is not None:
        said["lora"] = {"adapter": str(work.adapter)}
    return said


def train_preferences(work: Preferences, said: dict[str, Any], overrides: list[str]) -> int:
    """Train a recipe on the records; the last step. Runs on every rank."""
    from recipes.config import resolve
    from recipes.train.loop import train

    return train(resolve(said, overrides), lambda recipe, geometry, *dp: streams(work, recipe, *dp)).step


def logged(output: Path) -> list[dict[str, float]]:
    """What a run logged, a step a line."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@dataclass
class Theirs:
    """TRL's figures of every step, and what it trained: of LoRA by the keys of PEFT's state dict."""

    figures: list[dict[str, float]]
    trained: dict[str, Tensor]


def trl_training(work: Preferences, folder: Path) -> Theirs:
    """The training with TRL, PEFT and transformers alone."""
    import peft
    from datasets import Dataset
    from transformers import AutoTokenizer

    from bridge.verify.reference import load_hf

    geometry = Geometry.from_folder(work.toy)
    model = load_hf(work.toy, geometry, torch.float32)
    trainer_class, config_class, options = _trl(work)
    figures: list[dict[str, float]] = []
    models: dict[str, Any] = {}
    if work.spec is not None:
        spec = work.spec
        models["peft_config"] = peft.LoraConfig(
            r=spec.rank, lora_alpha=int(spec.alpha), target_modules=spec.targets, lora_dropout=0.0
        )
    elif work.said["loss"] not in UNREFERENCED:
        models["ref_model"] = load_hf(work.toy, geometry, torch.float32)
    trainer = _noting(trainer_class, figures)(
        model=model,
        args=config_class(**_arguments(work, folder), **options),
        train_dataset=Dataset.from_list(_rows(work)),
        processing_class=AutoTokenizer.from_pretrained(work.toy),
        **models,
    )
    trained = trainer.model
    if work.spec is not None:
        from .lora_kit import _places, _to_peft, moved_values, resolve, table_for

        values = moved_values(SEED, work.toy)
        with torch.no_grad():
            for (target, part), parameter in _places(trained, resolve(work.spec, table_for(geometry))):
                parameter.copy_(_to_peft(values(target, part), target, part))
    parameters = [p for p in trained.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    trainer.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    trainer.train()
    return Theirs(figures, _weights(work, geometry, trained))


def _weights(work: Preferences, geometry: Geometry, trained: torch.nn.Module) -> dict[str, Tensor]:
    """What was trained: of LoRA by the keys of PEFT's state dict."""
    if work.spec is None:
        return {name: p.detach().clone() for name, p in trained.named_parameters()}
    from .lora_kit import _from_peft, _places, part_name, resolve, table_for

    places = _places(trained, resolve(work.spec, table_for(geometry)))
    return {part_name(t.name, part): _from_peft(p.detach(), t, part) for (t, part), p in places}


def _noting(trainer_class: Any, figures: list[dict[str, float]]) -> Any:
    """The trainer on tokens as they are, in order; its figures of every step go to `figures`."""

    class Trainer(trainer_class):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *unused: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            loss = super()._compute_loss(model, inputs, return_outputs)
            said = {name: values[-1] for name, values in self._metrics["train"].items()}
            figures.append({"loss": float(loss.detach())} | said)
            return loss

        # Of the experimental trainers.
        def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
            return _tokenised(feature)

        def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: Any = "train") -> Any:
            loss, said = super().get_batch_loss_metrics(model, batch, train_eval)
            figures.append({"loss": float(loss.detach())} | said)
            return loss, said

    return Trainer


def _arguments(work: Preferences, folder: Path) -> dict[str, Any]:
    """Of the trainer's config."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": work.batch,
        "max_steps": work.steps,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": CLIP,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "max_length": None,
        "beta": work.said.get("beta", 0.1),
    }


def _trl(work: Preferences) -> tuple[Any, Any, dict[str, Any]]:
    """The trainer, its config, and what the losses are called there."""
    said = {name: value for name, value in work.said.items() if name not in ("loss", "beta", "reference")}
    names = work.said["loss"]
    if names in UNREFERENCED:
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        if names == "orpo":
            return ORPOTrainer, ORPOConfig, said
        return CPOTrainer, CPOConfig, {"loss_type": "simpo" if names == "simpo" else "sigmoid", **said}
    if not work.single:
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer, DPOConfig, {"loss_type": [names] if isinstance(names, str) else list(names), **said}
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer, KTOConfig, {"loss_type": names, **said}


def _tokenised(row: dict[str, Any]) -> dict[str, Any]:
    """As the experimental trainers have a row."""
    found: dict[str, Any] = {"prompt_input_ids": row["prompt_ids"]}
    for name in ("chosen", "rejected"):
        ids = [*row["prompt_ids"], *row[f"{name}_ids"]]
        labels = [-100] * len(row["prompt_ids"]) + list(row[f"{name}_ids"])
        found |= {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids), f"{name}_labels": labels}
    return found


def _rows(work: Preferences) -> list[dict[str, Any]]:
    """The records as TRL has them when they are tokenised."""
    records, epoch = work.records(), 2 * work.batch
    if not work.single:
        return [
            {"prompt_ids": list(record.prompt), "prompt": "", "chosen": "", "rejected": ""}
            | {f"{name}_ids": list(ids) for name, ids in zip(("chosen", "rejected"), record.answers, strict=True)}
            for record in records
        ]
    return [
        {
            "prompt_ids": list(record.prompt),
            "completion_ids": list(record.answers[0]),
            "label": record.desirable,
            # The answer before it in the data.
            **(
                {"KL_completion_ids": list(records[(index - 1) % epoch].answers[0])}
                if work.said["loss"] == "kto"
                else {}
            ),
        }
        for index, record in enumerate(records)
    ]


def write_pairs(folder: Path, pictures: bool) -> Path:
    """Eight pairs, some with a picture or two, and eight labelled answers, as JSON lines; the first file's path."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    pairs, labelled = [], []
    for number in range(8):
        content: list[dict[str, str]] = [{"type": "text", "text": f"Count {number} up to {number + number % 3}."}]
        for picture in range(number % 3 if pictures else 0):
            name = f"{number}-{picture}.png"
            Image.new("RGB", (24 + 8 * number, 24 + 16 * picture), (31 * number, 40, 90 * picture)).save(folder / name)
            content.insert(0, {"type": "image", "path": name})
        prompt = [{"role": "user", "content": content}]
        answers = [" ".join(str(number + step) for step in range(1 + 2 * more + number % 3)) for more in (0, 1)]
        pairs.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
        labelled.append({"prompt": prompt, "completion": answers[number % 2], "label": number % 2 == 0})
    for name, rows in (("pairs", pairs), ("labelled", labelled)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "pairs.jsonl"


def train_data(said: dict[str, Any], overrides: list[str]) -> tuple[int, bool]:
    """Train a recipe on its own data; (last step, stopped). Runs on every rank."""
    from recipes.config import resolve
    from recipes.train.loop import train

    outcome = train(resolve(said, overrides))
    return outcome.step, outcome.stopped


def width_of(path: Path, toy: Path, cache: Path, rows: int, multiple: int = 16, **options: Any) -> int:
    """The least length at which so many rows hold all of them, packed."""
    from recipes.data import Batches, BatchOptions, CorpusOptions, open_corpus
    from recipes.data.preference import of_its_kind

    corpus = open_corpus(of_its_kind(CorpusOptions(str(path), 4096, cache=str(cache))), toy)
    sizes = corpus.lengths.reshape(-1, corpus.options.together).sum(1)
    for length in range(-(-int(sizes.max()) // multiple) * multiple, 4096, multiple):
        if Batches(corpus, BatchOptions(length, packing=True, **options)).rows(0) == rows:
            return length
    raise AssertionError("no length gives so many rows")


def apart(
    ours: Sequence[Mapping[str, float]], alone: Sequence[Mapping[str, float]], needed: set[str]
) -> dict[str, float]:
    """The largest difference of each figure of two logs, relative to the largest value of it, evaluation too.

    `needed`: figures that have to be among them.
    """
    names = {
        name for line in alone for name in line if name not in {"step", *TIMED} and not name.startswith("expert_load")
    }
    assert needed <= names
    found = {}
    for name in names:
        pairs = [(a[name], b[name]) for a, b in zip(ours, alone, strict=True) if name in b]
        largest = max(abs(b) for _, b in pairs)
        found[name] = max(abs(a - b) for a, b in pairs) / largest if largest else max(abs(a) for a, _ in pairs)
    return found
