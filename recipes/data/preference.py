"""Records of preferences: a prompt with a chosen and a rejected answer, or with one that is wanted or not.

A prompt is a string or messages that end with the user's; an answer is a string or one message of the assistant.
Two conversations may also be given whole, which differ in their last message. Media and tools are as in
any record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from bridge.errors import DataError
from recipes.data.formats import FormatOptions
from recipes.data.options import CorpusOptions
from recipes.data.record_sources import find_sources
from recipes.data.sample import Sample, Where, parse_record

# What a record holds: a sample to learn, a pair of a chosen and a rejected answer, or an answer with a label.
SAMPLES, PAIRS, LABELLED = "samples", "pairs", "labelled"
# By the names that `recipes.data.formats` has for them.
_FORMATS = {PAIRS: "preference", LABELLED: "unpaired-preference"}
_COLUMNS = {PAIRS: ("chosen", "rejected"), LABELLED: ("prompt", "completion", "label")}


def parse(value: Any, where: Where, options: CorpusOptions) -> tuple[tuple[Sample, ...], bool]:
    """Check a record: its samples (of a pair the chosen answer first), and whether its label says that it is wanted.

    Raises DataError.
    """
    if options.records == SAMPLES:
        return (parse_record(value, where, options.format),), False
    names, columns = options.format.columns, _COLUMNS[options.records]
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: expected an object")
    renamed = {theirs: ours for ours, theirs in names.items() if ours not in ("role", "content")}
    record: dict[str, Any] = {str(renamed.get(key, key)): each for key, each in value.items() if each is not None}
    missing = [names.get(name, name) for name in columns if name not in record]
    if missing:
        raise DataError(f"{where}: has no {missing[0]}; a record of preferences has {', '.join(columns)}")
    if options.records == LABELLED and not isinstance(record["label"], bool):
        raise DataError(f"{where}: label: expected true or false, found {record['label']!r}")
    of_messages = FormatOptions("messages", {name: names[name] for name in ("role", "content") if name in names})
    prompt, answers = _prompt_and_answers(record, options.records, where)
    samples = tuple(
        _conversation(record, prompt, answer, f"{where}: {name}", of_messages, where)
        for name, answer in answers.items()
    )
    form = _FORMATS[options.records]
    return tuple(replace(sample, form=form) for sample in samples), bool(record.get("label"))


def _prompt_and_answers(record: Mapping[str, Any], kind: str, where: Where) -> tuple[Any, dict[str, Any]]:
    if kind == LABELLED:
        return record["prompt"], {"completion": record["completion"]}
    answers = {name: record[name] for name in ("chosen", "rejected")}
    whole = all(isinstance(answer, list | tuple) and len(answer) > 1 for answer in answers.values())
    if "prompt" in record and not whole:
        return record["prompt"], answers
    if not whole:
        raise DataError(f"{where}: has no prompt, and chosen and rejected are no conversations that begin with one")
    prompt = list(answers["chosen"][:-1])
    if list(answers["rejected"][:-1]) != prompt:
        raise DataError(f"{where}: chosen and rejected differ before their last message; give their prompt")
    return prompt, {name: answer[-1:] for name, answer in answers.items()}


def _conversation(
    record: Mapping[str, Any], prompt: Any, answer: Any, at: str, format_options: FormatOptions, where: Where
) -> Sample:
    role, content = format_options.columns.get("role", "role"), format_options.columns.get("content", "content")
    asked = [{role: "user", content: prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(asked, list | tuple) or not asked:
        raise DataError(f"{where}: prompt: expected a string or a list of messages")
    said = [{role: "assistant", content: answer}] if isinstance(answer, str) else answer
    if not isinstance(said, list | tuple) or len(said) != 1:
        raise DataError(f"{at}: expected a string or one message of the assistant")
    beside = {
        name: each
        for name, each in record.items()
        if name not in ("prompt", "chosen", "rejected", "completion", "label", "messages")
    }
    sample = parse_record({"messages": [*asked, *said], **beside}, where, format_options)
    if [message.role for message in sample.messages[-2:]] != ["user", "assistant"]:
        raise DataError(f"{at}: expected an answer of the assistant behind a message of the user")
    return sample


def of_its_kind(options: CorpusOptions) -> CorpusOptions:
    """The options of data that no recipe says the kind of: by its first record. Raises DataError."""
    sources = find_sources(options.paths, split=options.split, subset=options.subset)
    for record in chain.from_iterable(batch.records() for source in sources for batch in source.record_batches()):
        if isinstance(record.value, Mapping):
            given = {key for key, value in record.value.items() if value is not None}
            kind = next((kind for kind, columns in _COLUMNS.items() if given.issuperset(columns)), SAMPLES)
            if kind == SAMPLES or options.format != FormatOptions():
                break
            return replace(options, records=kind, supervise=replace(options.supervise, turns="last"))
    return options
