"""What torch and Megatron say of missing optional packages while they are imported, kept from the terminal."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Call it before the first import of Megatron in a program of a user: nothing of it is of use to them."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for name in ("megatron.core.dist_checkpointing", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
