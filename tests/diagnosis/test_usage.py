"""Tests of the command line: wrong usage is one line and exit status 2, without a traceback."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.layout_models import MODELS
from support.layouts import checkpoint
from support.models import import_classes, save_config

from vllm_nway_lora import cli

LLAMA = next(model for model in MODELS if model.name == "Llama")
Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Return a model's folder and an adapter's, both without fault."""
    model = tmp_path / "model"
    model.mkdir()
    save_config(model, LLAMA.config)
    import_classes(LLAMA.config)
    return model, checkpoint(LLAMA).save(tmp_path / "adapter")


def change_config(**settings: Any) -> Callable[[Path, Path], None]:
    def change(model: Path, adapter: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def write(name: str, content: bytes) -> Callable[[Path, Path], None]:
    """Return a change that writes ``content`` into a file of the model or of the adapter."""

    def change(model: Path, adapter: Path) -> None:
        folder, _, file = name.partition("/")
        ({"model": model, "adapter": adapter}[folder] / file).write_bytes(content)

    return change


def pickle_only(model: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea\nsize 167832240\n"
TENSORS = "adapter/adapter_model.safetensors"


def unchanged(model: Path, adapter: Path) -> None:
    """Change nothing: the fault is in the arguments."""


@pytest.mark.parametrize(
    ("arguments", "change", "expected"),
    [
        (["-tp", "0"], unchanged, "-tp: invalid positive number value: '0'"),
        (["-tp", "-2"], unchanged, "-tp: invalid positive number value: '-2'"),
        (["-tp", "3"], unchanged, "must be divisible by tensor parallel size (3)"),
        (["--max-lora-rank", "13"], unchanged, "max_lora_rank: Input should be 1, 8, 16"),
        (["--hf-overrides", "[1]"], unchanged, "invalid JSON object value"),
        (["--svg", "nowhere/x.svg"], unchanged, "nowhere/x.svg: there is no such folder"),
        (["--unknown"], unchanged, "unrecognized arguments: --unknown"),
        ([], write("model/config.json", b"{ oops"), "config.json is not valid JSON"),
        ([], write("model/config.json", b"[]"), "config.json is not a JSON object"),
        (
            [],
            write("adapter/adapter_config.json", b"{ nope"),
            "adapter_config.json is not valid JSON",
        ),
        ([], write(TENSORS, POINTER), "is a pointer of git-lfs"),
        ([], write(TENSORS, b""), "is not a complete safetensors file"),
        ([], write(TENSORS, struct.pack("<Q", 10**15)), "is not a complete safetensors file"),
        ([], write(TENSORS, struct.pack("<Q", 4) + b"{}"), "is not a complete safetensors file"),
        ([], pickle_only, "cannot be read"),
        ([], change_config(architectures=["FooForCausalLM"], model_type="foo"), "foo"),
        ([], change_config(architectures=["FooForCausalLM"]), "FooForCausalLM"),
    ],
    ids=lambda value: None if isinstance(value, list) else getattr(value, "__name__", str(value)),
)
def test_wrong_usage_is_one_line_and_status_2(
    pair: Pair,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    change: Callable[[Path, Path], None],
    expected: str,
) -> None:
    change(*pair)
    try:
        status = cli.main(["check", *map(str, pair), *arguments])
    except SystemExit as exit:  # argparse
        status = exit.code
    output, errors = capfd.readouterr()
    assert status == 2, errors
    assert output == ""
    assert errors.startswith("vllm-nway-lora")
    assert errors.count("\n") == 1
    assert expected in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("nowhere", "there is no folder nowhere\n"),
        ("./a/b/c", "there is no folder ./a/b/c\n"),
        ("Qwen/Qwen3.5-9B", "hf download Qwen/Qwen3.5-9B"),
    ],
)
def test_only_a_hub_name_gets_advice_on_the_hub(
    capsys: pytest.CaptureFixture[str], folder: str, expected: str
) -> None:
    assert cli.main(["plan", folder]) == 2
    errors = capsys.readouterr().err
    assert expected in errors
    assert ("hf download" in errors) == ("hf download" in expected)


def test_a_folder_that_exists_gets_no_advice_on_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"vllm-nway-lora plan: {tmp_path} has no config.json\n"


def test_a_refusal_names_the_users_folder(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """The tensors are examined in a temporary copy."""
    model, adapter = pair
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    (adapter / "adapter_model.safetensors").unlink()
    assert cli.main(["check", str(model), str(adapter), "--json"]) == 1
    reason = json.loads(capsys.readouterr().out)["plugin"]["reason"]
    assert reason.startswith(f"LoRA adapter 'adapter' ({adapter}) is refused on vLLM ")
    assert str(adapter) in reason.partition(" is refused on ")[2]


def test_nothing_is_wider_than_80_columns(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *map(str, pair), "--width", "80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("self_attn." in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_without_vllm_one_line_says_so(
    pair: Pair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", str(pair[0])]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("vllm-nway-lora plan: vLLM is not installed for ")
    assert errors.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("vllm-nway-lora ")


@pytest.mark.parametrize("command", ["check", "plan", "doctor"])
def test_every_option_has_help(command: str) -> None:
    parser = cli._parser()
    [commands] = [a for a in parser._actions if hasattr(a, "choices") and a.choices]
    for action in commands.choices[command]._actions:
        assert action.help, action.option_strings
