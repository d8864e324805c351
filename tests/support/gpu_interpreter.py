"""Triton's interpreter, made fit for vLLM's LoRA kernels: bfloat16, and less time per program."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def install() -> None:
    """Patch the interpreter and the size of the launches. Call it after vLLM has found Triton."""
    from triton.runtime import interpreter
    from vllm.lora.ops.triton_ops import lora_shrink_op

    _compute_bfloat16(interpreter)
    _patch_language_once(interpreter)
    get_configs = lora_shrink_op.get_lora_op_configs

    def get_small_configs(*args: Any, **kwargs: Any) -> dict[str, Any]:
        # One program takes milliseconds, and the inputs of the tests are narrow.
        return {**get_configs(*args, **kwargs), "split_k": 2, "block_k": 32}

    lora_shrink_op.get_lora_op_configs = get_small_configs


def _compute_bfloat16(interpreter: Any) -> None:
    """Let products and sums of bfloat16 compute on its values.

    The interpreter holds bfloat16 as uint16, and otherwise computes on these integers.
    """
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    create_dot, binary_op = builder.create_dot, builder.binary_op

    def is_bfloat16(operand: Any) -> bool:
        return bool(operand.dtype.scalar == tl.bfloat16)

    def values(operand: Any) -> Any:
        return (operand.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if not is_bfloat16(a):
            return create_dot(self, a, b, d, *rest)
        return handle(np.matmul(values(a), values(b)) + d.data, d.dtype.scalar)

    def binary(self: Any, left: Any, right: Any, function: Any) -> Any:
        if not is_bfloat16(left):
            return binary_op(self, left, right, function)
        result = np.ascontiguousarray(function(values(left), values(right)))
        bits = torch.from_numpy(result).bfloat16().view(torch.uint16).numpy()
        return handle(bits, tl.bfloat16)

    builder.create_dot, builder.binary_op = dot, binary


def _patch_language_once(interpreter: Any) -> None:
    """Let the interpreter patch ``triton.language`` once per launch and module.

    It does so at each call of a device function, which takes most of its time.
    """
    patched: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def call_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = call_kernel
    interpreter.InterpretedFunction.__call__ = call_device_function
