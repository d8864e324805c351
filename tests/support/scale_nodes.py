"""The workers of a second node: ``python -m support.scale_nodes ARGUMENTS`` as ``vllm serve --headless``.

``vllm serve`` itself needs a distribution named vllm; the CPU build has another name.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from support.scale import ScaleServer


class SecondNode:
    """The headless node of a server with ``--nnodes 2``, for as long as a ``with`` block runs."""

    def __init__(self, server: ScaleServer, log: Path, **environment: str) -> None:
        arguments = server._command[server._command.index("--model") :]
        arguments[arguments.index("--node-rank") + 1] = "1"
        self._command = [sys.executable, "-P", "-m", "support.scale_nodes", *arguments]
        self._env, self._log = server._env | environment, log

    def __enter__(self) -> SecondNode:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def main() -> None:
    """Run the headless node until it is killed."""
    from vllm.entrypoints.cli.serve import run_headless
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
    arguments.headless, arguments.api_server_count = True, 0
    run_headless(arguments)


if __name__ == "__main__":
    main()
