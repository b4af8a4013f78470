"""Conversations, and by hand what of each is learnt: between ⟦ and ⟧."""

from __future__ import annotations

from typing import Any

from recipes.data import Supervise

from .data_helpers import chat

# A 40 × 30 image is 9 × 7 soft tokens of the toys' 12 × 12 pixels; 8 × 8 for a square one.
WIDE = "<|image>" + "<|image|>" * 63 + "<image|>"
SQUARE = "<|image>" + "<|image|>" * 64 + "<image|>"
CLIP = " ".join(f"00:0{second} <|image>{'<|video|>' * 64}<image|>" for second in (0, 1))
SOUND = "<|audio>" + "<|audio|>" * 25 + "<audio|>"
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
TOOLS_RENDERED = (
    '<|tool>{"type": "function", "function": '
    '{"name": "now", "parameters": {"type": "object", "properties": {}}}}<tool|>'
)


def say(role: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


USE = [
    say("user", "when?"),
    say("assistant", "let me see", tool_calls=[call("now")], reasoning_content="a clock"),
    say("tool", "noon", name="now"),
    say("assistant", "It is noon.", reasoning_content="good"),
]
MERGED_USE = [
    say("user", "when?"),
    say("assistant", tool_calls=[call("now", zone="x")], tool_responses=[{"name": "now", "response": "noon"}]),
    say("assistant", "It is noon."),
]
THOUGHTS = [
    say("user", "a"),
    say("assistant", "one", reasoning_content="first thought"),
    say("user", "b"),
    say("assistant", "two", reasoning_content=" second\nthought "),
]


# name, record, options, the rendering with what is learnt in ⟦ ⟧
BY_HAND: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "one turn",
        chat("hi", "hello"),
        {},
        "<bos><|turn>user\nhi<turn|>\n<|turn>model\n⟦hello<turn|>⟧\n",
    ),
    (
        "white space around is trimmed by the template, inside it stays",
        chat(" hi ", "\n hello  there\n\nyou \n"),
        {},
        "<bos><|turn>user\nhi<turn|>\n<|turn>model\n⟦hello  there\n\nyou<turn|>⟧\n",
    ),
    (
        "three turns",
        chat("a", "b", "c", "d", "e", "f"),
        {},
        "<bos><|turn>user\na<turn|>\n<|turn>model\n⟦b<turn|>⟧\n<|turn>user\nc<turn|>\n<|turn>model\n⟦d<turn|>⟧\n"
        "<|turn>user\ne<turn|>\n<|turn>model\n⟦f<turn|>⟧\n",
    ),
    (
        "three turns, the last only",
        chat("a", "b", "c", "d", "e", "f"),
        {"supervise": Supervise(turns="last")},
        "<bos><|turn>user\na<turn|>\n<|turn>model\nb<turn|>\n<|turn>user\nc<turn|>\n<|turn>model\nd<turn|>\n"
        "<|turn>user\ne<turn|>\n<|turn>model\n⟦f<turn|>⟧\n",
    ),
    (
        "a system turn",
        {"messages": [say("system", "be brief"), *chat("a", "b")["messages"]]},
        {},
        "<bos><|turn>system\nbe brief<turn|>\n<|turn>user\na<turn|>\n<|turn>model\n⟦b<turn|>⟧\n",
    ),
    (
        "a developer's turn in two parts, and the token that asks for thoughts",
        {
            "messages": [
                say("developer", [{"type": "text", "text": "<|think|>be"}, {"type": "text", "text": " brief"}]),
                *chat("a", "b")["messages"],
            ]
        },
        {},
        "<bos><|turn>system\n<|think|>be brief<turn|>\n<|turn>user\na<turn|>\n<|turn>model\n⟦b<turn|>⟧\n",
    ),
    (
        "the words user and model, and an answer that was said before",
        chat("model\nyes", "yes", "user model yes", "yes\nmodel\nuser"),
        {},
        "<bos><|turn>user\nmodel\nyes<turn|>\n<|turn>model\n⟦yes<turn|>⟧\n<|turn>user\nuser model yes<turn|>\n"
        "<|turn>model\n⟦yes\nmodel\nuser<turn|>⟧\n",
    ),
    (
        "unicode: scripts, emoji with joiners, combining marks, no-break and ideographic space",
        chat("Grüße, 世界", "é vs e\u0301 👩‍👩‍👧 \u00a0x\u3000y ابجد"),
        {},
        "<bos><|turn>user\nGrüße, 世界<turn|>\n<|turn>model\n⟦é vs e\u0301 👩‍👩‍👧 \u00a0x\u3000y ابجد<turn|>⟧\n",
    ),
    (
        "thoughts: the template leaves those of earlier exchanges out",
        {"messages": THOUGHTS},
        {},
        "<bos><|turn>user\na<turn|>\n<|turn>model\n⟦one<turn|>⟧\n<|turn>user\nb<turn|>\n"
        "<|turn>model\n⟦<|channel>thought\nsecond\nthought\n<channel|>two<turn|>⟧\n",
    ),
    (
        "thoughts do not count",
        {"messages": THOUGHTS},
        {"supervise": Supervise(thinking=False)},
        "<bos><|turn>user\na<turn|>\n<|turn>model\n⟦one<turn|>⟧\n<|turn>user\nb<turn|>\n"
        "<|turn>model\n<|channel>thought\nsecond\nthought\n<channel|>⟦two<turn|>⟧\n",
    ),
    (
        "tools: declared, called, answered",
        {"messages": USE, "tools": TOOLS},
        {},
        f"<bos><|turn>system\n{TOOLS_RENDERED}<turn|>\n<|turn>user\nwhen?<turn|>\n"
        "<|turn>model\n⟦<|channel>thought\na clock\n<channel|>let me see<|tool_call>call:now{}<tool_call|><turn|>⟧\n"
        "<|turn>tool\n<|tool_response>noon<tool_response|><turn|>\n"
        "<|turn>model\n⟦<|channel>thought\ngood\n<channel|>It is noon.<turn|>⟧\n",
    ),
    (
        "tool calls and thoughts do not count",
        {"messages": USE},
        {"supervise": Supervise(thinking=False, tool_calls=False)},
        "<bos><|turn>user\nwhen?<turn|>\n"
        "<|turn>model\n<|channel>thought\na clock\n<channel|>let me see<|tool_call>call:now{}<tool_call|><turn|>\n"
        "<|turn>tool\n<|tool_response>noon<tool_response|><turn|>\n"
        "<|turn>model\n<|channel>thought\ngood\n<channel|>⟦It is noon.<turn|>⟧\n",
    ),
    (
        "a call alone, its arguments a string of JSON",
        {
            "messages": [
                say("user", "go"),
                say("assistant", tool_calls=[{"function": {"name": "f", "arguments": '{"x": [1, "ü"]}'}}]),
            ]
        },
        {},
        '<bos><|turn>user\ngo<turn|>\n<|turn>model\n⟦<|tool_call>call:f{"x": [1, "ü"]}<tool_call|><turn|>⟧\n',
    ),
    (
        "an image and a question",
        {
            "messages": [
                say("user", [{"type": "image", "path": "wide.png"}, {"type": "text", "text": "what?"}]),
                say("assistant", "a field"),
            ]
        },
        {},
        f"<bos><|turn>user\n{WIDE}what?<turn|>\n<|turn>model\n⟦a field<turn|>⟧\n",
    ),
    (
        "two images from the record's column, a turn between them",
        {
            "messages": [
                say("user", [{"type": "text", "text": "one"}, {"type": "image"}]),
                say("assistant", "a"),
                say("user", [{"type": "image"}, {"type": "text", "text": "two"}]),
                say("assistant", "b"),
            ],
            "images": ["wide.png", {"path": "square.png"}],
        },
        {},
        f"<bos><|turn>user\none{WIDE}<turn|>\n<|turn>model\n⟦a<turn|>⟧\n<|turn>user\n{SQUARE}two<turn|>\n"
        "<|turn>model\n⟦b<turn|>⟧\n",
    ),
    (
        "a sound and a video of two frames",
        {
            "messages": [
                say(
                    "user",
                    [
                        {"type": "audio", "audio": "tone.wav"},
                        {"type": "video", "frames": ["square.png", "square.png"], "fps": 1},
                    ],
                ),
                say("assistant", "a hum"),
            ]
        },
        {},
        f"<bos><|turn>user\n{SOUND}{CLIP}<turn|>\n<|turn>model\n⟦a hum<turn|>⟧\n",
    ),
    (
        "prompt and completion",
        {"prompt": "2+2", "completion": "4"},
        {},
        "<bos><|turn>user\n2+2<turn|>\n<|turn>model\n⟦4<turn|>⟧\n",
    ),
    (
        "plain text",
        {"text": " once upon\na time "},
        {},
        "<bos>⟦ once upon\na time <eos>⟧",
    ),
    (
        "tools that answer inside the model's turn: it learns to stop for them, not what they say",
        {"messages": [*MERGED_USE, *chat("thanks", "bye")["messages"]]},
        {"chat_template": "merging.jinja"},
        '<bos><|turn>user\nwhen?<turn|>\n<|turn>model\n⟦<|tool_call>call:now{zone:<|"|>x<|"|>}<tool_call|>'
        "<|tool_response>⟧response:now{noon}<tool_response|>⟦It is noon.<turn|>⟧\n<|turn>user\nthanks<turn|>\n"
        "<|turn>model\n<|channel>thought\n<channel|>⟦bye<turn|>⟧\n",
    ),
    (
        "the same, calls do not count",
        {"messages": MERGED_USE},
        {"chat_template": "merging.jinja", "supervise": Supervise(tool_calls=False)},
        '<bos><|turn>user\nwhen?<turn|>\n<|turn>model\n<|channel>thought\n<channel|><|tool_call>call:now{zone:<|"|>x<|"|>}'
        "<tool_call|><|tool_response>response:now{noon}<tool_response|>⟦It is noon.<turn|>⟧\n",
    ),
    (
        "two answers of tools in a row, and an answer in the same message",
        {
            "messages": [
                say("user", "x"),
                say(
                    "assistant",
                    "done",
                    tool_calls=[call("a"), call("b")],
                    tool_responses=[{"name": "a", "response": "1"}, {"name": "b", "response": "2"}],
                ),
            ]
        },
        {"chat_template": "merging.jinja"},
        "<bos><|turn>user\nx<turn|>\n<|turn>model\n<|channel>thought\n<channel|>⟦<|tool_call>call:a{}<tool_call|>"
        "<|tool_call>call:b{}<tool_call|><|tool_response>⟧response:a{1}<tool_response|><|tool_response>response:b{2}<tool_response|>⟦done<turn|>⟧\n",
    ),
    (
        "a thought written into the content, which the template takes out; an image between blank lines",
        {
            "messages": [
                say("user", [{"type": "image", "path": "square.png"}, {"type": "text", "text": "?"}]),
                say("assistant", "<|channel>thought\nhm<channel|>so be it"),
            ]
        },
        {"chat_template": "merging.jinja"},
        f"<bos><|turn>user\n\n\n{SQUARE}\n\n?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>⟦so be it<turn|>⟧\n",
    ),
    (
        "the empty thought of a generation prompt, before the last answer only",
        chat("a", "b", "c", "d"),
        {"chat_template": "merging.jinja"},
        "<bos><|turn>user\na<turn|>\n<|turn>model\n⟦b<turn|>⟧\n<|turn>user\nc<turn|>\n"
        "<|turn>model\n<|channel>thought\n<channel|>⟦d<turn|>⟧\n",
    ),
    (
        "the same, not wanted",
        chat("a", "b"),
        {"chat_template": "merging.jinja", "generation_prefix": False},
        "<bos><|turn>user\na<turn|>\n<|turn>model\n⟦b<turn|>⟧\n",
    ),
]
