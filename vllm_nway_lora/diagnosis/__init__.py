# SPDX-License-Identifier: Apache-2.0
"""The answers of the command ``vllm-nway-lora``: ``doctor``, ``check`` and ``plan``."""
