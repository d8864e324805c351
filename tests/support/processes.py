"""Python code run in a fresh process, for tests of what the plugin changes in a process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

#: The working folder of child processes: not the repository, whose sources would be imported in place of
#: the installed wheel. (`python -P` prevents that too, from Python 3.11 on.)
TESTS = Path(__file__).resolve().parent.parent
#: Seconds. Only a process that hangs takes that long: one that imports vLLM takes 10 to 60 seconds of
#: processor time, and many times that by the clock while other tests use the machine.
TIME_LIMIT = 3600


def run_python(
    code: str, *arguments: str, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with ``arguments`` in a fresh process.

    Args:
        code: Python code.
        arguments: the process's ``sys.argv[1:]``.
        environment: variables set on top of this process's; None removes a variable.
    """
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env.pop("VLLM_NWAY_LORA", None)
    for name, value in environment.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=TESTS,
        env=env,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )


def evaluate(code: str, *arguments: str, **environment: str | None) -> Any:
    """Run ``code``, whose last printed line is JSON, and return the value of that line.

    Raises:
        RuntimeError: the code failed; the message is its stdout and stderr.
    """
    done = run_python(code, *arguments, **environment)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run_module(
    module: str, job: dict[str, Any], log: Path, environment: dict[str, str], limit: float
) -> None:
    """Run a module with ``job`` as JSON in a child process, and end every process that it started.

    Args:
        module: the module's name; ``job`` is its only argument.
        job: what the module has to do.
        log: the file for its output.
        environment: its whole environment.
        limit: seconds.

    Raises:
        RuntimeError: it failed or did not end; the message is the end of its log.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(job)],
            cwd=TESTS,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise RuntimeError(log.read_text()[-4000:])
