# SPDX-License-Identifier: Apache-2.0
"""The parts of vLLM that this package replaces and needs, and the releases that have them."""
