# SPDX-License-Identifier: Apache-2.0
"""Read from vLLM's manager and LoRA layer what a mixture of experts takes."""

from __future__ import annotations

from typing import Any

import vllm

from vllm_nway_lora.adapters.expert_types import USUAL, Mixture, Swaps
from vllm_nway_lora.adapters.experts import read_sizes, stacked_modules
from vllm_nway_lora.adapters.target import LayoutError
from vllm_nway_lora.compat import defects

#: vLLM takes the rows of gate and up for alternating in this architecture only (``_slice_w13_b``,
#: vllm/lora/layers/fused_moe.py, and ``_convert_3d_to_2d_moe_lora``, vllm/lora/model_manager.py).
_INTERLEAVED = "GptOssForCausalLM"

#: The beginning of an architecture -> what PEFT does to its experts' parameters. These store ``(experts,
#: columns, rows)``: GPT-OSS, with ``is_transposed`` in transformers 5 (5.24.0) and without it in 4
#: (4.57.6, modeling_gpt_oss.py); Llama 4, always without; Qwen3-VL in transformers 4 only (4.57.6,
#: modeling_qwen3_vl_moe.py). Of Qwen3-Omni and of InternS1 and S2, which have code of their own, it is
#: not known.
_SWAPS = {
    "GptOss": Swaps(old=False, new=None),
    "Llama4": Swaps(old=False, new=True),
    "Qwen3VLMoe": Swaps(old=None, new=None),
    "Qwen3Omni": Swaps(old=None, new=None),
    "Intern": Swaps(old=None, new=None),
}


def read_mixture(manager: Any, adapter: Any, path: str, layer: Any) -> Mixture:
    """Return what a mixture of experts takes of an adapter.

    Args:
        manager: the rank's ``LoRAModelManager``.
        adapter: the ``LoRAModel``; its request can say that its experts are stacked.
        path: the mixture's path in the model.
        layer: its LoRA layer.

    Raises:
        LayoutError: vLLM's modules are not as many as the experts have projections.
    """
    experts, hidden, intermediate = read_sizes(manager, layer)
    is_stacked = bool(stacked_modules(manager, adapter, path, layer))
    is_shared = bool(getattr(manager, "_enable_moe_shared_loras", False))
    # An expert's modules are gate (w1), down (w2), up (w3), or up and down without a gate.
    kinds = ("up", "down") if manager._is_non_gated_moe else ("gate", "down", "up")
    names = list(manager.packed_modules.get(path, ()))
    modules: tuple[dict[str, str], ...] = ()
    local = range(experts)
    if not is_stacked and not is_shared:
        if len(names) != experts * len(kinds):
            raise LayoutError(
                f"layer {path}: vLLM has {len(names)} modules for {', '.join(kinds)} of {experts} experts"
            )
        own = [name.removeprefix(f"{path}.") for name in names]
        n = len(kinds)
        modules = tuple(
            dict(zip(kinds, own[start : start + n], strict=True)) for start in range(0, len(own), n)
        )
        if hasattr(manager, "_restrict_to_local_experts"):  # from 0.22.0 on
            here = manager._restrict_to_local_experts(path, names)
            start = names.index(here[0]) // n
            local = range(start, start + len(here) // n)
    architecture = _architecture(manager, layer)
    return Mixture(
        path=path,
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        is_stacked=is_stacked,
        is_shared=is_shared,
        is_gated="gate" in kinds,
        is_interleaved=architecture == _INTERLEAVED,
        swaps=next((s for start, s in _SWAPS.items() if architecture.startswith(start)), USUAL),
        modules=modules,
        local=local,
        scales_alike=bool(modules)
        and defects.find("experts-without-rslora").affects(vllm.__version__),
        layer=type(layer).__name__,
    )


def _architecture(manager: Any, layer: Any) -> str:
    """Return the model's architecture, as vLLM does to cut a rank's rows of gate_up_proj."""
    if name := getattr(layer, "_base_model", ""):
        return str(name)
    names = getattr(getattr(manager.model, "config", None), "architectures", None) or [""]
    return str(names[0])
