"""vLLM's side of a weight transfer through shared memory: one file is one bucket."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

# The only files that are opened: those that `bridge.sync.vllm` makes.
FOLDER, PREFIX = Path("/dev/shm"), "gemma4-bridge-sync-"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """`config`: facts of the trainer's model, by their names in its text config."""

    config: dict[str, int]


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Tensors that lie behind each other, without gaps, in a file of shared memory."""

    file: str
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class SharedMemoryEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads each bucket as a checkpoint is loaded, layer by layer, from the mapped file.

    What vLLM puts off until a layer is complete are views of the mapping, which is alive as long as they are: the file
    itself has no name any more by then, and nobody writes to it.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._kernels: list[tuple[Any, Any]] = []

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Raises ValueError where the trainer's model is another one."""
        ours = self.model_config.hf_text_config
        for name, theirs in init_info.config.items():
            have = getattr(ours, name, None) or 0
            if have != theirs:
                raise ValueError(f"another model is served: its {name} is {have}, that of the weights {theirs}")

    def start_weight_update(self) -> None:
        """What is loaded from here on replaces the weights; layers of which nothing comes stay as they are."""
        if self.device.type == "cpu":
            # Where experts have a kernel vLLM 0.32 takes weights for laid out as it wants them, and on a CPU nobody has
            # packed them again. Without one it does all that it did at first.
            for module in self.model.modules():
                method: Any = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    self._kernels.append((method, method.moe_kernel))
                    method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One bucket. The base class waits for an accelerator, which a CPU has none of."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Raises ValueError where the file is not what the message says."""
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        weights = list(_views(update_info))
        with disable_mtp_completeness_check():
            self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        """Put the layers together that are still open."""
        finalize_layerwise_reload(self.model, self.model_config)
        _process_tied(self.model)
        for method, kernel in self._kernels:
            if method.moe_kernel is None:  # of its layer nothing came
                method.moe_kernel = kernel
        self._kernels.clear()

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def _process_tied(model: torch.nn.Module) -> None:
    """Do once more what vLLM does with weights behind loading, where several modules share one: a tied head.

    Only the module that a checkpoint names is loaded. The others share its values, but not what kernels made of them:
    on a CPU a head keeps a packed copy of its weight.
    """
    owners: dict[int, list[torch.nn.Module]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(module)
    for module in (module for shared in owners.values() if len(shared) > 1 for module in shared):
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "process_weights_after_loading"):
            vars(module).pop("_already_called_process_weights_after_loading", None)
            method.process_weights_after_loading(module)


def _views(info: UpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a bucket, as views of the file."""
    dtypes = [_dtype(name) for name in info.dtype_names]
    if not len(info.names) == len(dtypes) == len(info.shapes):
        raise ValueError(f"{len(info.names)} names, {len(dtypes)} dtypes and {len(info.shapes)} shapes")
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(info.shapes, dtypes, strict=True)]
    buffer, offset = _mapped(info.file, sum(sizes)), 0
    for name, dtype, shape, size in zip(info.names, dtypes, info.shapes, sizes, strict=True):
        yield name, buffer[offset : offset + size].view(dtype).view(shape)
        offset += size


def _mapped(name: str, nbytes: int) -> torch.Tensor:
    """A bucket's file as uint8 [nbytes]. Raises ValueError for a file that the trainer did not make."""
    if not name.startswith(PREFIX) or "/" in name:
        raise ValueError(f"{name}: no bucket's file")
    path = FOLDER / name
    try:
        found = os.lstat(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; the trainer and this server share no memory?") from None
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_size != nbytes:
        raise ValueError(f"{path}: not a file of this user of {nbytes} bytes")
    return torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name}: no dtype")
    return found
