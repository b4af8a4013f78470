"""A model folder's tokenizer, processor and chat template: samples -> token ids with their supervision."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bridge.errors import BridgeError, DataError, UsageError
from bridge.geometry import Geometry
from bridge.hf.json_file import read_object
from bridge.token_ids import check_ids, embedding_tables
from recipes.data.control import ControlTokens, answers_of, has_thought
from recipes.data.options import CorpusOptions, Supervise
from recipes.data.processing import PLACEHOLDERS, MediaProcessor, ReadMedia
from recipes.data.rendering import Template
from recipes.data.sample import Media, Sample, Where
from recipes.data.segments import ALL, TokenArrays, mark_learnt, split_into_segments
from recipes.data.supervision import (
    MARKERS,
    MODEL_HEADER,
    RESPONSE,
    TURN,
    TURN_END,
    TemplateError,
    around,
    check_answers,
    model_steps,
    supervised_spans,
    with_prefix,
)
from recipes.data.tokens import Tokens

# Where processors of before transformers 4.57 keep the template that their tokenizer lacks.
_PROCESSOR_TEMPLATE = "chat_template.json"
# What the tokens depend on.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TOKEN_FILES = ("tokenizer.json", "tokenizer_config.json", *_PROCESSOR_FILES)


@dataclass(frozen=True)
class Encoded:
    """A sample as tokens. All arrays [n]: `ids` int32, `supervised` bool, `types` uint8 (0 text, 1 image, 2 video,
    3 audio). `media`: in the order of their placeholders, kind by kind as the record has them.
    `thoughts_left_out`: thoughts of the messages that the template does not render. `unlike_prompts`: learnt answers
    before the last that have no generation prefix, though answers are asked for with one. `desirable`: of an answer
    with a label, whether it is wanted.
    """

    ids: np.ndarray
    supervised: np.ndarray
    types: np.ndarray
    media: tuple[Media, ...] = ()
    thoughts_left_out: int = 0
    unlike_prompts: int = 0
    desirable: bool = False

    def __len__(self) -> int:
        return len(self.ids)


class _LaidOut(NamedTuple):
    """A sample before it is tokenised: texts that are tokenised each by itself, and what of each is learnt.

    `first_unlearnt`: where everything is learnt, but neither <bos> nor soft tokens.
    """

    segments: Sequence[str]
    learnt: Sequence[int]
    media: tuple[Media, ...] = ()
    thoughts_left_out: int = 0
    unlike_prompts: int = 0
    first_unlearnt: bool = False


class ChatModel:
    """The tokenizer, processor and template of a model folder. One per thread: `fork` makes another.

    `prefix`: what a generation prompt has behind the header of the model's
    turn, where answers are to have it too.
    """

    def __init__(self, folder: Path, options: CorpusOptions) -> None:
        """Raises UsageError: no tokenizer, not one of Gemma 4, an unreadable template."""
        from transformers import AutoTokenizer

        self.folder = folder
        self._supervise: Supervise = options.supervise
        self._kwargs = dict(options.template_kwargs)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            raise UsageError(f"{folder}: its tokenizer cannot be loaded ({_line(error)})") from error
        if not self.tokenizer.is_fast:
            raise UsageError(f"{folder}: has no tokenizer.json")
        self.template = _template(self.tokenizer, options.chat_template, self.folder)
        self._applied = Template(self.tokenizer, self.template or "", self._kwargs)
        has_processor = any((folder / name).is_file() for name in _PROCESSOR_FILES)
        self.geometry = Geometry.from_folder(folder)
        self.media = MediaProcessor(folder, self.geometry, has_processor=has_processor)
        self._control = ControlTokens(
            tuple(dict.fromkeys([*self.tokenizer.all_special_tokens, *MARKERS, *PLACEHOLDERS.values()]))
        )
        self._check_tokenizer()
        # The fewest rows of a table, and what ends a step of the model, each a token.
        self._rows = min(table.rows for table in embedding_tables(self.geometry))
        self._ends = {end: int(self.tokenizer.convert_tokens_to_ids(end)) for end in (TURN_END, RESPONSE)}
        self.prefix = "" if options.generation_prefix is False else self._generation_prefix(options.generation_prefix)

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def fork(self) -> ChatModel:
        """One for another thread: tokenizers and processors change inside while they work."""
        other = copy.copy(self)
        other.tokenizer, other.media = copy.deepcopy(self.tokenizer), self.media.fork()
        other._applied = Template(other.tokenizer, self.template or "", self._kwargs)
        return other

    def fingerprints(self) -> dict[str, str]:
        """What tokens depend on beside options and data: a digest of each, by its name in a message."""
        files = hashlib.sha256()
        for name in _TOKEN_FILES:
            path = self.folder / name
            files.update(f"\0{name}\0".encode() + (path.read_bytes() if path.is_file() else b""))
        template = hashlib.sha256((self.template or "").encode())
        kinds = ", ".join(sorted(self.media.kinds))
        # What `encode` refuses must not be found in a cache of before.
        rows = ", ".join(str(table.rows) for table in embedding_tables(self.geometry))
        return {
            "the model's vocabulary": rows,
            "the chat template": template.hexdigest(),
            "the model's tokenizer or processor": hashlib.sha256(f"{files.hexdigest()} {kinds}".encode()).hexdigest(),
        }

    def encode(self, samples: Sequence[Sample], read: Sequence[ReadMedia]) -> list[Encoded | BridgeError]:
        """Samples as tokens, all of them at a time, which is what makes a tokenizer fast. `read`: of each.

        In the place of a sample what is wrong with it: DataError that names the record; UsageError where nothing could
        be encoded, or a token that the model has no row for.
        """
        laid = list(map(self._laid_out, samples, self._render_all(samples), read))
        segments = [segment for one in laid if isinstance(one, _LaidOut) for segment in one.segments]
        tokens = self._token_ids(segments)
        together = TokenArrays.of(tokens)
        several = iter(tokens)
        return [
            self._encoded(sample, one, list(islice(several, len(one.segments))), together)
            if isinstance(one, _LaidOut)
            else one
            for sample, one in zip(samples, laid, strict=True)
        ]

    def _laid_out(self, sample: Sample, text: str | BridgeError, read: ReadMedia) -> _LaidOut | BridgeError:
        """What there is to tokenise of a sample, whose conversation was rendered as `text`."""
        try:
            if isinstance(text, BridgeError):
                raise text
            if sample.messages:
                return self._conversation(sample, text, read)
            return _LaidOut((text,) if sample.text is not None else (), (ALL,))
        except BridgeError as error:
            return error

    def _conversation(self, sample: Sample, text: str, read: ReadMedia) -> _LaidOut:
        try:
            steps = model_steps(text)
            said = check_answers(text, steps, answers_of(sample.messages))
        except TemplateError as error:
            raise DataError(f"{sample.where}: {error}") from None
        spans = supervised_spans(steps, self._supervise, said)
        everything, unlike = self._supervise.turns == "everything", 0
        if everything:
            spans = around(len(text), spans, steps)
        elif self.prefix and steps:
            text, spans, unlike = with_prefix(text, spans, steps, self.prefix)
        thoughts = len([message for message in sample.messages if message.thinking or has_thought(message)])
        left_out = max(0, thoughts - sum(len(step.thoughts) for step in steps))
        media = sample.media
        if media:
            text, spans = self.media.with_soft_tokens(text, spans, media, read, str(sample.where))
        return _LaidOut(
            *split_into_segments(text, spans, {} if everything else self._ends),
            media,
            left_out,
            unlike,
            first_unlearnt=everything,
        )

    def _encoded(
        self, sample: Sample, laid: _LaidOut, parts: Sequence[list[int]], together: TokenArrays
    ) -> Encoded | BridgeError:
        ids, supervised, types = together.next(sum(map(len, parts)))
        try:
            if sample.tokens is not None:
                encoded = self._encode_tokens(sample.tokens, sample.where)
            elif sample.text is not None:
                encoded = self._encode_text(parts[0])
            else:
                mark_learnt(supervised, parts, laid.learnt)
                types = self.media.types(ids) if laid.media else types
                if laid.first_unlearnt:
                    # Of <bos> there is nothing to learn, and a soft token is not one that anybody says.
                    supervised[0], supervised[types != 0] = False, False
                encoded = Encoded(ids, supervised, types, laid.media, laid.thoughts_left_out, laid.unlike_prompts)
            # Beside what the segments hold there are tokens of the data's own, and those at the ends of a text.
            ordinary = sample.messages and together.highest < self._rows
            if not len(encoded) or (not ordinary and int(encoded.ids.max()) >= self._rows):
                check_ids(encoded.ids, self.geometry, sample.where, self.tokenizer.convert_ids_to_tokens)
        except BridgeError as error:
            return error
        return encoded

    def encode_prompt(self, sample: Sample, read: ReadMedia) -> tuple[Encoded, dict[str, torch.Tensor]]:
        """What the model is asked, up to the header of its turn, and what the processor makes of the media.

        Raises as `encode` does.
        """
        self._control.check(sample)
        text, tensors = self.render(sample, answer=True), dict[str, torch.Tensor]()
        if sample.media:
            text, _ = self.media.with_soft_tokens(text, [], sample.media, read, str(sample.where))
            tensors, _ = self.media.tensors(sample.media, read, str(sample.where))
        ids, supervised, types = TokenArrays.of(parts := self._token_ids([text])).next(len(parts[0]))
        types = self.media.types(ids) if sample.media else types
        return Encoded(ids, supervised, types, sample.media), tensors

    def render(self, sample: Sample, *, answer: bool = False) -> str:
        """The conversation as the template writes it, a placeholder for each media item.

        `answer`: with the beginning of the model's turn behind it.

        Raises UsageError without a template, DataError where the template refuses.
        """
        try:
            (text,) = self._render([sample], answer=answer)
        except BridgeError:
            raise
        except Exception as error:
            # Templates are programs: what they raise on odd messages is anything.
            raise DataError(f"{sample.where}: the chat template refuses it ({_line(error)})") from error
        return self._checked_media(sample, text)

    def _render_all(self, samples: Sequence[Sample]) -> list[str | BridgeError]:
        """The same of many, of plain text the text; where one is refused the error is in its place."""
        refused = [self._control.refused(sample) for sample in samples]
        alike = [
            sample
            for sample, error in zip(samples, refused, strict=True)
            if sample.messages and not sample.tools and error is None
        ]
        try:
            together = iter(self._render(alike) if len(alike) > 1 else ())
        except Exception:
            # One by one, to find the one.
            together, alike = iter(()), []
        rendered: list[str | BridgeError] = []
        for sample, error in zip(samples, refused, strict=True):
            try:
                if error is not None:
                    rendered.append(error)
                elif not sample.messages:
                    rendered.append(sample.text or "")
                elif sample.tools or len(alike) < 2:
                    rendered.append(self.render(sample))
                else:
                    rendered.append(self._checked_media(sample, next(together)))
            except BridgeError as raised:
                rendered.append(raised)
        return rendered

    def _render(self, samples: Sequence[Sample], *, answer: bool = False) -> list[str]:
        """Conversations with the same tools. Raises UsageError without a template, and what the template raises."""
        if self.template is None:
            raise UsageError(
                f"{self.folder}: has no chat template (a base model): copy chat_template.jinja from the instruction-"
                f"tuned model of the same size ({self.folder.name}-it) into it, or set data.chat_template to that file"
            )
        return self._applied.render([sample.messages for sample in samples], samples[0].tools, answer=answer)

    def _checked_media(self, sample: Sample, text: str) -> str:
        media = sample.media
        for kind, token in PLACEHOLDERS.items():
            wanted = sum(item.kind == kind for item in media) if media else 0
            if text.count(token) != wanted:
                raise DataError(f"{sample.where}: the chat template renders {text.count(token)} of {wanted} {kind}(s)")
        return text

    def _encode_text(self, body: Sequence[int]) -> Encoded:
        ids = np.asarray([self.tokenizer.bos_token_id, *body, self.tokenizer.eos_token_id], np.int32)
        supervised = np.ones(len(ids), bool)
        supervised[0] = False
        return Encoded(ids, supervised, np.zeros(len(ids), np.uint8))

    def _encode_tokens(self, tokens: Tokens, where: Where) -> Encoded:
        for token in PLACEHOLDERS.values():
            if (tokens.ids == self.tokenizer.convert_tokens_to_ids(token)).any():
                raise DataError(f"{where}: input_ids: {token} stands for media, which tokens do not bring")
        return Encoded(tokens.ids, tokens.supervised, np.zeros(len(tokens.ids), np.uint8))

    def _token_ids(self, segments: Sequence[str]) -> list[list[int]]:
        """Of each piece, as it is."""
        if not segments:
            return []
        # Not the tokenizer's own call, which makes of each piece a dictionary of lists.
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(list(segments), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _generation_prefix(self, needed: bool | None) -> str:
        """What a generation prompt has behind the header of the model's turn; "" without a template.

        A template that makes no prompt has none: there is nothing to agree with. `needed`: raise UsageError there.
        """
        if self.template is None:
            return ""
        messages = [{"role": "user", "content": "a"}]
        given: dict[str, Any] = {"chat_template": self.template, "tokenize": False, **self._kwargs}
        try:
            plain = str(self.tokenizer.apply_chat_template(messages, **given))
            prompt = str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **given))
        except Exception as error:
            if not needed:
                return ""
            raise UsageError(f"{self.folder}: the chat template has no generation prompt ({_line(error)})") from error
        if prompt.startswith(plain + MODEL_HEADER):
            return prompt[len(plain + MODEL_HEADER) :]
        if needed:
            raise UsageError(f"{self.folder}: the chat template's generation prompt is no turn of the model")
        return ""

    def _check_tokenizer(self) -> None:
        encode: Callable[[str], list[int]] = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        for marker in MARKERS:
            if len(encode(marker)) != 1:
                raise UsageError(f"{self.folder}: its tokenizer has no token {marker}; it is not one of Gemma 4")
        # Pieces are only tokens of the whole if the tokenizer adds nothing to a piece.
        segments = [f"{TURN}model\n", "one two", f"{TURN_END}"]
        if encode("".join(segments)) != [token for segment in segments for token in encode(segment)]:
            raise UsageError(f"{self.folder}: its tokenizer adds something at the start of a text")


def _template(tokenizer: Any, file: str | None, folder: Path) -> str | None:
    if file is not None:
        try:
            return Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"data.chat_template: {file}: cannot be read ({_line(error)})") from None
    template = tokenizer.chat_template
    if template is None and (folder / _PROCESSOR_TEMPLATE).exists():
        template = read_object(folder / _PROCESSOR_TEMPLATE).get("chat_template")
    if isinstance(template, Mapping):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise UsageError(f"{folder}: its chat template is no text")
    return template


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
