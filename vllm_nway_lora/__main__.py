# SPDX-License-Identifier: Apache-2.0
"""Run the command: ``python -m vllm_nway_lora``."""

import sys

from vllm_nway_lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
