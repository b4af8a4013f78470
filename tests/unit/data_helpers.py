"""What the tests of recipes.data share: model folders without weights, and corpora of a few lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bridge.toy.assets import write_assets
from bridge.toy.config import toy_config
from recipes.data import Corpus, CorpusOptions, open_corpus
from recipes.data.fingerprints import FOLDER as FILES
from recipes.data.uses import FOLDER as USES

# Behaves as the published templates do where the toys' one does not: tools answer inside the model's turn, which may
# stay open and go on; thoughts written into content are taken out; media stand between blank lines.
MERGING_TEMPLATE = """\
{%- macro without_thoughts(text) -%}
  {%- set kept = namespace(text='') -%}
  {%- for piece in text.split('<channel|>') -%}{%- set kept.text = kept.text + piece.split('<|channel>')[0] -%}
  {%- endfor -%}
  {{- kept.text | trim -}}
{%- endmacro -%}
{%- set state = namespace(open=false) -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- if not state.open -%}
    {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
  {%- endif -%}
  {%- for call in message.tool_calls or [] -%}
    {{- '<|tool_call>call:' + call.function.name + '{' -}}
    {%- for key, value in call.function.arguments | dictsort -%}{{- key + ':<|"|>' + value + '<|"|>' -}}{%- endfor -%}
    {{- '}<tool_call|>' -}}
  {%- endfor -%}
  {%- for answer in message.tool_responses or [] -%}
    {{- '<|tool_response>response:' + answer.name + '{' + answer.response + '}<tool_response|>' -}}
  {%- endfor -%}
  {%- if message.content is string -%}
    {{- without_thoughts(message.content) if message.role == 'assistant' else message.content | trim -}}
  {%- else -%}
    {%- for part in message.content -%}
      {{- part.text | trim if part.type == 'text' else '\\n\\n<|' + part.type + '|>\\n\\n' -}}
    {%- endfor -%}
  {%- endif -%}
  {%- set state.open = message.tool_responses and not message.content -%}
  {%- if not state.open -%}{{- '<turn|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n<|channel>thought\\n<channel|>' -}}{%- endif -%}
"""


def model_folder(folder: Path, variant: str = "e2b", *, text_only: bool = False) -> Path:
    """A toy's folder without its weights: config, tokenizer, template, processor."""
    toy = toy_config(variant, text_only=text_only)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**toy.written, "architectures": [_CLASSES[text_only, toy.multimodal["model_type"]]]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_assets(folder, toy, full_size=False)
    return folder


_CLASSES = {
    (False, "gemma4"): "Gemma4ForConditionalGeneration",
    (True, "gemma4"): "Gemma4ForCausalLM",
    (False, "gemma4_unified"): "Gemma4UnifiedForConditionalGeneration",
    (True, "gemma4_unified"): "Gemma4UnifiedForCausalLM",
}


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """Rows as JSON lines; a string or bytes is a line as it is."""
    lines = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def corpus_of(folder: Path, model: Path, rows: Sequence[Any], **options: Any) -> Corpus:
    """The corpus of `rows`, written to `folder`/data.jsonl, its cache in `folder`/cache."""
    path = write_jsonl(folder / "data.jsonl", rows)
    return open_corpus(
        CorpusOptions(str(path), **{"seq_length": 512, "cache": str(folder / "cache"), **options}), model
    )


def caches(folder: Path) -> list[Path]:
    """What there is in a folder of caches, but for what is remembered of files and uses."""
    return sorted(path for path in folder.iterdir() if path.name not in (FILES, USES))


def chat(*turns: str, **extra: Any) -> Mapping[str, Any]:
    """A conversation of alternating turns, the user's first."""
    return {
        "messages": [
            {"role": "assistant" if index % 2 else "user", "content": turn} for index, turn in enumerate(turns)
        ],
        **extra,
    }


def messages(*rows: Any) -> dict[str, Any]:
    """A conversation of these messages."""
    return {"messages": list(rows)}


GOOD = chat("hi", "hello")
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def part(**keys: Any) -> dict[str, Any]:
    """A conversation whose user says one part of content."""
    return messages({"role": "user", "content": [keys]}, ANSWER)


def picture_folder(outside: Path) -> Path:
    """A folder of pictures, good.png and other.png, in a folder that has one too, secret.png."""
    data = outside / "data"
    data.mkdir()
    Image.new("RGB", (24, 24)).save(data / "good.png")
    Image.new("RGB", (36, 24)).save(data / "other.png")
    Image.new("RGB", (24, 24)).save(outside / "secret.png")
    return data


def files_of(folder: Path) -> dict[str, bytes]:
    """What is in a folder, by names."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
