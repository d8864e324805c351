"""Audit every class of vLLM's registry that takes LoRA, here or in vLLM: one word per layer and module.

``python -P -m support.audit OUT [ARCHITECTURE...]`` walks the registry of the installed vLLM. Each
architecture is built offline, without memory, in a process forked from this one. ``ci/audit.py`` runs
this module in a release's environment.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm.config import ModelConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import supports_lora

import vllm_nway_lora
from support.audit_words import BETWEEN, Words, audit_rank
from support.models import save_config
from support.shrunk import configurations
from support.usual_fields import complete
from support.verdicts import stub_dependencies
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.models.without_lora import is_listed

#: A tensor-parallel size and its rank that is audited.
RANKS = ((1, 0), (2, 1))
LIMIT = 120  # seconds per architecture
AT_ONCE = 2
CANNOT = "cannot be built here"


def walk(out: Path, chosen: Sequence[str] = ()) -> None:
    """Audit the registry's architectures, or the ``chosen`` ones, and write the result."""
    takes_lora, others, broken = [], 0, {}
    for architecture in sorted(chosen or ModelRegistry.models):
        try:
            model_class = offline.import_class(architecture)
        except Exception as error:
            broken[architecture] = _cannot(error)
            continue
        listed = is_listed(model_class.__module__, model_class.__name__)
        if supports_lora(model_class) or listed:
            takes_lora.append(architecture)
            # Else vLLM inspects the class in a new process.
            ModelRegistry.register_model(architecture, model_class)
        else:
            others += 1
    with tempfile.TemporaryDirectory() as folder:
        found = _run_all(takes_lora, Path(folder))
    result = {"takes no LoRA": others, "architectures": broken | found}
    out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def _run_all(architectures: Sequence[str], folder: Path) -> dict[str, Any]:
    """Audit each architecture in a forked process; return its words, or why there are none."""
    fork = multiprocessing.get_context("fork")
    waiting, running, found = list(architectures), {}, {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            name = waiting.pop(0)
            process = fork.Process(target=_run, args=(name, folder / name))
            process.start()
            running[name] = process, time.monotonic() + LIMIT
        time.sleep(0.05)
        for name, (process, end) in list(running.items()):
            if process.is_alive() and time.monotonic() < end:
                continue
            late = process.is_alive()
            if late:
                process.kill()
            process.join()
            del running[name]
            path = folder / name
            reason = f"more than {LIMIT} s" if late else f"exit status {process.exitcode}"
            found[name] = json.loads(path.read_text()) if path.exists() else f"{CANNOT}: {reason}"
            print(f"{len(found)} of {len(architectures)}: {name}", flush=True)
    return found


def _run(architecture: str, out: Path) -> None:
    log = os.environ.get("AUDIT_LOG")
    with open(f"{log}/{architecture}.log" if log else os.devnull, "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        words = audit(architecture)
        part = out.with_suffix(".part")
        part.write_text(json.dumps(words))
        part.rename(out)


def audit(architecture: str) -> Words | str:
    """Return an architecture's words, or the reason why it cannot be built here."""
    words: dict[str, dict[str, set[str]]] = {}
    faults: list[str] = []
    is_done = False
    for config, family, is_default in configurations(architecture):
        if is_default and is_done:
            continue
        try:
            with stub_dependencies(family) if family else contextlib.nullcontext():
                found = _audit_completed(config)
        except Exception as error:
            logging.exception("%s", architecture)
            faults.append(_cannot(error))
            continue
        is_done |= is_default
        for line, of_sizes in found.items():
            for size, word in of_sizes.items():
                words.setdefault(line, {}).setdefault(size, set()).update(word.split(BETWEEN))
    if not words:
        return faults[0]
    return {
        line: _join({size: BETWEEN.join(sorted(of)) for size, of in of_sizes.items()})
        for line, of_sizes in words.items()
    }


def _audit_completed(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Audit a configuration, with the fields that it lacks and whose usual values are known."""
    while True:
        try:
            return _audit_config(config)
        except AttributeError as error:
            completed = complete(config, error)
            if completed is None:
                raise
            config = completed


def _audit_config(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return line -> tensor-parallel size -> word."""
    words: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_config(Path(folder), config)
        for size, number in RANKS:
            try:
                found = audit_rank(folder, number, size)
            except Exception as error:
                if size == 1:
                    raise
                logging.exception("TP %d", size)
                found = dict.fromkeys(words, _cannot(error))
            for line, word in found.items():
                words.setdefault(line, {})[f"TP {size}"] = word
    return words


def _join(words: Mapping[str, str]) -> str:
    """Return the words of the sizes as one text."""
    if len(set(words.values())) == 1 and len(words) == len(RANKS):
        return next(iter(words.values()))
    return "; ".join(f"{size}: {word}" for size, word in words.items())


def _cannot(error: BaseException) -> str:
    """Return an error's class and first words, or its place if it has none, without temporary paths."""
    words = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
    if not words:
        last = traceback.extract_tb(error.__traceback__)[-1]
        words = [f"in {Path(last.filename).name}, {last.name}"]
    text = re.sub(r" \[type=.*|/tmp/\w+|\S*/site-packages/", "", " ".join(words))
    return f"{CANNOT}: {type(error).__name__}: {text}"[:200]


def _stub() -> None:
    """Replace what only a forward or a processor of inputs needs.

    0.33.0's build for CUDA lacks operators of activations on the CPU platform.
    """
    for name in ("_supports_multimodal_inputs", "_supports_multimodal_for_mm_prefix"):
        if hasattr(ModelConfig, name):
            setattr(ModelConfig, name, lambda *_, **__: True)
    for name in ("gelu_quick", "gelu_new", "gelu_fast"):
        if not hasattr(torch.ops._C, name):
            setattr(torch.ops._C, name, mock.MagicMock())


if __name__ == "__main__":
    logging.basicConfig()
    offline.initialize()
    _stub()
    vllm_nway_lora.unregister()
    vllm_nway_lora.register()
    walk(Path(sys.argv[1]), sys.argv[2:])
