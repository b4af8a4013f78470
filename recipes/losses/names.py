"""The losses that `preference.loss` can name. Without torch: what reads recipes and data asks here."""

from __future__ import annotations

from recipes.config import PreferenceConfig

# Of pairs, against a reference; they can be added up. `sft` is the mean cross entropy of the chosen answers.
DPO = (
    "sigmoid",
    "sigmoid_norm",
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "apo_zero",
    "apo_down",
    "aot",
    "sppo_hard",
    "sft",
)
SFT = "sft"
# Of pairs, without a reference.
UNREFERENCED = ("orpo", "cpo", "simpo")
# Of single answers with a label.
KTO, APO_ZERO_UNPAIRED = ANSWERS = ("kto", "apo_zero_unpaired")
ALL = (*DPO, *UNREFERENCED, *ANSWERS)


def loss_names(config: PreferenceConfig) -> tuple[str, ...]:
    """The losses that a recipe names; () where it trains on answers as they are."""
    said = config.loss
    return () if said is None else (said,) if isinstance(said, str) else tuple(said)
