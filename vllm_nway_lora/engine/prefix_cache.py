# SPDX-License-Identifier: Apache-2.0
"""Keep an adapter's cached prefixes from answering for other weights under the same name.

vLLM's key of a cached block has the adapter's name (until 0.30.0), or its name and path (from 0.31.0),
and never its contents. After other weights have been loaded under a name, this module adds a label to
the keys of that name. Runs in the engine core.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

#: Name, size in bytes and modification time in nanoseconds of an adapter's files, sorted; None if the
#: path is not a local folder.
Files = tuple[tuple[str, int, int], ...] | None

#: Adapter's name -> the files of its weights that were loaded last.
_files: dict[str, Files] = {}
#: Adapter's name -> its label. The first weights under a name have none.
_labels: dict[str, str] = {}
_numbers = itertools.count(1)

#: On a ``Request``: the label that its block hashes have.
_ATTRIBUTE = "_nway_lora_label"


def note_weights(name: str, files: Files) -> bool:
    """Note that weights have been loaded under a name; return whether the name has a new label.

    It gets one if the weights are not those that were loaded last.
    """
    is_known, last = name in _files, _files.get(name)
    _files[name] = files
    if not is_known or (files is not None and files == last):
        return False
    # A digest, so that engines that share a cache and have loaded the same files share prefixes.
    content = repr(files) if files is not None else str(next(_numbers))
    _labels[name] = hashlib.sha256(content.encode()).hexdigest()[:16]
    return True


def add_label(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    """Add the adapter's label to a block's key; wraps ``_gen_lora_extra_hash_keys``."""
    keys = wrapped(*args, **kwargs)
    request = args[0] if args else kwargs["request"]
    if request.lora_request is None or not _labels:
        return keys
    label = _labels.get(request.lora_request.lora_name)
    setattr(request, _ATTRIBUTE, label)
    return keys if label is None else [*keys, label]


def rehash(engine: Any, request: Any) -> None:
    """Compute a request's block hashes again if its adapter's label has changed since they were made.

    vLLM hashes a request's prompt in its input thread, before it adds the request.
    """
    label = _labels.get(request.lora_request.lora_name)
    hasher = getattr(engine, "request_block_hasher", None)
    if hasher is not None and getattr(request, _ATTRIBUTE, None) != label:
        request.block_hashes = []
        request.block_hashes = hasher(request)
