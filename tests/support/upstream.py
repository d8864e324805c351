"""Run the tests of docs/upstream on stock vLLM, and with each page's fix in a fork of the process."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "upstream"
_CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: What a test that passes has in place of an error.
PASSED = "passed"


def pages() -> dict[str, Path]:
    """Return defect -> its page."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.md")) if path.stem != "index"}


def code_of(page: Path) -> list[str]:
    """Return the code blocks of a page: the test and, on some pages, the fix."""
    return _CODE.findall(page.read_text())


def run_all() -> dict[str, list[str]]:
    """Return defect -> the outcome of its test, without and, if the page has one, with its fix."""
    [common] = code_of(FOLDER / "index.md")
    names: dict[str, Any] = {"__name__": "common"}
    exec(compile(common, "index.md", "exec"), names)
    tests = {name: code_of(page) for name, page in pages().items()}
    # A fork copies one thread only. The forks below have the model classes that these runs import.
    torch.set_num_threads(1)
    outcomes = {name: [run_here(dict(names), [test])] for name, (test, *_) in tests.items()}
    for name, (test, *fixes) in tests.items():
        outcomes[name] += [run_forked(names, [test, fix]) for fix in fixes]
    return outcomes


def run_forked(names: dict[str, Any], blocks: list[str]) -> str:
    """Run the test of the first block, after all blocks, in a fork; return its error or ``PASSED``."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        with os.fdopen(reader) as pipe:
            outcome = pipe.read()
        os.waitpid(child, 0)
        return outcome
    outcome = "the process ended"
    with contextlib.suppress(BaseException):
        outcome = run_here(dict(names), blocks)
    os.write(writer, outcome.encode())
    os._exit(0)


def run_here(names: dict[str, Any], blocks: list[str]) -> str:
    """Run the test of the first block, after all blocks; return its error or ``PASSED``."""
    try:
        for block in blocks:
            exec(compile(block, "page", "exec"), names)
        [test] = [names[name] for name in names if name.startswith("test_")]
        test()
    except BaseException as error:  # pytest's own outcomes are no Exception
        traceback.print_exc(file=sys.stderr)
        return f"{type(error).__name__}: {error}"
    return PASSED
