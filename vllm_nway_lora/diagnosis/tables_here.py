# SPDX-License-Identifier: Apache-2.0
"""What this package knows by table, and not by a trace, of the classes in the installed vLLM."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vllm_nway_lora.compat.sources import Sources
from vllm_nway_lora.models import tables
from vllm_nway_lora.models.without_lora import is_listed, name_class

#: The folders of vLLM with model classes and their layers.
_FOLDERS = ("models", "model_executor/models", "model_executor/layers")


def list_tables(vllm: Path) -> dict[str, str]:
    """Return class or projection -> what a table states of it, where the sources have that name.

    Args:
        vllm: the folder of the package ``vllm``. Its sources are read and not imported.
    """
    names: set[str] = set()
    for folder in _FOLDERS:
        for path in sorted((vllm / folder).rglob("*.py")):
            names |= set(re.findall(r"\w+", path.read_text(errors="ignore")))
    found: dict[str, list[str]] = {}
    for name, reason in _list_entries():
        if name in names:
            found.setdefault(name, []).append(reason)
    return {name: "; ".join(dict.fromkeys(reasons)) for name, reasons in sorted(found.items())}


def list_switched_on() -> list[str]:
    """Return the architectures that take LoRA only because this package switches it on."""
    from vllm.model_executor.models import ModelRegistry

    sources = Sources()
    found = []
    for architecture, entry in ModelRegistry.models.items():
        module, name = name_class(entry)
        # A later release can have LoRA on the class itself.
        if is_listed(module, name) and "supports_lora" not in sources.find_members(module, name):
            found.append(architecture)
    return sorted(found)


def _list_entries() -> Iterator[tuple[str, str]]:
    """Yield every entry of the tables, as the name of a class or projection and what it states."""
    for name, covered in tables.OUTPUTS.items():
        yield name, f"the outputs of {', '.join(covered)}, where they are not traced"
    for name, listed in tables.UNLISTED.items():
        yield name, f"modules that its class can omit: {', '.join(listed)}"
    for name, (declared, _) in tables.MISNAMED.items():
        yield name, f"other names for the modules {', '.join(declared)}"
    for name in tables.UNUSABLE:
        yield name, "an entry for a layer without LoRA is dropped"
    for name, renames in tables.RENAMES.items():
        yield (
            name,
            f"renames on loading, if its class does not state them: {', '.join(f'{a} to {b}' for a, b in renames.items())}",
        )
    for name in tables.SAME_PRODUCT:
        yield name, "its own forward computes the same product"
    for (parent, layer), refused in tables.UNSUPPORTED.items():
        reasons = "; ".join(dict.fromkeys(refused.values()))
        yield parent.rpartition(".")[2] or layer, f"LoRA on {layer} is refused: {reasons}"
    readers: dict[tuple[str, str], list[str]] = {}
    for read in tables.READS:
        readers.setdefault((read.parent, read.reader), []).append(read.layer)
    for (parent, reader), layers in readers.items():
        yield parent, f"LoRA on {', '.join(layers)} is refused where {reader} reads the weight"
    for name, (flag, _) in tables.FUSED_KERNEL_FLAGS.items():
        yield name, f"{flag} is turned off, so that the layer is called"
