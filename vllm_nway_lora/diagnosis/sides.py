# SPDX-License-Identifier: Apache-2.0
"""Both sides of a comparison, vLLM with the plugin and without it, on every tensor-parallel rank."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from vllm.model_executor.layers.linear import LinearBase

import vllm_nway_lora
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.diagnosis.offline import format_error
from vllm_nway_lora.diagnosis.options import ServerOptions, UsageError
from vllm_nway_lora.diagnosis.report import Outcome, Verdict
from vllm_nway_lora.layers.direct import find_read_compressors
from vllm_nway_lora.layers.mixers import list_part_layers
from vllm_nway_lora.layers.readers import find_readers
from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.notes import get_notes
from vllm_nway_lora.rows.plan import FusionPlan


def each_rank(
    model: str, options: ServerOptions, verdicts: Mapping[bool, Verdict]
) -> Iterator[tuple[bool, offline.Rank]]:
    """Yield ``(plugin is on, rank)`` for every rank of both sides, its model wrapped for LoRA.

    The plugin's side comes first, because its plans define the place of a module's rows. The yielded
    rank is the current one. A rank that cannot be built worsens the verdict of its side.

    Args:
        model: a local folder with ``config.json``.
        options: the server's options.
        verdicts: True for the plugin, False for stock vLLM -> the verdict on the whole.

    Raises:
        UsageError: vLLM does not accept the model's configuration or an option.
    """
    for plugin, verdict in verdicts.items():
        _switch(plugin)
        for number in range(options.tensor_parallel_size):
            try:
                rank = offline.configure(model, number, options)
            except UsageError:
                raise
            except Exception as error:
                verdict.worsen(*_judge_failure(model, Outcome.FAILS, error))
                continue
            try:
                offline.build(rank)
            except Exception as error:
                verdict.worsen(*_judge_failure(model, Outcome.UNKNOWN, error))
                continue
            try:
                rank.wrap()
                rank.warm_up()
            except Exception as error:
                verdict.worsen(Outcome.FAILS, format_error(error))
                continue
            with rank.current():
                yield plugin, rank
            # The next rank needs the memory. The caller still holds this one.
            rank.model = rank.worker_manager = None
    _switch(False)


def judge_stock_layer(
    layer: Any, plan: FusionPlan | None, weights_of: Sequence[tuple[str, Any]], faults: list[str]
) -> tuple[Outcome, str]:
    """Write the row numbers of LoRA-B into the slot of stock's layer and compare them with the plan.

    Args:
        layer: stock vLLM's LoRA layer.
        plan: the plugin's plan of the same layer on the same rank; None if the plugin leaves it.
        weights_of: the layer's modules and their weights.
        faults: the faults of these weights.
    """
    pairs = []
    for _, weights in weights_of:
        if weights is None or weights.lora_a is None or weights.lora_b is None:
            pairs.append((None, None))
            continue
        a, b = torch.zeros_like(weights.lora_a), torch.zeros_like(weights.lora_b)
        a[:1] = 1.0
        if b.ndim == 2:
            b[:, :1] = torch.arange(1.0, len(b) + 1).unsqueeze(1)
        pairs.append((a, b))
    lora_a, lora_b = [a for a, _ in pairs], [b for _, b in pairs]
    try:
        if len(weights_of) == 1:
            layer.set_lora(0, lora_a[0], lora_b[0])
        else:
            layer.set_lora(0, lora_a, lora_b)
    except Exception as error:
        return Outcome.REFUSED, format_error(error)
    if plan is None:
        return (Outcome.WRONG, faults[0]) if faults else (Outcome.EXACT, "")
    held = torch.cat([b[0, 0, :, 0] for b in layer.lora_b_stacked])
    layer.reset_lora(0)
    try:
        plan.validate(
            lora_a, lora_b, columns=layer.input_size, max_rank=layer.lora_b_stacked[0].shape[-1]
        )
    except PlanError as error:
        return Outcome.WRONG, str(error)
    expected = _place_rows(plan, lora_b)
    if torch.equal(held[: len(expected)], expected):
        return Outcome.EXACT, ""
    return Outcome.WRONG, "LoRA-B's rows are not those that the base weight has on this rank"


def judge_stock_experts(
    manager: Any, name: str, adapter: Any, faults: list[str]
) -> tuple[Outcome, str]:
    """Add the part of an adapter that is on one layer of experts to stock's manager.

    Args:
        manager: stock vLLM's ``LoRAModelManager``.
        name: the layer's path in the model.
        adapter: the ``LoRAModel``, which stays as it is.
        faults: the faults of its weights on that layer.
    """
    part = adapter.clone(adapter.id)
    part.loras = {
        module: copy.copy(weights)
        for module, weights in adapter.loras.items()
        if f"{module}.".startswith(f"{name}.")
    }
    layers = mock.patch.object(manager, "modules", {name: manager.modules[name]})
    try:
        with layers:
            manager.add_adapter(part)
            manager.activate_adapter(part.id)
    except Exception as error:
        return Outcome.REFUSED, format_error(error)
    finally:
        manager.remove_adapter(part.id)
    return (Outcome.WRONG, faults[0]) if faults else (Outcome.EXACT, "")


def find_bypassed(rank: offline.Rank) -> dict[int, tuple[Outcome, str]]:
    """Return what stock vLLM makes of LoRA layers that its model does not just call.

    Returns:
        The identity of each such base layer -> the outcome and its reason.
    """
    layers = [reader.layer for reader in find_readers(rank.model, [rank.lora_manager])]
    layers += [layer.base_layer for layer in find_read_compressors(rank.model)]
    past = Outcome.IGNORED, "the model uses the layer past its LoRA"
    part = (
        Outcome.WRONG,
        "the model calls the layer with a part of a batch, and LoRA takes the tokens of others",
    )
    found = {id(layer.base_layer): part for layer in list_part_layers(rank.model)}
    return found | dict.fromkeys(map(id, layers), past)


def is_by_table(layer: Any) -> bool:
    """Return whether a linear layer's rows were not traced, given its LoRA layer."""
    base = getattr(layer, "base_layer", None)
    return isinstance(base, LinearBase) and get_notes(base).traced is None


def _judge_failure(model: str, outcome: Outcome, error: Exception) -> tuple[Outcome, str]:
    """Return the outcome of a model that this machine's vLLM does not build, with the reason."""
    text = format_error(error)
    if own := offline.find_platform_class(model):
        return Outcome.UNKNOWN, f"{own} is this platform's class, and a GPU has another: {text}"
    if outcome is Outcome.UNKNOWN:
        text = f"vLLM cannot build it on this machine: {text}"
    return outcome, text


def _switch(plugin: bool) -> None:
    vllm_nway_lora.unregister()
    if plugin:
        vllm_nway_lora.register()


def _place_rows(plan: FusionPlan, lora_b: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Return per row of this rank's output the number that LoRA-B has there; 0 for none."""
    slices = [torch.zeros(part.width) for part in plan.slices]
    for number, (part, rows) in enumerate(zip(plan.slices, slices, strict=True)):
        if (b := lora_b[plan.source(number)]) is not None:
            rows[part.run] = part.take(b)[:, 0]
    return torch.cat(slices)
