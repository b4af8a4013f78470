"""What a run writes when all is done: HF folders of its model, and of a drafter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from recipes.train import checkpoint
from recipes.train.lora import export_merged
from recipes.train.setup import Run


def export(run: Run, best: Path | None, say: Callable[[str], None]) -> None:
    """Write what the recipe's `export` asks for, of a checkpoint or as it is now. Collective. Raises a BridgeError."""
    said, drafting = run.recipe.export, run.drafting
    model = None if said.hf is None else Path(said.hf)
    if best is not None and (said.hf is not None or said.drafter is not None):
        say(f"exporting the best checkpoint, {best}")
    if model is not None and run.lora is not None:
        merged, model = model, None
        checkpoint.on_rank_0(lambda: export_merged(run.recipe, best, merged, say))
    if model is None and said.drafter is None:
        return
    run.gather_weights()
    if best is not None:
        checkpoint.load_weights(run, best)
    if model is not None:
        run.trained.save_hf(run.stored, model, overwrite=True)
    if said.drafter is not None and drafting is not None:
        drafting.bridge.save_hf(drafting.held, said.drafter, overwrite=True)
