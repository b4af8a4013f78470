"""A record of each format, in the dialect of a public data set of that kind: the tokens and masks of transformers' own
template on the same conversation, from every kind of file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import wave
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bridge.cli import app
from bridge.errors import DataError, UsageError
from bridge.generate import output
from bridge.generate.rows import Completion
from recipes.data import Corpus, CorpusOptions, Supervise, open_corpus
from recipes.data.chat import ChatModel
from recipes.data.encoding import Encoder
from recipes.data.files import DataFile
from recipes.data.formats import FORMATS, FormatOptions
from recipes.data.media import decode_audio, read_blob, resampled
from recipes.data.record_batches import Record
from recipes.data.record_sources import find_sources
from recipes.data.sample import Where

from .data_helpers import corpus_of, write_jsonl
from .format_records import CALLED, IMAGE, RECORDS, TOOLS, picture, said

pyarrow = pytest.importorskip("pyarrow", reason="writes Parquet and Zstandard")


@pytest.fixture(scope="module")
def template(model: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model)


def with_picture(part: Any) -> Any:
    return {**part, "image": Image.open(io.BytesIO(picture()))} if part == IMAGE else part


def expected(template: Any, messages: Sequence[dict[str, Any]], tools: Any = None) -> tuple[list[int], list[bool]]:
    """transformers' own ids, and a mask from what it renders: the model's turns, with their end, by characters."""
    lists = [isinstance(row.get("content"), list) for row in messages]
    filled = [
        {**row, "content": [*map(with_picture, row["content"])]} if is_list else row
        for row, is_list in zip(messages, lists, strict=True)
    ]
    text = template.apply_chat_template(messages, tools=tools, tokenize=False)
    found = template.apply_chat_template(filled, tools=tools, tokenize=True, return_dict=True)
    ids = [int(token) for token in found["input_ids"][0]]
    # Soft tokens are no characters: the mask of the text, where an image is one token.
    encoded = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [match.span(1) for match in re.finditer(r"<\|turn>model\n(.*?<turn\|>)", text, re.S)]
    learnt = iter(
        (token, any(start <= at < end for start, end in spans))
        for token, (at, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    )
    image, begin, end = template.tokenizer.convert_tokens_to_ids(["<|image|>", "<|image>", "<image|>"])
    mask, before = [], None
    for token in ids:
        if token in (begin, end) or (token == image and before == image):
            mask.append(False)
        else:
            of_text, is_learnt = next(learnt)
            assert of_text == token
            mask.append(is_learnt)
        before = token
    assert next(learnt, None) is None
    return ids, mask


def of(corpus: Corpus, index: int = 0) -> tuple[list[int], list[bool]]:
    sample = corpus[index]
    return sample.ids.tolist(), sample.supervised.tolist()


def test_records_of_public_data_sets(tmp_path: Path, model: Path, template: Any) -> None:
    (tmp_path / "good.png").write_bytes(picture())
    options = CorpusOptions(str(tmp_path), 512)
    encoder = Encoder(ChatModel(model, options), options)
    for name, record, form, messages, unread in RECORDS:
        (outcome,) = encoder.outcomes(
            [Record(Where(name, 1), record)], [lambda blob, at: read_blob(blob, tmp_path, allow_urls=False, at=at)]
        )
        assert outcome.error is None, (name, outcome.message)
        sample, tools = outcome.encoded[0], TOOLS if "tools" in record or "functions" in record else None
        assert (sample.ids.tolist(), sample.supervised.tolist()) == expected(template, messages, tools), name
        assert (outcome.form, sorted(outcome.unread)) == (form, sorted(unread)), name
    assert {row[2] for row in RECORDS} >= {one.name for one in FORMATS} - {
        "input_ids",
        "answer",
        "megatron",
        "text",
        "preference",
        "unpaired-preference",
        "prompt-response",
        "inputs-targets",
        "input-output",
    }


def test_text_and_tokens(tmp_path: Path, model: Path, template: Any) -> None:
    tokenizer = template.tokenizer
    text = corpus_of(tmp_path, model, [{"text": "Once upon a time.", "url": "http://x"}])
    ids = [2, *tokenizer("Once upon a time.", add_special_tokens=False)["input_ids"], 1]
    assert of(text) == (ids, [False] + [True] * (len(ids) - 1)) and text.statistics.unread == {"url": 1}
    ids, mask = expected(template, said("a", "b"))
    labels = [token if learnt else -100 for token, learnt in zip(ids, mask, strict=True)]
    for record in (
        {"input_ids": ids, "labels": labels},
        {"input_ids": ids, "assistant_masks": [int(one) for one in mask]},
        {"input_ids": ids, "completion_mask": [int(one) for one in mask], "attention_mask": [1] * len(ids)},
        {"input_ids": [*ids, 0, 0], "labels": [*labels, -100, -100], "attention_mask": [1] * len(ids) + [0, 0]},
    ):
        corpus = corpus_of(tmp_path, model, [record])
        assert of(corpus) == (ids, mask) and corpus.statistics.formats == {"input_ids": 1}
    split = corpus_of(tmp_path, model, [{"input_ids": [2, 5, 6, 7, 8, 9]}], seq_length=4, overlong="split")
    assert [of(split, index)[0] for index in range(len(split))] == [[2, 5, 6, 7], [2, 8, 9]]
    with pytest.raises(DataError, match=r"data\.jsonl:1: input_ids: <\|image\|> stands for media"):
        corpus_of(tmp_path, model, [{"input_ids": [2, tokenizer.convert_tokens_to_ids("<|image|>"), 5]}])


def test_answers_of_generate(tmp_path: Path, model: Path) -> None:
    """The lines of `generate --output`, with a drafter or without: the answer is learnt."""
    asked, answered = (2, 105, 9, 10), (11, 12, 106)
    drafted = Completion(0, 0, asked, answered, (-0.5,) * 3, "stop", "b", ((2, 1),))
    lines = [output.record(drafted), output.record(replace(drafted, rounds=None, sample=1))]
    assert (lines[0]["drafted"], lines[0]["accepted"]) == (2, 1) and "drafted" not in lines[1]
    corpus = corpus_of(tmp_path, model, lines)
    assert corpus.statistics.formats == {"answer": 2} and not corpus.statistics.unread
    for index in range(2):
        assert of(corpus, index) == ([*asked, *answered], [False] * 4 + [True] * 3)
    with pytest.raises(DataError, match=r"data\.jsonl:1: tokens: expected a list of integers, found a string"):
        corpus_of(tmp_path, model, [{"prompt_tokens": [2], "tokens": "b", "text": "b"}])
    with pytest.raises(DataError, match=r"<\|image\|> stands for media"):
        image = corpus.tokenizer.convert_tokens_to_ids("<|image|>")
        corpus_of(tmp_path, model, [lines[0] | {"prompt_tokens": [2, image]}])


PAIRS = [{"question": f"Is {number} even?", "answer": f"{number % 2 == 0}"} for number in range(600)]


def packed(path: Path, data: bytes) -> list[Path]:
    """The file plain, by gzip and by Zstandard."""
    path.write_bytes(data)
    by_gzip, by_zstd = Path(f"{path}.gz"), Path(f"{path}.zst")
    by_gzip.write_bytes(gzip.compress(data))
    by_zstd.write_bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))
    return [path, by_gzip, by_zstd]


def test_every_kind_of_file(tmp_path: Path) -> None:
    """JSONL, arrays (on one line and on many), CSV, TSV, Parquet; plain, .gz, .zst: the same records, numbered."""
    import pyarrow.parquet as parquet

    # Fields with commas, quotes, line breaks and letters beyond ASCII.
    rows = [*PAIRS, {"question": 'a, "b"\nc', "answer": "é 😀"}, {"question": "x" * 200_000, "answer": "y"}]
    table = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=100)
    files = [
        *packed(tmp_path / "a.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows)),
        *packed(tmp_path / "a.json", json.dumps(rows).encode()),
        *packed(tmp_path / "b.json", json.dumps(rows, indent=2, ensure_ascii=False).encode()),
        *packed(tmp_path / "c.json", b"".join(json.dumps(row).encode() + b"\n" for row in rows)),
        *packed(tmp_path / "a.parquet", table.getvalue()),
    ]
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        text = io.StringIO()
        writer = csv.DictWriter(text, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        files += packed(tmp_path / f"a.{suffix}", text.getvalue().encode())
    for file in files:
        records = list(DataFile(file).records())
        assert [record.value for record in records] == rows, file
        lines = [record.where.line for record in records]
        # A field with a line break is of two lines.
        by_line = [*range(2, 603), 604] if ".csv" in file.name or ".tsv" in file.name else list(range(1, 603))
        assert lines == by_line, file


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"text": ', r"a\.json:2: not JSON, and what follows cannot be read"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"a\.json:1: not JSON, .*expected , or \]"),
        ("a.json", b'[{"text": "a"}] x', "goes on behind the end of its array"),
        ("a.json", b'[{"text": "a", "text": "b"}]', r"a\.json:1: .*comes twice"),
        ("a.csv", b"text,text\na,b\n", r"a\.csv:1: expected the names of the columns, each once"),
        ("a.csv", b"text,more\na\n", r"a\.csv:2: 1 fields, where there are 2 columns"),
        ("a.csv", b'text,more\n"a', r"a\.csv:2: not CSV"),
        ("a.csv", b"text\n\xff\n", "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-9], "cannot be read"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
        ("a.jsonl.zst", b"plain", "cannot be read"),
        ("a.txt", b"plain", r"expected one of \.jsonl"),
    ],
)
def test_files_that_are_not_what_they_are_called(
    name: str, data: bytes, message: str, tmp_path: Path, model: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_corpus(CorpusOptions(str(tmp_path / name), 64, cache=str(tmp_path / "cache")), model)


def test_folders_of_splits(tmp_path: Path) -> None:
    def names(*files: str, split: str = "train") -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("")
        return [str(Path(source.name).relative_to(folder)) for source in find_sources([str(folder)], split=split)]

    assert names("train.jsonl", "test.jsonl", "README.md") == ["train.jsonl"]
    assert names("train.jsonl", "test.jsonl", split="test") == ["test.jsonl"]
    assert names("train.json", "validation.csv.gz", split="validation") == ["validation.csv.gz"]
    shards = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert names(*shards, "data/test-00000-of-00001.parquet") == shards
    assert names("train/a.jsonl", "train/b.jsonl", "test/a.jsonl") == ["train/a.jsonl", "train/b.jsonl"]
    assert names("a.jsonl", "b.jsonl", "test.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("train_chats.jsonl", "config.json") == ["train_chats.jsonl"]
    with pytest.raises(DataError, match=r"no files of the split train; its splits: test, train_gen, train_sft"):
        names("train_sft.jsonl", "train_gen.jsonl", "test.jsonl")
    with pytest.raises(DataError, match=r"no files of the split test; its splits: none"):
        names("a.jsonl", split="test")


def made(record: dict[str, Any]) -> dict[str, Any] | None:
    """What `data.function` may name."""
    if record["n"] == 2:
        return None
    return {"prompt": f"{record['n']}?", "completion": str(10 // record["n"])}


def test_what_a_record_does_not_show_is_said(tmp_path: Path, model: Path, template: Any) -> None:
    def learnt(rows: list[Any], **layout: Any) -> Corpus:
        return corpus_of(tmp_path, model, rows, format=FormatOptions(**layout))

    asked = expected(template, said("q", "a"))
    assert of(learnt([{"q": "q", "a": "a"}], columns={"prompt": "q", "completion": "a"})) == asked
    dialog = [{"who": "human", "what": "q"}, {"who": "bot", "what": "a"}]
    columns = {"messages": "dialog", "role": "who", "content": "what"}
    assert of(learnt([{"dialog": dialog, "text": "t"}], columns=columns)) == asked
    both = {"messages": said("x", "y"), "prompt": "q", "completion": "a", "label": False}
    assert of(learnt([both], format="prompt-completion")) == asked
    pairs = {"chosen": said("q", "a"), "rejected": said("q", "b")}
    assert of(learnt([pairs], format="messages", columns={"messages": "chosen"})) == asked
    function = f"{__name__}:made"
    corpus = learnt([{"n": 1}, {"n": 2}, {"n": 5}], function=function)
    assert of(corpus, 1) == expected(template, said("5?", "2"))
    assert corpus.statistics.dropped == {"left out by data.function": 1}
    with pytest.raises(DataError, match=r"data\.jsonl:1: data\.function=.*:made raises ZeroDivisionError"):
        learnt([{"n": 0}], function=function)
    with pytest.raises(DataError, match=r"has no instruction, which data\.format=alpaca needs; it has q"):
        learnt([{"q": 1}], format="alpaca")
    for layout, message in [
        ({"format": "alpacca"}, r"data\.format=alpacca: is one of input_ids, megatron, answer, messages"),
        ({"columns": {"promt": "q"}}, r"data\.columns\.promt=q: names a column of the data for one of role"),
        ({"function": "made"}, r"data\.function=made: is written module:function"),
        ({"function": "nowhere:made"}, r"nowhere:made: cannot be imported"),
    ]:
        with pytest.raises(UsageError, match=message):
            learnt([{"n": 1}], **layout)


def test_messages_that_say_whether_they_are_learnt(tmp_path: Path, model: Path) -> None:
    def learnt(record: Any, **options: Any) -> str:
        corpus = corpus_of(tmp_path, model, [record], supervise=Supervise(**options))
        ids, mask = of(corpus)
        return str(corpus.tokenizer.decode([token for token, is_learnt in zip(ids, mask, strict=True) if is_learnt]))

    def turns(*keys: dict[str, Any]) -> dict[str, Any]:
        rows = said("a", "one", "b", "two", "c", "three")
        return {"messages": [row | (keys[index // 2] if index % 2 else {}) for index, row in enumerate(rows)]}

    end = "<turn|>"
    for key in ("train", "loss", "weight", "training"):
        assert learnt(turns({key: 0}, {key: 1}, {key: 0})) == f"two{end}"
    assert learnt(turns({}, {"weight": 0}, {})) == f"one{end}three{end}"
    assert learnt(turns({"train": True}, {}, {}), turns="last") == f"one{end}three{end}"
    everything = "<|turn>user\na<turn|>\n<|turn>model\n<|turn>user\nb<turn|>\n<|turn>model\ntwo<turn|>\n"
    assert learnt(turns({"train": False}, {}, {}), turns="everything").replace("\n\n", "\n").startswith(everything)
    prompt = {"prompt": said("a", "one", "b"), "completion": said("two", first="assistant")}
    assert learnt(prompt) == f"two{end}"
    prompt["prompt"][1]["train"] = True
    assert learnt(prompt) == f"one{end}two{end}"
    # Thoughts and calls of messages that are learnt are as the options say.
    called = {"messages": [{**row, **({"train": True} if row["role"] == "assistant" else {})} for row in CALLED]}
    assert learnt(called, tool_calls=False) == f"It is 1.{end}"
    called["messages"][1]["train"] = False
    assert learnt(called) == f"It is 1.{end}"


def test_sound_is_resampled(tmp_path: Path) -> None:
    def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
        return np.sin(2 * math.pi * hertz * np.arange(int(rate * seconds)) / rate).astype(np.float32)

    for rate in (8_000, 11_025, 22_050, 24_000, 44_100, 48_000):
        found, wanted = resampled(tone(rate), rate, 16_000), tone(16_000)
        assert len(found) == len(wanted) and found.dtype == np.float32
        inner = slice(400, -400)
        assert np.abs(found[inner] - wanted[inner]).max() < 2e-3, rate
    # What the lower rate cannot hold is gone, and not folded back.
    assert np.abs(resampled(tone(48_000, hertz=11_000), 48_000, 16_000)[400:-400]).max() < 2e-3
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((2, 2, 48_000, 0, "NONE", ""))
        file.writeframes((np.repeat(tone(48_000), 2) * 32767).astype("<i2").tobytes())
    heard = decode_audio(buffer.getvalue(), 16_000, "x")
    assert np.abs(heard[400:-400] - tone(16_000)[400:-400]).max() < 2e-3


def test_data_show_without_a_recipe(tmp_path: Path, model: Path) -> None:
    rows = [row[1] for row in RECORDS if row[2] in ("alpaca", "sharegpt")] + [{"nothing": 1}]
    path = write_jsonl(tmp_path / "mixed.jsonl", rows)
    result = CliRunner().invoke(app, ["data", "show", str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "alpaca: 3" in result.stdout and "sharegpt: 4" in result.stdout
    assert re.search(r"not read: text, source", result.stdout)
    assert re.search(r"mixed\.jsonl:8: has none of messages", result.stdout)
    assert "user: Add.\n2 and 2" in result.stdout and "assistant: 4" in result.stdout
    arguments = ["data", "show", "--data", str(path), "--json", "-"]
    found = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert (found["read"], found["kept"], found["dropped"]) == (8, 7, {"invalid": 1})
    assert found["formats"] == {"alpaca": 3, "sharegpt": 4}
