"""Setup for tests of model classes: every test here uses vLLM's CPU platform."""

from __future__ import annotations

import vllm.platforms
from support.cpu import disable_pinned_memory
from vllm.platforms.cpu import CpuPlatform

# vLLM's CUDA build detects its platform only once; replace the result before a test uses it.
if not vllm.platforms.current_platform.is_cpu():
    vllm.platforms._current_platform = CpuPlatform()

disable_pinned_memory()
