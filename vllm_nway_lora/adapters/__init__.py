# SPDX-License-Identifier: Apache-2.0
"""From an adapter's files or tensors to an admitted adapter: served whole, or refused."""
