# SPDX-License-Identifier: Apache-2.0
"""Every touch on vLLM: named patches, applied in groups on import, and undone."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt

from vllm_nway_lora import releases, settings

logger = logging.getLogger("vllm.nway_lora")


class Missing(LookupError):
    """Something of vLLM that a group needs is not there; the message names it."""


@dataclass(frozen=True)
class Need:
    """An attribute of vLLM that this package calls.

    Attributes:
        module: the module that has it.
        attribute: its path in there (``function`` or ``Class.method``).
        parameters: names that a function there must take, beside any others.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...] = ()

    def find(self) -> tuple[Any, str]:
        """Return the object that holds the attribute, and the attribute's own name.

        Raises:
            Missing: the attribute is not there, or does not take the parameters.
        """
        owner: Any = sys.modules.get(self.module)
        path, _, name = self.attribute.rpartition(".")
        for step in filter(None, path.split(".")):
            owner = getattr(owner, step, None)
        found = getattr(owner, name, None)
        if found is None:
            raise Missing(f"{self.module}.{self.attribute}")
        if self.parameters:
            lacking = set(self.parameters) - set(inspect.signature(found).parameters)
            if lacking:
                raise Missing(
                    f"the parameter {', '.join(sorted(lacking))} of {self.module}.{self.attribute}"
                )
        return owner, name


@dataclass(frozen=True)
class Patch:
    """One attribute of vLLM that this package replaces.

    Attributes:
        name: what the patch is called in messages.
        module: as in :class:`Need`.
        attribute: as in :class:`Need`.
        replacement: from what vLLM has there to what goes there instead.
        parameters: as in :class:`Need`.
    """

    name: str
    module: str
    attribute: str
    replacement: Callable[[Any], Any]
    parameters: tuple[str, ...] = ()

    def find(self) -> tuple[Any, str]:
        """As :meth:`Need.find`; what is missing is said with the patch's name."""
        try:
            return Need(self.module, self.attribute, self.parameters).find()
        except Missing as error:
            raise Missing(f"{error} ({self.name})") from None


@dataclass(frozen=True)
class Group:
    """Patches that are applied together, or none of them.

    Attributes:
        anchor: the module whose import applies the group. It imports those of the patches, so that
            every target can be looked at before the first is replaced.
        patches: what is replaced.
        defects: what the group mends, by their names in :data:`releases.DEFECTS`. Where vLLM has
            none of them, the group is not applied.
        needs: what else of vLLM the replacements call.
    """

    anchor: str
    patches: tuple[Patch, ...]
    defects: tuple[str, ...]
    needs: tuple[Need, ...] = ()

    def needed(self, version: str) -> bool:
        """Tell whether ``version`` of vLLM has anything that the group mends."""
        return any(releases.defect(name).messages(version) is not None for name in self.defects)


def _with_our_layer_first(lora_classes: Any) -> tuple[type, ...]:
    # `from_layer` takes the first class that claims a layer. vLLM to 0.19.1 keeps them in a set,
    # whose order differs between processes; none but ours claims what ours claims first.
    from vllm_nway_lora import unsharded
    from vllm_nway_lora.layer import NWayLinearWithLoRA

    return (NWayLinearWithLoRA, *unsharded.layer_classes(), *lora_classes)


def _wrapped(module: str, function: str) -> Callable[[Any], Any]:
    """Return what wraps an attribute in a function of this package, imported when applied."""

    def wrap(original: Any) -> Any:
        wrapper = getattr(importlib.import_module(f"vllm_nway_lora.{module}"), function)
        return wrapt.FunctionWrapper(original, wrapper)

    return wrap


def _with_loader_remembered(init: Any) -> Any:
    def __init__(wrapped: Any, mixer: Any, args: Any, kwargs: Any) -> None:
        from vllm_nway_lora.probe import remember

        wrapped(*args, **kwargs)
        remember(mixer.in_proj)

    return wrapt.FunctionWrapper(init, __init__)


_COLUMN_PARALLEL = "vllm.lora.layers.column_parallel_linear"
_MAMBA2 = "vllm.model_executor.layers.mamba.mamba_mixer2"

GROUPS = (
    # In the workers: exact layers, and nothing but whole adapters on them.
    Group(
        "vllm.lora.worker_manager",
        (
            Patch(
                "lora-layer-class", "vllm.lora.utils", "_all_lora_classes", _with_our_layer_first
            ),
            Patch(
                "packed-modules-mapping",
                "vllm.lora.model_manager",
                "process_packed_modules_mapping",
                _wrapped("mappings", "process_packed_modules_mapping"),
                parameters=("model",),
            ),
            Patch(
                "admission",
                "vllm.lora.worker_manager",
                "WorkerLoRAManager._load_adapter",
                _wrapped("admission", "load_adapter"),
                ("lora_request",),
            ),
            Patch(
                "adapter-tensors",
                "vllm.lora.lora_model",
                "LoRAModel.from_lora_tensors",
                _wrapped("admission", "read_tensors"),
                ("tensors", "peft_helper", "weights_mapper"),
            ),
            Patch(
                "adapter-config",
                "vllm.lora.peft_helper",
                "PEFTHelper.from_dict",
                _wrapped("admission", "read_config"),
                ("config_dict",),
            ),
        ),
        (
            "fewer-modules-than-outputs",
            "first-module-left-out",
            "last-module-left-out",
            "unwrapped-when-fully-sharded",
            "one-module-cut-in-halves",
            "gathered-when-whole",
            "whole-layer-gathered",
            "copied-lora-a",
            "llama4-rotary-rows",
            "misnamed-modules",
            "served-in-part",
            "patterns-ignored",
            "bias-for-matrix",
        ),
        (
            Need(_COLUMN_PARALLEL, "_mcp_apply", ("x", "bias", "layer")),
            Need(_COLUMN_PARALLEL, "ColumnParallelLinearWithLoRA.apply", ("x", "bias")),
            Need(
                "vllm.lora.utils",
                "from_layer",
                ("layer", "max_loras", "lora_config", "packed_modules_list", "model_config"),
            ),
            Need(
                "vllm.model_executor.layers.linear",
                "MergedColumnParallelLinear.weight_loader",
                ("param", "loaded_weight", "loaded_shard_id"),
            ),
        ),
    ),
    # In the engine core: all ranks or none, and an adapter's failure is not the engine's.
    Group(
        "vllm.v1.engine.core",
        (
            Patch(
                "all-ranks-or-none",
                "vllm.v1.executor.abstract",
                "Executor.add_lora",
                _wrapped("containment", "add_lora"),
                ("lora_request",),
            ),
            Patch(
                "request-alone-fails",
                "vllm.v1.engine.core",
                "EngineCore.add_request",
                _wrapped("containment", "add_request"),
                ("request",),
            ),
            Patch(
                "same-plugin-on-all-ranks",
                "vllm.v1.engine.core",
                "EngineCore.__init__",
                _wrapped("containment", "start_engine"),
                ("vllm_config", "executor_class"),
            ),
        ),
        ("stale-replies", "request-ends-engine"),
    ),
    # In the API server.
    Group(
        "vllm.entrypoints.openai.models.serving",
        (
            Patch(
                "load-inplace-once",
                "vllm.entrypoints.openai.models.serving",
                "OpenAIServingModels.load_lora_adapter",
                _wrapped("containment", "reset_load_inplace"),
                ("request",),
            ),
        ),
        ("reloaded-every-step",),
    ),
    # From 0.22.0 on vLLM does the same by itself.
    Group(
        "vllm.lora.worker_manager",
        (
            Patch(
                "layers-of-two-names",
                "vllm.lora.model_manager",
                "LoRAModelManager._create_lora_modules",
                _wrapped("mappings", "create_lora_modules"),
            ),
        ),
        ("two-names-two-layers",),
    ),
    # Mamba2 sets a loader on the weight of its `in_proj`, which packing for CPU or quantisation drops.
    Group(
        _MAMBA2,
        (Patch("mamba2-loader", _MAMBA2, "MambaMixer2.__init__", _with_loader_remembered),),
        ("mamba2-one-group",),
    ),
)

#: (owner, attribute's name) -> what vLLM had there, per patch that is in place.
_originals: dict[Patch, tuple[Any, str, Any]] = {}
#: What was said already in this process: several groups may have the same to say.
_said: set[str] = set()
_active = False
_hooked = False


def register() -> None:
    """See :func:`vllm_nway_lora.register`."""
    global _active, _hooked
    settings.declare_to_vllm()
    if settings.read_mode() is settings.Mode.OFF:
        return
    _active = True
    if not _hooked:
        # wrapt has no way to take a hook back, so there is one for good and `_active` guards it.
        _hooked = True
        for group in GROUPS:
            wrapt.register_post_import_hook(_on_import, group.anchor)
    else:
        for group in GROUPS:
            if _active and group.anchor in sys.modules:
                _apply(group)


def unregister() -> None:
    """See :func:`vllm_nway_lora.unregister`."""
    _undo()
    _said.clear()


def _undo() -> None:
    global _active
    _active = False
    for owner, name, original in _originals.values():
        setattr(owner, name, original)
    _originals.clear()


def applied() -> tuple[Patch, ...]:
    """Return the patches that are in place in this process."""
    return tuple(_originals)


def _on_import(module: ModuleType) -> None:
    for group in GROUPS:
        if _active and group.anchor == module.__name__:
            _apply(group)


def _apply(group: Group) -> None:
    """Apply every patch of a group whose modules are imported, or none of them."""
    if any(patch in _originals for patch in group.patches):
        return
    version = importlib.import_module("vllm").__version__
    support = releases.support(version)
    if support is releases.Support.TOO_OLD:
        _stand_aside(f"vLLM {version} is older than {releases.FIRST}, the first that it serves")
        return
    if not group.needed(version):
        names = ", ".join(patch.name for patch in group.patches)
        _say(logging.INFO, f"vllm-nway-lora does without {names}: vLLM {version} needs it no more.")
        return
    parts: tuple[Need | Patch, ...] = (*group.needs, *group.patches)
    originals, replacements, missing = {}, {}, []
    for part in parts:
        try:
            owner, name = part.find()
            if isinstance(part, Patch):
                # Not `getattr`, which binds class methods.
                originals[part] = (owner, name, inspect.getattr_static(owner, name))
        except Missing as error:
            missing.append(str(error))
    if not missing:
        try:
            replacements = {p: p.replacement(found) for p, (_, _, found) in originals.items()}
        except (ImportError, AttributeError) as error:  # from the imports of our own modules
            missing.append(f"what this package imports: {error}")
    if missing:
        _stand_aside(f"vLLM {version} lacks {', '.join(missing)}")
        return
    for patch, (owner, name, _) in originals.items():
        setattr(owner, name, replacements[patch])
    _originals.update(originals)
    # Once per process that builds LoRA layers.
    if support is releases.Support.UNTESTED and group is GROUPS[0]:
        _say(
            logging.WARNING,
            f"vllm-nway-lora has not been tested on vLLM {version}; all that it needs is there, so "
            f"it is on. {settings.VARIABLE}=0 turns it off.",
        )


def _stand_aside(reason: str) -> None:
    """Undo what this process has, so that it has the whole of this package or nothing."""
    _undo()
    if settings.read_mode() is settings.Mode.STRICT:
        raise RuntimeError(f"{settings.VARIABLE}=strict: vllm-nway-lora cannot be on: {reason}.")
    _say(logging.WARNING, f"vllm-nway-lora stands aside and leaves vLLM as it is: {reason}.")


def _say(level: int, text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.log(level, "%s", text)
