# SPDX-License-Identifier: Apache-2.0
"""A copy of an adapter with the same names, shapes and dtypes, whose numbers are zeros."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.files import find_files
from vllm_nway_lora.diagnosis.options import UsageError

#: The names of dtypes in safetensors' format.
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
#: The beginning of a file that git-lfs has not downloaded.
_POINTER = b"version https://git-lfs"
#: The length of a header from which safetensors refuses a file.
_LONGEST_HEADER = 100_000_000


@contextmanager
def zero_adapter(adapter: Path) -> Iterator[Path]:
    """Create an adapter with the same configuration, names, shapes and dtypes, and only zeros.

    Its files of tensors are sparse: they have headers and no data on the disk.

    Raises:
        UsageError: a file has no tensors that can be read.
        AdapterError: a tensor is of a dtype that is not read, or a shard is missing.
    """
    found = find_files(adapter)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source in adapter.glob("*.json"):
            (folder / source.name).write_bytes(source.read_bytes())
        for source in found.paths if found else ():
            if source.suffix == ".safetensors":
                header, size = _read_header(source), source.stat().st_size
            else:
                header, size = _build_header(source)
                source = source.with_suffix(".safetensors")
            (folder / source.name).write_bytes(header)
            os.truncate(folder / source.name, size)
        yield folder


def find_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of a zero adapter's tensors; float32 if there are several."""
    names = {
        entry["dtype"]
        for path in folder.glob("*.safetensors")
        for name, entry in json.loads(_read_header(path)[8:]).items()
        if name != "__metadata__"
    }
    found = [dtype for dtype, name in _DTYPES.items() if {name} == names]
    return found[0] if found else torch.float32


def _read_header(path: Path) -> bytes:
    """Return the length and the text with which a safetensors file begins."""
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
        if start == _POINTER:
            raise UsageError(
                f"{path} is a pointer of git-lfs, without the tensors. Fetch them with `git lfs pull`"
            )
        file.seek(0)
        length = file.read(8)
        size = struct.unpack("<Q", length)[0] if len(length) == 8 else _LONGEST_HEADER
        header = length + file.read(size) if size < _LONGEST_HEADER else b""
    if len(header) != 8 + size:
        raise UsageError(f"{path} is not a complete safetensors file. Copy or save it again")
    return header


def _build_header(path: Path) -> tuple[bytes, int]:
    """Return the header of a pickled file's tensors in safetensors' format, and the whole size."""
    entries: dict[str, Any] = {}
    end = 0
    try:
        tensors = torch.load(path, "meta", weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        if tensor.dtype not in _DTYPES:
            raise AdapterError(
                f"tensor {name} in {path.name} is {tensor.dtype}, and check reads "
                f"{', '.join(map(str, _DTYPES))}. Save the adapter in one of these types"
            )
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + end
