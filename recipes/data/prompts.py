"""Records of prompts -> what generation takes: `messages` or a `prompt` through the model's template, or token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bridge.errors import DataError
from bridge.generate.rows import Prompt
from recipes.data.chat import ChatModel
from recipes.data.files import DataFile
from recipes.data.media import read_blob
from recipes.data.options import CorpusOptions
from recipes.data.sample import Where, parse_prompt


class PromptEncoder:
    """Tokenizer, template and processor of a model folder, and where media lie.

    `raw`: a `prompt` is text as it is, without the template. `allow_urls`: media are fetched from the network.
    """

    def __init__(self, folder: Path, *, raw: bool = False, allow_urls: bool = False) -> None:
        # Of a corpus nothing counts here: neither its length nor what is learnt.
        self.chat = ChatModel(folder, CorpusOptions("prompts", 1 << 30, generation_prefix=False))
        self._raw, self._allow_urls = raw, allow_urls

    def encode(self, record: Any, where: Where, root: Path | None) -> Prompt:
        """One record. Raises DataError that names its place; UsageError without a template."""
        ids = record.get("ids") if isinstance(record, Mapping) else None
        if ids is not None:
            return Prompt(_ids(ids, where))
        if self._raw:
            text = record.get("prompt") if isinstance(record, Mapping) else None
            if not isinstance(text, str) or not text:
                raise DataError(f"{where}: --raw takes records with a prompt that is text, or ids")
            return Prompt(tuple(self.chat.tokenizer(text)["input_ids"]))
        sample = parse_prompt(record, where)
        encoded, media = self.chat.encode_prompt(
            sample, lambda blob, at: read_blob(blob, root, allow_urls=self._allow_urls, at=at)
        )
        types = torch.from_numpy(encoded.types.astype("int64")) if sample.media else None
        return Prompt(tuple(encoded.ids.tolist()), types, media)

    def decode(self, tokens: list[int]) -> str:
        """Text of an answer, without control tokens."""
        return str(self.chat.tokenizer.decode(tokens, skip_special_tokens=True))


def read_prompts(path: Path, encoder: PromptEncoder) -> Iterator[Prompt]:
    """The prompts of a file that `recipes.data.files` reads; paths of media are relative to its folder.

    Raises DataError that names the line.
    """
    for record in DataFile(path).records():
        if record.error is not None:
            raise record.error
        if record.blank:
            continue
        yield encoder.encode(record.value, record.where, path.resolve().parent)


def _ids(value: Any, where: Where) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(i) is int and i >= 0 for i in value):
        raise DataError(f"{where}: ids: expected a list of token ids")
    return tuple(value)
