"""Per-layer embeddings (transformers `get_per_layer_inputs` and `project_per_layer_inputs`).

Every pipeline stage holds the columns of the table and the rows of the projection that belong to its own layers, and
looks token rows up locally; only the input embeddings travel between stages.
"""

from __future__ import annotations

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_rank, get_pg_size, make_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.nn import ModuleDict

from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.embedding import padded_size, require_rows, scale_embeddings
from bridge.megatron.linear import ReplicatedLinear
from bridge.megatron.norm import RMSNorm
from bridge.megatron.sharding import split_parameter, without_padding


def share_over_stages(parameter: Tensor, first: bool) -> None:
    """Every stage holds this parameter: Megatron sums its gradient over them, and must count it once in norms."""
    parameter.pipeline_parallel = True  # type: ignore[attr-defined]
    if not first:
        parameter.shared = True  # type: ignore[attr-defined]


class PerLayerEmbedding(MegatronModule):
    """What each layer of this stage adds: [s (/tp), b, layers of the stage, ple dim]."""

    def __init__(self, config: Gemma4TransformerConfig, layers: range, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config)
        ple = config.geometry.ple
        assert ple is not None and config.init_method is not None
        self.ple = ple
        self.layers = layers
        self.pg_collection = pg_collection
        self.pad_token_id = config.geometry.pad_token_id
        self.embed_tokens = tensor_parallel.VocabParallelEmbedding(
            padded_size(ple.vocab_size, get_pg_size(pg_collection.tp)),
            len(layers) * ple.dim,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=pg_collection.tp,
        )
        self.embed_tokens.adapters = ModuleDict()  # as in `megatron.linear`
        self.model_projection = ReplicatedLinear(config, config.hidden_size, len(layers) * ple.dim)
        self.projection_norm = RMSNorm(config, ple.dim, config.layernorm_epsilon)
        share_over_stages(self.projection_norm.weight, first=layers.start == 0)

    def forward(self, input_ids: Tensor, embeds: Tensor) -> Tensor:
        """`input_ids` [b, s] and the scaled input embeddings [s (/tp), b, h]. Raises UsageError: see `require_rows`."""
        require_rows(input_ids, self.ple.vocab_size, "embed_tokens_per_layer")
        tokens = self.embed_tokens(input_ids)
        if not self.config.sequence_parallel:
            tokens = tokens.transpose(0, 1)
        tokens = scale_embeddings(tokens, input_ids, self.pad_token_id, self.ple.dim, self.config, self.embed_tokens)
        context = self.model_projection(embeds) * self.config.hidden_size**-0.5
        shape = (len(self.layers), self.ple.dim)
        return self.projection_norm(context.unflatten(-1, shape), residual=tokens.unflatten(-1, shape)) * 2.0**-0.5

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One box per layer: stages may hold any number of them."""
        tp_rank, tp_size = get_pg_rank(self.pg_collection.tp), get_pg_size(self.pg_collection.tp)
        dp_rank = get_pg_rank(self.pg_collection.dp_cp)
        total = self.config.geometry.num_layers
        table, projection, norm = (
            f"{prefix}{name}.weight" for name in ("embed_tokens", "model_projection", "projection_norm")
        )

        def layer_axis(axis: int, i: int) -> tuple[int, int, int]:
            return axis, self.layers.start + i, total

        norm_tensor = make_sharded_tensor_for_checkpoint(
            self.projection_norm.weight, norm, replica_id=(self.layers.start, tp_rank, dp_rank)
        )
        tokens = split_parameter(
            table,
            self.embed_tokens.weight,
            1,
            lambda i: ((0, tp_rank, tp_size), layer_axis(1, i)),
            len(self.layers),
            (0, 0, dp_rank),
        )
        return {
            table: without_padding(tokens, self.ple.vocab_size),
            projection: split_parameter(
                projection,
                self.model_projection.weight,
                0,
                lambda i: (layer_axis(0, i),),
                len(self.layers),
                (0, tp_rank, dp_rank),
            ),
            norm: norm_tensor,
        }
