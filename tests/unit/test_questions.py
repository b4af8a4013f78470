"""Samples as questions: what is asked is what `generate` would ask, and what is wanted is the last answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.errors import DataError
from recipes.data.prompts import PromptEncoder
from recipes.data.questions import Questions, check_questions
from recipes.data.sample import Where
from recipes.data.selection import first_samples, held_out
from recipes.metrics.named import METRICS

from .data_helpers import MERGING_TEMPLATE, chat, corpus_of

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
IMAGE = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what is it"}]
ROWS: list[dict[str, Any]] = [
    chat("what is 1", '{"a": 1}'),
    chat("one", "two", "three", " the answer\nof two lines "),
    {"messages": [{"role": "system", "content": "be brief"}, *chat("hello", "Grüße")["messages"]]},
    {
        "messages": [
            {"role": "user", "content": "how is it in Rome"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "warm", "name": "weather"},
            {"role": "assistant", "content": "warm"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "think"},
            {"role": "assistant", "content": "done", "reasoning_content": "what of it"},
        ]
    },
    {"messages": [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": "a cat"}]},
]
REFERENCES = ['{"a": 1}', "the answer\nof two lines", "Grüße", "warm", "done", "a cat"]


def test_what_is_asked_and_what_is_wanted(tmp_path: Path, model: Path) -> None:
    from PIL import Image

    Image.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "a.png")
    questions = Questions(corpus_of(tmp_path, model, ROWS))
    encoder = PromptEncoder(model)
    assert [questions.reference(number) for number in range(len(questions))] == REFERENCES
    for number, row in enumerate(ROWS):
        ours = questions.prompt(number)
        theirs = encoder.encode({"messages": row["messages"][:-1]}, Where("rows", number), tmp_path)
        assert ours.ids == theirs.ids and ours.media.keys() == theirs.media.keys()
        assert all(torch.equal(ours.media[name], theirs.media[name]) for name in theirs.media)
        if theirs.mm_token_type_ids is not None:
            assert ours.mm_token_type_ids is not None and torch.equal(ours.mm_token_type_ids, theirs.mm_token_type_ids)
    assert ours.media  # the last one has a picture


def test_a_template_with_a_prefix_asks_with_it(tmp_path: Path, model: Path) -> None:
    """An empty thought before the answer is of the question, as it is when the model is used."""
    template = tmp_path / "merging.jinja"
    template.write_text(MERGING_TEMPLATE)
    corpus = corpus_of(tmp_path, model, ROWS[:3], chat_template=str(template))
    prompt = Questions(corpus).prompt(1)
    assert corpus.tokenizer.decode(prompt.ids).endswith("<|turn>model\n<|channel>thought\n<channel|>")
    assert Questions(corpus).reference(1) == REFERENCES[1]


def test_parts_of_a_corpus(tmp_path: Path, model: Path) -> None:
    corpus = corpus_of(tmp_path, model, ROWS[:5])
    assert len(Questions(corpus, 2)) == len(Questions(first_samples(corpus, 2))) == 2
    rest, held = held_out(corpus, 0.4)
    wanted = [Questions(held).reference(number) for number in range(len(held))]
    assert wanted == [REFERENCES[number] for number in held.samples] and len(rest) + len(held) == 5


def test_answers_are_read_as_references_are(tmp_path: Path, model: Path) -> None:
    questions = Questions(corpus_of(tmp_path, model, ROWS[:1]))

    def text(said: str) -> str:
        return questions.text(questions.tokenizer(said, add_special_tokens=False)["input_ids"])

    assert text(" yes <turn|>") == text("<|channel>thought\nno<channel|>yes<turn|>") == "yes"
    assert text("yes<|channel>and on and on") == "yes"


def test_what_cannot_be_asked_is_named(tmp_path: Path, model: Path) -> None:
    corpus = corpus_of(tmp_path, model, [ROWS[0], ROWS[1], {"text": "a text"}])
    tree = METRICS["json_tree"]
    with pytest.raises(DataError, match=r"jsonl:2: eval.metrics=json_tree: the answer is no JSON"):
        check_questions([tree], Questions(corpus), "eval.metrics")
    check_questions([tree], Questions(corpus, 1), "eval.metrics")
    check_questions([METRICS["exact_match"]], Questions(corpus, 2), "eval.metrics")
    with pytest.raises(DataError, match=r"jsonl:3: asks nothing"):
        check_questions([METRICS["exact_match"]], Questions(corpus), "eval.metrics")
