# SPDX-License-Identifier: Apache-2.0
"""The LoRA layer for fused projections, the choice of layers for it, and its products on CPU."""
