"""Published configurations of models, in ``tests/published``: whole, or with few layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.shrunk import shrink

FOLDER = Path(__file__).parent.parent / "published"

#: The configurations that keep all of their layers, at these tensor-parallel sizes: seconds and MiB are
#: those of a user.
WHOLE: Mapping[str, tuple[int, ...]] = {
    "Qwen3.5-9B": (1, 2),
    "Qwen3.5-35B-A3B": (1,),
    "gpt-oss-20b": (1,),
    "DeepSeek-V3": (1,),
}
#: Of these, the models whose experts' adapters are gigabytes at rank 8, and the adapters on them. PEFT
#: adapts the experts of all layers by these modules' names.
LARGE = ("Qwen3.5-35B-A3B", "DeepSeek-V3")
LARGE_ADAPTERS = ("all linear", "usual seven")
#: Configurations that are examined at these sizes too.
LARGER: Mapping[str, tuple[int, ...]] = {"DeepSeek-V3": (4,), "gpt-oss-120b": (4,)}

#: A configuration's ``quant_method`` -> the name of the precision in the table.
_METHODS = {"bitsandbytes": "bitsandbytes 4-bit", "mxfp4": "MXFP4", "fp8": "FP8 (blocks)"}

_TEXT = "text_config"


def list_names() -> list[str]:
    """Return the names of the configurations."""
    return sorted((path.stem for path in FOLDER.glob("*.json")), key=str.lower)


def read(name: str) -> dict[str, Any]:
    """Return a configuration as it was published."""
    config: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return config


def shorten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with few layers, and at least one of each kind."""
    first_experts = get_text(config).get("first_k_dense_replace") or 0
    shrunk = shrink(config)
    if get_text(shrunk).get("first_k_dense_replace"):
        get_text(shrunk)["first_k_dense_replace"] = min(first_experts, 1)
    return shrunk


def save(config: Mapping[str, Any], folder: Path) -> Path:
    """Write ``config.json``; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def count_layers(config: Mapping[str, Any]) -> int:
    """Return the number of layers of the text model."""
    return int(get_text(config)["num_hidden_layers"])


def get_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that describes the text model."""
    part: dict[str, Any] = config.get(_TEXT) or config
    return part


def describe_precision(config: Mapping[str, Any]) -> str:
    """Return the precision of a configuration's weights, as the table names it."""
    found = config.get("quantization_config") or get_text(config).get("quantization_config")
    if not found:
        return "BF16"
    method = found["quant_method"]
    if method == "compressed-tensors":
        [group] = found["config_groups"].values()
        weights, inputs = group["weights"], group.get("input_activations")
        kind = "FP" if weights["type"] == "float" else "W"
        bits = f"{kind}{weights['num_bits']}" + ("" if kind == "FP" else _activations(inputs))
        return f"compressed-tensors {bits}"
    if method == "modelopt":
        return str(found["quant_algo"])
    if method in ("gptq", "awq"):
        return f"{method.upper()} {found['bits']}-bit"
    return _METHODS[method]


def _activations(inputs: Mapping[str, Any] | None) -> str:
    return f"A{inputs['num_bits']}" if inputs else "A16"
