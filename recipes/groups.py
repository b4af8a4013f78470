"""Groups of parameters that recipes name: patterns that begin anywhere in a Megatron parameter name, which
`bridge inspect` and docs/mapping.md show. Without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bridge.errors import UsageError
from bridge.mapping.modalities import MODALITIES
from recipes.keys import meant

# What `model.freeze` can name.
FREEZABLE = {
    "embeddings": r"embedding\.|output_layer\.|ple\.embed_tokens\.",
    "router": r"\.router\.",
    "experts": r"\.experts\.",
    "language": r"^(embedding|decoder|output_layer)\.",
    **{
        group: pattern
        for name, modality in MODALITIES.items()
        for group, pattern in ((name, name), (f"{name}_tower", rf"({'|'.join(modality.fronts)})\."))
        if pattern == name or modality.fronts
    },
    "projectors": rf"({'|'.join(modality.modules[-1] for modality in MODALITIES.values())})\.",
}
# What `optimizer.lr_groups` can name: these, and of adapters the factor that begins at 0 (LoRA+, arXiv 2402.12354).
RATED = {**FREEZABLE, "lora_b": r"\.lora_B$"}


def compiled(key: str, names: Sequence[str], known: Mapping[str, str]) -> list[re.Pattern[str]]:
    """Of groups and of regular expressions on parameter names. Raises UsageError, which starts with `key`."""
    patterns = []
    for name in names:
        try:
            patterns.append(re.compile(known.get(name, name)))
        except re.error as error:
            raise UsageError(f"{key}: {name!r} is no group and no regular expression ({error})") from None
    return patterns


def none_named(key: str, name: str, known: Mapping[str, str]) -> UsageError:
    """What is to be said where no parameter matches."""
    close = "" if name in known else meant(name, tuple(known))
    return UsageError(f"{key}: {name!r} names no parameter{close or f'; groups are {", ".join(known)}'}")
