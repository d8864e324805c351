# SPDX-License-Identifier: Apache-2.0
"""The answers of ``check`` and ``plan`` on the disk, by all that they depend on.

Imports neither torch nor vLLM, so that a second answer takes no import of them.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import importlib.util
import json
import os
import platform
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import vllm_nway_lora
from vllm_nway_lora.diagnosis import report as report_module
from vllm_nway_lora.diagnosis.report import Outcome, Report

#: The number of answers that are kept, the newest.
CAPACITY = 200

#: Files up to this size count by their contents, larger ones by size and time.
_SMALL = 1 << 20

#: Beginnings of the names of environment variables that can change an answer.
_VARIABLES = (
    *("VLLM_", "TORCH", "PYTORCH_", "TRITON_", "TRANSFORMERS_", "HF_", "CUDA_", "HIP_", "ROCR_"),
    *("PYTHONPATH", "NWAY_LORA_"),
)


class _NotCacheable(TypeError):
    """A value that this module cannot write."""


def build_key(command: str, model: str, adapter: str | None, options: Any) -> str | None:
    """Return the key of an answer: a digest of all that it depends on.

    That is: the command, its folders and options; this package's sources and vLLM's; names and versions
    of all distributions; Python, the machine and its accelerators; environment variables; the model's
    configuration and, if its own code is trusted, that code; the adapter's configuration and headers.

    Args:
        command: ``check`` or ``plan``.
        model: the model's folder.
        adapter: the adapter's folder, if any.
        options: the dataclass of the server's options.

    Returns:
        The key; None if the answer depends on code outside of these folders, or a file cannot be read.
    """
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        digest.update(json.dumps(parts, sort_keys=True, default=str).encode())

    trusts = bool(getattr(options, "trust_remote_code", False))
    try:
        add(command, model, adapter, type(options).__qualname__, dataclasses.asdict(options))
        add(os.path.abspath(model), adapter and os.path.abspath(adapter))
        add(sys.version, sys.executable, platform.platform(), sorted(_list_accelerators()))
        add({k: v for k, v in os.environ.items() if k.startswith(_VARIABLES) and k != "HF_TOKEN"})
        add(sorted(_list_distributions()))
        for path in sorted(Path(vllm_nway_lora.__file__).parent.rglob("*.py")):
            add(str(path), hashlib.sha256(path.read_bytes()).hexdigest())
        vllm = importlib.util.find_spec("vllm")
        for folder in (vllm.submodule_search_locations or ()) if vllm else ():
            for path in sorted(Path(folder).rglob("*.py")):
                add(str(path), *_stamp(path))
        if trusts and _has_foreign_code(Path(model)):
            return None
        paths = [path for path in Path(model).iterdir() if path.is_file()]
        paths += Path(model).rglob("*.py") if trusts else ()
        paths += [path for path in Path(adapter).rglob("*") if path.is_file()] if adapter else []
        for path in sorted({*paths}):
            add(str(path), _describe(path))
    except (OSError, ValueError, struct.error):
        return None
    return digest.hexdigest()


def load(key: str) -> Report | None:
    """Return the answer of a key; None if there is none that can be read.

    The plans in its rows have the fields of a :class:`FusionPlan`, and lists in place of tensors.
    """
    try:
        found = _decode(json.loads((_find_folder() / f"{key}.json").read_text()))
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, Report) else None


def store(key: str, report: Report) -> bool:
    """Write an answer and remove the oldest ones; return whether it was written.

    An answer that this machine could not find is not written, and neither is anything where the folder
    cannot be written.
    """
    if Outcome.UNKNOWN in (report.stock.outcome, report.plugin.outcome):
        return False
    temporary = None
    try:
        text = json.dumps(_encode(report))
        folder = _find_folder()
        folder.mkdir(parents=True, exist_ok=True)
        # Another process never sees half of a file.
        descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary, folder / f"{key}.json")
        _remove_oldest(folder)
    except (OSError, RuntimeError, _NotCacheable):
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)
        return False
    return True


def _find_folder() -> Path:
    """Return the folder of the answers.

    Raises:
        RuntimeError: the user has no home.
    """
    # As the XDG specification says, a relative path counts as unset.
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return root / "vllm-nway-lora" / "answers"


def _remove_oldest(folder: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for path in sorted(times, key=times.__getitem__, reverse=True)[CAPACITY:]:
        with suppress(OSError):  # another process has removed it
            path.unlink()


def _list_distributions() -> Iterator[str]:
    """Yield names and versions of what is installed, as the names of metadata folders have them."""
    for folder in dict.fromkeys(sys.path):
        with suppress(OSError):
            yield from (
                name
                for name in os.listdir(folder or ".")
                if name.endswith((".dist-info", ".egg-info", ".egg-link", ".pth"))
            )


def _list_accelerators() -> Iterator[str]:
    with suppress(OSError):
        yield from (
            n for n in os.listdir("/dev") if n.startswith(("nvidia", "kfd", "dri", "accel"))
        )


def _has_foreign_code(model: Path) -> bool:
    """Return whether the code of a model is in another repository (``owner/name--module.Class``)."""
    config = json.loads((model / "config.json").read_text())
    return "--" in json.dumps(config.get("auto_map") or {})


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _describe(path: Path) -> Any:
    """Return what an answer depends on of a file: of tensors, the names, types and shapes."""
    size, time = _stamp(path)
    if path.suffix == ".safetensors" and size >= 8:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return size, hashlib.sha256(file.read(min(length, size))).hexdigest()
    if size <= _SMALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return size, time


def _encode(value: Any) -> Any:
    """Return a value as objects that ``json`` writes, with the names of its classes."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, enum.Enum):
        return {"enum": _name(type(value)), "member": value.name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": _name(type(value)), "fields": fields}
    if isinstance(value, Mapping):
        return {"mapping": [[_encode(key), _encode(of)] for key, of in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor
        return value.tolist()
    raise _NotCacheable(f"{type(value).__name__} in a report")


def _decode(value: Any) -> Any:
    """Return the value of which :func:`_encode` returned ``value``."""
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_decode(item) for item in value["tuple"])
    if "mapping" in value:
        return {_decode(key): _decode(of) for key, of in value["mapping"]}
    if "enum" in value:
        return getattr(report_module, value["enum"].partition(":")[2])[value["member"]]
    fields = {name: _decode(of) for name, of in value["fields"].items()}
    module, _, name = value["class"].partition(":")
    # The classes of other modules need torch.
    build = getattr(report_module, name) if module == report_module.__name__ else SimpleNamespace
    return build(**fields)


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
