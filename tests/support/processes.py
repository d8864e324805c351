"""Python code run in a process of its own: what a plugin does to a process is tested in fresh ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any


def run_python(
    code: str, *arguments: str, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with ``arguments``, and with ``environment`` on top of this process's; None takes a variable away."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env.pop("VLLM_NWAY_LORA", None)
    for name, value in environment.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def evaluate(code: str, *arguments: str, **environment: str | None) -> Any:
    """Run ``code``, which prints JSON as its last line, and return that.

    Raises:
        RuntimeError: the code failed; the message is what it wrote.
    """
    done = run_python(code, *arguments, **environment)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
