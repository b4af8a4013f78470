"""What a model says while it trains: answers to a file of prompts at each evaluation, with its weights as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bridge.convert.manifest import MegatronFolder
from bridge.errors import UsageError
from bridge.generate.loop import Generator
from bridge.generate.opened import stop_token_ids
from bridge.generate.output import record
from bridge.generate.rows import Completion, Prompt
from bridge.generate.sampling import SamplingOptions
from bridge.hf.hub import resolve
from recipes.config import Recipe
from recipes.data.prompts import PromptEncoder, read_prompts
from recipes.train.setup import Run
from recipes.train.signals import StopSignal

FOLDER = "samples"
# Of an answer on the terminal, and how many answers.
_SHOWN_CHARACTERS, _SHOWN = 100, 3


@dataclass(frozen=True)
class Samples:
    """The prompts of `train.samples`, as tokens."""

    prompts: tuple[Prompt, ...]
    options: SamplingOptions
    encoder: PromptEncoder

    @classmethod
    def of(cls, recipe: Recipe) -> Samples | None:
        """None where a recipe asks for none. Raises DataError that names the line of a prompt that cannot be read, and
        UsageError for a file without one."""
        path = recipe.train.samples
        if path is None:
            return None
        said = recipe.model
        folder = resolve(said.hf) if said.hf is not None else MegatronFolder.open(str(said.megatron)).hf
        encoder = PromptEncoder(Path(folder), allow_urls=recipe.data.allow_urls)
        options = SamplingOptions(
            max_new_tokens=recipe.train.sample_tokens,
            temperature=recipe.train.sample_temperature,
            seed=recipe.train.seed,
            stop_token_ids=stop_token_ids(Path(folder)),
        )
        prompts = tuple(read_prompts(Path(path), encoder))
        if not prompts:
            raise UsageError(f"train.samples={path}: holds no prompts")
        return cls(prompts, options, encoder)

    def answer(self, run: Run, step: int, signalled: StopSignal, say: Callable[[str], None]) -> list[Completion] | None:
        """Answer, and write `samples/step-N.jsonl` on rank 0. Collective; training goes on as if nothing had been.

        None where any rank was told to stop, which is asked after every few prompts.
        """
        run.gather_weights()
        generator = Generator(run.models, run.groups, decode=lambda tokens: self.encoder.decode(list(tokens)))
        together = generator.max_rows * run.groups.dp.size()
        found: list[Completion] = []
        for first in range(0, len(self.prompts), together):
            told = torch.tensor([float(bool(signalled))], dtype=torch.float64, device=run.device)
            dist.all_reduce(told)
            if told:
                return None
            found += generator.generate(self.prompts[first : first + together], self.options, first)
        if dist.get_rank() == 0:
            _write(Path(run.recipe.output) / FOLDER / f"step-{step}.jsonl", found)
            for completion in found[:_SHOWN]:
                say(f"sample {completion.index}: {_short(completion.text)}")
        return found


def _write(path: Path, completions: Sequence[Completion]) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    lines = (json.dumps(record(completion), ensure_ascii=False) + "\n" for completion in completions)
    partial.write_text("".join(lines), encoding="utf-8")
    partial.rename(path)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[:_SHOWN_CHARACTERS] + " …"
