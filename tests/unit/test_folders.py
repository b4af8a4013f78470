"""What people have on their disks: hostile configs, adapters beside models, links, other names, damaged manifests."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf, open_source
from bridge.convert.manifest import MANIFEST_FILE, Manifest, MegatronFolder
from bridge.errors import BridgeError, CheckpointError, GeometryError, UsageError
from bridge.geometry import Geometry
from bridge.hf.folder import HfFolder
from bridge.hf.hub import resolve
from bridge.inspection import inspect_folder
from bridge.mapping.unified import in_memory
from bridge.toy import write_toy
from bridge.verify.round_trip import check_round_trip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("toys")

    def get(variant: str) -> Path:
        if not (base / variant).exists():
            write_toy(variant, base / variant)
        return base / variant

    return get


@pytest.fixture
def toy(made: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder that the test may damage."""
    return Path(shutil.copytree(made("12b"), tmp_path / "toy"))


def edit(folder: Path, **values: Any) -> None:
    """Set keys of a config; `text_config__eps=` is a key of a section."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in values.items():
        *sections, last = key.split("__")
        target = config
        for section in sections:
            target = target[section]
        target[last] = value
    (folder / "config.json").write_text(json.dumps(config))


# --- Hostile configs ---

HOSTILE: dict[str, str] = {
    "5,000 digits": '{"model_type": "gemma4_text", "hidden_size": ' + "9" * 5000 + "}",
    "4,000 digits": '{"model_type": "gemma4_text", "hidden_size": ' + "9" * 4000 + "}",
    "a list for a model_type": '{"model_type": ["gemma4"]}',
    "an object for a layer type": '{"model_type": "gemma4_text", "num_hidden_layers": 1, "layer_types": [{}]}',
    "eps of text": '{"model_type": "gemma4_text", "rms_norm_eps": "1e-6"}',
    "eps below 0": '{"model_type": "gemma4_text", "rms_norm_eps": -1.0}',
    "eps NaN": '{"model_type": "gemma4_text", "rms_norm_eps": NaN}',
    "softcap 0": '{"model_type": "gemma4_text", "final_logit_softcapping": 0.0}',
    "softcap NaN": '{"model_type": "gemma4_text", "final_logit_softcapping": NaN}',
    "softcap a list": '{"model_type": "gemma4_text", "final_logit_softcapping": [30.0]}',
    "pad behind the vocabulary": '{"model_type": "gemma4_text", "pad_token_id": 262144}',
    "pad below 0": '{"model_type": "gemma4_text", "pad_token_id": -1}',
    "pad behind the per-layer embeddings": '{"model_type": "gemma4_text", "pad_token_id": 9, '
    '"vocab_size_per_layer_input": 8}',
    "a key twice": '{"model_type": "gemma4_text", "head_dim": 64, "head_dim": 128}',
    "nested": '{"model_type": "gemma4_text", "x": ' + "[" * 500 + "]" * 500 + "}",
    "nested deeper": '{"model_type": "gemma4_text", "x": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "a lone surrogate": '{"model_type": "gemma4_text", "x": "\\ud800"}',
    "an infinite theta": '{"model_type": "gemma4_text", "rope_scaling": {"sliding_attention": {"rope_theta": Infinity},'
    ' "full_attention": {"rope_theta": 1e6}}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(HOSTILE[name])
    with pytest.raises(BridgeError, match=r"config\.json") as caught:
        Geometry.from_folder(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("target", ["/dev/zero", None])
def test_a_config_that_is_no_file_is_not_waited_for(target: str | None, tmp_path: Path) -> None:
    if target is None:
        os.mkfifo(tmp_path / "config.json")
    else:
        (tmp_path / "config.json").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"config\.json: not a regular file"):
        Geometry.from_folder(tmp_path)


def test_a_config_of_any_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"config\.json: 1099511627776 bytes"):
        Geometry.from_folder(tmp_path)


# --- Headers and manifests ---


def test_a_lone_surrogate_in_a_header_is_refused_at_import(toy: Path, tmp_path: Path) -> None:
    """safetensors refuses such a file as well."""
    data = (toy / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].decode().replace('"format":"pt"', '"format":"\\ud800"').encode()
    (toy / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    with pytest.raises(Exception, match="header"), safe_open(toy / "model.safetensors", framework="pt"):
        pass
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* lone surrogate"):
        import_hf(toy, tmp_path / "megatron")


MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "a text for tied": ({"tied": "false"}, "tied is neither true nor false"),
    "a number for tied": ({"tied": 1}, "tied is neither"),
    "a number in file_metadata": ({"file_metadata": {"format": 1}}, "file_metadata is not an object of texts"),
    "file_metadata a list": ({"file_metadata": [["format", "pt"]]}, "file_metadata is not"),
    "a later version": ({"version": 2}, "version 2, this program reads 1"),
    "a version of text": ({"version": "1"}, "version 1, this program reads 1"),
    "true for a version": ({"version": True}, "version True"),
    "tensors an object": ({"tensors": {}}, "tensors is not a list"),
    "a tensor of text": ({"tensors": ["a"]}, "an entry that is no object"),
    "a tensor without a shape": ({"tensors": [{"name": "a", "dtype": "F32"}]}, "tensor a lacks shape"),
    "a dtype that is none": (
        {"tensors": [{"name": "a", "dtype": ["F32"], "shape": []}]},
        "tensor a: its name or dtype",
    ),
    "a negative size": ({"tensors": [{"name": "a", "dtype": "F32", "shape": [-1]}]}, "tensor a: its shape"),
    "one twice": ({"tensors": [{"name": "a", "dtype": "F32", "shape": []}] * 2}, "one of them twice"),
    "an unknown key": ({"more": 1}, "the manifest has the unknown key more"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_read_strictly(name: str, tmp_path: Path) -> None:
    Manifest(True, (), {"format": "pt"}).write(tmp_path)
    assert Manifest.read(tmp_path) == Manifest(True, (), {"format": "pt"})
    changes, message = MANIFESTS[name]
    path = tmp_path / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=rf"bridge\.json: .*{message}"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("key", ["tied", "tensors", "file_metadata", "version"])
def test_a_manifest_without_a_key(key: str, tmp_path: Path) -> None:
    Manifest(True, (), {}).write(tmp_path)
    data = json.loads((tmp_path / MANIFEST_FILE).read_text())
    del data[key]
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"bridge\.json: "):
        Manifest.read(tmp_path)


# --- Files beside the model ---


def test_an_adapter_beside_a_model_is_refused_with_what_to_do(toy: Path, tmp_path: Path) -> None:
    """transformers loads base and adapter; the base alone would be another model."""
    import_hf(toy, tmp_path / "megatron")
    (toy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1, 1)}, toy / "adapter_model.safetensors")
    for attempt in (
        lambda: import_hf(toy, tmp_path / "other"),
        lambda: inspect_folder(toy),
        lambda: check_round_trip(toy, tmp_path / "megatron", "12b"),
    ):
        with pytest.raises(UsageError, match=rf"an adapter beside it .*adapter merge FOLDER OUT --base {toy}"):
            attempt()
    assert not (tmp_path / "other").exists()


def test_an_adapter_config_that_an_earlier_import_kept_is_left_behind(toy: Path, tmp_path: Path) -> None:
    import_hf(toy, tmp_path / "megatron")
    (tmp_path / "megatron" / "hf" / "adapter_config.json").write_text("{}")
    said: list[str] = []
    export_hf(tmp_path / "megatron", tmp_path / "back", notify=said.append)
    assert not (tmp_path / "back" / "adapter_config.json").exists()
    assert any("adapter_config.json is left behind" in line for line in said)


def test_weights_that_are_not_the_models_are_left_with_what_names_them(toy: Path, tmp_path: Path) -> None:
    (toy / "training_args.bin").write_bytes(b"x")
    (toy / "pytorch_model.bin").write_bytes(b"x")
    (toy / "pytorch_model.bin.index.json").write_text("{}")
    (toy / "other_index.json").write_text('{"a": "pytorch_model.bin"}')
    (toy / "README.md").write_text("pytorch_model.bin")
    (toy / "checkpoint-5").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json"):
        (toy / "checkpoint-5" / name).write_text("{}")
    (toy / "notes").mkdir()
    (toy / "notes" / "a.json").write_text("{}")
    said: list[str] = []
    import_hf(toy, tmp_path / "megatron", notify=said.append)
    export_hf(tmp_path / "megatron", tmp_path / "back")
    came = {str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*") if path.is_file()}
    there = {str(path.relative_to(toy)) for path in toy.rglob("*") if path.is_file()}
    left = {
        "training_args.bin",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "other_index.json",
        "checkpoint-5/adapter_config.json",
        "checkpoint-5/adapter_model.safetensors",
        "checkpoint-5/trainer_state.json",
    }
    assert there - came == left and came <= there
    (line,) = [line for line in said if "left behind" in line]
    assert all(name in line for name in left)
    assert line in inspect_folder(toy).notices
    rows = {row.metric: row for row in check_round_trip(toy, tmp_path / "megatron", "12b")}
    assert rows["different_assets"].passed and "7 left behind" in rows["different_assets"].detail


# --- Links ---


def test_a_folder_of_links_into_another_model_folder(made: Callable[[str], Path], tmp_path: Path) -> None:
    source, links = made("12b"), tmp_path / "links"
    links.mkdir()
    for path in source.iterdir():
        (links / path.name).symlink_to(path)
    import_hf(links, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    for path in source.iterdir():
        back = tmp_path / "back" / path.name
        assert not back.is_symlink() and back.read_bytes() == path.read_bytes()


def test_a_cache_whose_blobs_are_a_link(made: Callable[[str], Path], tmp_path: Path) -> None:
    repository, elsewhere = tmp_path / "models--a--b", tmp_path / "store"
    snapshot = repository / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    elsewhere.mkdir()
    (repository / "blobs").symlink_to(elsewhere)
    for number, path in enumerate(made("12b").iterdir()):
        shutil.copy(path, elsewhere / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    second = tmp_path / "second"
    second.mkdir()
    for path in snapshot.iterdir():
        (second / path.name).symlink_to(path)
    for folder in (snapshot, second):
        with HfFolder(folder) as hf:
            assert len(hf.assets) > 3 and Geometry.from_folder(folder).unified


def test_a_planted_link_takes_no_strangers_file_along(toy: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "id_rsa").write_text("secret")
    (toy / "id_rsa").symlink_to(home / "id_rsa")
    with pytest.raises(CheckpointError, match=r"id_rsa: a link that leads out of the folder"):
        HfFolder(toy)
    (toy / "id_rsa").unlink()
    (home / "config.json").write_text("{}")
    (toy / "notes.txt").symlink_to(home / "id_rsa")
    with pytest.raises(CheckpointError, match=r"notes\.txt: a link that leads out"):
        HfFolder(toy)
    (toy / "notes.txt").unlink()
    (home / "notes.txt").symlink_to("/etc/hostname")
    (toy / "notes.txt").symlink_to(home / "notes.txt")
    with pytest.raises(CheckpointError, match=r"notes\.txt: a link that leads out"):
        HfFolder(toy)
    (toy / "notes.txt").unlink()
    (toy / "notes.txt").symlink_to("notes.txt")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        HfFolder(toy)


# --- Folders that the base class saved ---


@pytest.mark.parametrize("variant", ["e2b", "12b"])
def test_a_folder_of_the_base_class_keeps_its_names(variant: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made(variant), tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, architectures=[f"{'Gemma4Unified' if variant == '12b' else 'Gemma4'}Model"])
    with ExitStack() as stack:
        source = open_source(stack, folder)
        assert (source.geometry.base, source.geometry.prefix) == ("", "language_model.")
        for name in bare:
            assert in_memory(name, source.geometry) == in_memory(f"model.{name}", Geometry.from_folder(folder))
    import_hf(folder, tmp_path / "megatron")
    import_hf(made(variant), tmp_path / "full")
    assert MegatronFolder.open(tmp_path / "megatron").geometry.base == ""
    for file in (tmp_path / "full" / "release").glob("*.distcp"):
        assert (tmp_path / "megatron" / "release" / file.name).read_bytes() == file.read_bytes()
    export_hf(tmp_path / "megatron", tmp_path / "back")
    for path in folder.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    import_hf(folder, tmp_path / "text", text_only=True)
    names = {tensor.name for tensor in MegatronFolder.open(tmp_path / "text").manifest.tensors}
    assert "model.embed_tokens.weight" in names and all(name.startswith("model.") for name in names)


# --- Trained for quantization, not quantized ---


def test_weights_trained_for_q4_0_are_16_bit_weights(toy: Path, tmp_path: Path) -> None:
    edit(toy, quantization_config={"quant_type": "q4_0"})
    said: list[str] = []
    import_hf(toy, tmp_path / "megatron", notify=said.append)
    assert len([line for line in said if "quantization_config" in line]) == 1
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (toy / "config.json").read_bytes()
    import_hf(toy, tmp_path / "text", text_only=True)
    config = json.loads((tmp_path / "text" / "hf" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_type": "q4_0"}


@pytest.mark.parametrize(
    "config", [{"quant_method": "gptq"}, {"bits": 4}, {"quant_type": "q4_0", "quant_method": "gemma"}, "q4_0"]
)
def test_quantized_weights_are_refused(config: Any, toy: Path) -> None:
    edit(toy, quantization_config=config)
    with pytest.raises(GeometryError, match="quantization_config"):
        Geometry.from_folder(toy)


def test_weights_of_integers_are_refused_whatever_the_config_says(toy: Path, tmp_path: Path) -> None:
    tensors = load_file(toy / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].view(torch.int16)
    save_file(tensors, toy / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {name} is I16: quantized"):
        import_hf(toy, tmp_path / "megatron")


# --- Names of models ---


@pytest.mark.parametrize("name", ["./no", "/tmp/no/such", "~/model", "a/b/c", "parent/typo", "no", "owner/model"])
def test_only_what_can_be_an_id_is_looked_up_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(repository: str, **kwargs: Any) -> str:
        asked.append(repository)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parent").mkdir()
    message = "neither a folder here" if name == "owner/model" else "no such folder"
    with pytest.raises(CheckpointError, match=message):
        resolve(name)
    assert asked == (["owner/model"] if name == "owner/model" else [])
