# SPDX-License-Identifier: Apache-2.0
"""Other names of a model's modules: a name is translated only if exactly one module can have it.

Pure Python, no vLLM.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from vllm_nway_lora.adapters.target import LayoutError, Target

#: Parts of names before the first layer's number that say nothing about which model it is. A text
#: model is ``model.layers`` alone and ``model.language_model.layers`` inside a multimodal one.
_NEUTRAL = frozenset(
    {"base_model", "model", "language_model", "text_model", "transformer", "llm", "backbone"}
)

#: Ends of names that Megatron-LM gives its modules, in row orders of its own.
_MEGATRON = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "linear_in", "linear_out")

#: The prefixes of names that kohya-ss writes with underscores instead of dots.
_UNDERSCORED = re.compile(r"^lora_(?:unet|te\d?|transformer|llm|text_model)_")


class Names:
    """The names under which adapters may have the modules of one model."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._exact = {*target.modules, *target.fused, *target.parts, *target.unwrapped}
        whole = [(path, path) for path in self._exact] + list(target.aliases.items())
        self._whole = _group(whole)
        #: Layers that have more than one module each, or whose modules are not known on this rank.
        above = [(path, path) for path in (*target.mixtures, *target.absent)]
        above += [(name, path) for name, path in target.aliases.items() if path in target.mixtures]
        # MLX-LM's name of a mixture (mlx_lm/models/switch_layers.py, 0.32).
        above += [
            (f"{path.removesuffix('experts')}switch_mlp", path)
            for path in target.mixtures
            if path.endswith(".experts")
        ]
        self._above = _group(above)
        self._underscored: dict[str, set[str]] = {}

    def resolve(self, *names: str) -> str | None:
        """Return the path that one of ``names`` means; None if no path is known for any of them.

        Args:
            names: the names of one module, the best first: vLLM's own reading, then the file's.

        Raises:
            LayoutError: several paths have the same right to the name.
        """
        for name in names:
            if name in self._exact:
                return name
            found = self._find(name)
            if len(found) > 1:
                raise LayoutError(
                    f"module {names[-1]} can be {', '.join(sorted(found))}: rename it in the adapter"
                )
            if found:
                return next(iter(found))
        return None

    def _find(self, name: str) -> set[str]:
        if _UNDERSCORED.match(name):
            return self._find_underscored(_UNDERSCORED.sub("", name))
        if found := self._whole.get(_plain(name)):
            return found
        parts = name.split(".")
        for stop in range(len(parts) - 1, 0, -1):
            if found := self._above.get(_plain(".".join(parts[:stop]))):
                rest = ".".join(parts[stop:])
                return {f"{path}.{rest}" for path in found}
        return self._above.get(_plain(name), set())

    def _find_underscored(self, name: str) -> set[str]:
        if not self._underscored:
            for path in self._target.modules:
                key = _plain(path).replace(".", "_")
                self._underscored.setdefault(key, set()).add(path)
        while prefix := next((part for part in _NEUTRAL if name.startswith(f"{part}_")), ""):
            name = name.removeprefix(f"{prefix}_")
        return self._underscored.get(name, set())


def find_nearest(name: str, target: Target) -> str:
    """Return the module whose name is most like ``name``, of those with the same numbers; else empty."""
    digits = re.findall(r"\d+", name)
    alike = [path for path in target.modules if re.findall(r"\d+", path) == digits]
    return next(iter(difflib.get_close_matches(name, alike, n=1, cutoff=0.0)), "")


def explain(name: str, target: Target) -> str:
    """Return what to do about a module of an unknown name, as a phrase."""
    if any(part in _MEGATRON for part in name.split(".")):
        return (
            "this is a name of Megatron-LM, and the file does not give its row order: export the adapter "
            "under Hugging Face's names, as Megatron-Bridge does"
        )
    nearest = find_nearest(name, target)
    return f"the nearest module of this model is {nearest}" if nearest else ""


def _group(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, path in pairs:
        found.setdefault(_plain(name), set()).add(path)
    return found


def _plain(name: str) -> str:
    """Return a name without the parts that say nothing about which model it is."""
    return ".".join(_strip(name.split(".")))


def _strip(parts: list[str]) -> Iterator[str]:
    is_before = True
    for number, part in enumerate(parts):
        is_before = is_before and not part.isdigit()
        if not is_before or part not in _NEUTRAL or number == len(parts) - 1:
            yield part
