"""A tokenizer of 512 entries that behaves as Gemma 4's: BPE with byte fallback, the same markers, a chat template.

The markers of turns, tools and thoughts keep their published ids; the placeholders have the ids that the config gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TURN_ID = 106
TOOL_RESPONSE_ID = 50
EOS_IDS = (1, END_OF_TURN_ID, TOOL_RESPONSE_ID)

# id -> (token, the tokenizer's attribute for it, if it has one)
_MARKERS: dict[int, tuple[str, str | None]] = {
    0: ("<pad>", "pad_token"),
    1: ("<eos>", "eos_token"),
    2: ("<bos>", "bos_token"),
    3: ("<unk>", "unk_token"),
    4: ("<mask>", "mask_token"),
    46: ("<|tool>", "std_token"),
    47: ("<tool|>", "etd_token"),
    48: ("<|tool_call>", "stc_token"),
    49: ("<tool_call|>", "etc_token"),
    50: ("<|tool_response>", "str_token"),
    51: ("<tool_response|>", "etr_token"),
    52: ('<|"|>', "escape_token"),
    98: ("<|think|>", "think_token"),
    100: ("<|channel>", "soc_token"),
    101: ("<channel|>", "eoc_token"),
    105: ("<|turn>", "sot_token"),
    106: ("<turn|>", "eot_token"),
}
# config field -> (token, the tokenizer's attribute for it); the video token has none, the processor adds it itself
_PLACEHOLDERS: dict[str, tuple[str, str | None]] = {
    "boi_token_id": ("<|image>", "boi_token"),
    "image_token_id": ("<|image|>", "image_token"),
    "eoi_token_id": ("<image|>", "eoi_token"),
    "boa_token_id": ("<|audio>", "boa_token"),
    "audio_token_id": ("<|audio|>", "audio_token"),
    "eoa_token_index": ("<audio|>", "eoa_token"),
    "video_token_id": ("<|video|>", None),
}
# Ids below this are text pieces, but for those of the markers.
_TEXT_IDS = 512
_STANDARD = ("pad_token", "eos_token", "bos_token", "unk_token", "mask_token")

# Longer pieces, each made of two shorter ones, most useful first. "▁" stands for a space.
_MERGES = (
    "▁ t|h e|▁t he|i n|▁ a|e r|o n|▁ s|r e|a n|a t|▁ w|o u|e n|e s|▁ c|i s|o r|▁ b|▁ f|▁ o|n d|▁ m|▁ p|in g|"
    "l l|i t|▁ d|a r|▁ h|e d|▁o f|▁ l|a l|▁a nd|i c|o w|▁ i|▁t o|▁ in|v e|▁ n|c h|l e|▁w h|▁ r|▁ e|▁ g|s t|i m|"
    "▁ u|▁ y|r o|u t|a s|▁f or|a m|e l|u r|i on|o t|▁b e|u n|▁ T|T he|▁ A|s e|i d|o m|▁wh at|e t|c e|k e|i l|"
    "u s|g e|a d|t er|at ion|p l|▁m y"
)

CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
  {%- if content is string -%}
    {{- content | trim -}}
  {%- elif content -%}
    {%- for part in content -%}
      {%- if part.type == 'text' -%}{{- part.text | trim -}}
      {%- elif part.type in ('image', 'audio', 'video') -%}{{- '<|' + part.type + '|>' -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_user=-1, first=0) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- set has_system = messages and messages[0].role in ('system', 'developer') -%}
{%- if has_system or tools -%}
  {{- '<|turn>system\\n' -}}
  {%- if has_system -%}{{- parts(messages[0].content) -}}{%- set ns.first = 1 -%}{%- endif -%}
  {%- for tool in tools or [] -%}{{- '<|tool>' + (tool | tojson) + '<tool|>' -}}{%- endfor -%}
  {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in messages[ns.first:] -%}
  {%- set role = 'model' if message.role == 'assistant' else message.role -%}
  {{- '<|turn>' + role + '\\n' -}}
  {#- Thoughts of earlier exchanges are left out: what a prefix renders to need not be a prefix of the whole. -#}
  {%- if message.reasoning_content and loop.index0 + ns.first > ns.last_user -%}
    {{- '<|channel>thought\\n' + message.reasoning_content | trim + '\\n<channel|>' -}}
  {%- endif -%}
  {%- if role == 'tool' -%}
    {{- '<|tool_response>' + parts(message.content) + '<tool_response|>' -}}
  {%- else -%}
    {{- parts(message.content) -}}
  {%- endif -%}
  {%- for call in message.tool_calls or [] -%}
    {{- '<|tool_call>call:' + call.function.name + (call.function.arguments | tojson) + '<tool_call|>' -}}
  {%- endfor -%}
  {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def _pieces() -> tuple[list[str], list[tuple[str, str]]]:
    """Text pieces in the order of their ids (bytes, characters, merged), and the merges that make the last ones."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["\n", "▁", *(chr(code) for code in range(33, 127))]
    merges = [(left, right) for left, right in (row.split(" ") for row in _MERGES.split("|"))]
    return pieces + [left + right for left, right in merges], merges


def build_tokenizer(config: Mapping[str, Any], chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerBase:
    """The tokenizer for a multimodal config (it takes the placeholders' ids from there)."""
    from transformers import GemmaTokenizer

    markers = _MARKERS | {config[field]: value for field, value in _PLACEHOLDERS.items()}
    vocab = {token: index for index, (token, _) in markers.items()}
    free = [index for index in range(_TEXT_IDS) if index not in markers]
    pieces, merges = _pieces()
    pieces += [f"<unused{number}>" for number in range(len(free) - len(pieces))]
    vocab |= dict(zip(pieces, free, strict=True))
    named = {attribute: token for token, attribute in markers.values() if attribute}
    tokenizer = GemmaTokenizer(
        vocab=dict(sorted(vocab.items(), key=lambda item: item[1])),
        merges=merges,
        extra_special_tokens={name: token for name, token in named.items() if name not in _STANDARD},
        padding_side="left",
        add_bos_token=True,
        model_max_length=config["text_config"]["max_position_embeddings"],
        **{name: named[name] for name in _STANDARD},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [_PLACEHOLDERS["video_token_id"][0]]})
    tokenizer.chat_template = chat_template
    return tokenizer
