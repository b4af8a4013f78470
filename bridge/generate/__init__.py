"""Generation with the Megatron model: caches in `bridge.megatron.kv_cache`, here sampling and the loop over rows."""

from bridge.generate.loop import Completion, Generator, Prompt
from bridge.generate.sampling import SamplingOptions

__all__ = ["Completion", "Generator", "Prompt", "SamplingOptions"]
