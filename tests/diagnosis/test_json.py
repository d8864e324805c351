"""Tests that ``docs/json.md`` describes every field that ``--json`` prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest import mock

import pytest
from support.layout_models import MODELS
from support.layouts import checkpoint
from support.models import import_classes, save_config
from support.release import needs_qwen3_5_text

from vllm_nway_lora import cli
from vllm_nway_lora.diagnosis.as_json import FORMAT
from vllm_nway_lora.diagnosis.report import Outcome

TEXT = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
MODEL = next(model for model in MODELS if model.name == "Qwen3.5 text")


@needs_qwen3_5_text
def test_every_field_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(tmp_path, MODEL.config)
    import_classes(MODEL.config)
    folder = checkpoint(MODEL).save(tmp_path / "adapter")
    assert cli.main(["plan", str(tmp_path), "--json", "-tp", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert cli.main(["check", str(tmp_path), str(folder), "--json"]) == 0
    check = json.loads(capsys.readouterr().out)
    fused = next(layer for layer in plan["layers"] if layer["ranks"])
    fields = {*plan, *check, *plan["stock"], *plan["costs"]["stock"], *fused}
    fields |= {name for cell in fused["ranks"][0].values() for name in cell}
    described = set(re.findall(r"`(\w+)`", TEXT))
    assert fields <= described, fields - described
    assert {outcome.value for outcome in Outcome} <= set(re.findall(r"`([\w ]+)`", TEXT))
    assert plan["format"] == FORMAT
    assert f"is {FORMAT}." in TEXT


@needs_qwen3_5_text
@pytest.mark.parametrize("arguments", [["--json"], ["--width", "80"]])
def test_a_second_answer_is_the_first_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    save_config(tmp_path, MODEL.config)
    import_classes(MODEL.config)
    folder = checkpoint(MODEL).save(tmp_path / "adapter")
    command = ["check", str(tmp_path), str(folder), "-tp", "2", *arguments]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    with mock.patch.object(cli, "_examine_anew", side_effect=AssertionError):
        assert cli.main(command) == 0
    assert capsys.readouterr().out == first
