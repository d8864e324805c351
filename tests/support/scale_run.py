"""The soak and the comparison with stock vLLM, run by ``python3 ci/scale.py``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.scale import BLOCKS, SLOTS, save_served
from support.scale_load import run_beside_stock, run_soak


def main() -> int:
    """Run both and write the result; return 1 if an answer was wrong or a request failed."""
    import vllm

    import vllm_nway_lora

    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--bursts", type=int, default=4)
    parser.add_argument("--result", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        served = save_served(root)
        beside = run_beside_stock(served, root, arguments.bursts, 200) if arguments.bursts else {}
        print(json.dumps(beside, indent=2), flush=True)
        soak = run_soak(served, root / "soak.log", arguments.seconds)
    result: dict[str, Any] = {
        "vllm": vllm.__version__,
        "vllm-nway-lora": vllm_nway_lora.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "options": " ".join((*SLOTS, *BLOCKS)),
        "beside stock": beside,
        "soak": soak,
    }
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")
    print(arguments.result.read_text())
    is_exact = all(side["exact"] == side["requests"] for side in beside.values())
    return int(bool(soak["faults"]) or not is_exact)


if __name__ == "__main__":
    sys.exit(main())
