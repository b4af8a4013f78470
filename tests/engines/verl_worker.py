"""Runs in .venv-verl, one process a rank: verl's engine makes one actor update on rows that are there.

`python verl_worker.py JOB.json RANK`. A job: `model`, `rows` (a file, see verl_kit.py), `world`, `store`, `engine`
(what of McoreEngineConfig is not usual), `lora` (of HFModelConfig), `out`, `answer`: where ranks answer, in JSON.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.engines.verl_kit import BETAS, CLIP, EPS, LR, WEIGHT_DECAY


def main(job_file: str, rank: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    # verl logs the memory of a GPU, and there is none.
    torch.cuda.mem_get_info = lambda *_: (0, 0)  # type: ignore[assignment]
    store = dist.FileStore(job["store"], job["world"])
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=job["world"])
    engine = make_engine(job)
    engine.initialize()
    rows = torch.load(job["rows"], weights_only=True)
    size, number = engine.get_data_parallel_size(), engine.get_data_parallel_rank()
    mine = rows[number * len(rows) // size : (number + 1) * len(rows) // size]
    answer: dict[str, Any] = {"engine": type(engine).__module__ + "." + type(engine).__name__}
    with engine.eval_mode():
        found = engine.infer_batch(batch_of(mine, len(rows), calculate_entropy=True))
        if found:
            answer["entropy"] = [row.tolist() for row in found["model_output"]["entropy"].unbind()]
            answer["log_probs"] = [row.tolist() for row in found["model_output"]["log_probs"].unbind()]
    with engine.train_mode():
        found = engine.train_batch(batch_of(mine, len(rows)), loss_function=partial(ppo_loss(), config=actor_config()))
    if found:
        answer["loss"] = sum(found["loss"]) / size
        losses = torch.tensor(answer["loss"], dtype=torch.float64)
    else:
        losses = torch.zeros((), dtype=torch.float64)
    dist.all_reduce(losses)
    answer["summed_loss"] = float(losses)
    stream, peft = engine.get_per_tensor_param()
    answer["peft"] = None if peft is None else {"r": peft["r"], "lora_alpha": peft["lora_alpha"]}
    sums = {name: float(tensor.double().sum()) for name, tensor in stream}
    answer["names"] = sorted(sums)
    if job["lora"]:
        engine.bridge.save_hf_adapter(engine.module, f"{job['out']}-adapter", engine.peft_cls)
        stream, _ = engine.get_per_tensor_param(base_sync_done=True)
        torch.save(dict(stream), f"{job['out']}-stream-{rank}.pt")
    engine.bridge.save_hf_weights(engine.module, job["out"])
    if rank == "0" or found:
        Path(f"{job['answer']}-{rank}").write_text(json.dumps(answer), encoding="utf-8")
    dist.barrier()


def make_engine(job: dict[str, Any]) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
    from verl.workers.engine import EngineRegistry

    usual = {"override_transformer_config": {"params_dtype": "float32"}, "use_dynamic_bsz": False}
    return EngineRegistry.new(
        model_type="language_model",
        backend="megatron",
        model_config=HFModelConfig(path=job["model"], lora=job["lora"]),
        engine_config=McoreEngineConfig(**usual | job["engine"]),
        optimizer_config=McoreOptimizerConfig(
            lr=LR,
            min_lr=LR,
            lr_decay_style="constant",
            weight_decay=WEIGHT_DECAY,
            clip_grad=CLIP,
            total_training_steps=10,
            override_optimizer_config={"adam_eps": EPS, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1]},
        ),
        checkpoint_config=CheckpointConfig(),
    )


def ppo_loss() -> Any:
    from verl.workers.utils.losses import ppo_loss as found

    return found


def actor_config() -> Any:
    from verl.workers.config import ActorConfig

    return ActorConfig(
        strategy="megatron",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
        clip_ratio_c=100.0,
        loss_agg_mode="seq-mean-token-mean",
    )


def batch_of(rows: list[dict[str, Any]], total: int, calculate_entropy: bool = False) -> Any:
    """Rows as verl's trainer hands them to a worker: prompts padded on the left, answers on the right, and then not."""
    from verl.utils import tensordict_utils
    from verl.workers.utils.padding import left_right_2_no_padding

    prompt = max(len(row["ids"]) - row["answer"] for row in rows)
    answer = max(row["answer"] for row in rows)
    shape = len(rows), prompt + answer
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    old, advantages, of_answer = (torch.zeros(len(rows), answer) for _ in range(3))
    for number, row in enumerate(rows):
        start, length = prompt - (len(row["ids"]) - row["answer"]), len(row["ids"])
        ids[number, start : start + length] = row["ids"]
        mask[number, start : start + length] = 1
        old[number, : row["answer"]] = row["old_logps"]
        advantages[number, : row["answer"]] = row["advantage"]
        of_answer[number, : row["answer"]] = 1
    tensors = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "prompts": ids[:, :prompt],
        "responses": ids[:, prompt:],
        "response_mask": of_answer.to(torch.int64),
        "old_log_probs": old,
        "advantages": advantages,
    }
    data = tensordict_utils.get_tensordict(tensors)
    if any(row["media"] for row in rows):
        tensordict_utils.assign_non_tensor_stack(data, "multi_modal_inputs", [row["media"] for row in rows])
    data = left_right_2_no_padding(data)
    tensordict_utils.assign_non_tensor(
        data,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=len(rows) // 2,
        temperature=1.0,
        global_batch_size=total,
        calculate_entropy=calculate_entropy,
    )
    return data


if __name__ == "__main__":
    main(*sys.argv[1:])
