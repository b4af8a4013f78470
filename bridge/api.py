"""The Python API: a model folder, its Megatron model, and weights between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.convert.folders import DEFAULT_SHARD_BYTES, open_source
from bridge.convert.manifest import MegatronFolder
from bridge.convert.quantized_folder import open_hf_folder
from bridge.geometry import Geometry
from bridge.hf.hub import resolve
from bridge.mapping import Table, table_for
from bridge.megatron.parallel import Parallel

if TYPE_CHECKING:
    import torch

    from bridge.lora.live import Adapters
    from bridge.lora.spec import LoraSpec
    from bridge.megatron.model import Gemma4Model
    from bridge.megatron.provider import Gemma4Provider
    from bridge.sync.live import WeightSync


@dataclass(frozen=True)
class Gemma4Bridge:
    """Geometry and tables of one model, and where its weights are.

    Opening one reads no weights, but for a folder with a head beside an embedding that its config ties it to: they are
    compared, because transformers loads such a model untied where they differ.

    Exactly one of `hf_dir` and `megatron` is set. `notices`: what of the folder is not followed or left behind.
    """

    geometry: Geometry
    table: Table
    hf_dir: Path | None = None
    megatron: MegatronFolder | None = None
    notices: tuple[str, ...] = ()

    @classmethod
    def from_hf(cls, name: str | Path) -> Gemma4Bridge:
        """A Hugging Face folder or hub id. Raises a BridgeError that names what is wrong with it."""
        path = resolve(str(name))
        with ExitStack() as stack:
            source = open_source(stack, path)
            source.table.check_folder({n: t.shape for n, t in source.folder.tensors.items()}, path)
            return cls(source.geometry, source.table, hf_dir=path, notices=source.notices)

    @classmethod
    def from_megatron(cls, path: str | Path) -> Gemma4Bridge:
        """A Megatron checkpoint that `import`, or a training run, wrote."""
        checkpoint = MegatronFolder.open(path)
        return cls(checkpoint.geometry, table_for(checkpoint.geometry), megatron=checkpoint)

    def provider(
        self, parallel: Parallel | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> Gemma4Provider:
        """What builds the Megatron model in one layout; `options` are those of `Gemma4Provider`.

        Raises ParallelError where the layout does not fit.
        """
        import torch

        from bridge.megatron.provider import Gemma4Provider

        return Gemma4Provider(self.geometry, parallel or Parallel(), dtype or torch.bfloat16, **options)

    def build(self, provider: Gemma4Provider) -> list[Gemma4Model]:
        """This rank's model chunks. torch.distributed must be initialised.

        Megatron's groups are made when there are none yet. Without a visible GPU the CPU runtime is switched on.
        Raises ParallelError where the ranks, or groups that there are, do not fit the provider's layout.
        """
        from megatron.core import parallel_state

        from bridge.megatron import cpu_runtime
        from bridge.megatron.parallel import initialize

        cpu_runtime.enable()
        if not parallel_state.model_parallel_is_initialized():
            initialize(provider.parallel)
        return provider.build()

    def load_hf_weights(self, model: Sequence[torch.nn.Module]) -> None:
        """Fill a model from the folder this bridge was opened on, HF or Megatron: each rank its own part, in chunks."""
        from bridge.convert.live import load_from_hf, load_from_megatron
        from bridge.torch_dist.reader import DistReader

        if self.hf_dir is not None:
            with open_hf_folder(self.hf_dir) as folder:
                load_from_hf(model, self.table, folder)
        elif self.megatron is not None:
            with DistReader(self.megatron.weights) as reader:
                load_from_megatron(model, self.table, reader)

    def iter_hf_weights(
        self,
        model: Sequence[torch.nn.Module],
        *,
        adapters: Adapters = "merge",
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, whole tensor on `device`), on every rank, one Megatron tensor in memory at a time.

        `adapters` of a model that has some: "merge" adds them to the weights, "leave" gives the base. `model`: this
        rank's chunks, in DDP or without. Collective: every rank must exhaust it. For an inference engine there is
        `weight_sync`. Raises what any rank raises, on all of them.
        """
        from bridge.convert.live import iter_hf
        from bridge.lora.live import open_gatherer

        yield from iter_hf(open_gatherer(model, self.table, adapters), device)

    def weight_sync(self, model: Sequence[torch.nn.Module], **options: Any) -> WeightSync:
        """What sends a live model's weights to an inference engine, in bounded buckets; `options` of `WeightSync`."""
        from bridge.sync.live import WeightSync

        return WeightSync(self.table, model, **options)

    def iter_adapters(
        self, model: Sequence[torch.nn.Module], adapter_format: str = "peft", *, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on `device`) of a model's adapters in a format (peft, vllm or sglang). As `iter_hf_weights`."""
        from bridge.lora.live import iter_adapters

        return iter_adapters(model, self.table, adapter_format, device)

    def save_adapter(
        self,
        model: Sequence[torch.nn.Module],
        target: str | Path,
        spec: LoraSpec,
        *,
        adapter_format: str = "peft",
        overwrite: bool = False,
    ) -> None:
        """A live model's adapters, which are of `spec`, as a folder in a format. Collective; rank 0 writes."""
        from bridge.lora.live import read_adapter
        from bridge.lora.peft_folder import write_peft
        from bridge.together import together

        adapter = read_adapter(model, self, spec)
        with together():
            if adapter is not None:
                write_peft(target, adapter, adapter_format=adapter_format, overwrite=overwrite)

    def save_hf(
        self,
        model: Sequence[torch.nn.Module],
        target: str | Path,
        *,
        max_shard_size: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
        adapters: Adapters = "merge",
    ) -> None:
        """A live model as a complete HF folder: tensors of the model, carried tensors and assets of this bridge.

        A model of one dtype makes a folder of that dtype. `model` and `adapters` as of `iter_hf_weights`. Collective;
        rank 0 writes, a bounded chunk at a time, and the folder appears when it is complete. Raises what any rank
        raises, on all of them; the target is then as it was before.
        """
        from bridge.convert.live_save import save_live
        from bridge.lora.live import open_gatherer

        gatherer = open_gatherer(model, self.table, adapters)
        save_live(gatherer, self, Path(target), max_shard_size, overwrite)
