# SPDX-License-Identifier: Apache-2.0
"""The engine core and the API server: adapters are loaded by all ranks or by none.

No module of this package imports torch or vLLM at import time.
"""
