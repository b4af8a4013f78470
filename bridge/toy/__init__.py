"""Random checkpoints of the Gemma 4 family, small or at the published size, for tests, demonstrations and timings."""

from bridge.toy.write import VARIANTS, write_toy

__all__ = ["VARIANTS", "write_toy"]
