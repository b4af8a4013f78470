"""Generation for the tests: what ranks run, and transformers' own answer to the same prompts."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from bridge.generate.loop import Generator
from bridge.generate.rows import Completion, Prompt
from bridge.generate.sampling import SamplingOptions
from bridge.generate.task import ModelTask, build_model
from bridge.geometry import Geometry
from bridge.lora.inject import disabled
from bridge.megatron.parallel import Parallel
from bridge.verify.media import REQUESTS, drawing, kinds_of, load_processor
from bridge.verify.reference import load_hf, with_masks

from .adapter_kit import make_adapter

_TEXT = {"input_ids", "attention_mask", "mm_token_type_ids"}
LENGTHS = (3, 25, 8, 9, 40, 1, 17)  # the window is 8: shorter, at its edge, of five windows


@dataclass(frozen=True)
class Answers:
    """Completions, and of each row the logits of every step [tokens, vocab], where they were asked for."""

    completions: list[Completion]
    logits: dict[int, Tensor]


class _Recorder(Generator):
    """A generator that keeps the logits that tokens were chosen of."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.recorded: dict[int, list[Tensor]] = {}

    def _choose(self, logits: Tensor | None, rows: Any, options: SamplingOptions) -> Any:
        if logits is not None:
            for row, found in zip(rows, logits, strict=True):
                self.recorded.setdefault(row.index, []).append(found)
        return super()._choose(logits, rows, options)


def task(folder: Path, parallel: Parallel = Parallel(), **changes: Any) -> ModelTask:  # noqa: B008 - frozen
    geometry = Geometry.from_folder(folder)
    return replace(ModelTask(geometry, folder, False, parallel, "float32"), **changes)


def letters(tokens: Sequence[int]) -> str:
    """A text that has a letter for every token."""
    return "".join(chr(ord("a") + token % 26) for token in tokens)


def answer(
    asked: ModelTask,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    without: bool = False,
    **settings: Any,
) -> Answers:
    """On a rank: the answers of the whole world, and the logits of the rows that this rank's replica answered.

    `without`: its adapters, though the model has them.
    """
    model, groups = build_model(asked)
    generator = _Recorder(model, groups, decode=letters, **settings)
    with disabled(model) if without else contextlib.nullcontext():
        completions = generator.generate(prompts, options)
    return Answers(completions, {index: torch.stack(rows) for index, rows in generator.recorded.items()})


def prefill_flops(asked: ModelTask, prompt: Prompt) -> int:
    """On a rank: of the products of a prompt's prefill, without those of attention."""
    from benchmarks.generation import CountedFlops

    model, groups = build_model(asked)
    generator = Generator(model, groups)
    with CountedFlops(weights_only=True) as counted:
        generator.generate([prompt], SamplingOptions(max_new_tokens=1))
    return counted.total


def random_prompts(geometry: Geometry, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([i for i in range(8, geometry.vocab_size) if i not in geometry.placeholder_ids])
    return [Prompt(tuple(allowed[torch.randint(len(allowed), (n,), generator=generator)].tolist())) for n in lengths]


def inputs_of(
    prompt: Prompt, more: Sequence[int] = (), placeholders: frozenset[int] = frozenset()
) -> dict[str, Tensor]:
    """A prompt, and tokens behind it, as transformers' models take them.

    A placeholder that was generated stands for no picture: in transformers' own generation it is embedded as padding.
    """
    ids = torch.tensor([[*prompt.ids, *(0 if token in placeholders else token for token in more)]])
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **prompt.media}
    if prompt.mm_token_type_ids is not None:
        types = prompt.mm_token_type_ids.reshape(1, -1)
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, len(more)))
    return inputs


def generate_with_transformers(
    folder: Path, prompts: Sequence[Prompt], tokens: int, static: bool = False
) -> list[list[int]]:
    """On a rank: greedy answers of so many tokens, one prompt after the other. `static`: with a static cache."""
    model = load_hf(folder, Geometry.from_folder(folder), torch.float32).eval()
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    found = []
    for prompt in prompts:
        output = model.generate(
            **inputs_of(prompt), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options
        )
        found.append(output[0, len(prompt.ids) :].tolist())
    return found


def teacher_forced(
    folder: Path, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], adapter: Path | None = None
) -> list[Tensor]:
    """On a rank: transformers' logits [tokens, vocab] of every step of given answers, in one forward pass each."""
    geometry = Geometry.from_folder(folder)
    model = load_hf(folder, geometry, torch.float32).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()
    found = []
    for prompt, tokens in zip(prompts, answers, strict=True):
        with torch.no_grad():
            inputs = with_masks(model, inputs_of(prompt, tokens, geometry.placeholder_ids))
            logits = model(**inputs, use_cache=False).logits[0]
        found.append(logits[len(prompt.ids) - 1 : -1].clone())
    return found


# What a prompt with media is made of, by its name; each ends in another way: in text, in an image, right behind one.
MEDIA_REQUESTS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "image": REQUESTS["image"],
    "two images": REQUESTS["two images"],
    "two videos": REQUESTS["two videos"],
    "audio": REQUESTS["audio"],
    "image, audio, text": REQUESTS["image, audio, text"],
    "right behind an image": lambda dice: {"text": ["behind it <|image|>"], "images": [[drawing(60, 80, dice)]]},
}


def media_prompts(folder: Path, seed: int = 0) -> dict[str, Prompt]:
    """On a rank: a prompt of each kind that the model takes, as its own processor makes it. One ends in an image."""
    geometry = Geometry.from_folder(folder)
    kinds = {*kinds_of(geometry)} | ({"right behind an image"} if geometry.vision is not None else set())
    processor, dice = load_processor(folder), random.Random(seed)
    prompts = {}
    for name in sorted(kinds & MEDIA_REQUESTS.keys()):
        batch = dict(processor(**MEDIA_REQUESTS[name](dice), return_tensors="pt"))
        media = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k not in _TEXT}
        prompts[name] = Prompt(tuple(batch["input_ids"][0].tolist()), batch["mm_token_type_ids"][0], media)
    behind = prompts.get("right behind an image")
    if behind is not None:
        assert behind.mm_token_type_ids is not None
        length = int(behind.mm_token_type_ids.nonzero().max()) + 1  # without what closes the image
        prompts["in an image"] = replace(
            behind, ids=behind.ids[:length], mm_token_type_ids=behind.mm_token_type_ids[:length]
        )
    return prompts


def save_adapter(folder: Path, target: Path, **options: Any) -> None:
    """On a rank: an adapter as PEFT saves it, of random values."""
    make_adapter(folder, target, **options)


def encode_prompts(folder: Path, file: Path) -> list[Prompt]:
    """On a rank: the prompts of a file, as the command reads them."""
    from recipes.data.prompts import PromptEncoder, read_prompts

    return list(read_prompts(file, PromptEncoder(folder)))


def run_recipe(said: dict[str, Any], keys: list[str]) -> None:
    """On a rank: train."""
    from recipes.config import resolve
    from recipes.train.loop import train

    train(resolve(said, keys))
