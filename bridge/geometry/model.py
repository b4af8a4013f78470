"""What a Gemma 4 checkpoint is made of, read once from its config: the whole of it, out of its sections."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from bridge.errors import CheckpointError, GeometryError
from bridge.geometry.decoder import (
    LayerGeometry,
    MoeGeometry,
    PleGeometry,
    read_layers,
    read_moe,
    read_ple,
    text_fields,
)
from bridge.geometry.drafter import DRAFTER_DEFAULTS, DrafterGeometry, check_text, read_drafter
from bridge.geometry.fields import Fields, short
from bridge.geometry.towers import (
    TOP_DEFAULTS,
    Placeholders,
    Towers,
    read_placeholders,
    read_towers,
)
from bridge.hf.json_file import read_object
from bridge.hf.quantization import is_marker, read_quantization

_BASE = "model."
# model_type of a multimodal config -> (its architecture, model_type of its text part, the text part's own architecture)
_MULTIMODAL = {
    "gemma4": ("Gemma4ForConditionalGeneration", "gemma4_text", "Gemma4ForCausalLM"),
    "gemma4_unified": ("Gemma4UnifiedForConditionalGeneration", "gemma4_unified_text", "Gemma4UnifiedForCausalLM"),
}
_TEXT = {text: (wrapper, architecture) for wrapper, (_, text, architecture) in _MULTIMODAL.items()}
# model_type of a drafter's config -> (its architecture, model_type of its text part)
_DRAFTERS = {
    "gemma4_assistant": ("Gemma4AssistantForCausalLM", "gemma4_text"),
    "gemma4_unified_assistant": ("Gemma4UnifiedAssistantForCausalLM", "gemma4_unified_text"),
}
_TOP_DEFAULTS: dict[str, Any] = {
    "text_config": None,
    "tie_word_embeddings": True,
    "quantization_config": None,
} | TOP_DEFAULTS
# Brackets of images and audio, which only the processor and the template write; what a processor does.
_TOP_IGNORED = (
    "boi_token_id",
    "eoi_token_id",
    "boa_token_id",
    "eoa_token_id",
    "eoa_token_index",
    "vision_soft_tokens_per_image",
)


class HasToDict(Protocol):
    """What of a transformers config object is used: its dictionary."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Geometry(Towers):
    """A Gemma 4 model, or a drafter of one.

    `base` starts the on-disk name of every tensor but `lm_head.weight`, `prefix` that of the language model's. `base`
    is empty where the base class saved the folder, which transformers loads as well. `notices`: what the config says
    that the model does not follow, a line each, for whoever shows it to a user.
    """

    model_type: str
    architecture: str
    multimodal: bool
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerGeometry, ...]
    moe: MoeGeometry | None
    ple: PleGeometry | None
    tied: bool
    rms_norm_eps: float
    initializer_range: float
    logit_softcap: float | None
    max_position_embeddings: int
    pad_token_id: int | None
    bidirectional_vision: bool
    placeholders: Placeholders | None
    drafter: DrafterGeometry | None = None
    base: str = _BASE
    notices: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def prefix(self) -> str:
        return self.base + ("language_model." if self.multimodal else "")

    def named_as_in(self, names: Collection[str]) -> Geometry:
        """This geometry with the names of a folder whose tensors these are."""
        embedding = f"{self.prefix}embed_tokens.weight"
        bare = embedding not in names and embedding.removeprefix(_BASE) in names
        return replace(self, base="") if bare else self

    def in_class(self, name: str) -> str:
        """What the class with a head calls the tensor `name` of a folder, on disk."""
        return name if self.base or name.startswith("lm_head.") else _BASE + name

    @property
    def placeholder_ids(self) -> frozenset[int]:
        """Ids of the tokens that soft tokens replace; none in the text classes."""
        return frozenset() if self.placeholders is None else self.placeholders.ids

    @property
    def unified(self) -> bool:
        """Whether this is the encoder-free family (12B), or a drafter of it."""
        return self.model_type.startswith("gemma4_unified")

    @property
    def text_architecture(self) -> str:
        """The transformers class of the text model alone."""
        return _MULTIMODAL[self.model_type][2]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Geometry:
        """Read `config.json` of an HF folder. Raises CheckpointError (no such file, no JSON) and GeometryError."""
        path = Path(folder) / "config.json"
        config = read_object(path)
        try:
            return cls.from_dict(config)
        except GeometryError as error:
            raise GeometryError(f"{path}: {error}") from None

    @classmethod
    def from_config(cls, config: HasToDict) -> Geometry:
        """Read a transformers config object (Gemma4Config, Gemma4TextConfig and the two Unified ones)."""
        return cls.from_dict(config.to_dict())

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Geometry:
        """Read a config as a dictionary. Raises GeometryError that names the field."""
        model_type, notices = config.get("model_type"), list[str]()
        if not isinstance(model_type, str) or model_type not in {*_MULTIMODAL, *_TEXT, *_DRAFTERS}:
            known = ", ".join([*_MULTIMODAL, *_TEXT, *_DRAFTERS])
            raise GeometryError(f"model_type is {short(model_type)}, not a Gemma 4 model (one of {known})")
        if model_type in _TEXT:
            wrapper, architecture = _TEXT[model_type]
            also = {"quantization_config": None}
            text = text_fields("", config, wrapper == "gemma4_unified", notices, also)
            _check_quantization(text["quantization_config"], notices)
            return cls._read(text, wrapper, architecture, text.flag("tie_word_embeddings"), notices)
        if model_type in _DRAFTERS:
            return cls._read_drafter(config, model_type, notices)
        architecture, text_type, _ = _MULTIMODAL[model_type]
        unified = model_type == "gemma4_unified"
        top = Fields("", config, _TOP_DEFAULTS, notices, ignored=_TOP_IGNORED)
        _check_quantization(top["quantization_config"], notices)
        text, tied = _text_section(top, text_type, unified, notices)
        towers = read_towers(top, unified, notices)
        return cls._read(text, model_type, architecture, tied, notices, read_placeholders(top), towers)

    @classmethod
    def _read_drafter(cls, config: Mapping[str, Any], model_type: str, notices: list[str]) -> Geometry:
        architecture, text_type = _DRAFTERS[model_type]
        unified = model_type.startswith("gemma4_unified")
        top = Fields("", config, DRAFTER_DEFAULTS[model_type], notices, ignored=_TOP_IGNORED)
        _check_quantization(top["quantization_config"], notices)
        if top["text_config"] is None:
            raise GeometryError("text_config is missing: a drafter has no default")
        text, tied = _text_section(top, text_type, unified, notices)
        check_text(text, unified, notices)
        drafter = read_drafter(top, text.positive("vocab_size"))
        # The class computes no softcap.
        return replace(cls._read(text, model_type, architecture, tied, notices, drafter=drafter), logit_softcap=None)

    @classmethod
    def _read(
        cls,
        text: Fields,
        model_type: str,
        architecture: str,
        tied: bool,
        notices: list[str],
        placeholders: Placeholders | None = None,
        towers: Towers | None = None,
        drafter: DrafterGeometry | None = None,
    ) -> Geometry:
        ple, vocab_size = read_ple(text), text.positive("vocab_size")
        pad, softcap = text.token("pad_token_id"), "final_logit_softcapping"
        rows = vocab_size if ple is None else min(vocab_size, ple.vocab_size)
        if pad is not None and pad >= rows:
            raise GeometryError(f"{text.where('pad_token_id')} is {pad}, but the embeddings have {rows} rows")
        return cls(
            model_type=model_type,
            architecture=architecture,
            multimodal=placeholders is not None,
            hidden_size=text.positive("hidden_size"),
            vocab_size=vocab_size,
            layers=read_layers(text, notices, external_kv=drafter is not None),
            moe=read_moe(text),
            ple=ple,
            tied=tied,
            rms_norm_eps=text.number("rms_norm_eps"),
            initializer_range=text.number("initializer_range"),
            logit_softcap=None if text[softcap] is None else text.number(softcap),
            max_position_embeddings=text.positive("max_position_embeddings"),
            pad_token_id=pad,
            bidirectional_vision=text["use_bidirectional_attention"] == "vision",
            placeholders=placeholders,
            drafter=drafter,
            notices=tuple(notices),
            **vars(towers or Towers()),
        )


def _text_section(top: Fields, text_type: str, unified: bool, notices: list[str]) -> tuple[Fields, bool]:
    """`text_config` of a config that has one, and whether the head is tied. Raises GeometryError."""
    section = {} if top["text_config"] is None else top["text_config"]
    text = text_fields("text_config", section, unified, notices, {"model_type": text_type})
    if text["model_type"] != text_type:
        raise GeometryError(f"text_config.model_type is {short(text['model_type'])}, expected {text_type!r}")
    # These classes obey the top-level value, whatever text_config says.
    tied = top.flag("tie_word_embeddings")
    if "tie_word_embeddings" in text.given and text["tie_word_embeddings"] is not tied:
        notices.append(f"text_config.tie_word_embeddings does not count: at the top it is {str(tied).lower()}")
    return text, tied


def _check_quantization(config: Any, notices: list[str]) -> None:
    """Refuse what no reader of folders reads. A q4_0 without a method is how 16-bit weights were trained for it."""
    try:
        read_quantization(config)
    except CheckpointError as error:
        raise GeometryError(str(error)) from None
    if not config or not is_marker(config):
        return
    notices.append(
        "quantization_config (q4_0, without a quant_method) says what the weights were trained for, not how they are "
        "stored; it stays in config.json as it is: transformers loads no folder that has it until the key is removed"
    )
