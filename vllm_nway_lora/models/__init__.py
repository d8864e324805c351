# SPDX-License-Identifier: Apache-2.0
"""Facts about single model classes that this package knows by hand, and code for a few of them."""
