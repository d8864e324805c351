# SPDX-License-Identifier: Apache-2.0
"""Admit an adapter whole, or refuse it, before vLLM makes room for it.

The checks run within ``WorkerLoRAManager._load_adapter``. In every release from 0.17.0 to 0.33.0 that
method returns before anything is evicted, packed or written, so a refusal has no side effect.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import vllm

from vllm_nway_lora import settings
from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.fit import validate_layer, validate_pair, weights_for_layer
from vllm_nway_lora.adapters.prepared import get_prepared
from vllm_nway_lora.adapters.unmatched import sort_unmatched
from vllm_nway_lora.layers.nway import NWayLinearWithLoRA

logger = logging.getLogger("vllm.nway_lora")

#: The number of faults that an error spells out.
_SPELLED_OUT = 5


def load_adapter(wrapped: Any, worker_manager: Any, args: Any, kwargs: Any) -> Any:
    """Load an adapter and admit it whole, or refuse it; wraps ``WorkerLoRAManager._load_adapter``.

    Raises:
        AdapterError: the adapter cannot be loaded, or one of its tensors cannot be applied exactly.
    """
    request = args[0] if args else kwargs["lora_request"]
    prepared = get_prepared(worker_manager, request)
    if prepared is not None:
        return prepared
    try:
        adapter = wrapped(*args, **kwargs)
    except Exception as error:
        # vLLM's own texts stay whole: its server recognises "not found" by them.
        text = str(error) if isinstance(error, AdapterError) else f"{type(error).__name__}: {error}"
        raise AdapterError(_format_refusal(request, [text])) from error
    findings = examine(worker_manager._adapter_manager, adapter)
    adapter_name = f"LoRA adapter {request.lora_name!r} ({request.lora_path})"
    for reason, modules in findings.left_out.items():
        logger.warning("%s is served without %s: %s.", adapter_name, ", ".join(modules), reason)
    faults, advice = findings.faults, ""
    if findings.unmatched and settings.read_mode() is settings.Mode.LENIENT:
        logger.warning(
            "%s is served without part of it, because %s=%s: %s.",
            adapter_name,
            settings.VARIABLE,
            settings.Mode.LENIENT.value,
            "; ".join(findings.unmatched),
        )
    elif findings.unmatched:
        faults = faults + findings.unmatched
        advice = (
            f" {settings.VARIABLE}={settings.Mode.LENIENT.value} serves adapters without the "
            "modules that have no layer."
        )
    if faults:
        raise AdapterError(_format_refusal(request, faults) + advice)
    logger.info("%s is served: %s.", adapter_name, findings.summarize())
    return adapter


def _format_refusal(request: Any, faults: Sequence[str]) -> str:
    parts = [fault.rstrip(". ") for fault in faults[:_SPELLED_OUT]]
    if len(faults) > _SPELLED_OUT:
        parts.append(f"and {len(faults) - _SPELLED_OUT} more")
    return (
        f"LoRA adapter {request.lora_name!r} ({request.lora_path}) is refused on vLLM "
        f"{vllm.__version__}: {'; '.join(parts)}. Adapters that were already loaded are not affected. "
        "Correct the adapter, or check that it was made for this model."
    )


@dataclasses.dataclass(frozen=True)
class Findings:
    """The result of :func:`examine`; every fault is a phrase for a message.

    Attributes:
        faults: tensors that cannot be applied exactly.
        unmatched: modules that no layer uses and that should have a layer here.
        left_out: reason -> modules that this server's settings leave out.
        applied: the ``LoRALayerWeights`` that layers of this rank use.
        fused: how many of them are in projections that this package serves.
    """

    faults: list[str]
    unmatched: list[str]
    left_out: dict[str, list[str]]
    applied: list[Any]
    fused: int

    def summarize(self) -> str:
        """Return the number of applied modules, their highest rank, and their bytes as loaded."""
        tensors = [t for weights in self.applied for t in (weights.lora_a, weights.lora_b)]
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        rank = max((weights.rank for weights in self.applied), default=0)
        return (
            f"{len(self.applied)} modules, {self.fused} of them in N-way fused projections, rank "
            f"{rank}, {size} bytes"
        )


def examine(manager: Any, adapter: Any) -> Findings:
    """Compare every tensor of an adapter with the layer of this rank that uses it.

    Args:
        manager: the rank's ``LoRAModelManager``.
        adapter: the ``LoRAModel``, loaded and not packed yet.
    """
    faults: list[str] = []
    used: dict[int, Any] = {}
    fused = 0
    for name, layer in manager.modules.items():
        weights_of = weights_for_layer(manager, adapter, name, layer)
        present = {id(weights): weights for _, weights in weights_of if weights is not None}
        if present:
            if isinstance(layer, NWayLinearWithLoRA):
                fused += len(present.keys() - used.keys())
            used |= present
            faults += validate_layer(manager, name, layer, weights_of)
    if not adapter.loras:
        faults.append("it has no LoRA tensors")
    unused = {m: weights for m, weights in adapter.loras.items() if id(weights) not in used}
    # vLLM also scales and pins tensors that no layer here uses, and fails if one half is missing.
    faults += [
        f"module {module}: {fault}"
        for module, weights in unused.items()
        for fault in validate_pair(weights, manager.lora_config.max_lora_rank, is_moe=True)
    ]
    unmatched, left_out = sort_unmatched(manager, adapter, unused)
    return Findings(faults, unmatched, left_out, list(used.values()), fused)
