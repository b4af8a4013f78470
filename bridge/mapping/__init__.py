"""The declarative weight-mapping tables: Hugging Face tensors on disk <-> Megatron-Core keys.

`table_for(geometry)` expands the rows of `text.py`, `ple.py`, `moe.py`, `vision.py`, `audio.py` and `unified.py` for
one model. Import, export, live load and save, gradient comparison and the page `docs/mapping.md` all walk the same
expanded table.
"""

from bridge.mapping.expansion import table_for
from bridge.mapping.table import Entry, HfTensor, Row, Table

__all__ = ["Entry", "HfTensor", "Row", "Table", "table_for"]
