"""In a vLLM server: the back end of its weight transfer that takes buckets from shared memory (`bridge.sync.vllm`).

vLLM finds `register` by the entry point `vllm.general_plugins` of this package. It needs to be installed beside vLLM
without what training needs (`pip install --no-deps`); nothing but vLLM and torch is imported.
"""

from __future__ import annotations

BACKEND = "gemma4_bridge"


def register() -> None:
    """Make the back end known. vLLM calls it in every process, some more than once."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, f"{__name__}.engine", "SharedMemoryEngine")
