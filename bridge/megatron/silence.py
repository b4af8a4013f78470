"""What torch and Megatron say of themselves (missing optional packages, coming changes), kept from the terminal."""

from __future__ import annotations

import logging
import warnings


def silence_warnings() -> None:
    """Call it before the first import of Megatron in a program of a user: nothing of it is of use to them."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    # Megatron's optimizer steps on views of its own buffers.
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for name in (
        "megatron.core.dist_checkpointing",
        "megatron.core.distributed.distributed_data_parallel",
        "megatron.core.models.gpt.gpt_model",
        "torch.utils.cpp_extension",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
