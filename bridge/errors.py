"""The exceptions of gemma4-bridge. The command line catches `BridgeError` once and prints one line."""

from __future__ import annotations


class BridgeError(Exception):
    """Base of every error this project raises on purpose; its text names the file, tensor, key or rank."""


class GeometryError(BridgeError):
    """A Hugging Face config that is not a Gemma 4 model, or asks for something that is not supported."""


class CheckpointError(BridgeError):
    """A checkpoint folder, or a file in it, is missing, damaged, unsafe or not what it claims to be."""


class MappingError(BridgeError):
    """Tensors and mapping tables disagree: an unknown tensor, a missing one, or a wrong shape."""


class ParallelError(BridgeError):
    """A parallel layout that the model or the number of ranks does not allow."""


class UsageError(BridgeError):
    """An option, key or argument that makes no sense as given."""


class VerificationError(BridgeError):
    """A verification could not be carried out (as opposed to: was carried out and failed)."""


class DataError(BridgeError):
    """Training data that cannot be used as it is: the text names the file and line, or what to change."""


class TrainingError(BridgeError):
    """A training run that cannot go on: the loss is not a number, the data has run out."""


class EngineError(BridgeError):
    """An inference engine that cannot be reached, or does not take what it is given: the text names its URL."""
