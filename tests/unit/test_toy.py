"""Toy checkpoints: small, complete, the same every time, and what transformers itself would have written."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from bridge.errors import CheckpointError, MappingError, UsageError
from bridge.geometry import Geometry
from bridge.hf.folder import HfFolder
from bridge.toy import VARIANTS, write, write_toy
from bridge.toy.config import published, toy_config
from bridge.toy.tokenizer import _pieces, build_tokenizer
from bridge.toy.weights import chunks, fill_of

from .toy_kit import Toys, config_of, load, toys_in

MAX_PARAMETERS = 3_000_000
_SIZE = {"BF16": 2, "F32": 4}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return toys_in(tmp_path_factory.mktemp("toys"))


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with HfFolder(folder) as opened:
        return {name: (info.dtype, info.shape) for name, info in opened.tensors.items()}


def is_dead(name: str, geometry: Geometry) -> bool:
    """Whether a tensor is one of those that KV-shared layers carry and no model reads."""
    head, _, tail = name.removeprefix(geometry.prefix + "layers.").partition(".self_attn.")
    return (
        head.isdecimal()
        and tail in ("k_proj.weight", "v_proj.weight", "k_norm.weight")
        and geometry.layers[int(head)].shares_kv
    )


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_what_transformers_writes(variant: str, text_only: bool, toys: Any, tmp_path: Path) -> None:
    folder = toys(variant, text_only=text_only)
    geometry, ours = Geometry.from_folder(folder), tensors_of(folder)
    assert sum(math.prod(shape) for _, shape in ours.values()) <= MAX_PARAMETERS
    load(folder, "auto").save_pretrained(tmp_path)
    dead = {name for name in ours if is_dead(name, geometry)}
    assert {name: ours[name] for name in ours.keys() - dead} == tensors_of(tmp_path)
    assert len(dead) == 3 * sum(layer.shares_kv for layer in geometry.layers)
    for file in ("config.json", "generation_config.json"):
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_untied(variant: str, text_only: bool, toys: Any, tmp_path: Path) -> None:
    folder = toys(variant, text_only=text_only, untied=True)
    assert not Geometry.from_folder(folder).tied
    ours = tensors_of(folder)
    assert set(ours) - set(tensors_of(toys(variant, text_only=text_only))) == {"lm_head.weight"}
    model = load(folder, "auto")
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" in tensors_of(tmp_path)
    assert (folder / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_of_another_width(variant: str) -> None:
    """For kernels that have a smallest head: only heads and the window are others."""
    usual, wide = (Geometry.from_dict(toy_config(variant, head_dim=heads).written) for heads in (None, 64))
    for ours, theirs in zip(wide.layers, usual.layers, strict=True):
        assert ours.head_dim == (128 if ours.kind == "global" else 64)
        assert ours.window == (None if ours.kind == "global" else 16)
        same = dataclasses.replace(ours, head_dim=theirs.head_dim, window=theirs.window)
        assert same == theirs


@pytest.mark.parametrize("wrong", [{"head_dim": 6}, {"head_dim": 0}, {"head_dim": 64, "full_size": True}])
def test_heads_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"head_dim {wrong['head_dim']}: "):
        toy_config("e2b", **wrong)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_structural_feature_is_there(variant: str, toys: Any) -> None:
    toy, real = Geometry.from_folder(toys(variant)), Geometry.from_dict(published(variant))
    assert (toy.architecture, toy.prefix, toy.tied) == (real.architecture, real.prefix, real.tied)
    assert (toy.logit_softcap, toy.bidirectional_vision) == (real.logit_softcap, real.bidirectional_vision)
    assert [layer.kind for layer in toy.layers] == [layer.kind for layer in real.layers[: toy.num_layers]]
    assert sum(layer.kind == "global" for layer in toy.layers) >= 2

    def heads(geometry: Geometry) -> set[tuple[Any, ...]]:
        return {
            (layer.kind, layer.num_attention_heads, layer.num_query_groups, layer.k_eq_v, layer.shares_kv)
            for layer in geometry.layers
        }

    def widths(geometry: Geometry) -> set[tuple[bool, float]]:
        narrow = min(layer.ffn_hidden_size for layer in geometry.layers)
        return {(layer.shares_kv, layer.ffn_hidden_size / narrow) for layer in geometry.layers}

    assert heads(toy) == heads(real)
    assert widths(toy) == widths(real)
    for kind in ("sliding", "global"):
        assert {(layer.rope_theta, layer.rotary_fraction) for layer in toy.layers if layer.kind == kind} == {
            (layer.rope_theta, layer.rotary_fraction) for layer in real.layers if layer.kind == kind
        }
    assert (toy.moe is None, toy.ple is None) == (real.moe is None, real.ple is None)
    assert (toy.vision is None, toy.audio is None) == (real.vision is None, real.audio is None)
    assert toy.moe is None or (toy.moe.num_experts >= 8 and 2 <= toy.moe.topk <= 4)
    # Producers of both kinds are read, and one of them lies in the first half of the layers.
    assert {layer.kind for layer in toy.layers if layer.shares_kv} in (set(), {"sliding", "global"})
    widest = {layer.head_dim for layer in toy.layers} | {toy.hidden_size, toy.vocab_size}
    assert all(width % 8 == 0 for width in widest | {layer.ffn_hidden_size for layer in toy.layers})


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_finite_and_spread(variant: str, text_only: bool, toys: Any) -> None:
    model = load(toys(variant, text_only=text_only))
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, 500, (2, 24)))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert torch.isfinite(logits).all()
    assert 0.6 < logits.std() < 3
    assert (logits.argmax(-1) == ids).float().mean() < 0.3
    # Causal, and earlier tokens matter: what is changed first changes all that follows and nothing before.
    other = ids.clone()
    other[:, 10] += 1
    with torch.no_grad():
        moved = (model(input_ids=other).logits - logits).abs().amax(dim=(0, 2))
    assert (moved[:10] < 1e-5).all()
    assert (moved[10:] > 1e-3).all()


def test_values_tell_mistakes_apart(toys: Any) -> None:
    for variant in VARIANTS:
        for name, tensor in load_file(toys(variant, dtype="float32") / "model.safetensors").items():
            assert torch.isfinite(tensor).all(), name
            assert tensor.numel() == 1 or tensor.unique().numel() > 0.9 * tensor.numel(), name
            assert not (tensor == 1).all(), name
            assert tensor.abs().max() > 1e-3, name
            if name.endswith("_min"):
                assert (tensor < -0.9).all(), name
            if name.endswith("_max"):
                assert (tensor > 0.9).all(), name


def test_the_same_every_time_and_different_by_seed(toys: Any, tmp_path: Path) -> None:
    first = load_file(toys("e2b") / "model.safetensors")
    write_toy("e2b", tmp_path / "again")
    write_toy("e2b", tmp_path / "other", seed=1)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (toys("e2b") / "model.safetensors").read_bytes()
    for name, tensor in load_file(tmp_path / "other" / "model.safetensors").items():
        # A clip bound is one number in bfloat16: two seeds may agree on it.
        assert tensor.numel() == 1 or not torch.equal(tensor, first[name]), name


def test_bfloat16_is_the_rounded_float32(toys: Any) -> None:
    wide = load_file(toys("26b-a4b", dtype="float32") / "model.safetensors")
    for name, tensor in load_file(toys("26b-a4b") / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, wide[name].to(torch.bfloat16)), name
    assert config_of(toys("26b-a4b", dtype="float32"))["dtype"] == "float32"


def test_shards(toys: Any, tmp_path: Path) -> None:
    write_toy("e2b", tmp_path / "toy", max_shard_size=500_000)
    files = sorted((tmp_path / "toy").glob("*.safetensors"))
    assert len(files) > 2
    whole = load_file(toys("e2b") / "model.safetensors")
    parts = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    load(tmp_path / "toy")


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_dtypes(variant: str, toys: Any) -> None:
    tensors = tensors_of(toys(variant, mixed_dtypes=True))
    dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
    assert set(dtypes.values()) == {"BF16", "F32"}
    assert dtypes[Geometry.from_folder(toys(variant)).prefix + "norm.weight"] == "F32"
    layers = Geometry.from_folder(toys(variant)).prefix + "layers."
    assert (dtypes[f"{layers}0.self_attn.q_proj.weight"], dtypes[f"{layers}0.self_attn.k_proj.weight"]) == (
        "BF16",
        "F32",
    )
    assert (dtypes[f"{layers}1.mlp.gate_proj.weight"], dtypes[f"{layers}1.mlp.up_proj.weight"]) == ("BF16", "F32")
    if variant == "26b-a4b":
        assert (dtypes[f"{layers}0.router.scale"], dtypes[f"{layers}0.router.proj.weight"]) == ("F32", "BF16")
        assert dtypes[f"{layers}2.experts.down_proj"] == "F32"
    load(toys(variant, mixed_dtypes=True), "auto")


def test_without_the_dead_tensors(toys: Any) -> None:
    geometry = Geometry.from_folder(toys("e4b"))
    ours = tensors_of(toys("e4b"))
    assert tensors_of(toys("e4b", dead_kv=False)).keys() == {name for name in ours if not is_dead(name, geometry)}


# ---- full size: the plan of all five, without their gigabytes


@pytest.mark.parametrize(
    ("variant", "tensors", "parameters", "dead"),
    [
        ("e2b", 1951, 5_104_298_467, 60),
        ("e4b", 2076, 7_941_101_802, 54),
        ("12b", 677, 11_959_730_224, 0),
        ("26b-a4b", 1013, 25_805_936_206, 0),
        ("31b", 1188, 31_273_088_876, 0),
    ],
)
def test_the_published_size(variant: str, tensors: int, parameters: int, dead: int) -> None:
    toy = toy_config(variant, full_size=True)
    _, shapes = write.build(toy, "bfloat16", dead_kv=False)
    assert (len(shapes), sum(math.prod(shape) for shape in shapes.values())) == (tensors, parameters)
    assert len(write.build(toy, "bfloat16", dead_kv=True)[1]) == tensors + dead
    for name in shapes:
        fill_of(name)


def test_large_tensors_come_in_chunks_of_one_stream() -> None:
    shape = (3000, 4096)
    parts = list(chunks("x.mlp.up_proj.weight", shape, "F32", "e2b", 0))
    assert len(parts) > 1
    assert [start for start, _ in parts] == [0, *np.cumsum([len(rows) for _, rows in parts])[:-1]]
    # The chunks are views of one buffer, so they are asked for again to be put together.
    whole = np.concatenate([rows.copy() for _, rows in chunks("x.mlp.up_proj.weight", shape, "F32", "e2b", 0)])
    assert whole.shape == shape
    assert len({row[:8].tobytes() for row in whole}) == shape[0]
    assert abs(whole.std() * 64 - 1) < 0.01


def test_a_tensor_without_a_rule() -> None:
    with pytest.raises(MappingError, match=r"layers\.0\.novelty: the toy has no rule"):
        fill_of("layers.0.novelty")


# ---- the target


def test_an_existing_target_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    folder.mkdir()
    write_toy("e2b", folder, text_only=True)  # an empty folder is as good as none
    with pytest.raises(UsageError, match="pass --overwrite"):
        write_toy("e2b", folder)
    write_toy("e4b", folder, text_only=True, overwrite=True)
    assert Geometry.from_folder(folder).num_layers == 12
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="does not look like a checkpoint"):
        write_toy("e2b", tmp_path / "mine", overwrite=True)
    with pytest.raises(UsageError, match="not a folder"):
        write_toy("e2b", tmp_path / "mine" / "letter.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "toy"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise failure

    monkeypatch.setattr(write, "chunks", fail)
    with pytest.raises(CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt):
        write_toy("e2b", tmp_path / "toy", text_only=True)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown variant 'e3b', expected one of e2b, e4b"):
        write_toy("e3b", tmp_path / "toy")
    with pytest.raises(UsageError, match="unknown dtype 'float16'"):
        write_toy("e2b", tmp_path / "toy", dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="mixed_dtypes"):
        write_toy("e2b", tmp_path / "toy", dtype="float32", mixed_dtypes=True)


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_toy("e2b", tmp_path / "toy", text_only=True, progress=lambda done, total: seen.append((done, total)))
    data = sum(_SIZE[dtype] * math.prod(shape) for dtype, shape in tensors_of(tmp_path / "toy").values())
    assert seen[-1] == (data, data)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# ---- tokenizer and template


@pytest.mark.parametrize("full_size", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokenizer_agrees_with_the_config(variant: str, full_size: bool, tmp_path: Path) -> None:
    config = toy_config(variant, full_size=full_size).multimodal
    build_tokenizer(config).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for token, field in [
        ("<|image|>", "image_token_id"),
        ("<|image>", "boi_token_id"),
        ("<image|>", "eoi_token_id"),
        ("<|audio|>", "audio_token_id"),
        ("<|audio>", "boa_token_id"),
        ("<audio|>", "eoa_token_index"),
        ("<|video|>", "video_token_id"),
    ]:
        assert tokenizer(token, add_special_tokens=False).input_ids == [config[field]], token
    assert (tokenizer.image_token_id, tokenizer.audio_token_id) == (config["image_token_id"], config["audio_token_id"])
    text = config["text_config"]
    assert tokenizer.pad_token_id == text["pad_token_id"] == 0
    assert tokenizer.eos_token_id == text["eos_token_id"] == 1
    assert tokenizer.bos_token_id == text["bos_token_id"] == 2
    assert max(tokenizer.get_vocab().values()) < text["vocab_size"]
    ids = tokenizer.convert_tokens_to_ids(["<|tool_response>", "<|turn>", "<turn|>"])
    assert ids == [50, 105, 106]


def test_any_text_survives_the_tokenizer(toys: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(toys("e2b", text_only=True))
    for text in [
        "The night you know",
        "  two  spaces \n\ttab\r\n",
        "日本語 🎉 Ünïcödé",
        "\x00\x7f",
        "",
        "<unk>",
        "a▁b",
    ]:
        ids = tokenizer(text).input_ids
        assert ids[0] == 2
        assert tokenizer.decode(ids[1:]) == text.replace("▁", " ")
        assert max(ids) < 512
    assert len(tokenizer("the night and what").input_ids) < 14
    pieces, merges = _pieces()
    assert len(set(pieces)) == len(pieces)
    assert all(left in pieces and right in pieces for left, right in merges)


def test_chat_template(toys: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(toys("e2b", text_only=True))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "A cat.", "reasoning_content": "whiskers"},
        {"role": "user", "content": " and? "},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\n<|image|>what?<turn|>\n<|turn>model\nA cat.<turn|>\n"
        "<|turn>user\nand?<turn|>\n<|turn>model\n"
    )
    assert tokenizer.apply_chat_template(messages[:3], tokenize=False).endswith(
        "<|turn>model\n<|channel>thought\nwhiskers\n<channel|>A cat.<turn|>\n"
    )
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Bern"}}}]}
    text = tokenizer.apply_chat_template(
        [messages[1], call, {"role": "tool", "content": "rain"}], tools=[tool], tokenize=False
    )
    assert text.startswith("<bos><|turn>system\n<|tool>{")
    assert '<|tool_call>call:weather{"city": "Bern"}<tool_call|><turn|>\n' in text
    assert "<|tool_response>rain<tool_response|>" in text
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids[:3] == [2, 105, *tokenizer("system", add_special_tokens=False).input_ids][:3]


def test_files_beside_the_weights(toys: Any) -> None:
    common = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in toys("12b", text_only=True).iterdir()} == common | {"model.safetensors"}
    assert {path.name for path in toys("12b").iterdir()} == common | {"model.safetensors", "processor_config.json"}
    with (toys("12b") / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header["__metadata__"] == {"format": "pt"}
