"""Runs in .venv-sglang: adapters as SGLang's own loader takes them.

`python sglang_worker.py JOB.json`. A job is a list of `{"adapter": folder, "base": folder, "out": file}`: what each
layer holds afterwards is written to `out`, in safetensors, with the scaling and the modules wanted in its metadata.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.utils import get_normalized_target_modules
from sglang.srt.runtime_context import get_context
from sglang.srt.server_args import ServerArgs
from transformers import AutoConfig


def main(job_file: str) -> None:
    for job in json.loads(Path(job_file).read_text(encoding="utf-8")):
        # Reading a folder asks a server's arguments how.
        get_context().set_server_args(ServerArgs(model_path=job["base"], device="cpu"))
        config = LoRAConfig(job["adapter"])
        text = AutoConfig.from_pretrained(job["base"]).get_text_config()
        adapter = LoRAAdapter("mine", config, text, LoadConfig(), None)
        adapter.initialize_weights()
        held = {name: tensor for layer in adapter.layers for name, tensor in layer.weights.items()}
        wanted = sorted(get_normalized_target_modules(config.target_modules))
        told = {"scaling": str(adapter.scaling), "targets": json.dumps(wanted)}
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, job["out"], metadata=told)


if __name__ == "__main__":
    main(*sys.argv[1:])
