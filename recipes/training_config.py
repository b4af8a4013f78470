"""What a recipe may say of what is trained: steps and batches, the optimizer, adapters, a drafter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainConfig:
    """`steps` of `global_batch_size` sequences of at most `seq_length` tokens; `micro_batch_size` go through at once.

    `epochs`, in the place of `steps`: as many steps as it takes to see every row so often.
    `eval_every`: steps between evaluations, the last step has one too; 0: none. `eval_rows`: of the first so many
    samples of each set; 0: all. `patience`: evaluations without a better loss before the run ends, 0: never; with it
    the checkpoint of the best evaluation is kept, and exported. `z_loss`: factor of the squared log-sum-exp.
    `aux_loss`: factor of the loss that spreads tokens, padding included, over experts (Switch Transformers; of each
    layer and microbatch).
    `nan_limit`: steps in a row whose loss or gradient is not finite before the run ends; their updates are left out.
    `spike_factor`: also leave out updates whose gradient norm exceeds this many times the recent mean; 0: none.
    `deterministic`: only algorithms that give the same bits every time, on the same layout and GPU; slower.
    `samples`: a JSONL file of prompts (as `generate` takes them) that the model answers at each evaluation, or how many
    of the evaluation data; with at most `sample_tokens` tokens; greedily, or at `sample_temperature`.
    """

    steps: int = 0
    epochs: float = 0.0
    global_batch_size: int = 8
    micro_batch_size: int = 1
    seq_length: int = 4096
    seed: int = 1234
    eval_every: int = 0
    eval_rows: int = 0
    patience: int = 0
    z_loss: float = 0.0
    aux_loss: float = 0.0
    nan_limit: int = 3
    spike_factor: float = 0.0
    deterministic: bool = False
    samples: Any = None
    sample_tokens: int = 128
    sample_temperature: float = 0.0


@dataclass
class OptimizerConfig:
    """AdamW and its schedule, in steps. Vectors (norms, scales) have no weight decay.

    `schedule`: constant, linear, cosine or wsd (constant, then over the last `wsd_steps` along `wsd_style`: linear,
    cosine, exponential or minus_sqrt). The rate after `warmup` steps is `lr`, that of the last step `min_lr`.
    `lr_groups`: the same for groups of parameters, by names (of `recipes.groups`) or regular expressions on Megatron's
    parameter names, in the place of `lr`, with the same warm-up and decay (`min_lr` in proportion); of several that
    match, the one named last counts.
    `clip`: the largest gradient norm, 0: any. `precision_aware` (needs Transformer Engine): moments in
    `moments_dtype`, and no float32 copy of bf16 weights but what is missing of them.
    """

    lr: float = 1e-5
    min_lr: float = 0.0
    lr_groups: dict[str, float] = field(default_factory=dict)
    warmup: int = 0
    schedule: str = "cosine"
    wsd_steps: int = 0
    wsd_style: str = "linear"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    precision_aware: bool = False
    moments_dtype: str = "float32"


@dataclass
class LoraConfig:
    """Adapters, where `rank` is above 0: the base is frozen. The keys mean what PEFT's `LoraConfig` means by them.

    `targets`: all-linear or a regular expression for whole module names, or a list of endings of names (`q_proj`);
    `parameters`: expert parameters (`experts.gate_up_proj`); `exclude`: as `targets`, taken away from them.
    `dropout_pattern`, which PEFT has not: to `dropout` what `rank_pattern` is to `rank`. `dora`: PEFT's `use_dora`.
    `adapter`: a Megatron adapter (of `adapter import`, or another run) to go on from; it brings all the other keys, and
    as an override takes the place of what the recipe's file says of `lora`.
    """

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Any = "all-linear"
    parameters: list[str] = field(default_factory=list)
    exclude: Any = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dropout_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    modules_to_save: list[str] = field(default_factory=list)
    layers_to_transform: list[int] = field(default_factory=list)
    layers_pattern: list[str] = field(default_factory=list)
    adapter: str | None = None


@dataclass
class DrafterConfig:
    """A drafter of the model, trained where `path` is set: an HF folder or id, or a Megatron checkpoint.

    `target`: "frozen", only the drafter is trained; "trained", the model too, as the recipe says, whole or by LoRA.
    `detach`: the gradient of drafts ends at the model's states, keys and values, and does not reach it.

    Each token begins a draft of `steps` tokens, which is given those of the data. Factors:
    `cross_entropy` of the data's tokens, `kl` of the model's own distribution (KL(model || drafter)), `centroids` of
    the clusters that hold the data's tokens (ordered embeddings; 0: the centroids stay as they are).
    """

    path: str | None = None
    target: str = "frozen"
    detach: bool = True
    steps: int = 4
    cross_entropy: float = 1.0
    kl: float = 1.0
    centroids: float = 1.0
