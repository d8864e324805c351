"""vLLM's CPU platform, whichever build of vLLM is installed: no test here runs on a device."""

from __future__ import annotations

import vllm.platforms
from support.cpu import unpin
from vllm.platforms.cpu import CpuPlatform

# The CUDA build picks its platform by what it finds; resolved once, it is never looked for again.
if not vllm.platforms.current_platform.is_cpu():
    vllm.platforms._current_platform = CpuPlatform()

unpin()
