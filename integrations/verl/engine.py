"""verl's Megatron engine on this bridge: models, weights in and out, and the forward pass with Gemma 4's media.

Everything else is verl's own: its schedule of microbatches, losses, optimizer and checkpoints of optimizer states.
`override_transformer_config` goes to Megatron's config as it is; `params_dtype` in it takes the place of `dtype`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor
from verl.utils import tensordict_utils
from verl.utils.device import get_device_id
from verl.utils.megatron_peft_utils import build_peft_config_for_vllm
from verl.utils.megatron_utils import load_megatron_model_to_gpu
from verl.utils.model import extract_multi_modal_inputs
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from bridge import Gemma4Bridge
from bridge.errors import UsageError
from bridge.lora.initial import initial_values
from bridge.lora.inject import attach, disabled, fill
from bridge.lora.table import AdapterTable, adapter_table
from bridge.lora.targets import resolve
from bridge.megatron import cpu_runtime
from bridge.megatron.multimodal import ON_HOST
from integrations.verl.head import TokenOptions, token_values
from integrations.verl.options import DTYPES, check, layout, lora_spec
from integrations.verl.packed import media_of, pack, prompt_lengths

VENDOR = "gemma4_bridge"
# Without a GPU, which tests are, Megatron has to be told before verl asks it for a device.
cpu_runtime.enable()


class HfFiles:
    """What verl's checkpoint manager asks of a bridge: Hugging Face files into a model, and out of it."""

    def __init__(self, bridge: Gemma4Bridge) -> None:
        self._bridge = bridge

    def load_hf_weights(self, model: list[torch.nn.Module], path: str, **unused: Any) -> None:
        """Fill a model from a folder of the same model."""
        Gemma4Bridge.from_hf(path).load_hf_weights(model)

    def save_hf_weights(self, model: list[torch.nn.Module], path: str, **unused: Any) -> None:
        """A complete folder: weights, config, tokenizer, processor."""
        self._bridge.save_hf(model, path, overwrite=True)

    def save_hf_adapter(self, model: list[torch.nn.Module], path: str, adapters: Any) -> None:
        """A PEFT folder."""
        self._bridge.save_adapter(model, path, adapters, overwrite=True)


@EngineRegistry.register(model_type="language_model", backend="megatron", device=["cuda", "cpu"], vendor=VENDOR)
class Gemma4Engine(MegatronEngineWithLMHead):
    """See the module. Where it says so, `super()` of verl 0.9.1 does the same for Megatron-Bridge."""

    def _build_tf_config(self) -> None:
        """Geometry, tables, provider and Megatron's config. Raises a BridgeError for what is not supported."""
        check(self.engine_config, self.model_config)
        options = dict(self.engine_config.override_transformer_config)
        dtype = options.pop("params_dtype", self.engine_config.dtype)
        # verl's shipped configuration always says flash; which kernels there are for which layer is known here.
        options.pop("attention_backend", None)
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r}: known are {', '.join(DTYPES)}")
        self.is_value_model = self.vanilla_bridge = False
        self.share_embeddings_and_output_weights = self.model_config.share_embeddings_and_output_weights
        self.param_dtype = self.dtype = DTYPES[dtype]
        self.gemma = Gemma4Bridge.from_hf(self.model_config.local_path)
        # Rows differ in length: stages tell each other what they send.
        fixed = {"variable_seq_lengths": True, "perform_initialization": False}
        # Which Megatron takes with no other dispatcher, of models without experts too.
        options.setdefault("moe_token_dispatcher_type", "alltoall")
        self.provider = self.gemma.provider(layout(self.engine_config), self.param_dtype, overrides=options | fixed)
        self.tf_config = self.provider.config
        self.bridge = HfFiles(self.gemma)
        self.adapters: AdapterTable | None = None
        # verl asks whether there is one; what it is, is known here alone.
        self.peft_cls = lora_spec(self.model_config)
        if self.peft_cls is not None:
            self.adapters = adapter_table(self.gemma.table, resolve(self.peft_cls, self.gemma.table))

    def _build_megatron_module(self) -> list[torch.nn.Module]:
        """This rank's chunks with their weights and adapters; in Megatron's DDP, unless they are a reference's."""
        if not tensor_parallel.get_cuda_rng_tracker().get_states():
            # verl seeds where it finds a device.
            tensor_parallel.model_parallel_cuda_manual_seed(self.engine_config.seed)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        models = self.provider.build(groups)
        self.gemma.load_hf_weights(models)
        if self.adapters is not None:
            attach(models, self.adapters)
            fill(models, self.adapters.factors(), initial_values(self.engine_config.seed))
        if self.engine_config.forward_only:
            return list(models)
        ddp = {
            "use_distributed_optimizer": self.engine_config.use_distributed_optimizer,
            **self._resolve_override_ddp_config(),
        }
        config = DistributedDataParallelConfig(**ddp)
        self.tf_config.every_gradient = config.overlap_grad_reduce
        return [
            DistributedDataParallel(self.tf_config, config, model, disable_bucketing=i > 0, pg_collection=groups)
            for i, model in enumerate(models)
        ]

    def _maybe_enable_fused_kernels(self) -> None:
        """The loss is fused as it is, whatever `use_fused_kernels` says."""

    def forward_step(
        self,
        batch_iter: Iterator[Any],
        model: torch.nn.Module,
        logits_processor_func: Any,
        postprocess_micro_batch_func: Any,
    ) -> tuple[Any, Any]:
        """A microbatch through a chunk: on the last stage nested `log_probs`, and `entropy` where it is asked for.

        As in verl the value of a token stands where the token before it does.
        """
        batch = next(batch_iter).to(get_device_id())

        def said(key: str, default: Any = False) -> Any:
            return tensordict_utils.get_non_tensor_data(batch, key=key, default=default)

        for key in ("calculate_sum_pi_squared", "distillation_use_topk", "distillation_only"):
            if said(key):
                raise UsageError(f"{key}: not supported by the gemma4_bridge engine of verl")
        geometry, stage = self.gemma.geometry, unwrap_model(model)
        row = pack(batch["input_ids"], geometry, self.provider.parallel.row_multiple, prompt_lengths(batch))
        media = media_of(extract_multi_modal_inputs(batch.get("multi_modal_inputs", [])), geometry)
        device = row.input_ids.device
        media = {name: value if name in ON_HOST else value.to(device) for name, value in media.items()}
        wanted = TokenOptions(
            _temperature(batch["temperature"], row.offsets, row.labels), bool(said("calculate_entropy"))
        )
        output = model(
            row.input_ids,
            None,
            row.attention_mask,
            labels=row.labels,
            packed_seq_params=row.params,
            mm_token_type_ids=row.mm_token_type_ids,
            output_processor=token_values,
            output_processor_context=wanted,
            **(media if stage.pre_process else {}),
        )
        if stage.post_process:
            output = dict(zip(("log_probs", "entropy"), map(row.nested, output), strict=False))
        return output, partial(postprocess_micro_batch_func, data=batch)

    def get_per_tensor_param(
        self, base_sync_done: bool = False, **unused: Any
    ) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any] | None]:
        """(name, tensor on this rank's device) of everything, by Hugging Face names; and a config of the adapters.

        With adapters that are not merged (`model.lora.merge`): the base the first time, and then the adapters alone, in
        vLLM's format.
        """
        device = torch.device(get_device_id())
        if self.adapters is None or self.model_config.lora.get("merge", False):
            load_megatron_model_to_gpu(self.module, load_grad=False)
            return self.gemma.iter_hf_weights(self.module, device=device), None
        config = build_peft_config_for_vllm(self.model_config.lora)
        load_megatron_model_to_gpu(self.module, load_grad=False, load_frozen_params=not base_sync_done)
        if base_sync_done:
            return self.gemma.iter_adapters(self.module, "vllm", device=device), config
        return self.gemma.iter_hf_weights(self.module, adapters="leave", device=device), config

    def disable_adapter(self) -> AbstractContextManager[None]:
        """The base alone, while the context lasts."""
        return disabled([unwrap_model(chunk) for chunk in self.module])


def _temperature(given: Any, offsets: Tensor, labels: Tensor) -> Tensor | None:
    """Of every token, float32 [s]; None where it is 1 for all. `given`: a number, or one for every row."""
    values = torch.as_tensor(given, dtype=torch.float32, device=labels.device).reshape(-1)
    if bool((values == 1).all()):
        return None
    spread = values.expand(len(offsets) - 1).repeat_interleave(offsets.diff())
    return torch.nn.functional.pad(spread, (0, labels.shape[1] - len(spread)), value=1.0)
