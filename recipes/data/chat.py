"""A model folder's tokenizer, processor and chat template: samples -> token ids with their supervision."""

from __future__ import annotations

import copy
import hashlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridge.errors import BridgeError, DataError, UsageError
from bridge.geometry import Geometry
from bridge.hf.json_file import read_object
from bridge.token_ids import check_ids, embedding_tables
from recipes.data import media as media_files
from recipes.data.dialects import MEDIA_KINDS
from recipes.data.options import CorpusOptions, Supervise
from recipes.data.sample import THINKING_KEYS, Blob, Media, Message, Sample, Where
from recipes.data.supervision import (
    MARKERS,
    MODEL_HEADER,
    THOUGHT,
    THOUGHT_END,
    TURN,
    TURN_END,
    Answer,
    Span,
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
_IMAGE_TOKEN, _VIDEO_TOKEN, _AUDIO_TOKEN = "<|image|>", "<|video|>", "<|audio|>"
_PLACEHOLDERS = dict(zip(MEDIA_KINDS, (_IMAGE_TOKEN, _VIDEO_TOKEN, _AUDIO_TOKEN), strict=True))
# Control tokens that a message of the role may hold, because the model's own documentation has people write them.
_ALLOWED = {"assistant": {THOUGHT, THOUGHT_END}, "system": {"<|think|>"}, "developer": {"<|think|>"}}
_THOUGHT_MARKER = re.compile(f"{re.escape(THOUGHT)}|{re.escape(THOUGHT_END)}")
# What the tokens depend on.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TOKEN_FILES = ("tokenizer.json", "tokenizer_config.json", *_PROCESSOR_FILES)

Decoded = tuple[Media, Any]
ReadMedia = Callable[[Blob, str], bytes]


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


class ChatModel:
    """The tokenizer, processor and template of a model folder. One per thread: `fork` makes another.

    `kinds`: the media that the model takes. `prefix`: what a generation prompt has behind the header of the model's
    turn, where answers are to have it too.
    """

    def __init__(self, folder: Path, options: CorpusOptions) -> None:
        """Raises UsageError: no tokenizer, not one of Gemma 4, an unreadable template."""
        from transformers import AutoTokenizer

        self.folder = folder
        # Forks have the processor of the first one.
        self._root, self._lock = self, threading.RLock()
        self._supervise: Supervise = options.supervise
        self._kwargs = dict(options.template_kwargs)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            raise UsageError(f"{folder}: its tokenizer cannot be loaded ({_line(error)})") from error
        if not self.tokenizer.is_fast:
            raise UsageError(f"{folder}: has no tokenizer.json")
        self.template = _template(self.tokenizer, options.chat_template, self.folder)
        self._thinking_key = next((key for key in THINKING_KEYS if key in (self.template or "")), None)
        has_processor = any((folder / name).is_file() for name in _PROCESSOR_FILES)
        self.geometry = Geometry.from_folder(folder)
        self.kinds = _kinds(self.geometry) if has_processor else frozenset()
        self._control = tuple(dict.fromkeys([*self.tokenizer.all_special_tokens, *MARKERS, *_PLACEHOLDERS.values()]))
        self._check_tokenizer()
        self.prefix = "" if options.generation_prefix is False else self._generation_prefix(options.generation_prefix)

    @cached_property
    def processor(self) -> Any:
        """Made when the first media come: what it imports takes seconds, which text alone need not wait for.

        Loaded once, whichever thread asks first; every fork has a copy. Raises UsageError.
        """
        with self._lock:
            if self._root is not self:
                return copy.deepcopy(self._root.processor)
            from transformers import AutoProcessor

            try:
                return AutoProcessor.from_pretrained(self.folder, trust_remote_code=False)
            except Exception as error:
                raise UsageError(f"{self.folder}: its processor cannot be loaded ({_line(error)})") from error

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def fork(self) -> ChatModel:
        """One for another thread: tokenizers and processors change inside while they work."""
        other = copy.copy(self)
        other.tokenizer = copy.deepcopy(self.tokenizer)
        vars(other).pop("processor", None)
        return other

    def fingerprints(self) -> dict[str, str]:
        """What tokens depend on beside options and data: a digest of each, by its name in a message."""
        files = hashlib.sha256()
        for name in _TOKEN_FILES:
            path = self.folder / name
            files.update(f"\0{name}\0".encode() + (path.read_bytes() if path.is_file() else b""))
        template = hashlib.sha256((self.template or "").encode())
        kinds = ", ".join(sorted(self.kinds))
        # What `encode` refuses must not be found in a cache of before.
        rows = ", ".join(str(table.rows) for table in embedding_tables(self.geometry))
        return {
            "the model's vocabulary": rows,
            "the chat template": template.hexdigest(),
            "the model's tokenizer or processor": hashlib.sha256(f"{files.hexdigest()} {kinds}".encode()).hexdigest(),
        }

    def encode(self, sample: Sample, read: ReadMedia) -> Encoded:
        """A sample as tokens. Raises DataError that names the record; UsageError where nothing could be encoded, or a
        token that the model has no row for.
        """
        encoded = self._encode(sample, read)
        check_ids(encoded.ids, self.geometry, sample.where, self.tokenizer.convert_ids_to_tokens)
        return encoded

    def _encode(self, sample: Sample, read: ReadMedia) -> Encoded:
        self._check_control(sample)
        if sample.text is not None:
            return self._encode_text(sample.text)
        if sample.tokens is not None:
            return self._encode_tokens(sample.tokens, sample.where)
        text = self.render(sample)
        try:
            steps = model_steps(text)
            said = check_answers(text, steps, _answers(sample.messages))
        except TemplateError as error:
            raise DataError(f"{sample.where}: {error}") from None
        spans = supervised_spans(steps, self._supervise, said)
        everything = self._supervise.turns == "everything"
        if everything:
            spans = around(len(text), spans, steps)
        thoughts = sum(1 for message in sample.messages if message.thinking or _has_thought(message))
        left_out = max(0, thoughts - sum(len(step.thoughts) for step in steps))
        media = sample.media
        unlike = 0
        if self.prefix and steps and not everything:
            text, spans, unlike = with_prefix(text, spans, steps, self.prefix)
        if media:
            text, spans = self._with_soft_tokens(sample, text, spans, read)
        ids, supervised = self._tokens(text, spans)
        types = self._types(ids, bool(media))
        if everything:
            # Of <bos> there is nothing to learn, and a soft token is not one that anybody says.
            supervised[0], supervised[types != 0] = False, False
        return Encoded(ids, supervised, types, media, left_out, unlike)

    def encode_prompt(self, sample: Sample, read: ReadMedia) -> tuple[Encoded, dict[str, torch.Tensor]]:
        """What the model is asked, up to the header of its turn, and what the processor makes of the media.

        Raises as `encode` does.
        """
        self._check_control(sample)
        text, tensors = self.render(sample, answer=True), dict[str, torch.Tensor]()
        if sample.media:
            text, _ = self._with_soft_tokens(sample, text, [], read)
            tensors, _ = self.media_tensors(sample.media, read, str(sample.where))
        ids, supervised = self._tokens(text, [])
        return Encoded(ids, supervised, self._types(ids, bool(sample.media)), sample.media), tensors

    def render(self, sample: Sample, *, answer: bool = False) -> str:
        """The conversation as the template writes it, a placeholder for each media item.

        `answer`: with the beginning of the model's turn behind it.

        Raises UsageError without a template, DataError where the template refuses.
        """
        if self.template is None:
            raise UsageError(
                f"{self.folder}: has no chat template (a base model): copy chat_template.jinja from the instruction-"
                f"tuned model of the same size ({self.folder.name}-it) into it, or set data.chat_template to that file"
            )
        messages = [message.for_template(self._thinking_key) for message in sample.messages]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                tools=list(sample.tools) or None,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=answer,
                **self._kwargs,
            )
        except Exception as error:
            # Templates are programs: what they raise on odd messages is anything.
            raise DataError(f"{sample.where}: the chat template refuses it ({_line(error)})") from error
        text = str(rendered)
        for kind, token in _PLACEHOLDERS.items():
            wanted = sum(item.kind == kind for item in sample.media)
            if text.count(token) != wanted:
                raise DataError(f"{sample.where}: the chat template renders {text.count(token)} of {wanted} {kind}(s)")
        return text

    def media_tensors(self, media: Sequence[Media], read: ReadMedia, at: str) -> tuple[dict[str, torch.Tensor], int]:
        """What the processor makes of media: tensors as it names them, and the number of soft tokens they stand for.

        Raises DataError.
        """
        text = "".join(_PLACEHOLDERS[item.kind] for item in media)
        batch = self._process(text, [(item, self._decode(item, read, at)) for item in media], at)
        soft = int((np.asarray(batch["mm_token_type_ids"]) != 0).sum())
        text_keys = {"input_ids", "attention_mask", "mm_token_type_ids", "text_replacement_offsets"}
        return {key: torch.as_tensor(value) for key, value in batch.items() if key not in text_keys}, soft

    def _encode_text(self, text: str) -> Encoded:
        body = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = np.asarray([self.tokenizer.bos_token_id, *body, self.tokenizer.eos_token_id], np.int32)
        supervised = np.ones(len(ids), bool)
        supervised[0] = False
        return Encoded(ids, supervised, np.zeros(len(ids), np.uint8))

    def _encode_tokens(self, tokens: Tokens, where: Where) -> Encoded:
        for token in _PLACEHOLDERS.values():
            if (tokens.ids == self.tokenizer.convert_tokens_to_ids(token)).any():
                raise DataError(f"{where}: input_ids: {token} stands for media, which tokens do not bring")
        return Encoded(tokens.ids, tokens.supervised, np.zeros(len(tokens.ids), np.uint8))

    def _tokens(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise piece by piece, cut where supervision begins and ends.

        In use, the prompt up to the answer is tokenised alone and the model goes on from there: a token that straddles
        the two would be one that it can never say.
        """
        cuts = sorted({0, len(text), *(edge for span in spans for edge in span)})
        starts = {start for start, _ in spans}
        pieces = [text[start:end] for start, end in pairwise(cuts)]
        parts = self.tokenizer(pieces, add_special_tokens=False)["input_ids"]
        ids = np.asarray([token for part in parts for token in part], np.int32)
        learnt = [start in starts for start in cuts[:-1]]
        return ids, np.repeat(learnt, [len(part) for part in parts])

    def _types(self, ids: np.ndarray, media: bool) -> np.ndarray:
        if not media:
            return np.zeros(len(ids), np.uint8)
        return np.asarray(self.processor.create_mm_token_type_ids([ids.tolist()])[0], np.uint8)

    def _with_soft_tokens(
        self, sample: Sample, text: str, spans: Sequence[Span], read: ReadMedia
    ) -> tuple[str, list[Span]]:
        """The text with every placeholder grown to the soft tokens that the processor counts, and the spans in it."""
        items = [(item, self._decode(item, read, str(sample.where))) for item in sample.media]
        batch = self._process(text, items, str(sample.where))
        grown, edges, position = "", [], 0
        for change in batch["text_replacement_offsets"][0]:
            start, end = change["span"]
            grown += text[position:start] + change["replacement"]
            edges.append((end, len(change["replacement"]) - (end - start)))
            position = end
        grown += text[position:]

        def moved(edge: int) -> int:
            return edge + sum(growth for end, growth in edges if end <= edge)

        return grown, [(moved(start), moved(end)) for start, end in spans]

    def _decode(self, item: Media, read: ReadMedia, at: str) -> Any:
        if item.kind not in self.kinds:
            raise DataError(f"{at}: the model in {self.folder} takes no {item.kind}")
        name = f"{at}: {item.kind}"
        blobs = [read(blob, name) for blob in item.blobs]
        if len(blobs) == 1:
            name = f"{name} {item.blobs[0].shown}"
        if item.kind == "image":
            return media_files.decode_image(blobs[0], name)
        if item.kind == "audio":
            rate = int(self.processor.feature_extractor.sampling_rate)
            return media_files.decode_audio(blobs[0], rate, name)
        return media_files.decode_video(item, blobs, name)

    def _process(self, text: str, items: Sequence[Decoded], at: str) -> Any:
        """Run the processor over a text with placeholders and the decoded media for them."""
        images = [value for item, value in items if item.kind == "image"]
        sounds = [value for item, value in items if item.kind == "audio"]
        videos = [value for item, value in items if item.kind == "video"]
        given: dict[str, Any] = {"images": images or None, "audio": sounds or None}
        if videos:
            given["videos"] = [video.frames for video in videos]
            given["video_metadata"] = [
                {
                    "fps": video.fps,
                    "total_num_frames": len(video.frames),
                    "duration": len(video.frames) / video.fps,
                    "frames_indices": list(range(len(video.frames))),
                }
                for video in videos
            ]
            fewest = min(len(video.frames) for video in videos)
            if fewest < (getattr(self.processor.video_processor, "num_frames", None) or 0):
                given["videos_kwargs"] = {"num_frames": fewest}
        given = {key: value for key, value in given.items() if value is not None}
        try:
            return self.processor(
                text=[text],
                add_special_tokens=False,
                return_text_replacement_offsets=True,
                return_tensors="pt",
                **given,
            )
        except BridgeError:
            raise
        except Exception as error:
            raise DataError(f"{at}: the processor refuses its media ({_line(error)})") from error

    def _check_control(self, sample: Sample) -> None:
        """No text of the record may be a control token: the tokenizer would make it one."""
        if sample.text is not None:
            self._refuse_control(sample.text, set(), f"{sample.where}: text")
        for index, message in enumerate(sample.messages):
            at = f"{sample.where}: messages[{index}]"
            allowed = _ALLOWED.get(message.role, set())
            texts = [part for part in message.parts if isinstance(part, str)]
            for text in texts:
                self._refuse_control(text, allowed, at)
                if THOUGHT in text or THOUGHT_END in text:
                    _check_thoughts(text, at)
            # Halves of a token in two parts, or around a thought, become one when the template joins what it trims.
            pieces = [piece for text in texts for piece in _outside_thoughts(text)]
            for parts in (texts, pieces):
                self._refuse_control("".join(parts), allowed, at)
                self._refuse_control("".join(part.strip() for part in parts), allowed, at)
            self._refuse_control(message.thinking or "", set(), f"{at}: thinking")
            for value in _strings([*message.tool_calls, message.extra]):
                self._refuse_control(value, set(), at)
        for value in _strings(list(sample.tools)):
            self._refuse_control(value, set(), f"{sample.where}: tools")

    def _refuse_control(self, text: str, allowed: set[str], at: str) -> None:
        if "<" not in text:
            return
        for token in self._control:
            if token in text and token not in allowed:
                raise DataError(f"{at}: holds the control token {token}")

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
        pieces = [f"{TURN}model\n", "one two", f"{TURN_END}"]
        if encode("".join(pieces)) != [token for piece in pieces for token in encode(piece)]:
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


def _kinds(geometry: Geometry) -> frozenset[str]:
    """The media that the model itself takes; its processor may know more."""
    vision = {"image", "video"} if geometry.vision is not None else set()
    return frozenset(vision | ({"audio"} if geometry.audio is not None else set()))


def _answers(messages: Sequence[Message]) -> list[Answer]:
    """What the assistant says, piece by piece as templates trim it, without the thoughts written into it."""
    answers = []
    for message in messages:
        if message.role == "assistant":
            texts = [
                piece.strip()
                for part in message.parts
                if isinstance(part, str)
                for piece in _outside_thoughts(part)
                if piece.strip()
            ]
            answers.append(Answer(texts, len(message.tool_calls), message.train))
    return answers


def _outside_thoughts(text: str) -> list[str]:
    first, *rest = text.split(THOUGHT)
    return [first, *(piece.partition(THOUGHT_END)[2] for piece in rest)]


def _check_thoughts(text: str, at: str) -> None:
    """`<|channel>` and `<channel|>` come in pairs."""
    inside = False
    for marker in _THOUGHT_MARKER.findall(text):
        if (marker == THOUGHT) == inside:
            raise DataError(f"{at}: {THOUGHT} and {THOUGHT_END} do not come in pairs")
        inside = not inside
    if inside:
        raise DataError(f"{at}: {THOUGHT} without {THOUGHT_END}")


def _has_thought(message: Message) -> bool:
    return message.role == "assistant" and any(isinstance(part, str) and THOUGHT in part for part in message.parts)


def _strings(value: Any) -> list[str]:
    found, stack = [], [value]
    while stack:
        top = stack.pop()
        if isinstance(top, str):
            found.append(top)
        elif isinstance(top, Mapping):
            stack += [*top.keys(), *top.values()]
        elif isinstance(top, list | tuple):
            stack += top
    return found


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
