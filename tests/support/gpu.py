"""vLLM's GPU kernels for LoRA: in Triton's interpreter on CPU tensors, or on a GPU.

``NWAY_LORA_TEST_GPU`` selects where they run:

- unset: in the interpreter; no GPU is used.
- ``1``: on the GPU. vLLM is on its CPU platform, so its compiled extensions are not needed.
- ``cuda``: on the GPU, with vLLM on its CUDA platform.

:func:`prepare` must be called before any other import of vLLM.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

VARIABLE = "NWAY_LORA_TEST_GPU"
PUNICA = "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"


def mode() -> str:
    """Return ``interpreter``, ``1`` or ``cuda``.

    Raises:
        ValueError: the variable has another value.
    """
    found = os.environ.get(VARIABLE) or "interpreter"
    if found not in ("interpreter", "1", "cuda"):
        raise ValueError(f"{VARIABLE}={found}: use 1 or cuda")
    return found


def is_native() -> bool:
    """Return whether the kernels run on a GPU."""
    return mode() != "interpreter"


def device() -> str:
    """Return torch's name of the device on which the kernels run."""
    return "cuda" if is_native() else "cpu"


def prepare() -> None:
    """Select where the kernels run, and the platform that vLLM sees.

    Raises:
        RuntimeError: vLLM is imported already, finds no Triton, or has another platform than CUDA.
    """
    if "vllm" in sys.modules:
        raise RuntimeError("tests/gpu_kernels needs a process without other suites")
    if not is_native():
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if mode() != "cuda":
        os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    import vllm.platforms

    # vLLM switches Triton off if its version contains "cpu". The kernels are in that wheel too.
    vllm.platforms.vllm_version_matches_substr = lambda *_: False
    if mode() != "cuda":
        from vllm.platforms.cpu import CpuPlatform

        CpuPlatform.get_punica_wrapper = classmethod(lambda cls: PUNICA)
        if is_native():
            CpuPlatform.dispatch_key = "CUDA"  # vLLM registers its operators for this key
        vllm.platforms._current_platform = CpuPlatform()
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        raise RuntimeError("vLLM finds no Triton")
    if mode() == "cuda" and not vllm.platforms.current_platform.is_cuda():
        raise RuntimeError(f"vLLM's platform is {vllm.platforms.current_platform}, not CUDA")
    if mode() != "cuda":
        from vllm.model_executor.layers import utils

        utils.dispatch_cpu_unquantized_gemm = use_torch_linear
    if not is_native():
        from support import gpu_interpreter

        gpu_interpreter.install()
    elif mode() == "1":
        from vllm.lora.ops.triton_ops import lora_expand_op

        # vLLM asks the platform whether the kernel must avoid a fault of ptxas.
        if hasattr(lora_expand_op, "current_platform"):
            lora_expand_op.current_platform = SimpleNamespace(
                is_cuda=lambda: True, is_device_capability=_is_capability
            )


def use_torch_linear(layer: Any, remove_weight: bool) -> None:
    """Leave a weight as it is; vLLM's CPU platform would pack it for kernels of the CPU."""
    import torch

    layer.cpu_linear = torch.nn.functional.linear


def _is_capability(capability: int) -> bool:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return capability == 10 * major + minor


def card() -> str:
    """Return the name of the device on which the kernels run, for reports."""
    if not is_native():
        return "Triton's interpreter on CPU"
    import torch

    return (
        f"{torch.cuda.get_device_name()}, vLLM's {'CUDA' if mode() == 'cuda' else 'CPU'} platform"
    )


def forget_addresses() -> None:
    """Clear the kernels' tables of LoRA tensors.

    They are keyed by address and never cleared, because an engine never frees its LoRA layers. Tests
    do, and later layers get the same addresses.
    """
    from vllm.lora.ops.triton_ops import utils

    utils._LORA_A_PTR_DICT.clear()
    utils._LORA_B_PTR_DICT.clear()


class _TorchWithFloat32(SimpleNamespace):
    """torch for two host functions of vLLM whose assertion allows 16-bit types only."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return torch.float32 if name == "float16" else getattr(torch, name)


def allow_float32() -> ExitStack:
    """Return a patch that allows float32 in place of float16 as LoRA's dtype.

    The families' exact integers need float32. The kernels compute with it; the assertion is of the
    functions around them. On a GPU their products are in TF32, exact for integers up to 2048.
    """
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    stack = ExitStack()
    for module in (lora_shrink_op, lora_expand_op):
        stack.enter_context(mock.patch.object(module, "torch", _TorchWithFloat32()))
    return stack
