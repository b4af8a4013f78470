"""Gemma 4 between Hugging Face and Megatron-Core.

    from bridge import Gemma4Bridge, Parallel

Names are imported on first use: a conversion needs neither torch nor Megatron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.api import Gemma4Bridge
    from bridge.megatron.parallel import Parallel

__all__ = ["Gemma4Bridge", "Parallel", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Gemma4Bridge":
        from bridge.api import Gemma4Bridge

        return Gemma4Bridge
    if name == "Parallel":
        from bridge.megatron.parallel import Parallel

        return Parallel
    raise AttributeError(f"module 'bridge' has no attribute {name!r}")
