# SPDX-License-Identifier: Apache-2.0
"""The error of a refused adapter. Imports neither torch nor vLLM."""


class AdapterError(ValueError):
    """An adapter that is refused, or that a rank could not load; the message gives every detail.

    Attributes:
        request_ids: the requests that fail because of it.
    """

    request_ids: tuple[str, ...] = ()
