"""What a recipe may say: structured configs, read with OmegaConf from YAML and `key=value` overrides.

A key that does not exist, or a value of the wrong type, is a UsageError that names the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bridge.errors import UsageError
from bridge.generate.memory import MAX_ROWS
from bridge.megatron.parallel import Parallel
from recipes.clusters import SECTION, choose_cluster, clusters_of
from recipes.keys import by_field, by_key, check_keys, key_of, meant
from recipes.training_config import DrafterConfig, LoraConfig, OptimizerConfig, TrainConfig

CONFIGS = Path(__file__).parent / "configs"
# Begins a `data.path` that is a file of `CONFIGS`, wherever that is installed.
_SHIPPED = "shipped:"


@dataclass
class ModelConfig:
    """`hf` (a folder or hub id) or `megatron` (a Megatron checkpoint or run): exactly one.

    `dtype`: of weights and activations; the optimizer's own copy is float32. `freeze`: groups of `recipes.groups`, or
    regular expressions on Megatron's parameter names.
    `layer_spec`: what the decoder's linears are: local, or te (Transformer Engine, on a GPU). `fp8`: what te linears
    multiply in: none (bf16), current (a scale for each tensor, from its own values) or block (for each 128 of them).
    `kernels`: who computes norms, activations, rotation and the loss: auto (this project's own on a GPU) or torch.
    `fp8_experts`: experts multiply in FP8, with a scale for each row, whatever the linears do.
    `fake_quant`: what weights of the decoder's linears are rounded to in the forward pass, to be quantized later:
    none, q4_0, int4-g32 (what `export --quantize w4a16` writes) or fp8 (what `fp8-dynamic` does).
    `vision_mask`: whose masks of images, where transformers has two (12B): generate (those it and vLLM serve by) or
    forward (those of its `forward`, to compare with that).
    `attention_backends`: who computes attention in `sliding` and in `global` layers, by the names in docs/attention.md.
    """

    hf: str | None = None
    megatron: str | None = None
    dtype: str = "bfloat16"
    freeze: list[str] = field(default_factory=list)
    layer_spec: str = "local"
    fp8: str = "none"
    kernels: str = "auto"
    fp8_experts: bool = False
    fake_quant: str = "none"
    vision_mask: str = "generate"
    attention_backends: dict[str, str] = field(default_factory=lambda: {"sliding": "auto", "global": "auto"})


@dataclass
class SourceConfig:
    """One of `data.sources`. What it does not say of how it is read is as `data.*` has it.

    `name`: what the log calls it, by default the name of its first file. `weight`: its share of the rows, of the sum of
    all weights. Without weights an epoch has all rows of every source, `repeat` times, or as many as hold `tokens`
    tokens (of more than there are, where `repeat` allows so many rounds). `max_samples`: of its first so many; 0: all.
    """

    path: Any = None
    name: str | None = None
    weight: float | None = None
    tokens: int | None = None
    max_samples: int = 0
    repeat: int = 1
    split: str | None = None
    subset: str | None = None
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    function: str | None = None
    media_root: str | None = None


@dataclass
class DataConfig:
    """Read by `recipes.data`, which says what the keys mean.

    `sources`: in the place of `path`, several of them and how much is taken of each. `shuffle`: rows come in another
    order in every epoch; without it as the data has them.
    `eval`: what evaluation uses, as `path`, or several of these by their names. `eval_split`: which split of it, where
    it has splits (without `eval`: of `path`); by default one for validation or test, never the one that is trained on.
    `val_fraction`: this part of the training data is held out and evaluated on, the same whatever the seed.
    `format`, `columns`, `function`: how records are read (`recipes.data.formats.FormatOptions`).
    `on_change`: where a run goes on and its rows are other ones than before: refuse, or restart at the first of them.
    """

    path: Any = None
    sources: list[SourceConfig] = field(default_factory=list)
    shuffle: bool = True
    eval: Any = None
    eval_split: str | None = None
    val_fraction: float = 0.0
    packing: bool = False
    split: str = "train"
    subset: str | None = None
    chat_template: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    supervise_turns: str = "all"
    supervise_thinking: bool = True
    supervise_tool_calls: bool = True
    generation_prefix: bool | None = None
    on_error: str = "fail"
    overlong: str = "drop"
    allow_urls: bool = False
    media_root: str | None = None
    cache: str | None = None
    workers: int = 2
    on_change: str = "refuse"
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    function: str | None = None


@dataclass
class ParallelConfig:
    """The layout, and what Megatron does to hide its cost.

    `recompute`: none, selective (`recompute_modules`: core_attn, mlp, moe) or full. `overlap`: send gradients while
    the backward pass runs and fetch parameters while the forward pass does.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    overlap: bool = False
    dispatcher: str = "alltoall"

    def layout(self) -> Parallel:
        """The sizes, checked against each other. Raises ParallelError."""
        return Parallel(self.tp, self.pp, self.vpp, self.ep, self.etp, self.cp, self.sequence_parallel)


@dataclass
class PreferenceConfig:
    """Preferences (docs/preference.md), where `loss` is set; names and defaults are TRL's.

    `loss`: one of `recipes.losses.preference`, or for DPO several, added up with `loss_weights` (1 each by default).
    `beta`: how much the policy is held to the reference. `label_smoothing`: of robust, exo_pair, aot, cpo and simpo.
    `simpo_gamma`: SimPO's margin. `cpo_alpha`: factor of the chosen answers' likelihood in cpo and simpo (0: SimPO as
    published). `desirable_weight`, `undesirable_weight`: of KTO's answers.
    `reference`: base (the model without its adapters) or start (the model as the run begins; what it says of the data
    is computed once and kept beside it); auto: base with new adapters, else start.
    """

    loss: Any = None
    loss_weights: list[float] = field(default_factory=list)
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: str = "auto"


@dataclass
class GrpoConfig:
    """Answers that the model samples itself, and rewards (docs/reinforcement.md), where `rewards` are named.

    `rewards`: names of `recipes.rewards.named`, or `module:function` of (answer, reference), added up with
    `reward_weights` (1 each by default). `reward_pattern`, `reward_schema` (a file), `reward_length` (characters): of
    regex, json_schema and length. `reward_timeout`: seconds for one reward of one answer.
    `loss`: grpo, dapo, dr_grpo, gspo or rloo. `num_generations` answers to a prompt, of at most `max_new_tokens`.
    `steps_per_generation` steps are made of the answers sampled at once, `num_iterations` times over.
    `epsilon`, `epsilon_high` (by default the same): ratios are clipped to 1 - epsilon, 1 + epsilon_high. `beta`: factor
    of the KL to the model without its adapters. `scale_rewards`: advantages over the standard deviation of their group,
    of the batch, or none; auto: none for dr_grpo, else group.
    `importance_cap`: of the correction for what the sampler and the trainer say of a token differently; 0: none.
    `max_rows`: answers at once on a replica. `samples_every`: steps between `rollouts/step-N.jsonl`, 0: never.
    `engine`: who samples: own, or vllm: a server at `engine_url`. `router_replay` is not there yet.
    """

    rewards: list[str] = field(default_factory=list)
    reward_weights: list[float] = field(default_factory=list)
    reward_pattern: str | None = None
    reward_schema: str | None = None
    reward_length: int | None = None
    reward_timeout: float = 10.0
    loss: str = "grpo"
    num_generations: int = 8
    max_new_tokens: int = 256
    steps_per_generation: int = 1
    num_iterations: int = 1
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    scale_rewards: str = "auto"
    importance_cap: float = 3.0
    max_rows: int = MAX_ROWS
    samples_every: int = 10
    engine: str = "own"
    engine_url: str | None = None
    router_replay: bool = False

    @property
    def updates(self) -> int:
        """Steps that are made of one rollout."""
        return self.steps_per_generation * self.num_iterations


@dataclass
class DistillConfig:
    """A teacher of the model (docs/distillation.md), where `teacher` is set: an HF folder or id, a Megatron checkpoint.

    `beta`: of the generalised Jensen-Shannon divergence, as TRL's GKD has it: 0 is KL(teacher || student), 1 is
    KL(student || teacher). `temperature`: of both distributions in it. `top_k`: over the teacher's likeliest tokens,
    and one class for the rest; 0: over all. `cross_entropy`: factor of the cross entropy of the labels, added.
    `cache`: what the teacher says of the data (its `top_k`) is computed once, and kept beside it.
    `lmbda`: share of the steps that are made of the model's own answers, of at most `max_new_tokens`, `max_rows` at
    once on a replica.
    """

    teacher: str | None = None
    beta: float = 0.5
    temperature: float = 1.0
    top_k: int = 0
    cross_entropy: float = 0.0
    cache: bool = False
    lmbda: float = 0.0
    max_new_tokens: int = 128
    max_rows: int = MAX_ROWS


@dataclass
class EvalConfig:
    """What is measured at evaluations beside the loss: on answers, greedy ones, to the evaluation data.

    `metrics`: exact_match, token_f1, json_valid, json_tree, or `module:function` of (answer, reference).
    `metric_rows`: of the first so many samples of each set; 0: of all. `metric_tokens`: the longest answer.
    `best`: what `train.patience` goes by: loss (the least is the best), or one of the metrics (the highest).
    """

    metrics: list[str] = field(default_factory=list)
    metric_rows: int = 0
    metric_tokens: int = 256
    best: str = "loss"


@dataclass
class CheckpointConfig:
    """`every`: steps between checkpoints, 0: only the last. `keep`: how many stay, 0: all.

    `resume`: go on from the latest complete checkpoint in `output`, where there is one. `async`: training goes on while
    one is written.
    """

    every: int = 0
    keep: int = 2
    resume: bool = True
    async_: bool = False


@dataclass
class LogConfig:
    """`log.jsonl` in `output` is always written. `wandb`: a project name; offline where no key is set.

    `peak_tflops`: what one device does at best, for MFU; 0: known for some GPUs by their name, else there is no MFU.
    """

    wandb: str | None = None
    tensorboard: bool = False
    every: int = 1
    peak_tflops: float = 0.0


@dataclass
class SyncConfig:
    """A vLLM server at `url` is given the weights after each `every` steps, and after the last."""

    url: str | None = None
    every: int = 1


@dataclass
class ExportConfig:
    """`hf`: write the final model as an HF folder there, a LoRA run's merged into its base; of a
    frozen model its drafter.

    `drafter`: write the drafter of a model that is trained too.
    """

    hf: str | None = None
    drafter: str | None = None


@dataclass
class Recipe:
    """A run. `output` is its folder: log, checkpoints, the resolved config."""

    output: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by its name under `recipes/configs` or by its YAML file, with `key=value` overrides.

    `cluster=8x141` among them takes the layout that the file has for it (`clusters.py`). Raises UsageError naming the
    key, and the one that was probably meant.
    """
    path = find_recipe(name)
    try:
        said = OmegaConf.load(path)
    except Exception as error:  # whatever a YAML parser raises
        raise UsageError(f"{path}: no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(said, DictConfig):
        raise UsageError(f"{path}: a recipe is a mapping of keys")
    where, plain = str(path), OmegaConf.to_container(said)
    assert isinstance(plain, dict)
    layouts = clusters_of(plain, where)
    for cluster, keys in layouts.items():
        check_keys(keys, Recipe, f"{where}: {SECTION}.{cluster}")
    chosen, others = choose_cluster(plain, layouts, overrides, where)
    return resolve(chosen, others, where)


def resolve(said: Any, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """A plain dictionary and overrides as a `Recipe`. Raises UsageError, which starts with `where`."""
    check_keys(said, Recipe, where)
    given: list[DictConfig] = []
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise UsageError(f"{override!r}: an override is written key=value")
        try:
            more = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except Exception as error:  # as above
            raise UsageError(f"{override!r}: cannot be read ({' '.join(str(error).split())})") from None
        check_keys(more, Recipe, override)
        given.append(OmegaConf.create(by_field(more, Recipe)))
    if any(OmegaConf.select(more, "lora.adapter") is not None for more in given):
        # It brings its rank, targets and the rest: those of the recipe are of other adapters.
        said = {key: value for key, value in said.items() if key != "lora"}
    merged: Any = OmegaConf.structured(Recipe)
    for source, more in [(where, by_field(said, Recipe)), *zip(overrides, given, strict=True)]:
        try:
            merged = OmegaConf.merge(merged, more)
            missing = sorted(OmegaConf.missing_keys(merged))
        except OmegaConfBaseException as error:
            key = f"{'.'.join(map(key_of, error.full_key.split('.')))}: " if error.full_key else ""
            raise UsageError(f"{source}: {key}{str(error.msg or error).splitlines()[0]}") from None
    _replace(merged, given, ("train.steps", "train.epochs"), 0)
    _replace(merged, given, ("data.path", "data.sources"), None)
    try:
        recipe = OmegaConf.to_object(merged) if not missing else None
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UsageError(f"{where}: {str(error.msg or error).splitlines()[0]}") from None
    if missing:
        raise UsageError(f"{where}: {missing[0]} is not set; add {missing[0]}=...")
    assert isinstance(recipe, Recipe)
    every: list[DataConfig | SourceConfig] = [recipe.data, *recipe.data.sources]
    for named in every:
        if isinstance(named.path, str) and named.path.startswith(_SHIPPED):
            named.path = str(CONFIGS / named.path.removeprefix(_SHIPPED))
    return recipe


def _replace(merged: Any, given: Sequence[DictConfig], keys: tuple[str, str], nothing: object) -> None:
    """The two `keys` say one thing: which of them overrides name takes the place of the other."""
    named = [key for key in keys if any(OmegaConf.select(one, key) is not None for one in given)]
    if len(named) == 1 and OmegaConf.select(merged, named[0]):
        other = keys[1 - keys.index(named[0])]
        OmegaConf.update(merged, other, [] if other == "data.sources" else nothing, merge=False)


def find_recipe(name: str) -> Path:
    """The file of a recipe. Raises UsageError with the names there are."""
    given = Path(name)
    if given.suffix in (".yaml", ".yml"):
        if given.is_file():
            return given
        raise UsageError(f"{name}: no such file")
    path = CONFIGS / f"{name}.yaml"
    if path.is_file():
        return path
    if given.is_file():
        raise UsageError(f"{name}: no recipe, which is a .yaml file; data is named with data.path=...")
    known = sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml"))
    raise UsageError(f"recipe {name!r}: not found{meant(name, known)}; known are {', '.join(known)}")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every key with its value."""
    said = OmegaConf.to_container(OmegaConf.structured(recipe))
    return OmegaConf.to_yaml(OmegaConf.create(by_key(said, Recipe)))
