"""What a Gemma 4 checkpoint is made of, read once from its config: the only room that reads Hugging Face config fields.

Everything else asks the frozen `Geometry`. Plain JSON is read, so that a conversion need not import transformers;
`tests/unit/test_geometry*.py` hold the reading against that of the transformers classes.
"""

from bridge.geometry.binding import bound, producers
from bridge.geometry.decoder import LayerGeometry, LayerKind, MoeGeometry, PleGeometry
from bridge.geometry.drafter import DrafterGeometry
from bridge.geometry.model import Geometry, HasToDict
from bridge.geometry.towers import (
    Audio,
    AudioGeometry,
    Placeholders,
    UnifiedAudioGeometry,
    UnifiedVisionGeometry,
    Vision,
    VisionGeometry,
)

__all__ = [
    "Audio",
    "AudioGeometry",
    "DrafterGeometry",
    "Geometry",
    "HasToDict",
    "LayerGeometry",
    "LayerKind",
    "MoeGeometry",
    "Placeholders",
    "PleGeometry",
    "UnifiedAudioGeometry",
    "UnifiedVisionGeometry",
    "Vision",
    "VisionGeometry",
    "bound",
    "producers",
]
