"""Whole folders: import, export, and everything that can be wrong with them, as the command line shows it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bridge
from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf, write_beside
from bridge.convert.manifest import MegatronFolder
from bridge.errors import BridgeError, CheckpointError
from bridge.geometry import Geometry
from bridge.toy import VARIANTS, write_toy

from .convert_kit import KINDS, Make, assert_refused, assert_same_folder, cli, toys


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def toy(made: Make, tmp_path: Path) -> Path:
    """A folder that the test may damage."""
    return Path(shutil.copytree(made("e2b"), tmp_path / "toy"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(made: Make, tmp_path: Path, variant: str, kind: str) -> None:
    """Weights, config and assets, byte for byte: the weight file itself is the same."""
    source = made(variant, kind)
    import_hf(source, tmp_path / "megatron")
    done = export_hf(tmp_path / "megatron", tmp_path / "back", check_files=True)
    assert_same_folder(tmp_path / "back", source)
    assert done.tensors == len(load_file(source / "model.safetensors"))


def test_round_trip_in_shards(made: Make, tmp_path: Path) -> None:
    source = made("26b-a4b")
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back", max_shard_size=200_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 10
    import_hf(tmp_path / "back", tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "whole")
    assert_same_folder(tmp_path / "whole", source)


def test_every_bit_pattern_survives(toy: Path, tmp_path: Path) -> None:
    """NaNs with payloads, infinities, both zeros, in fused tensors of two dtypes."""
    tensors = load_file(toy / "model.safetensors")
    name = "model.language_model.layers.0.self_attn."
    generator = torch.Generator().manual_seed(0)
    for kind, bits, dtype in (("q", torch.int16, torch.bfloat16), ("k", torch.int32, torch.float32)):
        shape = tensors[f"{name}{kind}_proj.weight"].shape
        low, high = torch.iinfo(bits).min, torch.iinfo(bits).max
        patterns = torch.randint(low, high + 1, shape, generator=generator).to(bits)
        tensors[f"{name}{kind}_proj.weight"] = patterns.view(dtype)
    save_file(tensors, toy / "model.safetensors", metadata={"format": "pt"})
    import_hf(toy, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("variant", ["e4b", "12b", "26b-a4b"])
def test_text_only_import(made: Make, tmp_path: Path, variant: str) -> None:
    """The text model inside a multimodal folder: what transformers' text class loads, with the same values."""
    import transformers

    source = made(variant)
    import_hf(source, tmp_path / "megatron", text_only=True)
    export_hf(tmp_path / "megatron", tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    model, report = getattr(transformers, config["architectures"][0]).from_pretrained(
        tmp_path / "text", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    whole = load_file(source / "model.safetensors")
    for name, parameter in model.named_parameters():
        original = whole[name.replace("model.", "model.language_model.", 1)]
        assert torch.equal(parameter.detach(), original), name
    assert not (tmp_path / "text" / "processor_config.json").exists()
    assert (tmp_path / "text" / "tokenizer.json").exists()


def test_import_in_another_dtype(made: Make, tmp_path: Path) -> None:
    source = made("12b")
    import_hf(source, tmp_path / "megatron", dtype="float32")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    original, back = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensor.float()) for name, tensor in original.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"


def test_a_run_has_what_goes_beside_its_weights_in_its_own_dtype(made: Make, tmp_path: Path) -> None:
    """Whatever the checkpoint is in that it begins from, or an earlier version had put there; what is right stays."""
    import_hf(made("e2b"), tmp_path / "imported")
    import_hf(made("e2b"), tmp_path / "wide", dtype="float32")
    imported, hf = MegatronFolder.open(tmp_path / "imported"), tmp_path / "run" / "hf"
    (tmp_path / "run").mkdir()
    shutil.copytree(imported.hf, hf)
    write_beside(imported, tmp_path / "run", dtype="float32")
    assert _files(hf) == _files(tmp_path / "wide" / "hf")
    inode = hf.stat().st_ino
    write_beside(imported, tmp_path / "run", dtype="float32")
    assert hf.stat().st_ino == inode
    write_beside(imported, tmp_path / "run", dtype="bfloat16")
    assert _files(hf) == _files(imported.hf)


def test_weights_that_are_narrowed_are_said(made: Make, tmp_path: Path) -> None:
    """Of a checkpoint whose `hf/` is of fewer bits, as float32 runs of 0.1 had it; not of mixed dtypes."""
    import_hf(made("e2b"), tmp_path / "narrow")
    import_hf(made("e2b"), tmp_path / "wide", dtype="float32")
    for name, beside, lines in (("wide", "wide", 0), ("narrow", "wide", 0), ("wide", "narrow", 1)):
        folder, said = Path(shutil.copytree(tmp_path / name, tmp_path / f"{name}-{beside}")), list[str]()
        shutil.rmtree(folder / "hf")
        shutil.copytree(tmp_path / beside / "hf", folder / "hf")
        export_hf(folder, tmp_path / f"{name}-{beside}-hf", notify=said.append)
        found = [line for line in said if "tensors are F32 and are written as BF16" in line]
        assert len(found) == lines and all(str(folder / "hf" / "bridge.json") in line for line in found), said
    import_hf(made("e2b", "mixed untied"), tmp_path / "mixed")
    said = []
    export_hf(tmp_path / "mixed", tmp_path / "mixed-hf", notify=said.append)
    assert not said


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_head_that_differs_unties_the_model(toy: Path, tmp_path: Path) -> None:
    """A tied config with its own lm_head.weight on disk loads untied in transformers; an equal copy stays tied."""
    tensors = load_file(toy / "model.safetensors")
    embedding = tensors["model.language_model.embed_tokens.weight"]
    for head, tied in ((embedding.clone(), True), (embedding * 2, False)):
        save_file(tensors | {"lm_head.weight": head}, toy / "model.safetensors", metadata={"format": "pt"})
        import_hf(toy, tmp_path / f"m{tied}")
        assert MegatronFolder.open(tmp_path / f"m{tied}").geometry.tied is tied
        export_hf(tmp_path / f"m{tied}", tmp_path / f"b{tied}")
        assert torch.equal(load_file(tmp_path / f"b{tied}" / "model.safetensors")["lm_head.weight"], head)


def _drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _add(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.zeros(2, dtype=torch.bfloat16)


def _reshape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].contiguous()


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (_drop, "model.language_model.layers.3.mlp.up_proj.weight"),
        (_add, "model.language_model.layers.3.mlp.side_proj.weight"),
        (_add, "model.somewhere.else"),
        (_reshape, "model.language_model.layers.0.self_attn.q_norm.weight"),
        (_reshape, "model.language_model.embed_tokens_per_layer.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    toy: Path, tmp_path: Path, damage: Callable[[dict[str, torch.Tensor], str], None], name: str
) -> None:
    tensors = load_file(toy / "model.safetensors")
    damage(tensors, name)
    save_file(tensors, toy / "model.safetensors", metadata={"format": "pt"})
    assert_refused(cli("import", toy, tmp_path / "m"), f"{toy}: ", name)
    assert_refused(cli("inspect", toy), name)
    assert not (tmp_path / "m").exists()


def test_wrong_folders_and_damaged_files(toy: Path, tmp_path: Path) -> None:
    target = tmp_path / "m"
    assert_refused(cli("import", tmp_path / "nowhere", target), "nowhere", "no such folder")
    assert_refused(cli("import", toy / "config.json", target), "config.json")
    (tmp_path / "empty").mkdir()
    assert_refused(cli("import", tmp_path / "empty", target), "config.json")
    assert_refused(cli("export", toy, target), "toy")
    other = json.loads((toy / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "empty" / "config.json").write_text(json.dumps(other))
    assert_refused(cli("import", tmp_path / "empty", target), "llama")
    assert_refused(cli("import", toy, toy / "inside"), "inside")

    weights = toy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    assert_refused(cli("import", toy, target), "model.safetensors")
    weights.unlink()
    assert_refused(cli("import", toy, target), "toy")
    assert not target.exists()

    weights.write_bytes(whole)
    import_hf(toy, target)
    export_hf(target, tmp_path / "sharded", max_shard_size=500_000)
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(cli("import", tmp_path / "sharded", tmp_path / "m2"), shard.name)
    assert_refused(cli("import", toy, target), "m", "--overwrite")
    assert_refused(cli("import", target, tmp_path / "m3"), "Megatron checkpoint already")


def test_quantized_models_and_adapters_are_no_models(toy: Path, tmp_path: Path) -> None:
    tensors = load_file(toy / "model.safetensors")
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, toy / "model.safetensors")
    with pytest.raises(BridgeError, match=rf"{toy}: tensor {name} is F8_E4M3: quantized"):
        import_hf(toy, tmp_path / "m")
    config = json.loads((toy / "config.json").read_text())
    (toy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(BridgeError, match=r"config.json: quantization_config: FP8 whose weight_block_size is None"):
        import_hf(toy, tmp_path / "m")
    (toy / "config.json").rename(toy / "adapter_config.json")
    with pytest.raises(BridgeError, match="`adapter import` reads it"):
        import_hf(toy, tmp_path / "m")


def test_one_checkpoint_of_a_run(made: Make, tmp_path: Path) -> None:
    """Not the latest, but the one that is named."""
    source, run = made("e2b"), tmp_path / "run"
    import_hf(source, run)
    (run / "release").rename(run / "iter_0000010")
    shutil.copytree(run / "iter_0000010", run / "iter_0000020")
    (run / "latest_checkpointed_iteration.txt").write_text("20")
    assert MegatronFolder.open(run).weights == run / "iter_0000020"
    shutil.rmtree(run / "iter_0000020" / "hf", ignore_errors=True)
    max((run / "iter_0000020").glob("*.distcp"), key=lambda path: path.stat().st_size).unlink()
    export_hf(run / "iter_0000010", tmp_path / "back")
    assert_same_folder(tmp_path / "back", source)


def test_a_damaged_megatron_checkpoint(toy: Path, tmp_path: Path) -> None:
    megatron = tmp_path / "m"
    import_hf(toy, megatron)
    data = max((megatron / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole = bytearray(data.read_bytes())
    whole[len(whole) // 2] ^= 1
    data.write_bytes(whole)
    with pytest.raises(CheckpointError, match="damaged"):
        export_hf(megatron, tmp_path / "back", check_files=True)
    assert not (tmp_path / "back").exists()
    data.write_bytes(whole[: len(whole) // 2])
    assert_refused(cli("export", megatron, tmp_path / "back"), data.name)
    data.unlink()
    assert_refused(cli("export", megatron, tmp_path / "back"), data.name)
    shutil.rmtree(megatron / "hf")
    assert_refused(cli("export", megatron, tmp_path / "back"), "bridge.json")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_import_leaves_all_or_nothing(made: Make, tmp_path: Path, sent: signal.Signals) -> None:
    """At a random moment, again and again; the target is absent or whole, and never are there leftovers in the end."""
    source, target = made("31b"), tmp_path / "m"
    moments = random.Random(int(sent))
    codes = set()
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-m", "bridge.cli", "import", source, target],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(moments.uniform(0.25, 0.6))
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=60)
        codes.add(process.returncode)
        assert "Traceback" not in stderr or process.returncode == -sent, stderr  # before the program had begun
        # Python ends itself by SIGINT, which is 130 to a shell, where the code that was interrupted came of a string,
        # as that of dataclasses does; before the program has begun, the signal itself ends it.
        interrupted = "interrupted: nothing is left" in stderr
        assert process.returncode in ((130, -signal.SIGINT) if interrupted else (0, -sent)), stderr
        if target.exists():
            export_hf(target, tmp_path / "back", overwrite=True)
            assert_same_folder(tmp_path / "back", source)
            shutil.rmtree(target)
    assert cli("import", source, target).returncode == 0
    export_hf(target, tmp_path / "back", overwrite=True)
    assert_same_folder(tmp_path / "back", source)
    assert not list(tmp_path.glob(".*")), "leftovers"


def test_a_full_disk(made: Make, tmp_path: Path) -> None:
    """A file size limit stands for it: writes fail midway with an error of the system."""
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    assert_refused(cli("import", made("31b"), tmp_path / "m", preexec_fn=limit), ".distcp")
    assert not (tmp_path / "m").exists()


def test_options_that_are_wrong_before_any_work(made: Make, tmp_path: Path) -> None:
    """A variable of the shell that is not set, and a result that could not be written in the end."""
    assert_refused(cli("import", made("e2b"), ""), "argument 3 is empty")
    assert_refused(cli("import", made("e2b"), tmp_path / "m", "--json", tmp_path / "no" / "x"), "folder does not exist")
    assert not (tmp_path / "m").exists()
    assert cli("--version").stdout == f"gemma4-bridge {bridge.__version__}\n"


def test_json_results(made: Make, tmp_path: Path) -> None:
    done = json.loads(cli("import", made("12b"), tmp_path / "m", "--json", "-").stdout)
    assert done["tensors"] == 145 and done["bytes"] > 1_000_000
    for folder in (made("12b"), tmp_path / "m"):
        result = json.loads(cli("inspect", folder, "--json", "-").stdout)
        assert result["num_layers"] == 12 and result["coverage"]["unaccounted"] == 0
        assert [row["k_eq_v"] for row in result["layer_kinds"]] == [False, True]


@pytest.mark.parametrize("command", ["toy", "inspect", "import", "export", "verify"])
def test_help_has_an_example(command: str) -> None:
    result = cli(command, "--help")
    assert result.returncode == 0
    assert f"gemma4-bridge {command}" in " ".join(result.stdout.split())


def test_a_conversion_imports_neither_torch_nor_megatron(made: Make, tmp_path: Path) -> None:
    code = (
        "import sys; from bridge.convert.export import export_hf; from bridge.convert.folders import import_hf; "
        f"import_hf({str(made('e4b'))!r}, {str(tmp_path / 'm')!r}); export_hf({str(tmp_path / 'm')!r}, "
        f"{str(tmp_path / 'b')!r}); print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.strip() == "[]"


def test_a_config_that_vanishes_after_it_was_read(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are listed later: the import was complete, but for its config."""
    real = Geometry.from_folder

    def read(path: str | Path) -> Geometry:
        geometry = real(path)
        (Path(path) / "config.json").unlink()
        return geometry

    monkeypatch.setattr(Geometry, "from_folder", read)
    with pytest.raises(CheckpointError, match=r"config\.json: vanished while the folder was being read"):
        import_hf(toy, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["bfloat16", "mixed untied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_text_model_back_in_its_multimodal_folder(made: Make, tmp_path: Path, variant: str, kind: str) -> None:
    folder = made(variant, kind)
    import_hf(folder, tmp_path / "text", text_only=True)
    export_hf(tmp_path / "text", tmp_path / "back", multimodal=folder)
    assert_same_folder(tmp_path / "back", folder)


def test_another_text_model_in_a_multimodal_folder(tmp_path: Path) -> None:
    """Its weights and dtype, the towers of the folder, and what was changed beside the weights."""
    write_toy("e2b", tmp_path / "whole", seed=1)
    # With a copy of the embedding as its head, which would be the old one.
    whole = load_file(tmp_path / "whole/model.safetensors")
    head = whole["model.language_model.embed_tokens.weight"].clone()
    save_file({**whole, "lm_head.weight": head}, tmp_path / "whole/model.safetensors", {"format": "pt"})
    write_toy("e2b", tmp_path / "tuned", seed=2, text_only=True, dtype="float32")
    (tmp_path / "tuned/generation_config.json").write_text('{"max_new_tokens": 7}\n')
    import_hf(tmp_path / "tuned", tmp_path / "text")
    said: list[str] = []
    export_hf(tmp_path / "text", tmp_path / "out", multimodal=tmp_path / "whole", notify=said.append)
    text = load_file(tmp_path / "tuned/model.safetensors")
    out = load_file(tmp_path / "out/model.safetensors")
    assert set(out) == set(whole)
    for name, tensor in out.items():
        inner = name.replace("model.language_model.", "model.")
        expected = text[inner] if inner in text and inner != name else whole[name].float()
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float32" and config["vision_config"]
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"max_new_tokens": 7}
    assert (tmp_path / "out/processor_config.json").is_file()
    assert len(said) == 1 and "BF16 there, and written as F32" in said[0]


def test_a_text_model_is_refused_where_it_does_not_belong(made: Make, tmp_path: Path) -> None:
    import_hf(made("e2b"), tmp_path / "text", text_only=True)
    import_hf(made("e2b"), tmp_path / "whole")
    for checkpoint, folder, words in (
        ("text", made("e4b"), "its language model is another one: layers differs"),
        ("text", made("e2b", "mixed untied"), "tied differs (False there, True here)"),
        ("text", made("e2b", "float32 text"), "has no towers"),
        ("whole", made("e2b"), "is for a text model"),
    ):
        assert_refused(cli("export", tmp_path / checkpoint, tmp_path / "out", "--multimodal", folder), words)
        assert not (tmp_path / "out").exists()
