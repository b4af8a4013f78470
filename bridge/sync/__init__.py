"""Weights on their way to an inference engine: bounded buckets, out of a live model or a checkpoint, into a sink."""
