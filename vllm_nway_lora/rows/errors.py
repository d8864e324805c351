# SPDX-License-Identifier: Apache-2.0
"""The error of rows that cannot be placed. Imports neither torch nor vLLM."""


class PlanError(ValueError):
    """A fused projection, or tensors for it, that no plan places exactly."""
