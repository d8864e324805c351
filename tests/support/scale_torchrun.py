"""Starts ``support.scale_offline`` on several ranks as torchrun does (``external_launcher``)."""

from __future__ import annotations

import json
import sys


def main(arguments: str) -> None:
    """Run the job on as many ranks as it names, on a free port."""
    from torch.distributed.run import main as torchrun

    ranks = json.loads(arguments)["ranks"]
    options = ["--standalone", f"--nproc-per-node={ranks}", "--no-python"]
    torchrun([*options, sys.executable, "-P", "-m", "support.scale_offline", arguments])


if __name__ == "__main__":
    main(sys.argv[1])
