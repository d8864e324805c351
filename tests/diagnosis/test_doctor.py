"""The command ``vllm-nway-lora``: the report of ``doctor``, exit statuses, wrong usage."""

from __future__ import annotations

import json
import os
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
        "import vllm.lora.model_manager as m; m.renamed = m.__dict__.pop('from_layer')"
    )
    assert status == 1
    assert any("vllm.lora.model_manager.from_layer" in warning for warning in report["warnings"])
    states = {patch["state"] for patch in report["patches"]}
    assert "aside" in states <= {"aside", "not needed here"}


OTHER_PLUGIN = """
import functools
import vllm.lora.model_manager as manager
import vllm.lora.worker_manager as worker
import vllm_nway_lora

def replacement(*args, **kwargs):
    raise AssertionError

def wrapper_of(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper

def register():
"""


def doctor_beside(folder: Path, *register: str) -> tuple[int, dict[str, Any], str]:
    """Run doctor beside another plugin, which vLLM loads before this one.

    Returns the exit status, the report, and the name of the other plugin's module and its file.
    """
    file = folder / "another_plugin.py"
    file.write_text(OTHER_PLUGIN + "".join(f"    {line}\n" for line in register))
    metadata = folder / "another_plugin-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: another-plugin\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nanother = another_plugin:register\n"
    )
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    status, report = doctor(PYTHONPATH=path)
    return status, report, f"another_plugin ({file})"


def test_doctor_names_what_others_replaced_before(tmp_path: Path) -> None:
    """It wraps them, so all is well; what others override of classes that it uses is named too."""
    status, report, other = doctor_beside(
        tmp_path,
        "manager.from_layer = wrapper_of(manager.from_layer)",
        "worker.LRUCacheWorkerLoRAManager._load_adapter = wrapper_of(",
        "    worker.WorkerLoRAManager._load_adapter)",
    )
    patches = {patch["target"]: patch for patch in report["patches"] if patch["name"] != "-"}
    assert patches["vllm.lora.model_manager.from_layer"]["replaced_by"] == other
    [override] = [patch for patch in report["patches"] if patch["name"] == "-"]
    assert override["target"] == (
        "vllm.lora.worker_manager.LRUCacheWorkerLoRAManager._load_adapter"
    )
    assert (override["state"], override["reason"]) == ("replaced", f"by {other}")
    assert status == 0, report["warnings"]


def test_doctor_names_what_others_replace_afterwards(tmp_path: Path) -> None:
    status, report, other = doctor_beside(
        tmp_path,
        "vllm_nway_lora.register()",
        "manager.process_packed_modules_mapping = replacement",
        "manager.from_layer = wrapper_of(manager.from_layer)",
        "worker.LRUCacheWorkerLoRAManager.__init__ = replacement",
    )
    assert status == 1
    states = {patch["name"]: patch["state"] for patch in report["patches"]}
    assert states["packed-modules-mapping"] == states["admission"] == "replaced"
    assert states["lora-layer-class-of-models"] == "on"
    [wrapped] = [patch for patch in report["patches"] if patch["name"] == "-"]
    assert wrapped["target"] == "vllm.lora.model_manager.from_layer"
    assert wrapped["reason"] == f"by {other}"
    mapping, admission = sorted(report["warnings"], reverse=True)
    assert mapping == (
        "patch packed-modules-mapping is not in place: "
        f"vllm.lora.model_manager.process_packed_modules_mapping is replaced by {other}"
    )
    assert admission == (
        "patch admission is not in place: "
        f"vllm.lora.worker_manager.LRUCacheWorkerLoRAManager.__init__ is replaced by {other}"
    )


@pytest.mark.parametrize("command", ["check", "plan"])
def test_missing_model_folder_is_wrong_usage(tmp_path: Path, command: str) -> None:
    arguments = [command, str(tmp_path), *([str(tmp_path)] if command == "check" else [])]
    done = run_python(
        f"import sys; from vllm_nway_lora.cli import main; sys.exit(main({arguments!r}))"
    )
    assert done.returncode == 2, done.stderr
    assert "no local folder with config.json" in done.stderr
    assert "hf download" in done.stderr
