# SPDX-License-Identifier: Apache-2.0
"""Find and read an adapter's tensors in its folder, also where vLLM would not look for them."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from vllm.lora import lora_model
from vllm.lora.utils import get_lora_id

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.forms import is_plain
from vllm_nway_lora.adapters.origin import get_origin, set_origin

_STOCK = "adapter_model.safetensors"
_PICKLED = ("adapter_model.bin", "adapter_model.pt")
_INDEX = "adapter_model.safetensors.index.json"
_SHARD = re.compile(r"adapter_model-(\d+)-of-(\d+)\.safetensors$")

#: Files of one trainer, which vLLM does not know -> the trainer.
_OTHERS = {
    "pytorch_lora_weights.safetensors": "diffusers",
    "adapters.safetensors": "MLX-LM",
}

_is_admitted_later = contextvars.ContextVar("is_admitted_later", default=False)


class _AnyModule(frozenset[str]):
    """The expected modules of a caller that judges the modules itself."""

    def __contains__(self, _: object) -> bool:
        return True


class Found(NamedTuple):
    """The files that have an adapter's tensors.

    Attributes:
        paths: the files.
        rule: their kind, as a phrase for messages; empty for those that vLLM reads itself.
        names: the tensors that an index names in them.
    """

    paths: list[Path]
    rule: str = ""
    names: frozenset[str] = frozenset()


@contextlib.contextmanager
def admission_follows() -> Iterator[None]:
    """Within this context, :func:`load_checkpoint` reads every layout and every module's name.

    Without it nobody would refuse a module that has no layer: other platforms' managers are not
    guarded.
    """
    token = _is_admitted_later.set(True)
    try:
        yield
    finally:
        _is_admitted_later.reset(token)


def load_checkpoint(wrapped: Any, model_class: Any, args: Any, kwargs: Any) -> Any:
    """Load a folder in any layout; wraps ``LoRAModel.from_local_checkpoint``.

    vLLM reads its own layouts itself. Modules that it does not expect are left to admission.

    Raises:
        AdapterError: the folder's tensors are incomplete, or of a kind that cannot be read.
    """
    if not _is_admitted_later.get():
        return wrapped(*args, **kwargs)
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    given["expected_lora_modules"] = _AnyModule(given["expected_lora_modules"])
    # Tensorizer (in 0.24.0) reads from another place than the folder.
    is_elsewhere = bool(given.get("tensorizer_config_dict"))
    found = None if is_elsewhere else find_files(Path(given["lora_dir"]))
    if found is None or _is_stock(found):
        return wrapped(**given)
    keep = _get_filter(given.get("moe_ep_spec"))
    tensors = _read(found, keep, given.get("device", "cpu"))
    # Those arguments that both take: a release can add some.
    shared = inspect.signature(model_class.from_lora_tensors).parameters.keys() & given.keys()
    arguments = {name: given[name] for name in shared} | {"tensors": tensors}
    if arguments.get("lora_model_id") is None:
        arguments["lora_model_id"] = get_lora_id()
    adapter = model_class.from_lora_tensors(**arguments)
    if found.rule:
        origin = get_origin(adapter)
        set_origin(adapter, dataclasses.replace(origin, rules=(found.rule, *origin.rules)))
    return adapter


def find_files(folder: Path) -> Found | None:
    """Return the files that have an adapter's tensors; None if there are none.

    Raises:
        AdapterError: a shard is missing, or the tensors are in a GGUF file.
    """
    for name in (_STOCK, *_PICKLED):
        if (folder / name).is_file():
            return Found([folder / name])
    if shards := _find_shards(folder):
        return shards
    for name, trainer in _OTHERS.items():
        if (folder / name).is_file():
            return Found([folder / name], f"{name} of {trainer} read")
    for path in sorted(folder.glob("*.gguf")):
        raise AdapterError(
            f"{path.name} is a GGUF file, whose tensors have llama.cpp's names and row order. Give the "
            "PEFT folder from which it was converted"
        )
    return None


def _find_shards(folder: Path) -> Found | None:
    """Return the shards of adapter_model.safetensors, by the index if there is one."""
    index = folder / _INDEX
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        expected, source = sorted(set(names.values())), _INDEX
    else:
        names = {}
        files = sorted(folder.glob("adapter_model-*.safetensors"))
        present = [found for path in files if (found := _SHARD.match(path.name))]
        if not present:
            return None
        totals = {found[2] for found in present}
        if len(totals) > 1:
            raise AdapterError(
                "its shards are of several adapters: "
                f"{', '.join(sorted(found[0] for found in present))}. Keep those of one"
            )
        total = totals.pop()
        expected = [
            f"adapter_model-{n:0{len(present[0][1])}}-of-{total}.safetensors"
            for n in range(1, int(total) + 1)
        ]
        source = present[0][0]
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise AdapterError(
            f"{source} tells of {len(expected)} files, and {', '.join(missing)} is missing. Copy every "
            "file of the adapter into its folder"
        )
    rule = f"{len(expected)} shards of {_STOCK} read"
    return Found([folder / name for name in expected], rule, frozenset(names))


def _is_stock(found: Found) -> bool:
    """Return whether vLLM reads a file itself and understands all names in it."""
    [path, *others] = found.paths
    if others or path.name != _STOCK:
        return False
    with safe_open(path, framework="pt") as file:
        return all(map(is_plain, file.keys()))


def _get_filter(spec: Any) -> Callable[[str], bool]:
    """Return which tensors to read: not those of experts on other ranks (``moe_ep_spec`` of 0.24.0)."""
    is_remote = getattr(lora_model, "_is_remote_expert_key", None)
    if spec is None or is_remote is None:
        return lambda name: True
    return lambda name: not is_remote(name, spec)


def _read(found: Found, keep: Callable[[str], bool], device: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of files: name -> tensor.

    A ``.bin`` or ``.pt`` is read as vLLM reads it; its names are known only then.
    """
    tensors: dict[str, torch.Tensor] = {}
    sources: dict[str, Path] = {}
    for path in found.paths:
        for name, tensor in _iterate(path, keep, device):
            if name in tensors:
                raise AdapterError(
                    f"tensor {name} is in {sources[name].name} and in {path.name}. Keep one of them"
                )
            tensors[name], sources[name] = tensor, path
    lost: Sequence[str] = sorted(name for name in found.names - tensors.keys() if keep(name))
    if lost:
        raise AdapterError(
            f"{_INDEX} names tensor {lost[0]}, which no shard has. Copy every file of the adapter into "
            "its folder"
        )
    return tensors


def _iterate(
    path: Path, keep: Callable[[str], bool], device: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    if path.name in _PICKLED:
        loaded = torch.load(path, map_location=device, weights_only=True)
        yield from ((name, tensor) for name, tensor in loaded.items() if keep(name))
        return
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if keep(name):
                yield name, file.get_tensor(name)
