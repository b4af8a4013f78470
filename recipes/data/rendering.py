"""A chat template, as its tokenizer applies it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.data.sample import THINKING_KEYS, Message


class Template:
    """Renders conversations with the template `text` and its variables.

    Plain ones (each message a role and a text) go straight to transformers' renderer, which the tokenizer itself would
    call: what it does before, to messages of any kind, changes nothing of them.
    """

    def __init__(self, tokenizer: Any, text: str, variables: Mapping[str, Any]) -> None:
        self._tokenizer, self._text, self._variables = tokenizer, text, dict(variables)
        self._thinking_key = next((key for key in THINKING_KEYS if key in text), None)
        # Variables that are none of the template's but say how it is applied.
        self._ordinary = not variables.keys() & inspect.signature(tokenizer.apply_chat_template).parameters.keys()

    def render(self, conversations: Sequence[Sequence[Message]], tools: Sequence[Any], *, answer: bool) -> list[str]:
        """Conversations with the same tools; `answer`: with the beginning of the model's turn. Raises anything."""
        plain = [_plain(one) for one in conversations] if self._ordinary and not tools else [None]
        if None not in plain:
            from transformers.utils.chat_template_utils import render_jinja_template

            said = {**self._tokenizer.special_tokens_map, **self._variables}
            rendered, _ = render_jinja_template(plain, chat_template=self._text, add_generation_prompt=answer, **said)
            return list(rendered)
        return list(
            self._tokenizer.apply_chat_template(
                [[message.for_template(self._thinking_key) for message in one] for one in conversations],
                tools=list(tools) or None,
                chat_template=self._text,
                tokenize=False,
                add_generation_prompt=answer,
                **self._variables,
            )
        )


def _plain(conversation: Sequence[Message]) -> list[dict[str, Any]] | None:
    """The messages as the template takes them; None unless each is a role and a text, and nothing beside."""
    messages = []
    for role, parts, thinking, calls, extra, _ in conversation:
        # Of strings, no class that brings methods of its own: a template must not see those.
        if thinking is not None or calls or extra or len(parts) != 1 or type(parts[0]) is not str:
            return None
        messages.append({"role": role, "content": parts[0]})
    return messages
