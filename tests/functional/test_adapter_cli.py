"""`gemma4-bridge adapter`, as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from bridge.cli import app
from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.errors import BridgeError, UsageError
from bridge.lora.checkpoint import write_adapter
from bridge.lora.initial import initial_values
from bridge.lora.peft_config import CONFIG_FILE
from bridge.lora.peft_folder import WEIGHTS_FILE
from bridge.lora.spec import LoraSpec
from tests.functional.adapter_kit import EXPERTS, load_model, make_adapter
from tests.functional.conftest import Toy


def cli(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["adapter", *map(str, arguments), "--json", "-"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folders(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/, megatron/ and peft/: a 26B text toy, the same imported, and an adapter of it with experts."""
    base = tmp_path_factory.mktemp("cli")
    (base / "hf").symlink_to(toy("26b-a4b", text_only=True))
    import_hf(base / "hf", base / "megatron")
    make_adapter(base / "hf", base / "peft", target_modules=["q_proj", "k_proj"], target_parameters=list(EXPERTS))
    return base


def test_the_whole_way(folders: Path, tmp_path: Path) -> None:
    """In, out, into both formats and back, and merged from each side."""
    done = cli("import", folders / "peft", tmp_path / "adapter", "--base", folders / "megatron")
    tensors = load_file(folders / "peft" / WEIGHTS_FILE)
    assert done == {
        "target": str(tmp_path / "adapter"),
        # q and k lie in one Megatron tensor, the experts in two.
        "tensors": 12 * 3 * 2,
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "bytes_resumed": 0,
    }
    cli("export", tmp_path / "adapter", tmp_path / "peft", "--base-model", folders / "hf")
    cli("export", tmp_path / "adapter", tmp_path / "vllm", "--format", "vllm")
    cli("convert", tmp_path / "vllm", tmp_path / "sglang", "--format", "sglang", "--base", folders / "hf")
    cli("convert", tmp_path / "sglang", tmp_path / "back", "--base", folders / "megatron")
    for name in ("peft", "back"):
        ours = load_file(tmp_path / name / WEIGHTS_FILE)
        assert ours.keys() == tensors.keys()
        assert all(torch.equal(ours[key], tensors[key]) for key in tensors)
    assert json.loads((tmp_path / "peft" / CONFIG_FILE).read_text())["base_model_name_or_path"] == str(folders / "hf")

    # The bases are those that the adapters name.
    merged = cli("merge", tmp_path / "peft", tmp_path / "one", "--max-shard-size", "1MB")
    assert merged["tensors"] == len(load_model(folders / "hf").state_dict()) - 1
    cli("merge", tmp_path / "adapter", tmp_path / "two", "--max-shard-size", "1MB", "--workers", 1)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


@pytest.mark.parametrize("variant", ["e2b", "12b"])
def test_an_exported_folder_tokenizes_and_renders(variant: str, toy: Toy, tmp_path: Path) -> None:
    """Whatever the format; but it is no model: without a config of one."""
    from transformers import AutoProcessor, AutoTokenizer

    base = toy(variant)
    import_hf(base, tmp_path / "base")
    spec = LoraSpec(2, 4.0, ".*language_model.*(q|o)_proj")
    write_adapter(tmp_path / "adapter", tmp_path / "base", spec, initial_values(0), lambda *_: torch.float32)
    for adapter_format in ("peft", "vllm", "sglang"):
        cli("export", tmp_path / "adapter", tmp_path / adapter_format, "--format", adapter_format)
    cli("convert", tmp_path / "vllm", tmp_path / "converted", "--base", base)
    for adapter_format in ("peft", "vllm", "sglang", "converted"):
        files = {path.name for path in (tmp_path / adapter_format).iterdir()} - {CONFIG_FILE, WEIGHTS_FILE}
        assert {"tokenizer.json", "chat_template.jinja", "processor_config.json"} <= files
        assert not files & {"config.json", "generation_config.json"}
        assert all((tmp_path / adapter_format / name).read_bytes() == (base / name).read_bytes() for name in files)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / adapter_format)
        assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
        processor = AutoProcessor.from_pretrained(tmp_path / adapter_format)
        said = [{"role": "user", "content": [{"type": "text", "text": "a word"}]}]
        theirs = AutoProcessor.from_pretrained(base).apply_chat_template(said, tokenize=False)
        assert processor.apply_chat_template(said, tokenize=False) == theirs


def test_errors_name_what_is_wrong(folders: Path, tmp_path: Path) -> None:
    cases: list[tuple[list[object], str]] = [
        (["export", folders / "megatron", tmp_path / "out"], "adapter.json: not found"),
        (["export", folders / "hf", tmp_path / "out"], "holds no complete distributed checkpoint"),
        (["export", folders / "peft", tmp_path / "out"], "is a PEFT folder already"),
        (
            ["import", folders / "hf", tmp_path / "out", "--base", folders / "megatron"],
            "adapter_config.json: not found",
        ),
        (["import", folders / "peft", tmp_path / "out", "--base", folders / "hf"], "holds no complete distributed"),
        (["convert", folders / "peft", tmp_path / "out", "--format", "gguf"], "format 'gguf': expected one of peft"),
        (["convert", folders / "peft", folders / "peft", "--format", "vllm"], "is the source itself"),
        (["merge", folders / "peft", folders / "peft", "--overwrite"], "is the source itself"),
        (["merge", folders / "peft", folders / "hf", "--overwrite"], "is not a folder|is the source itself"),
    ]
    for arguments, words in cases:
        with pytest.raises(BridgeError, match=words):
            CliRunner().invoke(app, ["adapter", *map(str, arguments)], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []
    cli("import", folders / "peft", tmp_path / "adapter", "--base", folders / "megatron")
    with pytest.raises(UsageError, match="`adapter merge` makes a model of them"):
        export_hf(tmp_path / "adapter", tmp_path / "out")


def test_one_line_and_exit_code_without_megatron(folders: Path, tmp_path: Path) -> None:
    """Importing Megatron takes ten seconds, and it warns on the way: handling files needs none of it."""
    text = (
        "import sys, atexit, bridge.cli; atexit.register(lambda: print('megatron' in sys.modules)); bridge.cli.main()"
    )
    command = [sys.executable, "-c", text, "adapter", "export"]
    command += [str(folders / "peft"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (1, "False\n")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(folders / "peft") in result.stderr


@pytest.mark.parametrize("command", ["export", "import", "merge", "convert"])
def test_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, ["adapter", command, "--help"])
    assert result.exit_code == 0
    assert f"gemma4-bridge adapter {command}" in result.output.replace("\n", " ")
