"""Which weights a `LoraSpec` hits, against the modules that PEFT itself wraps on transformers."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.lora.formats import note_for_engine
from bridge.lora.spec import LoraSpec
from bridge.lora.targets import module_name, resolve
from bridge.mapping import Table, table_for
from bridge.toy import VARIANTS
from bridge.toy.config import toy_config

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
LANGUAGE = r"model\.(language_model\.)?layers\.\d+\.self_attn\.(q|v)_proj"


@cache
def toy_table(variant: str, text_only: bool = False, untied: bool = False) -> Table:
    return table_for(Geometry.from_dict(toy_config(variant, text_only=text_only, untied=untied).written))


def toy_model(variant: str, text_only: bool = False, untied: bool = False) -> Any:
    """The transformers model, without memory for its weights."""
    toy = toy_config(variant, text_only=text_only, untied=untied)
    config = transformers.CONFIG_MAPPING[toy.model_type].from_dict(toy.written)
    with torch.device("meta"):
        return getattr(transformers, Geometry.from_dict(toy.written).architecture)(config)


def peft_layers(model: Any, **options: Any) -> dict[str, tuple[int, float, tuple[int, ...], tuple[int, ...]]]:
    """Module or parameter -> (rank, scaling, shape of A, shape of B) of what PEFT makes."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options), low_cpu_mem_usage=True)
    found = {}
    for name, module in wrapped.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = name.removeprefix("base_model.model.")
        if isinstance(module, ParamWrapper):
            name = f"{re.sub(r'(\.base_layer)+$', '', name)}.{module.parameter_name}"
        if module.lora_embedding_A:
            a, b = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        else:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        found[name] = (module.r["default"], module.scaling["default"], tuple(a.shape), tuple(b.shape))
    return found


def ours(spec: LoraSpec, table: Table) -> dict[str, tuple[int, float, tuple[int, ...], tuple[int, ...]]]:
    """The same of `resolve`; experts as PEFT lays them out, [E·r, in] and [out, E·r]."""
    found = {}
    for target in (t for t in resolve(spec, table) if t.kind != "saved"):
        a, b = target.shape_a, target.shape_b
        if target.kind == "experts":
            a, b = (a[0] * a[1], a[2]), (b[1], b[0] * b[2])
        found[target.module] = (target.rank, target.scaling, a, b)
    return found


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_linear_is_what_peft_makes_of_it(variant: str, text_only: bool) -> None:
    found = ours(LoraSpec(4, 8, "all-linear"), toy_table(variant, text_only))
    assert found == peft_layers(toy_model(variant, text_only), r=4, lora_alpha=8, target_modules="all-linear")
    assert any("router.proj" in name for name in found) == (variant == "26b-a4b")
    assert any("per_layer_model_projection" in name for name in found) == (variant in ("e2b", "e4b"))


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_regular_expression_patterns_and_rslora(variant: str, text_only: bool) -> None:
    ranks, alphas = {r"layers\.1\..*q_proj": 2, "v_proj": 6}, {r"layers\.0\.self_attn\.v_proj": 5.0, "q_proj": 7.0}
    found = ours(
        LoraSpec(4, 8, LANGUAGE, rank_pattern=ranks, alpha_pattern=alphas, rslora=True), toy_table(variant, text_only)
    )
    assert found == peft_layers(
        toy_model(variant, text_only),
        r=4,
        lora_alpha=8,
        target_modules=LANGUAGE,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=True,
    )
    assert {rank for rank, *_ in found.values()} == {2, 4, 6}


@pytest.mark.parametrize(
    ("variant", "targets"),
    [
        ("26b-a4b", ["linear", "router.proj", "embedding_projection"]),
        ("e2b", ["q_proj.linear", "relative_k_proj", "per_layer_input_gate", "per_layer_model_projection"]),
        ("e4b", ["embed_tokens", "embed_tokens_per_layer", "post.linear", "input_proj"]),
        ("12b", ["patch_dense", "embedding_projection", "o_proj", "layers.1.mlp.up_proj"]),
        ("31b", ["model.language_model.layers.5.self_attn.k_proj", "down_proj.linear"]),
    ],
)
def test_endings_of_names(variant: str, targets: list[str]) -> None:
    found = ours(LoraSpec(4, 8, tuple(targets)), toy_table(variant))
    assert found == peft_layers(toy_model(variant), r=4, lora_alpha=8, target_modules=targets)


@pytest.mark.parametrize("variant", ["e2b", "26b-a4b"])
def test_towers_are_excluded_as_peft_excludes_them(variant: str) -> None:
    """Without the exclusion, both refuse: q_proj of a tower is a wrapper."""
    exclude = r"model\.(vision|audio)_tower\..*"
    found = ours(LoraSpec(4, 8, ("q_proj", "v_proj", "k_proj"), exclude=exclude), toy_table(variant))
    assert found == peft_layers(
        toy_model(variant), r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "k_proj"], exclude_modules=exclude
    )
    with pytest.raises(UsageError, match=r"q_proj.*wraps a linear: target q_proj\.linear"):
        resolve(LoraSpec(4, 8, ("q_proj",)), toy_table(variant))
    with pytest.raises(ValueError, match="not supported"):
        peft_layers(toy_model(variant), target_modules=["q_proj"])


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:], ("layers.3.experts.down_proj",)])
def test_experts(parameters: tuple[str, ...]) -> None:
    patterns: Any = {"rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"experts.gate_up_proj": 5.0}}
    expected = peft_layers(
        toy_model("26b-a4b"),
        r=4,
        lora_alpha=8,
        target_modules=["o_proj"],
        exclude_modules=r".*tower.*",
        target_parameters=list(parameters),
        **patterns,
    )
    table, tower = toy_table("26b-a4b"), r".*tower.*"
    assert ours(LoraSpec(4, 8, ("o_proj",), parameters=parameters, exclude=tower, **patterns), table) == expected
    # A tuple of targets may name parameters too.
    assert ours(LoraSpec(4, 8, ("o_proj", *parameters), exclude=tower, **patterns), table) == expected


def test_all_linear_with_experts_and_a_module_to_save() -> None:
    saved = ["embed_tokens", "patch_embedder"]
    spec = LoraSpec(4, 8, ("all-linear", *EXPERTS), modules_to_save=tuple(saved))
    expected = peft_layers(
        toy_model("26b-a4b"),
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        target_parameters=list(EXPERTS),
        modules_to_save=saved,
    )
    table = toy_table("26b-a4b")
    assert ours(spec, table) == expected
    assert not any("patch_embedder" in name for name in expected)
    assert [target.name for target in resolve(spec, table) if target.kind == "saved"] == [
        "model.language_model.embed_tokens.weight",
        "model.vision_tower.patch_embedder.input_proj.weight",
        "model.vision_tower.patch_embedder.position_embedding_table",
    ]


@pytest.mark.parametrize(
    ("layers", "pattern"), [([1, 3], None), (2, None), ([0], "encoder.layers"), ([4, 1], ["tower", "layers"])]
)
def test_layers(layers: Any, pattern: Any) -> None:
    """Of the language model and of the towers; a whole name, and experts, in whatever layer."""
    whole = "model.language_model.layers.5.mlp.up_proj"
    experts = ["experts.down_proj"]
    expected = peft_layers(
        toy_model("26b-a4b"),
        r=4,
        lora_alpha=8,
        target_modules=["o_proj.linear", whole, "mlp.gate_proj", "router.proj"],
        target_parameters=experts,
        exclude_modules=r".*tower.*gate_proj",
        layers_to_transform=layers,
        layers_pattern=pattern,
    )
    spec = LoraSpec(
        4,
        8,
        ("o_proj.linear", whole, "mlp.gate_proj", "router.proj"),
        parameters=tuple(experts),
        exclude=r".*tower.*gate_proj",
        layers_to_transform=tuple(layers) if isinstance(layers, list) else (layers,),
        layers_pattern=tuple([pattern] if isinstance(pattern, str) else pattern or ()),
    )
    assert ours(spec, toy_table("26b-a4b")) == expected


def test_an_ending_that_modules_have_does_not_mean_experts() -> None:
    found = ours(LoraSpec(4, 8, ("down_proj",)), toy_table("26b-a4b", True))
    assert found == peft_layers(toy_model("26b-a4b", True), r=4, lora_alpha=8, target_modules=["down_proj"])


def test_what_layers_lack_is_never_hit() -> None:
    spec = LoraSpec(4, 8, ("k_proj", "v_proj"))
    found = {target.module for target in resolve(spec, toy_table("31b", True))}
    assert "model.layers.5.self_attn.k_proj" in found
    assert "model.layers.5.self_attn.v_proj" not in found
    found = {target.module for target in resolve(spec, toy_table("e2b", True))}
    assert found == {f"model.layers.{i}.self_attn.{x}_proj" for i in range(5) for x in "kv"}


def test_an_untied_head_is_hit_only_by_name() -> None:
    table = toy_table("e2b", True, True)
    assert "lm_head" not in ours(LoraSpec(4, 8, "all-linear"), table)
    expected = peft_layers(toy_model("e2b", True, True), r=4, lora_alpha=8, target_modules=["lm_head"])
    assert ours(LoraSpec(4, 8, ("lm_head",)), table) == expected
    with pytest.raises(UsageError, match="lm_head, which is tied"):
        resolve(LoraSpec(4, 8, r"lm_head|model\.layers\..*q_proj"), toy_table("e2b", True))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"targets": ("q_prj",)}, r"'q_prj' matches nothing.*q_proj"),
        ({"targets": "model.layers.q"}, "regular expression"),
        ({"targets": "(q_proj"}, "not a regular expression"),
        ({"targets": ("q_norm",)}, r"layers\.0\.self_attn\.q_norm, which is no linear"),
        ({"targets": ("o_proj",), "parameters": ("experts.w1",)}, "'experts.w1' matches nothing"),
        ({"targets": ("o_proj", "experts.down_proj"), "dropout": 0.1}, "dropout"),
        ({"targets": ("o_proj", "experts.down_proj"), "dora": True}, "dora"),
        ({"targets": ("o_proj",), "exclude": ("self_attn.o_proj",)}, "no weight"),
        ({"targets": ()}, "no weight"),
        ({"targets": (), "modules_to_save": ("norm",)}, "no weight.*modules_to_save alone are no adapter"),
        ({"targets": ("o_proj",), "modules_to_save": ("embed_tokens", "lm_head")}, "'lm_head' is tied to .*embed_tok"),
        ({"targets": ("embed_tokens",), "dropout_pattern": {"embed_tokens": 0.5}}, "embeddings have none"),
        ({"targets": ("o_proj",), "rank": 0}, "rank is 0"),
        ({"targets": ("o_proj",), "alpha": float("nan")}, "alpha is nan"),
        ({"targets": ("o_proj",), "rank_pattern": {"o_proj": 1.5}}, "rank_pattern 'o_proj' is 1.5"),
        ({"targets": ["o_proj"]}, "targets is"),
        ({"targets": ("o_proj",), "dropout_pattern": {"o_proj": 1.0}}, "dropout_pattern 'o_proj' is 1.0"),
        ({"targets": ("o_proj", "experts.down_proj"), "dropout_pattern": {"experts.down_proj": 0.5}}, "dropout"),
        ({"targets": "all-linear", "layers_to_transform": (1,)}, "a list of endings"),
        ({"targets": ("o_proj",), "layers_to_transform": (99,)}, "no weight"),
        ({"targets": ("o_proj",), "modules_to_save": ("attn.o_proj",)}, "in modules_to_save and a target"),
    ],
)
def test_refused_by_name(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve(LoraSpec(**{"rank": 4, "alpha": 8, **spec}), toy_table("26b-a4b", True))


def test_a_module_to_save_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="'embed_token' matches nothing"):
        resolve(LoraSpec(4, 8, ("o_proj",), modules_to_save=("embed_token",)), toy_table("31b", True))


def test_the_common_dropout_passes_embeddings_by() -> None:
    """As in PEFT."""
    spec = LoraSpec(4, 8, ("embed_tokens", "o_proj"), 0.1, dropout_pattern={"embed_tokens": 0.0})
    assert {t.kind: t.dropout for t in resolve(spec, toy_table("31b", True))} == {"embedding": 0.0, "linear": 0.1}
    assert resolve(LoraSpec(4, 8, ("embed_tokens",), 0.1), toy_table("31b", True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_module_names_are_those_in_memory(variant: str) -> None:
    names = {name for name, _ in toy_model(variant).named_modules()}
    table = toy_table(variant)
    linears = [n for n in table.by_hf_name if n.endswith(".weight")]
    assert [n for n in linears if module_name(table, n) not in names] == []


@pytest.mark.parametrize("variant", ["e4b", "12b", "26b-a4b"])
def test_what_vllm_leaves_out_is_said(variant: str) -> None:
    table = toy_table(variant)
    everything = resolve(LoraSpec(4, 8.0, "all-linear"), table)
    towers = [target.module for target in everything if ".language_model." not in target.module]
    said = note_for_engine("vllm", everything)
    assert towers and said is not None and said.startswith(f"{towers[0]} and {len(towers) - 1} more: vLLM serves")
    assert note_for_engine("peft", everything) is None
    assert note_for_engine("vllm", resolve(LoraSpec(4, 8.0, LANGUAGE), table)) is None


def test_a_spec_goes_through_json() -> None:
    spec = LoraSpec(4, 8.0, ("q_proj", *EXPERTS), 0.0, (), "x.*", {"a": 1}, {"b": 2.0}, True, False, ("norm",))
    assert LoraSpec.from_json(spec.to_json()) == spec
    with pytest.raises(UsageError, match="expected the fields"):
        LoraSpec.from_json({"rank": 4})
