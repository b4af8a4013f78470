"""Records of preferences: a prompt with a chosen and a rejected answer, or with one that is wanted or not.

A prompt is a string or messages; an answer is a string or one message of the assistant. Without a prompt, two
conversations may be given whole, which differ in their last message. Media and tools are as in any record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bridge.errors import DataError
from recipes.data.options import CorpusOptions
from recipes.data.sample import Sample, Where, parse_record
from recipes.data.sources import find_sources

# What a record holds: samples to learn, pairs of a chosen and a rejected answer, or answers with a label.
SAMPLES, PAIRS, LABELLED = "samples", "pairs", "labelled"


def recognised(options: CorpusOptions) -> CorpusOptions:
    """The options of data that no recipe says the kind of: by its first record. Raises DataError."""
    for source in find_sources(options.paths, split=options.split, subset=options.subset):
        for record in source.records():
            if isinstance(record.value, Mapping):
                given = {key for key, value in record.value.items() if value is not None}
                kind = PAIRS if {"chosen", "rejected"} <= given else SAMPLES
                kind = LABELLED if {"completion", "label"} <= given else kind
                supervise = options.supervise if kind == SAMPLES else replace(options.supervise, turns="last")
                return replace(options, records=kind, supervise=supervise)
    return options


def parse_pair(record: Any, where: Where) -> tuple[Sample, Sample]:
    """Check `prompt`, `chosen` and `rejected`; (chosen, rejected) as conversations. Raises DataError."""
    record = _object(record, where)
    _needed(record, ("chosen", "rejected"), where)
    chosen, rejected = record["chosen"], record["rejected"]
    prompt = record.get("prompt")
    if prompt is None:
        for key in ("chosen", "rejected"):
            if not isinstance(record[key], list | tuple) or len(record[key]) < 2:
                raise DataError(f"{where}: has no prompt, and {key} is no conversation that begins with one")
        prompt = list(chosen[:-1])
        if list(rejected[:-1]) != prompt:
            raise DataError(f"{where}: chosen and rejected differ before their last message; give their prompt")
        chosen, rejected = chosen[-1:], rejected[-1:]
    return (
        _conversation(record, prompt, chosen, "chosen", where),
        _conversation(record, prompt, rejected, "rejected", where),
    )


def parse_labelled(record: Any, where: Where) -> tuple[Sample, bool]:
    """Check `prompt`, `completion` and `label`; the conversation, and whether it is wanted. Raises DataError."""
    record = _object(record, where)
    _needed(record, ("prompt", "completion", "label"), where)
    label = record["label"]
    if not isinstance(label, bool):
        raise DataError(f"{where}: label: expected true or false, found {label!r}")
    return _conversation(record, record["prompt"], record["completion"], "completion", where), label


def _object(record: Any, where: Where) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object")
    return record


def _needed(record: Mapping[str, Any], keys: tuple[str, ...], where: Where) -> None:
    missing = [key for key in keys if record.get(key) is None]
    if missing:
        raise DataError(f"{where}: has no {missing[0]}; a record of preferences has {', '.join(keys)}")


def _conversation(record: Mapping[str, Any], prompt: Any, answer: Any, key: str, where: Where) -> Sample:
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(asked, list | tuple) or not asked:
        raise DataError(f"{where}: prompt: expected a string or a list of messages")
    said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not isinstance(said, list | tuple) or len(said) != 1:
        raise DataError(f"{where}: {key}: expected a string or one message of the assistant")
    if not isinstance(asked[-1], Mapping) or asked[-1].get("role") != "user":
        raise DataError(f"{where}: prompt: does not end with a message of the user")
    shared = {name: record.get(name) for name in ("tools", "images", "videos", "audios")}
    try:
        return replace(parse_record({"messages": [*asked, *said], **shared}, where), form="preference")
    except DataError as error:
        raise DataError(f"{error} (of {key})") from None
