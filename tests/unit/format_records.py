"""A record for each format, in the fields of a public data set of that kind; the contents are our own."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from PIL import Image


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (200, 10, 90)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = base64.b64encode(picture()).decode()
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def said(*turns: str, first: str = "user") -> list[dict[str, Any]]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]


IMAGE, TEXT = {"type": "image"}, "What colour is it?"
SEEN = [{"role": "user", "content": [IMAGE, {"type": "text", "text": TEXT}]}, *said("Red.", first="assistant")]
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = said("What is 2 + 2?", "4")
CALLED = [
    {"role": "user", "content": "add"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": "It is 1."},
]

# After which data set, the record, the format, the conversation as transformers takes it, columns that are not read
RECORDS: list[tuple[str, dict[str, Any], str, list[dict[str, Any]], list[str]]] = [
    (
        "HuggingFaceH4/ultrachat_200k",
        {"prompt": "Why?", "prompt_id": "f0e3", "messages": said("Why?", "So.", "And?", "No.")},
        "messages",
        said("Why?", "So.", "And?", "No."),
        ["prompt", "prompt_id"],
    ),
    (
        "allenai/tulu-3-sft-mixture",
        {"id": "x1", "messages": said("Hi", "Ho"), "source": "s"},
        "messages",
        said("Hi", "Ho"),
        ["id", "source"],
    ),
    (
        "trl-lib/Capybara",
        {"source": "s", "messages": said("Hi", "Ho"), "num_turns": 1},
        "messages",
        said("Hi", "Ho"),
        ["source", "num_turns"],
    ),
    (
        "trl-lib: conversational prompt-completion",
        {"prompt": [SYSTEM, *said("Sky?")], "completion": said("Blue.", first="assistant")},
        "prompt-completion",
        [SYSTEM, *said("Sky?", "Blue.")],
        [],
    ),
    (
        "prompt and completion as strings",
        {"prompt": "The sky is", "completion": "blue."},
        "prompt-completion",
        said("The sky is", "blue."),
        [],
    ),
    (
        "tatsu-lab/alpaca",
        {"instruction": "Add.", "input": "2 and 2", "output": "4", "text": "Below is an instruction"},
        "alpaca",
        said("Add.\n2 and 2", "4"),
        ["text"],
    ),
    (
        "tatsu-lab/alpaca, without input",
        {"instruction": "Say yes.", "input": "", "output": "Yes.", "text": "Below"},
        "alpaca",
        said("Say yes.", "Yes."),
        ["text"],
    ),
    (
        "LLaMA-Factory: alpaca with history",
        {"instruction": "And now?", "input": "", "output": "c", "system": "Be brief.", "history": [["a?", "b"]]},
        "alpaca",
        [SYSTEM, *said("a?", "b", "And now?", "c")],
        [],
    ),
    (
        "databricks-dolly-15k",
        {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "closed_qa"},
        "dolly",
        said("Who?\nAda wrote it.", "Ada."),
        ["category"],
    ),
    (
        "teknium/OpenHermes-2.5",
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "Hi", "weight": None},
                {"from": "gpt", "value": "Ho", "weight": None},
            ],
            "source": "s",
            "id": None,
        },
        "sharegpt",
        [SYSTEM, *said("Hi", "Ho")],
        ["source"],
    ),
    (
        "anon8231489123/ShareGPT",
        {"id": "QWJhYvA_0", "conversations": [{"from": "human", "value": "Hi"}, {"from": "chatgpt", "value": "Ho"}]},
        "sharegpt",
        said("Hi", "Ho"),
        ["id"],
    ),
    (
        "LLaMA-Factory: sharegpt with tools",
        {
            "conversations": [
                {"from": "human", "value": "add"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "It is 1."},
            ],
            "tools": json.dumps(TOOLS),
        },
        "sharegpt",
        CALLED,
        [],
    ),
    (
        "mlabonne/FineTome with role and content",
        {"conversations": [{"role": "human", "content": "Hi"}, {"role": "model", "content": "Ho"}], "score": 5.2},
        "sharegpt",
        said("Hi", "Ho"),
        ["score"],
    ),
    (
        "lmsys-chat-1m, WildChat",
        {
            "conversation": [
                {"role": "user", "content": "Hi", "language": "English", "toxic": False},
                {"role": "assistant", "content": "Ho", "language": "English", "toxic": False},
            ],
            "model": "m",
        },
        "conversation",
        said("Hi", "Ho"),
        ["model", "conversation[].language", "conversation[].toxic"],
    ),
    (
        "liuhaotian/LLaVA-Instruct-150K",
        {
            "id": "000000033471",
            "image": "good.png",
            "conversations": [{"from": "human", "value": f"<image>\n{TEXT}"}, {"from": "gpt", "value": "Red."}],
        },
        "llava",
        SEEN,
        ["id"],
    ),
    (
        "LLaVA, the tag behind",
        {
            "image": "good.png",
            "conversations": [{"from": "human", "value": f"{TEXT}\n<image>"}, {"from": "gpt", "value": "Red."}],
        },
        "llava",
        [{"role": "user", "content": [{"type": "text", "text": TEXT}, IMAGE]}, SEEN[1]],
        [],
    ),
    (
        "LLaMA-Factory: mllm_demo",
        {"messages": [{"role": "user", "content": f"<image>{TEXT}"}, SEEN[1]], "images": ["good.png"]},
        "messages",
        SEEN,
        [],
    ),
    (
        "LLaVA-OneVision, two images",
        {
            "images": ["good.png", {"bytes": picture(), "path": None}],
            "conversations": [{"from": "human", "value": "<image>\n<image>\nAlike?"}, {"from": "gpt", "value": "Yes."}],
        },
        "llava-images",
        [
            {"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "Alike?"}]},
            *said("Yes.", first="assistant"),
        ],
        [],
    ),
    (
        "trl-lib/llava-instruct-mix",
        {
            "prompt": said(TEXT),
            "completion": said("Red.", first="assistant"),
            "images": [{"bytes": picture(), "path": None}],
        },
        "prompt-completion",
        SEEN,
        [],
    ),
    (
        "HuggingFaceH4/llava-instruct-mix-vsft",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"index": None, "text": TEXT, "type": "text"},
                        {"index": 0, "text": None, "type": "image"},
                    ],
                },
                {"role": "assistant", "content": [{"index": None, "text": "Red.", "type": "text"}]},
            ],
            "images": [{"bytes": picture(), "path": None}],
        },
        "messages",
        [{"role": "user", "content": [{"type": "text", "text": TEXT}, IMAGE]}, SEEN[1]],
        [],
    ),
    (
        "HuggingFaceM4/the_cauldron",
        {"images": [{"bytes": picture(), "path": None}], "texts": [{"user": TEXT, "assistant": "Red.", "source": "s"}]},
        "texts",
        SEEN,
        [],
    ),
    (
        "OpenAI's fine-tuning of vision",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "low"}},
                        {"type": "text", "text": TEXT},
                    ],
                },
                {"role": "assistant", "content": "Red."},
            ]
        },
        "messages",
        SEEN,
        [],
    ),
    (
        "OpenAI's fine-tuning of tools",
        {
            "messages": [
                CALLED[0],
                {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
                {"role": "function", "content": "1"},
                CALLED[3],
            ],
            "functions": [TOOLS[0]["function"]],
        },
        "messages",
        CALLED,
        [],
    ),
    ("base64 in a column of images", {"messages": said(TEXT, "Red."), "images": [PNG]}, "messages", SEEN, []),
    ("openai/gsm8k", {"question": "2 + 2?", "answer": "4"}, "question-answer", said("2 + 2?", "4"), []),
    (
        "Open-Orca/OpenOrca",
        {"id": "n", "system_prompt": "Be brief.", "question": "2 + 2?", "response": "4"},
        "question-response",
        [SYSTEM, *said("2 + 2?", "4")],
        ["id"],
    ),
    (
        "meta-math/MetaMathQA",
        {"type": "t", "query": "2 + 2?", "original_question": "2+2", "response": "4"},
        "query-response",
        said("2 + 2?", "4"),
        ["type", "original_question"],
    ),
    ("AI-MO/NuminaMath", {"problem": "2 + 2?", "solution": "4"}, "problem-solution", said("2 + 2?", "4"), []),
]
