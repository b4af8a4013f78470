"""Tokens and labels of TRL's SFTTrainer on its four formats, beside ours.

TRL is no dependency of this project: `uv pip install --target DIR --no-deps trl==1.16.0 accelerate`, then
`PYTHONPATH=DIR python benchmarks/trl_tokens.py`. A toy's tokenizer, with its own template and with every template of
Gemma 4 that TRL ships, which are the published ones. docs/data.md says what the differences are.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data import CorpusOptions, Supervise, open_corpus

IGNORE = -100
QUESTION, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A duck, I think."}
TALK = [
    QUESTION,
    ANSWER,
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "It said so.\n\nTwice."},
]
# The name of a format -> its records, and the option by which the same tokens are learnt here.
FORMATS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "language modelling, text": (
        [{"text": "Once upon a time there was a duck."}, {"text": "Two\n\nparagraphs."}],
        "all",
    ),
    "language modelling, messages": ([{"messages": TALK}, {"messages": TALK[:2]}], "everything"),
    "prompt-completion, strings": ([{"prompt": "The duck says", "completion": " quack."}], "all"),
    "prompt-completion, messages": (
        [{"prompt": TALK[:3], "completion": TALK[3:]}, {"prompt": TALK[:1], "completion": TALK[1:2]}],
        "all",
    ),
}


@dataclass(frozen=True)
class Row:
    """`ids` and `labels` [n]; labels are not shifted, and that of the first token counts for nothing."""

    ids: list[int]
    labels: list[int]


def theirs(rows: list[dict[str, Any]], model: Path, template: str | None) -> list[Row]:
    """What an SFTTrainer makes of the rows, with its defaults."""
    datasets, trl = importlib.import_module("datasets"), importlib.import_module("trl")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if template is not None:
        tokenizer.chat_template = template
    with tempfile.TemporaryDirectory() as output:
        arguments = trl.SFTConfig(output_dir=output, max_length=None, report_to=[], use_cpu=True, bf16=False)
        trainer = trl.SFTTrainer(
            str(model), args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
    return [Row(list(row["input_ids"]), list(row["labels"])) for row in trainer.train_dataset]


def ours(rows: list[dict[str, Any]], model: Path, template: str | None, turns: str) -> list[Row]:
    """What `recipes.data` makes of them."""
    with tempfile.TemporaryDirectory() as folder:
        path, jinja = Path(folder, "data.jsonl"), Path(folder, "template.jinja")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if template is not None:
            jinja.write_text(template, encoding="utf-8")
        options = CorpusOptions(
            str(path),
            4096,
            supervise=Supervise(turns),
            chat_template=str(jinja) if template is not None else None,
            cache=f"{folder}/cache",
        )
        corpus = open_corpus(options, model)
        samples = [corpus[index] for index in range(len(corpus))]
    return [
        Row(
            sample.ids.tolist(),
            [token if learnt else IGNORE for token, learnt in zip(sample.ids.tolist(), sample.supervised, strict=True)],
        )
        for sample in samples
    ]


def difference(one: Row, other: Row, tokenizer: Any) -> str:
    """In words; `one` is TRL's."""
    if one.ids != other.ids:
        return f"other tokens: TRL {tokenizer.decode(one.ids)!r}, here {tokenizer.decode(other.ids)!r}"
    pairs = list(zip(one.ids, one.labels, other.labels, strict=True))[1:]
    only_theirs = [token for token, a, b in pairs if a != IGNORE and b == IGNORE]
    only_ours = [token for token, a, b in pairs if a == IGNORE and b != IGNORE]
    said = [
        f"{who} alone learns {tokenizer.decode(tokens)!r}"
        for who, tokens in (("TRL", only_theirs), ("here", only_ours))
        if tokens
    ]
    return "; ".join(said) or "equal"


def main() -> None:
    """Print a line for each template, format and record."""
    from transformers import AutoTokenizer

    from bridge.toy.write import write_toy

    templates = Path(importlib.import_module("trl").__file__ or "").parent / "chat_templates"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "toy")
        write_toy("e2b", model, text_only=True)
        tokenizer = AutoTokenizer.from_pretrained(model)
        for file in [None, *sorted(templates.glob("gemma4*.jinja"))]:
            template = file.read_text(encoding="utf-8") if file is not None else None
            for name, (rows, turns) in FORMATS.items():
                for one, other in zip(theirs(rows, model, template), ours(rows, model, template, turns), strict=True):
                    at = "toy" if file is None else file.stem
                    print(f"{at} | {name} | {difference(one, other, tokenizer)}", flush=True)


if __name__ == "__main__":
    main()
