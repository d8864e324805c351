"""The command ``vllm-nway-lora doctor``: its report, its exit status, and who is named in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_python

from vllm_nway_lora.diagnosis import issue

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
    assert report["by_table"]["conv1d"].startswith("an entry for a layer without LoRA is dropped")
    assert {"GPT2LMHeadModel", "FalconMambaForCausalLM"} <= set(report["switched_on"])
    assert "VLLM_NWAY_LORA=1, patches: " in report["agreement"]["this process"]
    assert "RankError" in report["agreement"]["if they differ"]
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
    assert report["environment"]["VLLM_NWAY_LORA"] == "0"
    assert report["by_table"]
    assert "self-test: not run" in report["issue"]


def test_doctor_reports_invalid_setting() -> None:
    status, report = doctor(VLLM_NWAY_LORA="yes")
    assert status == 1
    assert report["warnings"][-1].startswith("VLLM_NWAY_LORA='yes' is not a valid value")


@pytest.mark.parametrize("error", ["ModuleNotFoundError('no vllm')", "OSError('libcudart.so')"])
def test_doctor_without_vllm_says_so_on_one_line(tmp_path: Path, error: str) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(f"raise {error}\n")
    code = "import sys; from vllm_nway_lora.cli import main; sys.exit(main(sys.argv[1:]))"
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    done = run_python(code, "doctor", "--width", "2000", PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    [line] = done.stdout.splitlines()
    assert line.startswith("! vLLM is not installed")
    assert error.split("'")[1] in line


def test_doctor_names_missing_attribute() -> None:
    status, report = doctor(
        "import vllm.lora.model_manager as m; m.renamed = m.__dict__.pop('from_layer')"
    )
    assert status == 1
    [warning] = report["warnings"]
    assert warning.startswith("the plugin stands aside and leaves vLLM unchanged")
    assert "vllm.lora.model_manager.from_layer" in warning
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
    patches = {patch["name"]: patch for patch in report["patches"]}
    assert patches["packed-modules-mapping"]["state"] == "replaced"
    assert patches["admission"]["state"] == "replaced"
    wrapped = patches["lora-layer-class-of-models"]
    assert wrapped["state"] == "wrapped"
    assert wrapped["reason"] == f"vllm.lora.model_manager.from_layer is wrapped by {other}"
    mapping, admission = sorted(report["warnings"], reverse=True)
    assert mapping == (
        "patch packed-modules-mapping is not in place: "
        f"vllm.lora.model_manager.process_packed_modules_mapping is replaced by {other}"
    )
    assert admission == (
        "patch admission is not in place: "
        f"vllm.lora.worker_manager.LRUCacheWorkerLoRAManager.__init__ is replaced by {other}"
    )
    assert f"{tmp_path}" not in report["issue"]
    assert "another_plugin.py" in report["issue"]


def test_doctor_names_wrappers_that_do_not_name_what_they_wrap(tmp_path: Path) -> None:
    """They keep it in a closure, call it as their base class's, or derive from vLLM's class."""
    status, report, other = doctor_beside(
        tmp_path,
        "vllm_nway_lora.register()",
        "def plain(function):",
        "    return lambda *args, **kwargs: function(*args, **kwargs)",
        "manager.from_layer = plain(manager.from_layer)",
        "init = worker.WorkerLoRAManager.__init__",
        "worker.WorkerLoRAManager.__init__ = plain(init)",
        "class Mine(manager.LRUCacheLoRAModelManager):",
        "    def activate_adapter(self, lora_id):",
        "        return super().activate_adapter(lora_id)",
        "manager.LRUCacheLoRAModelManager = Mine",
    )
    patches = {patch["name"]: patch for patch in report["patches"]}
    for name in ("lora-layer-class-of-models", "admission", "failed-eviction"):
        assert patches[name]["state"] == "wrapped", report["warnings"]
        assert f"is wrapped by {other}" in patches[name]["reason"]
    assert status == 0, report["warnings"]


def test_doctor_names_replaced_class_and_layers(tmp_path: Path) -> None:
    """A class under vLLM's name that is not vLLM's, an inherited method, and an added LoRA layer."""
    status, report, other = doctor_beside(
        tmp_path,
        "import vllm.lora.utils as utils",
        "from vllm.lora.layers import ColumnParallelLinearWithLoRA as Column",
        "vllm_nway_lora.register()",
        "class LRU:",
        "    pass",
        "worker.LRUCacheWorkerLoRAManager = LRU",
        "Column.__mro__[1].apply = replacement",
        "class Layer(Column):",
        # It takes no layer: the table is a set on some releases, so its place is not known.
        "    @classmethod",
        "    def can_replace_layer(cls, *args, **kwargs):",
        "        return False",
        "utils._all_lora_classes = type(utils._all_lora_classes)(",
        "    [*utils._all_lora_classes, Layer])",
    )
    assert status == 1
    replaced = f"vllm.lora.worker_manager.LRUCacheWorkerLoRAManager is replaced by {other}"
    names = ("admission", "resident-adapters-first")
    assert len(report["warnings"]) == len(names)
    for warning, name in zip(report["warnings"], names):
        assert warning.startswith(f"patch {name} is not in place: {replaced}")
    rest = {patch["target"]: patch for patch in report["patches"] if patch["name"] == "-"}
    apply = rest["vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA.apply"]
    assert (apply["state"], apply["reason"]) == ("replaced", f"by {other}")
    added = rest["vllm.lora.utils._all_lora_classes"]
    assert (added["state"], added["reason"]) == ("added", f"Layer by {other}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("by a.b (/home/me/x/a/b.py)", "by a.b (b.py)"),
        ("see #36372 and vllm/lora/utils.py", "see #36372 and vllm/lora/utils.py"),
        ("https://example.com/a/b", "https://example.com/a/b"),
        (r"by a (C:\Users\me\a.py); '/opt/x/y/'", "by a (a.py); 'y'"),
        ("~/private/z.py", "z.py"),
    ],
)
def test_text_for_issue_has_no_folders(text: str, expected: str) -> None:
    assert issue.remove_paths(text) == expected
