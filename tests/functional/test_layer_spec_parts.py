"""Classes as the te spec makes them, with Megatron's local linears for Transformer Engine's: wiring, keys, adapters.

It shows that a spec's parts are used, and that nothing this project adds to them changes what a checkpoint holds. What
Transformer Engine computes is not tested here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch

from bridge.ranks import RankPool

from ..unit.test_layer_spec import COLUMN, ROW


class LikeTransformerEngine(torch.nn.Module):
    """Transformer Engine's linears keep a state of their own, and ask for it when they are loaded."""

    # By class, what its instances were given by name.
    keywords: ClassVar[dict[str, set[str]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.keywords.setdefault(type(self).__name__, set()).update(kwargs)
        super().__init__(*args, **kwargs)
        self._load_state_dict_pre_hooks.clear()

    def get_extra_state(self) -> torch.Tensor:
        return torch.ones(3)

    def set_extra_state(self, state: Any) -> None:
        assert state is not None


def both_specs(folder: str) -> dict[str, Any]:
    """Build, load and run a model of the local parts and one of the stand-ins. Runs on a rank."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from bridge import Gemma4Bridge
    from bridge.lora.initial import initial_values
    from bridge.lora.inject import attach, fill
    from bridge.lora.spec import LoraSpec
    from bridge.lora.table import adapter_table
    from bridge.lora.targets import resolve
    from bridge.megatron import te_linear
    from bridge.megatron.layer_options import LayerLinears
    from bridge.megatron.parallel import initialize
    from bridge.verify.sample import random_sample

    called: dict[str, set[str]] = {}

    class LikeTe(LikeTransformerEngine):
        keywords = called

    stand_ins = LayerLinears(
        *te_linear.quantizable(
            type("Column", (LikeTe, ColumnParallelLinear), {}), type("Row", (LikeTe, RowParallelLinear), {})
        )
    )
    contexts = []

    def context(config: Any) -> Any:
        contexts.append(config)
        return torch.autograd.profiler.record_function("fp8")

    bridge = Gemma4Bridge.from_hf(folder)
    initialize(bridge.provider().parallel)
    sample = random_sample(bridge.geometry, 0, batch=2)
    spec = LoraSpec(4, 8.0, "all-linear", parameters=())
    found: dict[str, Any] = {"called": called}
    for name in ("local", "te"):
        with patch("bridge.megatron.block.layer_linears", return_value=stand_ins) if name == "te" else patch.dict({}):
            provider = bridge.provider(dtype=torch.float32, overrides={"perform_initialization": False})
            model = provider.build()
        bridge.load_hf_weights(model)
        # Strict, from a state that has no entries beside weights, as a checkpoint of either spec.
        state = {k: v for k, v in model[0].state_dict().items() if not k.endswith("_extra_state")}
        model[0].load_state_dict(state)
        with patch.object(te_linear, "get_fp8_context", context):
            output = model[0](sample.input_ids, None, sample.attention_mask)
        table = adapter_table(bridge.table, resolve(spec, bridge.table))
        attach(model, table)
        fill(model, table, initial_values(0))
        sharded = model[0].sharded_state_dict()
        classes = {type(module).__name__ for module in model[0].decoder.modules() if hasattr(module, "adapters")}
        found[name] = {
            "keys": {key: (item.key, tuple(item.data.shape)) for key, item in sharded.items()},
            "output": output.detach(),
            "classes": classes,
            "fp8": len(contexts),
        }
    return found


def test_both_specs_hold_the_same_checkpoint(ranks: RankPool, toy: Any) -> None:
    folder: Path = toy("26b-a4b", text_only=True)
    (found,) = ranks.run(both_specs, str(folder), world_size=1)
    local, te = found["local"], found["te"]
    assert local["keys"] == te["keys"] and any("lora_A" in key for key in local["keys"])
    assert not any(key.endswith("_extra_state") for key in te["keys"])
    assert torch.equal(local["output"], te["output"])
    assert {"ColumnLinear", "RowLinear"} <= local["classes"] and {"TEColumnLinear", "TERowLinear"} <= te["classes"]
    assert not {"ColumnLinear", "RowLinear"} & te["classes"]
    # Around the four linears of each of 12 layers, and nothing else.
    assert (local["fp8"], te["fp8"]) == (0, 4 * 12)
    assert found["called"] == {"TEColumnLinear": COLUMN | {"stride"}, "TERowLinear": ROW}
