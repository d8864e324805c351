"""The command ``vllm-nway-lora``: the report of ``doctor``, exit statuses, wrong usage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_python

DOCTOR = """
import sys
from vllm_nway_lora.cli import main
{before}
sys.exit(main(["doctor", "--json"]))
"""


def doctor(before: str = "", **environment: str) -> tuple[int, dict[str, Any]]:
    done = run_python(DOCTOR.format(before=before), **environment)
    assert "{" in done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout[done.stdout.index("{\n") :])


def test_doctor_reports_healthy_installation() -> None:
    status, report = doctor()
    assert status == 0, report
    assert report["healthy"]
    assert not report["warnings"]
    assert {patch["state"] for patch in report["patches"]} <= {"on", "not needed here"}
    assert len(report["selftest"]) == 16
    assert set(report["selftest"].values()) == {"exact"}


def test_doctor_reports_filtered_plugin_first() -> None:
    status, report = doctor(VLLM_PLUGINS="lora_filesystem_resolver")
    assert status == 1
    assert report["warnings"][0].startswith("VLLM_PLUGINS='lora_filesystem_resolver' filters")


def test_doctor_reports_that_plugin_is_off() -> None:
    status, report = doctor(VLLM_NWAY_LORA="0")
    assert status == 1
    assert report["warnings"] == ["VLLM_NWAY_LORA=0: the plugin is off"]


def test_doctor_names_missing_attribute() -> None:
    status, report = doctor(
        "import vllm.lora.utils as u; u._lora_classes = u.__dict__.pop('_all_lora_classes')"
    )
    assert status == 1
    assert any("vllm.lora.utils._all_lora_classes" in warning for warning in report["warnings"])
    states = {patch["state"] for patch in report["patches"]}
    assert "aside" in states <= {"aside", "not needed here"}


def test_doctor_names_earlier_replacement_of_a_target() -> None:
    _, report = doctor(
        """
import types
import vllm.lora.model_manager as m
def other(model, *args, **kwargs): ...
other.__module__ = "another_plugin.patches"
m.process_packed_modules_mapping = other
"""
    )
    [patch] = [p for p in report["patches"] if p["name"] == "packed-modules-mapping"]
    assert patch["replaced_by"] == "another_plugin.patches"


@pytest.mark.parametrize("command", ["check", "plan"])
def test_missing_model_folder_is_wrong_usage(tmp_path: Path, command: str) -> None:
    arguments = [command, str(tmp_path), *([str(tmp_path)] if command == "check" else [])]
    done = run_python(
        f"import sys; from vllm_nway_lora.cli import main; sys.exit(main({arguments!r}))"
    )
    assert done.returncode == 2, done.stderr
    assert "no local folder with config.json" in done.stderr
    assert "hf download" in done.stderr
