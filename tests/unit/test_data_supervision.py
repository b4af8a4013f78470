"""What is learnt, against masks written by hand: what stands in ⟦ ⟧ is, and nothing else."""

from __future__ import annotations

import json
import re
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bridge.errors import DataError, UsageError
from recipes.data import CorpusOptions, Supervise, open_corpus
from recipes.data.chat import ChatModel, Encoded
from recipes.data.sample import Where, parse_record

from .data_helpers import MERGING_TEMPLATE, chat, corpus_of, model_folder
from .supervision_cases import BY_HAND, say


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with media in it, which is also the current one."""
    Image.new("RGB", (40, 30), (9, 200, 9)).save(tmp_path / "wide.png")
    Image.new("RGB", (24, 24), (9, 9, 200)).save(tmp_path / "square.png")
    (tmp_path / "merging.jinja").write_text(MERGING_TEMPLATE)
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((8000 * np.sin(np.arange(16_000) / 9)).astype("<i2").tobytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_hand(marked: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids and mask of a text in which what is learnt stands in ⟦ ⟧."""
    ids: list[int] = []
    mask: list[bool] = []
    for index, piece in enumerate(re.split("[⟦⟧]", marked)):
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        mask += [bool(index % 2)] * len(tokens)
    return ids, mask


@pytest.mark.parametrize(("record", "options", "marked"), [row[1:] for row in BY_HAND], ids=[row[0] for row in BY_HAND])
def test_masks_by_hand(record: Any, options: Any, marked: str, data: Path, model: Path) -> None:
    corpus = corpus_of(data, model, [record], **options)
    sample = corpus[0]
    ids, mask = by_hand(marked, corpus.tokenizer)
    assert corpus.tokenizer.decode(sample.ids) == re.sub("[⟦⟧]", "", marked)
    assert sample.ids.tolist() == ids
    assert sample.supervised.tolist() == mask
    assert corpus.statistics.supervised == sum(mask)


# As the published templates end: the smaller models' ask for nothing but the turn, the larger ones' put an empty
# thought where thinking is off. The third one writes what it asks with into the history too.
_HISTORY = MERGING_TEMPLATE[: MERGING_TEMPLATE.index("{%- if add_generation_prompt -%}")]
TEMPLATES = {
    "small": _HISTORY + "{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}",
    "large": _HISTORY
    + "{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- if not enable_thinking | default(false) -%}"
    + "{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}{%- endif -%}",
    "in the history": _HISTORY.replace(
        "if message.role == 'assistant' else message.role) + '\\n' -}}",
        "if message.role == 'assistant' else message.role) + '\\n' -}}"
        "{%- if message.role == 'assistant' -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}",
    )
    + "{%- if add_generation_prompt -%}{{- '<|turn>model\\n<|channel>thought\\n<channel|>' -}}{%- endif -%}",
}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", ["e2b", "e4b", "12b", "26b-a4b", "31b", *TEMPLATES])
def test_what_is_learnt_follows_what_is_asked(name: str, thinking: bool, tmp_path: Path) -> None:
    """With default options: the tokens before the last answer are those of the template's own generation prompt."""
    folder = model_folder(tmp_path / "model", "e2b" if name in TEMPLATES else name)
    if name in TEMPLATES:
        (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    kwargs = {"enable_thinking": thinking}
    asked = [chat("a", "b"), chat("a", "b", "c", "d"), {"messages": [say("system", "s"), *chat("a", "b")["messages"]]}]
    corpus = corpus_of(tmp_path, folder, asked, template_kwargs=kwargs)
    for index, record in enumerate(asked):
        messages = record["messages"]
        prompt = corpus.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **kwargs)["input_ids"]
        sample = corpus[index]
        assert sample.ids[: len(prompt)].tolist() == list(prompt)
        answer = corpus.tokenizer(messages[-1]["content"] + "<turn|>", add_special_tokens=False)["input_ids"]
        assert sample.ids[len(prompt) : len(prompt) + len(answer)].tolist() == answer
        assert sample.supervised[len(prompt) :].tolist() == [True] * len(answer) + [False]
        assert not sample.supervised[len(prompt) - 1]
    prefixed = name == "in the history" or (name == "large" and not thinking)
    assert bool(corpus.inputs["data.generation_prefix"]) == prefixed
    # The answer "b" of the second conversation is learnt behind less than it is asked for with.
    assert corpus.statistics.unlike_prompts == (1 if prefixed and name == "large" else 0)


def test_the_tokens_are_those_of_transformers(data: Path, model: Path) -> None:
    """The processor's own apply_chat_template, decoding and all, gives the same ids and token types."""
    messages = [
        say("user", [{"type": "image", "path": "wide.png"}, {"type": "text", "text": "what is it?"}]),
        say("assistant", "a field"),
    ]
    corpus = corpus_of(data, model, [{"messages": messages}])
    processor = ChatModel(model, corpus.options).media.processor
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert corpus[0].ids.tolist() == expected["input_ids"][0].tolist()
    assert corpus[0].types.tolist() == expected["mm_token_type_ids"][0].tolist()
    tensors = corpus.media_tensors(0)
    assert set(tensors) == {"pixel_values", "image_position_ids"}
    for name, tensor in tensors.items():
        assert tensor.equal(expected[name]), name


def test_threads_share_one_loading_of_the_processor(data: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that cannot be loaded is said when a corpus with media is opened, out of its cache too."""
    from transformers import AutoProcessor

    picture = {"messages": [say("user", [{"type": "image", "path": "wide.png"}]), say("assistant", "a field")]}
    options = corpus_of(data, model, [picture]).options
    loaded = []

    def load(folder: Path, **kwargs: Any) -> Any:
        loaded.append(folder)
        time.sleep(0.1)
        return real(folder, **kwargs)

    def fail(folder: Path, **kwargs: Any) -> Any:
        raise OSError("no such thing")

    real = AutoProcessor.from_pretrained
    monkeypatch.setattr(AutoProcessor, "from_pretrained", load)
    root = ChatModel(model, options)
    with ThreadPoolExecutor(4) as pool:
        own = list(pool.map(lambda fork: fork.media.processor, [root.fork() for _ in range(4)]))
    assert len(loaded) == 1 and len({id(processor) for processor in (*own, root.media.processor)}) == 5
    assert root.fork().fork().media.processor is not root.media.processor and len(loaded) == 1

    monkeypatch.setattr(AutoProcessor, "from_pretrained", fail)
    with pytest.raises(UsageError, match="its processor cannot be loaded"):
        open_corpus(options, model)
    corpus_of(data, model, [chat("a", "b")])


def test_a_token_never_straddles_prompt_and_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a merge of newline and h, the whole has one token where a prompt ends and an answer begins."""
    from bridge.toy import tokenizer as toy_tokenizer

    monkeypatch.setattr(toy_tokenizer, "_MERGES", "\n h|" + toy_tokenizer._MERGES)
    corpus = corpus_of(tmp_path, model_folder(tmp_path / "merging"), [chat("a\nhi", "hi", "b", "oh\nhi")])
    merged = corpus.tokenizer.convert_tokens_to_ids("\nh")
    whole = corpus.tokenizer("<|turn>model\nhi", add_special_tokens=False)["input_ids"]
    assert merged in whole
    sample = corpus[0]
    spoken = "".join(corpus.tokenizer.decode(sample.ids[sample.supervised]))
    assert spoken == "hi<turn|>oh\nhi<turn|>"
    # Inside a turn the merge is as ever.
    assert sample.ids.tolist().count(merged) == 2


@pytest.mark.parametrize("variant", ["e2b", "12b", "26b-a4b"])
def test_every_family(variant: str, data: Path) -> None:
    model = model_folder(data / variant, variant)
    corpus = corpus_of(data, model, [BY_HAND[13][1]])
    ids, mask = by_hand(BY_HAND[13][3], corpus.tokenizer)
    assert (corpus[0].ids.tolist(), corpus[0].supervised.tolist()) == (ids, mask)
    if variant == "26b-a4b":
        sound = {"messages": [say("user", [{"type": "audio", "path": "tone.wav"}]), say("assistant", "a hum")]}
        with pytest.raises(DataError, match=r"data\.jsonl:1: the model in .* takes no audio"):
            corpus_of(data, model, [sound])


def test_a_text_model_takes_text_only(data: Path) -> None:
    model = model_folder(data / "text", text_only=True)
    assert corpus_of(data, model, [chat("a", "b")])[0].supervised.sum() == 2
    with pytest.raises(DataError, match=r"data\.jsonl:1: the model in .* takes no image"):
        corpus_of(data, model, [BY_HAND[13][1]])


def test_a_base_model(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "gemma")
    (model / "chat_template.jinja").rename(tmp_path / "elsewhere.jinja")
    with pytest.raises(UsageError, match=r"copy chat_template\.jinja .*gemma-it.*data\.chat_template"):
        corpus_of(tmp_path, model, [chat("a", "b")], on_error="skip")
    assert len(corpus_of(tmp_path, model, [{"text": "words"}])) == 1
    assert len(corpus_of(tmp_path, model, [chat("a", "b")], chat_template=str(tmp_path / "elsewhere.jinja"))) == 1


def test_the_template_of_an_older_processor(tmp_path: Path) -> None:
    """In chat_template.json, which transformers' processors read and its tokenizers do not."""
    model = model_folder(tmp_path / "gemma")
    expected = corpus_of(tmp_path, model, [chat("a", "b")])[0]
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    sample = corpus_of(tmp_path, model, [chat("a", "b")])[0]
    assert sample.ids.tolist() == expected.ids.tolist()
    (model / "chat_template.json").write_text('{"chat_template": 3}')
    with pytest.raises(UsageError, match="its chat template is no text"):
        corpus_of(tmp_path, model, [chat("a", "c")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "does not render the answer 'fine'"),
        ("<|turn>model\nso <turn|>{{ messages[1].content }}", "does not render the answer 'fine'"),
        ("<|turn>model\n{{ messages[1].content | upper }}<turn|>", "does not render the answer 'fine'"),
        ("<|turn>model\n<|channel>{{ messages[1].content }}<turn|>", "a thought without <channel|>"),
        ("{{ raise_exception('not like this') }}", "the chat template refuses it (not like this)"),
        ("{% for", "the chat template refuses it"),
    ],
)
def test_a_template_that_is_not_understood(template: str, message: str, tmp_path: Path, model: Path) -> None:
    (tmp_path / "odd.jinja").write_text(template)
    with pytest.raises(DataError, match=rf"data\.jsonl:1: .*{re.escape(message)}"):
        corpus_of(tmp_path, model, [chat("how?", "fine")], chat_template=str(tmp_path / "odd.jinja"))


# No control characters that JSON or the tokenizer's decoder treat on their own, and no "▁", which is a space to it.
_words = st.text(
    st.characters(codec="utf-8", exclude_characters="▁", exclude_categories=("Cs", "Cn")), min_size=1, max_size=24
).filter(lambda text: text.strip() and not re.search(r"<\|?[a-z_]+\|?>|<.\".>", text))


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.tuples(_words, _words), min_size=1, max_size=4), last=st.booleans(), system=st.booleans())
def test_what_is_learnt_is_what_the_assistant_says(
    turns: list[tuple[str, str]], last: bool, system: bool, chat_model: dict[bool, ChatModel]
) -> None:
    head = [say("system", "be kind")] if system else []
    body = [say(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    model = chat_model[last]
    sample = parse_record({"messages": head + body}, Where("x", 1))
    (encoded,) = model.encode([sample], [lambda blob, at: b""])
    assert isinstance(encoded, Encoded)
    spans = np.flatnonzero(np.diff(encoded.supervised.astype(int), prepend=0, append=0)).reshape(-1, 2)
    said = [model.tokenizer.decode(encoded.ids[start:end]) for start, end in spans]
    expected = [answer.strip() + "<turn|>" for _, answer in turns]
    assert said == (expected[-1:] if last else expected)
    assert model.tokenizer.decode(encoded.ids) == model.render(sample)


@pytest.fixture(scope="module")
def chat_model(model: Path) -> dict[bool, ChatModel]:
    """By whether only the last turn counts."""
    return {
        last: ChatModel(model, CorpusOptions("x", 512, supervise=Supervise(turns="last" if last else "all")))
        for last in (False, True)
    }
