# SPDX-License-Identifier: Apache-2.0
"""Whole or refused: what an adapter must satisfy before vLLM makes room for it.

Checked within ``WorkerLoRAManager._load_adapter``, which in every release from 0.17.0 to 0.33.0
runs before anything is evicted, packed or written: refusing there has no side effect.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import vllm
from vllm.lora.utils import parse_fine_tuned_lora_name

from vllm_nway_lora import settings
from vllm_nway_lora.containment import PREPARED, AdapterError
from vllm_nway_lora.fit import given_to, pair_problems, problems_of
from vllm_nway_lora.layer import NWayLinearWithLoRA

logger = logging.getLogger("vllm.nway_lora")

#: How many problems of one adapter an error spells out.
_SPELLED_OUT = 5

#: Keys of adapter_config.json that change what an adapter computes. A release whose `PEFTHelper` has
#: no such field ignores them (vLLM to 0.31.0 all but `use_dora`); PEFT's own names and meanings.
_MEANINGFUL_KEYS = (
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)

#: Values of `init_lora_weights` whose adapters are right only on base weights that PEFT modifies.
_MODIFYING_INITS = ("pissa", "olora", "corda", "loftq")


def load_adapter(wrapped: Any, worker_manager: Any, args: Any, kwargs: Any) -> Any:
    """Load an adapter and admit it whole, or refuse it; wraps ``WorkerLoRAManager._load_adapter``.

    Raises:
        AdapterError: the adapter cannot be loaded, or a tensor of it cannot be applied exactly.
    """
    request = args[0] if args else kwargs["lora_request"]
    kept = getattr(worker_manager, PREPARED, None)
    if kept is not None and _same(kept[0], request):
        return kept[1]
    try:
        adapter = wrapped(*args, **kwargs)
    except Exception as error:
        # The words of vLLM's own errors stay whole: its server knows "not found" by them.
        words = (
            str(error) if isinstance(error, AdapterError) else f"{type(error).__name__}: {error}"
        )
        raise AdapterError(_refusal(request, [words])) from error
    findings = check(worker_manager._adapter_manager, adapter)
    who = f"LoRA adapter {request.lora_name!r} ({request.lora_path})"
    for reason, modules in findings.left_out.items():
        logger.warning("%s is served without %s: %s.", who, ", ".join(modules), reason)
    problems, advice = findings.problems, ""
    if findings.unmatched and settings.read_mode() is settings.Mode.LENIENT:
        logger.warning(
            "%s is served without part of it, as %s=%s says: %s.",
            who,
            settings.VARIABLE,
            settings.Mode.LENIENT.value,
            "; ".join(findings.unmatched),
        )
    elif findings.unmatched:
        problems = problems + findings.unmatched
        advice = (
            f" {settings.VARIABLE}={settings.Mode.LENIENT.value} serves adapters without the "
            "modules that have no layer."
        )
    if problems:
        raise AdapterError(_refusal(request, problems) + advice)
    logger.info("%s is served: %s.", who, findings.summary())
    return adapter


def read_config(wrapped: Any, peft_helper: Any, args: Any, kwargs: Any) -> Any:
    """Refuse settings that this release would ignore; wraps ``PEFTHelper.from_dict``.

    Raises:
        AdapterError: adapter_config.json has such a setting; the message names it.
    """
    config: Mapping[str, Any] = args[0] if args else kwargs["config_dict"]
    known = {field.name for field in dataclasses.fields(peft_helper)}
    ignored = [key for key in _MEANINGFUL_KEYS if key not in known and config.get(key)]
    init = config.get("init_lora_weights")
    if "init_lora_weights" not in known and str(init).lower().startswith(_MODIFYING_INITS):
        ignored.append("init_lora_weights")
    if ignored:
        settings_ = ", ".join(f"{key}={config[key]!r}" for key in ignored)
        raise AdapterError(
            f"adapter_config.json has {settings_}, which this release does not know and would "
            "ignore. Use a later vLLM, or have PEFT write the adapter without it"
        )
    return wrapped(*args, **kwargs)


def read_tensors(wrapped: Any, _model_class: Any, args: Any, kwargs: Any) -> Any:
    """Refuse tensors that vLLM would convert or drop; wraps ``LoRAModel.from_lora_tensors``.

    Raises:
        AdapterError: tensors that are no floating-point numbers, biases of LoRA (vLLM 0.31.0 takes
            them for its matrices, vllm/lora/utils.py), or two tensors for the same place.
    """
    adapter = wrapped(*args, **kwargs)
    tensors = kwargs["tensors"] if "tensors" in kwargs else args[1]
    mapper, helper = kwargs.get("weights_mapper"), kwargs.get("peft_helper")
    saved_whole = getattr(helper, "modules_to_save", None) or ()
    places: dict[tuple[str, bool], str] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"tensor {name} is {tensor.dtype}, not a floating-point type")
        try:
            place = parse_fine_tuned_lora_name(name, mapper)
        except ValueError:
            continue  # what `from_lora_tensors` skips by name; anything else it refused above
        if name.endswith((".lora_A.bias", ".lora_B.bias")):
            raise AdapterError(
                f"tensor {name} is a bias, which LoRA in vLLM does not have. Train the adapter without "
                "lora_bias"
            )
        if place[0] not in saved_whole and places.setdefault(place, name) != name:
            raise AdapterError(
                f"tensors {places[place]} and {name} are both LoRA-{'A' if place[1] else 'B'} of "
                f"module {place[0]}"
            )
    return adapter


def _same(one: Any, other: Any) -> bool:
    # `LoRARequest.__eq__` compares names only.
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("lora_int_id", "lora_name", "lora_path")
    )


def _refusal(request: Any, problems: Sequence[str]) -> str:
    said = [problem.rstrip(". ") for problem in problems[:_SPELLED_OUT]]
    if len(problems) > _SPELLED_OUT:
        said.append(f"and {len(problems) - _SPELLED_OUT} more")
    return (
        f"LoRA adapter {request.lora_name!r} ({request.lora_path}) is refused on vLLM "
        f"{vllm.__version__}: {'; '.join(said)}. What was served before still is. Correct the "
        "adapter, or check that it was made for this model."
    )


@dataclasses.dataclass(frozen=True)
class Findings:
    """What :func:`check` found; every item is a phrase for a message.

    Attributes:
        problems: tensors that cannot be applied exactly.
        unmatched: modules that no layer takes, and that should have one here.
        left_out: reason -> modules that this server's settings leave out.
        applied: the ``LoRALayerWeights`` that layers of this rank take.
        fused: how many of them are in projections that this package serves.
    """

    problems: list[str]
    unmatched: list[str]
    left_out: dict[str, list[str]]
    applied: list[Any]
    fused: int

    def summary(self) -> str:
        """Say what is applied: the highest rank, and the bytes of the tensors as loaded."""
        tensors = [t for weights in self.applied for t in (weights.lora_a, weights.lora_b)]
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        rank = max((weights.rank for weights in self.applied), default=0)
        return (
            f"{len(self.applied)} modules, {self.fused} of them in N-way fused projections, rank "
            f"{rank}, {size} bytes"
        )


def check(manager: Any, adapter: Any) -> Findings:
    """Hold every tensor of an adapter against the layer of this rank that takes it.

    Args:
        manager: the rank's ``LoRAModelManager``.
        adapter: the ``LoRAModel``, loaded and not packed yet.
    """
    problems: list[str] = []
    taken: dict[int, Any] = {}
    fused = 0
    for name, layer in manager.modules.items():
        given = given_to(manager, adapter, name, layer)
        present = {id(weights): weights for _, weights in given if weights is not None}
        if present:
            if isinstance(layer, NWayLinearWithLoRA):
                fused += len(present.keys() - taken.keys())
            taken |= present
            problems += problems_of(manager, name, layer, given)
    if not adapter.loras:
        problems.append("it has no LoRA tensors")
    rest = {m: weights for m, weights in adapter.loras.items() if id(weights) not in taken}
    # vLLM scales and pins what no layer here takes too, and fails at a missing half.
    problems += [
        f"module {module}: {problem}"
        for module, weights in rest.items()
        for problem in pair_problems(weights, manager.lora_config.max_lora_rank, is_moe=True)
    ]
    unclaimed = _sort_unclaimed(manager, adapter, rest)
    return Findings(problems, *unclaimed, list(taken.values()), fused)


def _sort_unclaimed(
    manager: Any, adapter: Any, rest: Mapping[str, Any]
) -> tuple[list[str], dict[str, list[str]]]:
    """Tell modules that no layer here takes and should, from those that rightly have none here."""
    unmatched: list[str] = []
    left_out: dict[str, list[str]] = {}
    layers = dict(manager.model.named_modules(remove_duplicate=False)) if rest else {}
    # Layers of other pipeline ranks, and towers that this server runs without.
    absent = [
        path
        for path, layer in layers.items()
        if type(layer).__name__ in ("PPMissingLayer", "StageMissingLayer")
    ]
    targets = getattr(manager.lora_config, "target_modules", None)
    for module, weights in rest.items():
        if any(_lies_in(manager, adapter, module, weights, path) for path in absent):
            continue
        names = [module, *_fused_names(manager.packed_modules_mapping, module)]
        here = next((name for name in names if name in layers), None)
        if here is None:
            unmatched.append(f"module {module}: this model has no such layer")
        elif targets is not None and not any(
            name in targets or name.rpartition(".")[2] in targets for name in names
        ):
            left_out.setdefault("--lora-target-modules does not name them", []).append(module)
        elif manager.supports_mm and manager._get_punica_wrapper(here) is None:
            left_out.setdefault("this server has LoRA on no such part", []).append(module)
        else:
            modules = [path.rpartition(".")[2] for path in manager.packed_modules.get(here, ())]
            unmatched.append(
                f"module {module}: vLLM would ignore it, since its layer {here} "
                f"({type(layers[here]).__name__}) takes {', '.join(modules) or 'no LoRA'}"
            )
    return unmatched, left_out


def _fused_names(packed: Mapping[str, Sequence[str]], module: str) -> list[str]:
    """Return the paths that a module's fused layer would have."""
    return [
        module.removesuffix(child) + fused
        for fused, children in packed.items()
        for child in children
        if f".{module}".endswith(f".{child}")
    ]


def _lies_in(manager: Any, adapter: Any, module: str, weights: Any, path: str) -> bool:
    """Whether vLLM's look-up of a module in the layer ``path`` would find these weights."""
    parts = path.split(".")
    candidates = (".".join([*parts[:n], module]) for n in range(len(parts)))
    return any(
        f"{name}.".startswith(f"{path}.")
        and manager._get_lora_layer_weights(adapter, name) is weights
        for name in candidates
    )
