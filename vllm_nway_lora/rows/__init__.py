# SPDX-License-Identifier: Apache-2.0
"""The place of each module's rows in a fused output, per tensor-parallel rank."""
