"""`generate`: what a model says, in Megatron, wherever its weights are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge.cli_kit import (
    AdapterOption,
    AllowUrlsOption,
    DtypeOption,
    EpOption,
    EtpOption,
    MaxNewTokensOption,
    MaxRowsOption,
    ModelArgument,
    PpOption,
    SequenceParallelOption,
    TpOption,
    VppOption,
    epilog,
    err,
    out,
)
from bridge.errors import UsageError

if TYPE_CHECKING:
    from bridge.generate.opened import OpenedModel
    from bridge.generate.rows import Completion, Prompt
    from bridge.generate.sampling import SamplingOptions
    from bridge.generate.session import Session
    from bridge.megatron.parallel import Parallel
    from recipes.data.prompts import PromptEncoder


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=epilog("generate runs/first --prompt 'What is in this picture?' --image receipt.png"))(generate)


PromptOption = Annotated[str | None, typer.Option(help="A user's message.")]
ImageOption = Annotated[list[Path] | None, typer.Option(help="A picture of the message; repeat.")]
VideoOption = Annotated[list[Path] | None, typer.Option(help="A film of the message; repeat.")]
AudioOption = Annotated[list[Path] | None, typer.Option(help="A WAV file of the message; repeat.")]
SystemOption = Annotated[str | None, typer.Option(help="What the system says before --prompt, or --chat.")]
InputOption = Annotated[
    Path | None,
    typer.Option("--input", metavar="JSONL", help='Lines of {"messages": …}, {"prompt": …} or {"ids": …}.'),
]
IdsOption = Annotated[str | None, typer.Option(metavar="5,6,7", help="Token ids as they are.")]
OutputOption = Annotated[
    Path | None, typer.Option(metavar="JSONL", help="Write answers there; the same command again goes on.")
]
DrafterOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="A drafter of the model: the same answers, in fewer passes.")
]
DraftTokensOption = Annotated[
    int | None, typer.Option(help="It proposes so many at once; its generation config says, or 4.")
]
TemperatureOption = Annotated[float, typer.Option(help="0: the likeliest token.")]
TopKOption = Annotated[int | None, typer.Option(help="Of the k likeliest.")]
TopPOption = Annotated[float | None, typer.Option(help="Of the likeliest that hold this probability together.")]
MinPOption = Annotated[float | None, typer.Option(help="Of those at least so likely, against the likeliest.")]
RepetitionPenaltyOption = Annotated[float, typer.Option(help="Above 1: against what is there already.")]
NumReturnSequencesOption = Annotated[int, typer.Option(help="Answers a prompt.")]
StopOption = Annotated[list[str] | None, typer.Option(help="A text that ends an answer; repeat.")]
IgnoreEosOption = Annotated[bool, typer.Option("--ignore-eos", help="Go on behind the model's own end.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same answers, in any layout.")]
RawOption = Annotated[bool, typer.Option("--raw", help="No chat template.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="A conversation on the terminal.")]


def generate(
    model: ModelArgument,
    prompt: PromptOption = None,
    image: ImageOption = None,
    video: VideoOption = None,
    audio: AudioOption = None,
    system: SystemOption = None,
    input_file: InputOption = None,
    ids: IdsOption = None,
    output: OutputOption = None,
    adapter: AdapterOption = None,
    drafter: DrafterOption = None,
    draft_tokens: DraftTokensOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    num_return_sequences: NumReturnSequencesOption = 1,
    stop: StopOption = None,
    ignore_eos: IgnoreEosOption = False,
    seed: SeedOption = 0,
    raw: RawOption = False,
    chat: ChatOption = False,
    allow_urls: AllowUrlsOption = False,
    dtype: DtypeOption = "bfloat16",
    tp: TpOption = 1,
    pp: PpOption = 1,
    vpp: VppOption = 1,
    ep: EpOption = 1,
    etp: EtpOption = 1,
    sequence_parallel: SequenceParallelOption = False,
    max_rows: MaxRowsOption = 16,
) -> None:
    """Let a model answer: a prompt, a file of them, or a conversation. Greedy unless --temperature is above 0.

    Answers stream to the terminal, or go to --output as JSONL: index, prompt_tokens, tokens, text, logprobs,
    finish_reason; with --drafter also drafted and accepted, how many tokens, and rounds, those of each pass. The
    log-probabilities are the model's own, before temperature and cuts.
    """
    from bridge.generate.opened import stop_token_ids
    from bridge.generate.sampling import SamplingOptions
    from bridge.megatron.parallel import Parallel

    question = _Question(prompt, image or [], video or [], audio or [], system, input_file, ids, raw, chat)
    question.check(output, num_return_sequences)
    cuts = (temperature, top_k, top_p, min_p, repetition_penalty)
    options = SamplingOptions(max_new_tokens, *cuts, seed, num_return_sequences, stop_strings=tuple(stop or ()))
    parallel = Parallel(tp, pp, vpp, ep, etp, 1, sequence_parallel)
    opened = _open(model, adapter, parallel, dtype, drafter, draft_tokens)
    if not ignore_eos:
        options = replace(options, stop_token_ids=stop_token_ids(opened.assets))
    _Run(opened, options, raw, allow_urls, max_rows).answer(question, output, model)


def _open(
    model: str, adapter: str | None, parallel: Parallel, dtype: str, drafter: str | None, draft_tokens: int | None
) -> OpenedModel:
    from bridge.generate.opened import open_model, with_drafter

    if drafter is None and draft_tokens is not None:
        raise UsageError("--draft-tokens goes with --drafter")
    opened = open_model(model, adapter=adapter, parallel=parallel, dtype=dtype)
    return opened if drafter is None else with_drafter(opened, drafter, draft_tokens)


@dataclass(frozen=True)
class _Question:
    """What is asked, as the options say it: exactly one of `prompt`, `file`, `ids`, `chat`."""

    prompt: str | None
    images: Sequence[Path]
    videos: Sequence[Path]
    sounds: Sequence[Path]
    system: str | None
    file: Path | None
    ids: str | None
    raw: bool
    chat: bool

    def check(self, output: Path | None, samples: int) -> None:
        """Raise UsageError where options exclude each other."""
        options = {"--prompt": self.prompt, "--input": self.file, "--ids": self.ids, "--chat": self.chat or None}
        said = [name for name, value in options.items() if value is not None]
        if len(said) != 1:
            raise UsageError(
                f"{' and '.join(said) or 'no prompt'}: exactly one of --prompt, --input, --ids, --chat is needed"
            )
        if self._has_more and self.prompt is None and not self.chat:
            raise UsageError(
                "--image, --video, --audio and --system go with --prompt; in --input they stand in the messages"
            )
        if self.chat and (output is not None or samples > 1):
            raise UsageError("--chat shows one answer, on the terminal: leave --output and --num-return-sequences away")

    @property
    def _has_more(self) -> bool:
        return bool(self.images or self.videos or self.sounds or self.system)

    def record(self) -> dict[str, Any]:
        """The question as a line of a file of prompts. Raises UsageError."""
        if self.ids is not None:
            return {"ids": _numbers(self.ids)}
        if not self.raw:
            return {"messages": self.messages(self.prompt or "")}
        if self._has_more:
            raise UsageError("--raw takes text alone: media and a system's message are put in place by the template")
        return {"prompt": self.prompt}

    def messages(self, text: str) -> list[dict[str, Any]]:
        """One user's turn, media before the text as the model's makers advise."""
        media = (("image", self.images), ("video", self.videos), ("audio", self.sounds))
        parts: list[dict[str, Any]] = [
            {"type": kind, "path": str(path.resolve())} for kind, paths in media for path in paths
        ]
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*messages, {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(f"--ids {text}: token ids with commas between them are needed, such as 5,6,7") from None


class _Run:
    """One call of the command: the model, what it is asked, and where the answers go."""

    def __init__(
        self, opened: OpenedModel, options: SamplingOptions, raw: bool, allow_urls: bool, max_rows: int
    ) -> None:
        self._opened, self._options = opened, options
        self._raw, self._allow_urls, self._max_rows = raw, allow_urls, max_rows
        self._met: list[Completion] = []

    def _encoder(self) -> PromptEncoder:
        from recipes.data.prompts import PromptEncoder

        return PromptEncoder(self._opened.assets, raw=self._raw, allow_urls=self._allow_urls)

    @contextmanager
    def _session(self) -> Iterator[Session]:
        from bridge.generate.acceptance import Acceptance
        from bridge.generate.session import Session
        from bridge.ranks import RankPool

        task = self._opened.task
        world = task.parallel.world_size
        threads = max(1, (os.cpu_count() or 1) // world)
        for notice in self._opened.notices:
            err.print(notice)
        beside = [str(found) for found in (task.adapter, task.drafter and task.drafter.weights) if found]
        err.print(f"loading {task.weights}{f' with {" and ".join(beside)}' if beside else ''} ({task.parallel})")
        with (
            RankPool(world, threads_per_rank=threads) as pool,
            Session(pool, task, self._opened.assets, max_rows=self._max_rows) as session,
        ):
            yield session
        if task.drafter is not None:
            err.print(str(Acceptance.of(self._met)))

    def answer(self, question: _Question, output: Path | None, model: str) -> None:
        """Whatever is asked; `model` as the command names it."""
        if question.chat:
            self.converse(question)
        elif question.file is not None:
            self.answer_file(question.file, output, model)
        else:
            self.answer_one(question.record(), output, model)

    def answer_one(self, record: dict[str, Any], output: Path | None, model: str) -> None:
        """One prompt; its answers stream to the terminal, one after the other where there are several."""
        from recipes.data.sample import Where

        encoder = self._encoder()
        prompts = [encoder.encode(record, Where("--prompt", 1), Path("/"))]
        if output is not None:
            self._write(prompts, output, model)
            return
        with self._session() as session:
            self._stream(session, prompts, encoder)

    def answer_file(self, path: Path, output: Path | None, model: str) -> None:
        """A file of prompts, to a file of answers, or to the terminal as lines."""
        from recipes.data.prompts import read_prompts

        if not path.is_file():
            raise UsageError(f"--input {path}: not a file")
        prompts = list(read_prompts(path, self._encoder()))
        if not prompts:
            raise UsageError(f"--input {path}: holds no prompts")
        self._write(prompts, output, model)

    def _write(self, prompts: Sequence[Prompt], output: Path | None, model: str) -> None:
        import json

        from bridge.generate.output import OutputFile, record

        if output is None:
            with self._session() as session:
                waiting, samples, done = {}, self._options.num_return_sequences, 0
                for completion in session.generate(prompts, self._options):
                    self._met.append(completion)
                    waiting[completion.index, completion.sample] = completion
                    while (ready := waiting.pop(divmod(done, samples), None)) is not None:
                        print(json.dumps(record(ready), ensure_ascii=False), flush=True)
                        done += 1
            return
        total = len(prompts) * self._options.num_return_sequences
        said = json.dumps([[prompt.ids, sorted(prompt.media)] for prompt in prompts]).encode()
        with OutputFile(output, self._options, said, self._identity(model)) as file:
            if file.done:
                err.print(f"{output}: {file.done} of {total} answers are there, going on behind them")
            first = file.done // self._options.num_return_sequences
            if first < len(prompts):
                with self._session() as session:
                    begun = file.done
                    for completion in session.generate(prompts[first:], self._options, first_index=first):
                        self._met.append(completion)
                        if completion.index * self._options.num_return_sequences + completion.sample >= begun:
                            file.write(completion, lambda done: err.print(f"{done} of {total} answers"))
        out.print(f"wrote {total} answers: {output}")

    def _identity(self, model: str) -> str:
        """What the answers are of, as far as a name and the newest checkpoint say it."""
        task = self._opened.task
        drafter = "" if task.drafter is None else f" {task.drafter.weights} {task.draft_tokens}"
        return f"{model} {task.weights.name} {task.adapter} {task.dtype}{drafter}"

    def _stream(self, session: Session, prompts: Sequence[Prompt], encoder: PromptEncoder) -> list[str]:
        """Print answers while they are made; returns their texts."""
        printer = _Shown(encoder)
        texts = []
        several = self._options.num_return_sequences > 1
        for completion in session.generate(prompts, self._options, on_token=None if several else printer.add):
            if several:
                out.print(f"[{completion.sample}] {completion.text}")
            else:
                printer.end(completion.text)
            self._met.append(completion)
            texts.append(completion.text)
            if completion.finish_reason == "length":
                err.print(f"(cut at --max-new-tokens {self._options.max_new_tokens})")
        return texts

    def converse(self, question: _Question) -> None:
        """A conversation: a line is a message, an empty one or the end of the input ends it."""
        from recipes.data.sample import Where

        if self._raw:
            raise UsageError("--chat speaks through the template: leave --raw away")
        encoder = self._encoder()
        messages: list[dict[str, Any]] = []
        with self._session() as session:
            while line := _ask():
                if messages:
                    messages.append({"role": "user", "content": line})
                else:
                    messages += question.messages(line)
                prompt = encoder.encode({"messages": messages}, Where("--chat", len(messages)), Path("/"))
                (text,) = self._stream(session, [prompt], encoder)
                messages.append({"role": "assistant", "content": text or "…"})


def _ask() -> str:
    err.print("> ", end="")
    return sys.stdin.readline().strip()


class _Shown:
    """Tokens of an answer as text on the terminal: what is shown once is not changed by what follows."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self._decode: Callable[[list[int]], str] = encoder.decode
        self._tokens: list[int] = []
        self._text = ""

    def add(self, index: int, sample: int, token: int) -> None:
        """One more token."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if not text.endswith("\ufffd"):  # a character of which some bytes are to come
            self._print(text)

    def end(self, text: str) -> None:
        """The whole text, as it stays."""
        self._print(text)
        print(flush=True)
        self._tokens, self._text = [], ""

    def _print(self, text: str) -> None:
        if text.startswith(self._text):
            print(text[len(self._text) :], end="", flush=True)
            self._text = text
