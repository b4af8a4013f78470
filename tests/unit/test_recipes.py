"""Recipes: what a key may be, what is said where it is not, and which layouts are refused."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from bridge.errors import BridgeError, ParallelError, UsageError
from recipes.check import check_recipe, check_startable
from recipes.config import CONFIGS, DataConfig, Recipe, load_recipe, resolve, to_yaml
from recipes.data import CorpusOptions
from recipes.data.training import corpus_options
from recipes.keys import key_of
from recipes.simulate.table import CLUSTERS, SHIPPED
from recipes.training_config import LoraConfig

ROOT = Path(__file__).parents[2]

MINIMAL = {"output": "run", "model": {"hf": "toy"}, "train": {"steps": 10, "global_batch_size": 8, "seq_length": 64}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimzer.lr=1"], "unknown key optimzer; did you mean optimizer?"),
        (["train.step=2"], "unknown key train.step; did you mean train.steps?"),
        (["lr=3"], "unknown key lr; did you mean optimizer.lr?"),
        (["train.lr=3"], "unknown key train.lr; did you mean optimizer.lr?"),
        (["optimizer.LR=3"], "unknown key optimizer.LR; did you mean optimizer.lr?"),
        (["parallel.sequence-parallel=true"], "did you mean parallel.sequence_parallel?"),
        (["lora.r=8"], "did you mean lora.rank?"),
        (["loraplus_lr_ratio=16"], "did you mean optimizer.lr_groups?"),
        (["optimizer.learning_rate=1"], "did you mean optimizer.lr?"),
        (["lora_alpha=1"], "did you mean lora.alpha?"),
        (["optimizer.type=adam"], "unknown key optimizer.type; there are lr, min_lr"),
        (["train.val_split=0.1"], "did you mean data.val_fraction?"),
        (["data.eval_path=x"], "did you mean data.eval?"),
        (["train.eval_batches=4"], "did you mean train.eval_rows?"),
        (["train.warmup_stps=3"], "did you mean optimizer.warmup?"),
        (["trian.steps=3"], "did you mean train?"),
        (["export.zip=1"], "there are hf"),
        (["train.seed=3", "train.steps=many"], "train.steps=many: train.steps: Value 'many'"),
        (["train.steps="], "train.steps=: train.steps: Incompatible value 'None'"),
        (["parallel.tp=2.5"], "parallel.tp: Value '2.5'"),
        (["data.packing=perhaps"], "data.packing"),
        (["train=3"], "train is a group of keys"),
        (["train.steps"], "an override is written key=value"),
        (["train.steps=[1"], "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(MINIMAL, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_required_key_is_asked_for() -> None:
    with pytest.raises(UsageError, match="output is not set; add output="):
        resolve({"train": {"steps": 3}})


def test_overrides_and_types() -> None:
    recipe = resolve(
        MINIMAL, ["optimizer.lr=3e-4", "train.steps=7", "data.packing=true", "model.freeze=[router,vision]"]
    )
    assert recipe.optimizer.lr == 3e-4 and recipe.train.steps == 7 and recipe.data.packing
    assert recipe.model.freeze == ["router", "vision"]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes(path: Path) -> None:
    name = str(path.relative_to(CONFIGS).with_suffix(""))
    recipe = load_recipe(name, ["model.hf=somewhere"])
    assert check_recipe(recipe, 1 if "smoke" in name else 8) >= 1


@pytest.mark.parametrize(
    "path", [p for p in sorted(CONFIGS.rglob("*.yaml")) if p.stem != "smoke"], ids=lambda p: p.stem
)
def test_shipped_layouts_fit_the_real_models(path: Path) -> None:
    import json

    import bridge
    from bridge.geometry import Geometry
    from bridge.megatron.provider import check_layout

    config = json.loads((Path(bridge.__file__).parent / "variants" / f"{path.stem}.json").read_text(encoding="utf-8"))
    check_layout(Geometry.from_dict(config), load_recipe(str(path)).parallel.layout())


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("name", SHIPPED)
def test_layouts_for_clusters(name: str, cluster: str) -> None:
    """Each recipe of the simulated table can be laid out on each of its clusters, for the published model."""
    import json

    import bridge
    from bridge.geometry import Geometry
    from bridge.megatron.provider import check_layout

    recipe = load_recipe(name, [f"cluster={cluster}"])
    assert check_recipe(recipe, CLUSTERS[cluster][0]) >= 1
    config = Path(bridge.__file__).parent / "variants" / f"{name.partition('/')[2]}.json"
    check_layout(Geometry.from_dict(json.loads(config.read_text(encoding="utf-8"))), recipe.parallel.layout())


def test_a_cluster_of_a_recipe(tmp_path: Path) -> None:
    """Its keys come behind the file's own and before overrides, wherever among those it is named."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "output: x\nmodel: {hf: y}\ntrain: {steps: 3}\nparallel: {cp: 2, recompute: full}\n"
        "clusters: {4x80: {parallel: {cp: 4, tp: 2}}, 1x80: }\n"
    )

    def layout(*overrides: str) -> tuple[int, int, str]:
        parallel = load_recipe(str(file), overrides).parallel
        return parallel.cp, parallel.tp, parallel.recompute

    assert layout() == layout("cluster=1x80") == (2, 1, "full")
    assert layout("cluster=4x80") == (4, 2, "full")
    assert layout("parallel.tp=1", "cluster=4x80", "parallel.recompute=none") == (4, 1, "none")
    with pytest.raises(UsageError, match=r"cluster=4x8 .*plan RECIPE.*it has 4x80, 1x80$"):
        layout("cluster=4x8")
    with pytest.raises(UsageError, match=r"no layout for cluster=8x80 .*; it has none"):
        load_recipe("sft/smoke", ["cluster=8x80"])


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        ("{8x80: {parallel: {tpp: 2}}}", r"mine\.yaml: clusters\.8x80: unknown key parallel\.tpp"),
        ("{8x80: 3}", r"clusters\.8x80 is a mapping"),
        ("[8x80]", "clusters is a mapping"),
    ],
)
def test_wrong_clusters(tmp_path: Path, clusters: str, message: str) -> None:
    """Refused whether or not they are asked for."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"output: x\nmodel: {{hf: y}}\ntrain: {{steps: 3}}\nclusters: {clusters}\n")
    with pytest.raises(UsageError, match=message):
        load_recipe(str(file))


def test_the_resolved_recipe_is_a_recipe(tmp_path: Path) -> None:
    recipe = resolve(MINIMAL, ["optimizer.lr=3e-4"])
    (tmp_path / "again.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    again = load_recipe(str(tmp_path / "again.yaml"))
    assert isinstance(again, Recipe) and again == recipe


def test_a_key_that_python_keeps_for_itself(tmp_path: Path) -> None:
    """`async` is no name of a field; a column called `from` is not touched."""
    recipe = resolve(MINIMAL | {"checkpoint": {"async": True}}, ["data.columns={messages: from}"])
    assert recipe.checkpoint.async_ and "async: true" in to_yaml(recipe) and "async_" not in to_yaml(recipe)
    assert resolve(MINIMAL, ["checkpoint.async=true"]).checkpoint.async_
    for said in ("checkpoint.async=perhaps", "checkpoint.async_=true", "checkpoint.asnyc=true"):
        with pytest.raises(UsageError, match=r"checkpoint\.async") as caught:
            resolve(MINIMAL, [said])
        assert "async_:" not in str(caught.value)


def test_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'sft/e5b': not found; did you mean sft/e\db\?"):
        load_recipe("sft/e5b")
    with pytest.raises(UsageError, match="no such file"):
        load_recipe(str(tmp_path / "absent.yaml"))
    (tmp_path / "chats.jsonl").touch()
    with pytest.raises(UsageError, match="data is named with"):
        load_recipe(str(tmp_path / "chats.jsonl"))
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(UsageError, match="mapping"):
        load_recipe(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [\n", encoding="utf-8")
    with pytest.raises(UsageError, match="no YAML"):
        load_recipe(str(tmp_path / "broken.yaml"))


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (
            ["model.attention_backends.global=flexible"],
            1,
            "attention_backends.global=flexible: is one of auto",
        ),
        (["model.attention_backends.local=flex"], 1, "attention_backends.local: layers are sliding or global"),
        (["model.megatron=also"], 1, "exactly one of model.hf and model.megatron"),
        (["model.dtype=float16"], 1, "bfloat16, float32"),
        (["optimizer.schedule=cosin"], 1, "constant, linear, cosine, wsd"),
        (["optimizer.schedule=wsd"], 1, "optimizer.wsd_steps=0"),
        (["optimizer.min_lr=1"], 1, "exceeds optimizer.lr"),
        (["train.steps=0"], 1, "train.steps=0: must be at least 1"),
        (["train.seed=-1"], 1, "train.seed=-1: must be at least 0"),
        (["train.eval_rows=-1"], 1, "train.eval_rows=-1: must be at least 0"),
        (["data.val_fraction=1"], 1, "data.val_fraction=1.0: must be below 1"),
        (["data.val_fraction=-0.1"], 1, "data.val_fraction=-0.1: must be at least 0"),
        (["train.patience=2"], 1, "set train.eval_every"),
        (["train.spike_factor=nan"], 1, "train.spike_factor=nan: is no finite number"),
        (["optimizer.lr=nan"], 1, "optimizer.lr=nan: is no finite number"),
        (["optimizer.lr=inf"], 1, "optimizer.lr=inf: is no finite number"),
        (["optimizer.weight_decay=-1"], 1, "optimizer.weight_decay=-1.0: must be at least 0"),
        (["optimizer.beta2=1"], 1, "optimizer.beta2=1.0: must be below 1"),
        (
            ["optimizer.lr_groups.vison=1e-5"],
            1,
            "optimizer.lr_groups.vison: there is no such group; did you mean vision?",
        ),
        (["optimizer.lr_groups.lora_B=1e-5"], 1, "lora_B: there is no such group; did you mean lora_b?"),
        (["optimizer.lr_groups.router=-1"], 1, "optimizer.lr_groups.router=-1: must be a number of at least 0"),
        (["optimizer.lr_groups.router=nan"], 1, "optimizer.lr_groups.router=nan: must be a number"),
        (["optimizer.lr_groups.router=1", "optimizer.lr=0"], 1, "optimizer.lr=0: rates of optimizer.lr_groups"),
        (["optimizer.lr_groups.a(b=1"], 1, "optimizer.lr_groups: 'a(b' is no group and no regular expression"),
        (["optimizer.eps=0"], 1, "optimizer.eps=0.0: must be above 0"),
        (["data.workers=0"], 1, "data.workers=0: must be at least 1"),
        (["lora.rank=-4"], 1, "lora.rank=-4: must be at least 0"),
        (["lora.rank=8", "model.freeze=[router]"], 1, "with adapters all of the model is frozen"),
        (["lora.rank=8", "lora.targets=3"], 1, "lora.targets=3: is a name"),
        (["lora.dora=true"], 1, "lora.dora needs lora.rank"),
        (["lora.modules_to_save=[norm]"], 1, "lora.modules_to_save needs lora.rank"),
        (["export.hf=toy"], 1, "export.hf=toy: is model.hf=toy"),
        (["export.hf=./run"], 1, "export.hf=./run: is output=run"),
        (["export.hf=run/hf"], 1, "or one lies inside the other"),
        (["export.hf=."], 1, "or one lies inside the other"),
        (["parallel.cp=2", "train.seq_length=62"], 2, "no multiple of 4, as parallel.cp=2"),
        (["parallel.cp=2", "train.seq_length=62"], 2, "64 would work"),
        (["parallel.cp=2", "parallel.tp=4", "parallel.sequence_parallel=true", "train.seq_length=60"], 8, "64 would"),
        (["train.global_batch_size=6"], 4, "8 would work"),
        (["train.micro_batch_size=3"], 1, "9 would work"),
        (["parallel.pp=2", "parallel.vpp=2", "train.global_batch_size=5"], 2, "global_batch_size=4 would work"),
        (["parallel.tp=2", "parallel.sequence_parallel=true", "train.seq_length=63"], 2, "64 would work"),
        (["parallel.tp=2"], 3, "3 ranks are no multiple"),
        (["parallel.vpp=2"], 1, "needs pp > 1"),
        (["drafter.kl=2"], 1, "drafter: its keys need drafter.path"),
        (["drafter.path=x", "drafter.kl=0", "drafter.cross_entropy=0"], 1, "cross_entropy or kl above 0"),
        (["drafter.path=x", "drafter.steps=0"], 1, "steps is at least 1"),
        (["drafter.path=x", "drafter.centroids=-1"], 1, "drafter.centroids=-1.0: must be at least 0"),
        (["drafter.path=x", "train.z_loss=1e-4"], 1, "train.z_loss does not go with drafter.path"),
        (["drafter.path=x", "lora.rank=4"], 1, "lora: the model is frozen; drafter.target=trained trains it with its"),
        (["drafter.path=x", "drafter.detach=false"], 1, "drafter.detach=false: the model is frozen; drafter.target="),
        (["drafter.path=x", "drafter.target=lora"], 1, "drafter.target=lora: is frozen or trained"),
        (["drafter.path=x", "export.drafter=y"], 1, "export.drafter: the model is frozen, and export.hf is"),
        (["export.drafter=y"], 1, "export.drafter needs drafter.path"),
        (
            ["drafter.path=x", "drafter.target=trained", "export.hf=y", "export.drafter=y/z"],
            1,
            "export.drafter=y/z: is export.hf=y, or one lies inside the other",
        ),
    ],
)
def test_refused_before_anything_is_built(overrides: list[str], world: int, message: str) -> None:
    with pytest.raises((UsageError, ParallelError)) as caught:
        check_recipe(resolve(MINIMAL, overrides), world)
    assert isinstance(caught.value, BridgeError) and message in str(caught.value)


def test_evaluation_needs_data() -> None:
    """Said before the first step, not at the first evaluation."""
    recipe = resolve(MINIMAL, ["data.path=chats.jsonl", "train.eval_every=5"])
    with pytest.raises(UsageError, match=r"train.eval_every=5 needs data: set data.eval, data.eval_split, data.val_fr"):
        check_startable(recipe, 1)
    for said in ("data.eval=more.jsonl", "data.eval.chats=more.jsonl", "data.eval_split=test", "data.val_fraction=0.1"):
        check_startable(resolve(MINIMAL, ["data.path=chats.jsonl", "train.eval_every=5", said]), 1)
        with pytest.raises(
            UsageError, match=r"data.(eval|eval_split|val_fraction) is evaluated every train.eval_every"
        ):
            check_startable(resolve(MINIMAL, ["data.path=chats.jsonl", said]), 1)


def test_keys_in_the_documentation_exist() -> None:
    groups = "|".join(key for key, value in resolve(MINIMAL).__dict__.items() if not isinstance(value, str))
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
    pages.remove(ROOT / "docs" / "mapping.md")  # names of tensors
    verl = re.compile(r"```text\n[^`]*verl\.trainer[^`]*```")  # a command with keys of its own
    named = {
        (path.name, key)
        for path in pages
        for key in re.findall(
            rf"(?<![\w./-])(?:{groups})\.[a-z_]+(?![\w(/-])", verl.sub("", path.read_text(encoding="utf-8"))
        )
    }
    files = {"model.safetensors", "log.jsonl", "lora.sbatch", "data.md", "preference.md"}
    assert len(named) > 40
    for page, key in sorted(named):
        if key not in files:
            group, _, name = key.partition(".")
            known = {key_of(field.name) for field in fields(getattr(resolve(MINIMAL), group))}
            assert name in known, f"{page}: {key}"


def test_every_option_of_the_data_is_a_key() -> None:
    overrides = ["data.path=x", "data.generation_prefix=true", "data.supervise_turns=last", "data.overlong=split"]
    options = corpus_options(resolve(MINIMAL, overrides))
    assert options.generation_prefix and options.supervise.turns == "last" and options.overlong == "split"
    ours = {field.name for field in fields(DataConfig)}
    theirs = {field.name for field in fields(CorpusOptions)} - {
        "seq_length",
        "supervise",
        "layout",
        "records",
        "one_row",
    }
    assert theirs <= ours, "an option that no recipe can set"


def test_steps_or_epochs() -> None:
    """One of them is set; the one that an override names takes the place of the recipe's own."""
    epochs = resolve(MINIMAL, ["train.epochs=2.5"])
    assert (epochs.train.steps, epochs.train.epochs) == (0, 2.5) and check_recipe(epochs, 1) == 8
    assert load_recipe("sft/e2b", ["train.epochs=1"]).train.steps == 0
    own = {**MINIMAL, "train": {"epochs": 3}}
    assert resolve(own).train.epochs == 3
    assert (resolve(own, ["train.steps=7"]).train.steps, resolve(own, ["train.steps=7"]).train.epochs) == (7, 0)
    for said, overrides, message in [
        (MINIMAL, ["train.steps=3", "train.epochs=2"], "train.steps=3 and train.epochs=2: set one of them"),
        ({**MINIMAL, "train": {"steps": 3, "epochs": 2}}, [], "train.steps=3 and train.epochs=2: set one of them"),
        ({**MINIMAL, "train": {"seed": 3}}, [], "train.steps=0: must be at least 1; or set train.epochs"),
        (MINIMAL, ["train.epochs=-1"], "train.epochs=-1.0: must be at least 0"),
        (MINIMAL, ["data.on_change=ignore"], "data.on_change=ignore: is one of refuse, restart"),
    ]:
        with pytest.raises(UsageError, match=re.escape(message)):
            check_recipe(resolve(said, overrides), 1)


def test_microbatches() -> None:
    assert check_recipe(resolve(MINIMAL), 1) == 8
    assert check_recipe(resolve(MINIMAL, ["train.micro_batch_size=2"]), 2) == 2


def test_smoke_recipes_bring_their_data(tmp_path: Path) -> None:
    """A toy's folder is all that they need; every record fits and is learnt from. A path of one's own comes first."""
    import tomllib

    from recipes.data.training import corpora

    from .data_helpers import model_folder

    model = model_folder(tmp_path / "model")
    for name in ("sft/smoke", "lora/smoke", "dpo/smoke", "kto/smoke"):
        recipe = load_recipe(name, [f"model.hf={model}", f"data.cache={tmp_path / 'cache'}"])
        check_startable(recipe, 1)
        statistics = corpora(recipe).train.statistics
        assert statistics.read == statistics.kept >= 40
    assert load_recipe("sft/smoke", ["data.path=mine.jsonl"]).data.path == "mine.jsonl"
    assert "shipped:" not in to_yaml(recipe), "a resolved recipe is complete"
    # And they are installed with the recipes.
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "package-data"
    ]
    assert Path(recipe.data.path) in {path for pattern in packaged["recipes"] for path in CONFIGS.parent.glob(pattern)}


def test_an_adapter_takes_the_place_of_the_recipes_own() -> None:
    recipe = load_recipe("lora/e2b", ["lora.adapter=somewhere"])
    assert recipe.lora == LoraConfig(adapter="somewhere")
    assert load_recipe("lora/e2b", ["lora.adapter=somewhere", "lora.rank=4"]).lora.rank == 4, "said, and so checked"
    assert load_recipe("lora/e2b").lora.rank == 16
    said = {**MINIMAL, "lora": {"rank": 4, "adapter": "somewhere"}}
    assert resolve(said).lora.rank == 4


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("\n## Keys\n")[2]
    documented = set(re.findall(r"`([a-z_.0-9]+)`", text))
    groups = {
        name: [key_of(f.name) for f in fields(value)]
        for name, value in resolve(MINIMAL).__dict__.items()
        if not isinstance(value, str)
    }
    keys = {"output", *(f"{group}.{key}" for group, names in groups.items() for key in names)}
    assert not keys - documented, "add a row to docs/training.md, Keys"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.metrics=[rouge]"], "eval.metrics: 'rouge' is no metric; there are exact_match"),
        (["eval.metrics=[absent:function]"], "absent:function cannot be imported"),
        (["eval.metrics=[exact_match]"], "eval.metrics=['exact_match']: is answered at evaluations"),
        (["train.samples=4"], "train.samples=4: is answered at evaluations"),
        (["train.samples=0", "data.eval=x", "train.eval_every=1"], "train.samples=0: must be at least 1"),
        (["train.samples=true", "data.eval=x", "train.eval_every=1"], "is a file of prompts, or a number"),
        (["train.samples=[a]", "data.eval=x", "train.eval_every=1"], "is a file of prompts, or a number"),
        (
            ["train.samples=4", "data.eval=x", "train.eval_every=1", "data.supervise_thinking=false"],
            "leave data.supervise",
        ),
        (["eval.metric_tokens=0"], "eval.metric_tokens=0: must be at least 1"),
        (["eval.best=json_tree"], "eval.best=json_tree: is loss, or one of eval.metrics (none)"),
        (["eval.best=json_tree", "eval.metrics=[json_tree]"], "is what train.patience goes by"),
        (["train.compute_metrics=x"], "did you mean eval.metrics?"),
    ],
)
def test_what_is_generated_at_evaluations(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_startable(resolve(MINIMAL, ["data.path=x", *overrides]), 2)
    assert message in str(caught.value) and "\n" not in str(caught.value)
