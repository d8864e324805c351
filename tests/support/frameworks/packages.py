"""The projects whose own function takes a stand-in's place where it is installed (standard library only).

Most of them import a GPU's or an RL trainer's packages. A folder is searched for the one module that
has the function: packages above it are not executed, and modules that the function does not call are
blank.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

#: The variable with a JSON object: package's name -> the folder in which it is installed.
VARIABLE = "NWAY_LORA_FRAMEWORKS"


@dataclass(frozen=True)
class Package:
    """A package on PyPI.

    Attributes:
        requirement: what is installed, without dependencies.
        module: the module that has the function.
        function: what is run of it.
        unexecuted: packages above the module whose ``__init__`` is not executed.
        blank: modules that are replaced by blank ones; ``module:name`` gives one an empty dataclass.
        release: the release of vLLM on which it is run; the default release if empty.
    """

    requirement: str
    module: str
    function: str
    unexecuted: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()
    release: str = ""

    def load(self, folder: str) -> Any:
        """Import the module from a folder.

        Raises:
            ImportError: it imports something that is not here.
        """
        if self.module in sys.modules:
            return sys.modules[self.module]
        sys.path.append(folder)
        for name in self.unexecuted:
            package = types.ModuleType(name)
            package.__path__ = [str(Path(folder, *name.split(".")))]
            package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            sys.modules[name] = package
        for entry in self.blank:
            name, _, attribute = entry.partition(":")
            blank: Any = mock.MagicMock(name=name)
            blank.__path__ = []
            blank.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            if attribute:
                setattr(blank, attribute, dataclasses.make_dataclass(attribute, []))
            sys.modules[name] = blank
        return importlib.import_module(self.module)


_ASCEND = ("vllm_ascend", "vllm_ascend.lora", "vllm_ascend.ops")
_ASCEND_BLANK = ("torch_npu", "torch_npu.npu", "torchair")

#: Stand-in's name -> its package.
PACKAGES = {
    "verl": Package(
        "verl==0.9.1",
        "verl.utils.vllm.utils",
        "VLLMHijack.hijack, TensorLoRARequest",
        ("verl", "verl.utils", "verl.utils.vllm", "verl.third_party"),
        # It reads the version of the distribution `vllm`, which a CPU build has not.
        ("verl.third_party.vllm",),
    ),
    "ms-swift": Package(
        "ms-swift==4.6.0",
        "swift.rlhf_trainers.utils",
        "patch_vllm_load_adapter, TensorLoRARequest",
        ("swift", "swift.rlhf_trainers"),
        (
            *("datasets", "wandb", "swanlab", "swift.rl_core", "swift.rl_core.data"),
            *("swift.template", "swift.tuners", "swift.tuners.lora:LoraConfig", "swift.utils"),
        ),
    ),
    "unsloth": Package(
        "unsloth-zoo==2026.10.9",
        "unsloth_zoo.vllm_lora_worker_manager",
        "WorkerLoRAManager, LRUCacheWorkerLoRAManager, LoRARequest",
        ("unsloth_zoo",),
    ),
    "areal": Package(
        "areal==1.0.4",
        "areal.engine.vllm_ext.vllm_worker_extension",
        "VLLMWorkerExtension.areal_update_weight_lora_xccl",
        ("areal", "areal.engine", "areal.engine.vllm_ext"),
        (
            *("areal.engine.core", "areal.engine.core.distributed", "areal.infra"),
            *("areal.infra.platforms", "areal.utils", "areal.utils.constants"),
        ),
    ),
    "ascend-0.18": Package(
        "vllm-ascend==0.18.0",
        "vllm_ascend.lora.utils",
        "refresh_all_lora_classes and the linear layers",
        _ASCEND,
        _ASCEND_BLANK,
        "0.18.0",
    ),
    "ascend-0.26": Package(
        "vllm-ascend==0.26.0rc1",
        "vllm_ascend.lora.utils",
        "refresh_all_lora_classes and the linear layers",
        _ASCEND,
        _ASCEND_BLANK,
        "0.26.0",
    ),
    "tpu": Package(
        "tpu-inference==0.32.0",
        "tpu_inference.lora.lora_manager",
        "TPULRUCacheWorkerLoRAManager",
        ("tpu_inference", "tpu_inference.lora"),
        ("torchax", "tpu_inference.envs"),
    ),
    "rbln": Package(
        "vllm-rbln==0.12.0",
        "vllm_rbln.v1.worker.optimum_worker",
        "RBLNOptimumWorker.add_lora",
        ("vllm_rbln", "vllm_rbln.v1", "vllm_rbln.v1.worker"),
        (
            *("rebel", "vllm_rbln.envs", "vllm_rbln.logger", "vllm_rbln.utils"),
            *("vllm_rbln.utils.optimum", "vllm_rbln.utils.optimum.converter"),
            *("vllm_rbln.v1.worker.optimum_model_runner", "vllm_rbln.v1.worker.utils"),
        ),
    ),
}


def given() -> dict[str, str]:
    """Return the packages that take a stand-in's place in this process: name -> folder."""
    folders: dict[str, str] = json.loads(os.environ.get(VARIABLE, "{}"))
    return folders


def is_given(name: str) -> bool:
    """Return whether a stand-in's own package is given; ``name`` may end in a comma and a variant."""
    return name.partition(",")[0] in given()


def chosen(names: Iterable[str]) -> list[str]:
    """Return the stand-ins whose own package is given, or all if none is given."""
    return [name for name in names if is_given(name) or not given()]


def load(name: str) -> Any:
    """Return the module of a stand-in's own package if it is given, else None."""
    key = name.partition(",")[0]
    return PACKAGES[key].load(given()[key]) if is_given(name) else None
