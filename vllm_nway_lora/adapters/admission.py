# SPDX-License-Identifier: Apache-2.0
"""Admit an adapter whole, or refuse it, before vLLM makes room for it.

:mod:`vllm_nway_lora.adapters.hooks` calls :func:`admit` on every way into vLLM's LoRA manager.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import vllm
from vllm.lora.layers import FusedMoEWithLoRA

from vllm_nway_lora import settings
from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.fit import validate_layer, weights_for_layer
from vllm_nway_lora.adapters.origin import get_origin
from vllm_nway_lora.adapters.target import LayoutError
from vllm_nway_lora.adapters.translation import translate_adapter
from vllm_nway_lora.adapters.unmatched import sort_unmatched
from vllm_nway_lora.layers.nway import NWayLinearWithLoRA
from vllm_nway_lora.rows.pairs import find_pair_fault

logger = logging.getLogger("vllm.nway_lora")

_ADMITTED_BY = "_nway_lora_admitted_by"

#: The number of faults, and of modules per fault, that an error spells out.
_SPELLED_OUT = 5


def admit(manager: Any, adapter: Any, label: str) -> None:
    """Admit an adapter whole, or refuse it. An adapter is examined once.

    Args:
        manager: the rank's ``LoRAModelManager``.
        adapter: the ``LoRAModel``, loaded and not packed yet.
        label: the adapter's name in messages.

    Raises:
        AdapterError: one of its tensors cannot be applied exactly, or nothing of it is applied.
    """
    if getattr(adapter, _ADMITTED_BY, None) is manager:
        return
    findings, refusal = decide(manager, adapter, label)
    if refusal:
        raise AdapterError(refusal)
    for reason, modules in findings.left_out.items():
        logger.warning("%s is served without %s: %s.", label, ", ".join(modules), reason)
    if findings.unmatched:
        logger.warning(
            "%s is served without part of it, because %s=%s: %s.",
            label,
            settings.VARIABLE,
            settings.Mode.LENIENT.value,
            "; ".join(findings.unmatched),
        )
    if rules := get_origin(adapter).rules:
        logger.info("%s is translated: %s.", label, "; ".join(rules))
    logger.info("%s is served: %s.", label, findings.summarize())
    setattr(adapter, _ADMITTED_BY, manager)


def decide(manager: Any, adapter: Any, label: str) -> tuple[Findings, str]:
    """Examine an adapter, and translate it if its layout needs it.

    Args:
        manager: as for :func:`admit`.
        adapter: as for :func:`admit`.
        label: as for :func:`admit`.

    Returns:
        The findings, and the message of the refusal; empty if the adapter is served.
    """
    findings, fault = translate_and_examine(manager, adapter)
    if fault:
        return findings, format_refusal(label, [fault])
    is_lenient = settings.read_mode() is settings.Mode.LENIENT
    faults, advice = list(findings.faults), ""
    if findings.is_empty and not faults:
        faults = ["no module of it is left, so that the base model would answer under its name"]
        faults += [f"{reason}: {_join(', ', of)}" for reason, of in findings.left_out.items()]
    elif findings.unmatched and not faults and not is_lenient:
        advice = (
            f" {settings.VARIABLE}={settings.Mode.LENIENT.value} serves adapters without the "
            "modules that have no layer."
        )
    if faults or not is_lenient:
        faults += findings.unmatched
    if not faults:
        return findings, ""
    if rules := get_origin(adapter).rules:
        advice = f" It was translated: {'; '.join(rules)}.{advice}"
    return findings, format_refusal(label, faults) + advice


def format_refusal(label: str, faults: Sequence[str]) -> str:
    """Return the message of a refused adapter."""
    reasons = _join("; ", [fault.rstrip(". ") for fault in faults])
    return (
        f"{label} is refused on vLLM {vllm.__version__}: {reasons}. Correct the adapter, or check that "
        "it was made for this model."
    )


def _join(separator: str, items: Sequence[str]) -> str:
    more = len(items) - _SPELLED_OUT
    return separator.join([*items[:_SPELLED_OUT], *([f"and {more} more"] if more > 0 else [])])


@dataclasses.dataclass(frozen=True)
class Findings:
    """The result of :func:`examine`; every fault is a phrase for a message.

    Attributes:
        faults: tensors that cannot be applied exactly.
        unmatched: modules that no layer uses and that should have a layer here.
        left_out: reason -> modules that this server's settings leave out.
        elsewhere: modules of layers that are not on this rank (pipeline parallelism).
        applied: the ``LoRALayerWeights`` that layers of this rank use.
        fused: how many of them are in projections that this package serves.
        unused: the modules that no layer of this rank uses.
        has_experts: whether layers of experts use some.
    """

    faults: list[str]
    unmatched: list[str]
    left_out: dict[str, list[str]]
    elsewhere: list[str]
    applied: list[Any]
    fused: int
    unused: list[str]
    has_experts: bool

    @property
    def is_empty(self) -> bool:
        """Whether no rank would apply anything of the adapter."""
        return not self.applied and not self.elsewhere

    def summarize(self) -> str:
        """Return the number of applied modules, their highest rank, and their bytes as loaded."""
        tensors = [t for weights in self.applied for t in (weights.lora_a, weights.lora_b)]
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        rank = max((weights.rank for weights in self.applied), default=0)
        return (
            f"{len(self.applied)} modules, {self.fused} of them in N-way fused projections, rank "
            f"{rank}, {size} bytes"
        )


def translate_and_examine(manager: Any, adapter: Any) -> tuple[Findings, str]:
    """Examine an adapter; if layers do not take it as it is, translate it and examine the result.

    Args:
        manager: as for :func:`examine`.
        adapter: as for :func:`examine`.

    Returns:
        The findings, and the reason why a module has no exact translation; empty if all have one.
    """
    findings = examine(manager, adapter)
    # Experts' tensors can fit in an orientation that is not the layer's.
    if findings.faults or findings.unused or findings.has_experts:
        try:
            if translate_adapter(manager, adapter, findings.unused):
                findings = examine(manager, adapter)
        except LayoutError as error:
            return findings, str(error)
        except Exception as error:  # tensors or settings of a kind that nobody has thought of
            logger.debug("The translation failed", exc_info=True)
            return findings, (
                f"its layout cannot be read ({type(error).__name__}: {error}). Save the adapter with PEFT"
            )
    return findings, ""


def examine(manager: Any, adapter: Any) -> Findings:
    """Compare every tensor of an adapter with the layer of this rank that uses it.

    Args:
        manager: the rank's ``LoRAModelManager``.
        adapter: the ``LoRAModel``, loaded and not packed yet.
    """
    faults: list[str] = []
    used: dict[int, Any] = {}
    fused: set[int] = set()
    has_experts = False
    for name, layer in manager.modules.items():
        weights_of = weights_for_layer(manager, adapter, name, layer)
        present = {id(weights): weights for _, weights in weights_of if weights is not None}
        if present:
            if isinstance(layer, NWayLinearWithLoRA):
                fused |= present.keys()
            has_experts = has_experts or isinstance(layer, FusedMoEWithLoRA)
            used |= present
            faults += validate_layer(manager, name, layer, weights_of)
    if not adapter.loras:
        faults.append("it has no LoRA tensors")
    unused = {m: weights for m, weights in adapter.loras.items() if id(weights) not in used}
    # vLLM also scales and pins tensors that no layer here uses, and fails if one half is missing.
    faults += [
        f"module {module}: {find_pair_fault(weights.lora_a, weights.lora_b)}"
        for module, weights in unused.items()
        if weights.lora_a is None or weights.lora_b is None
    ]
    unmatched, left_out, elsewhere = sort_unmatched(manager, adapter, unused)
    return Findings(
        faults,
        unmatched,
        left_out,
        elsewhere,
        list(used.values()),
        len(fused),
        list(unused),
        has_experts,
    )
