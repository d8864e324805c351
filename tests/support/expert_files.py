"""One adapter on experts as every trainer writes it, beside `moe.flat` and `moe.per_expert`."""

from __future__ import annotations

from typing import Any

import torch

from support.moe import EXPERTS, RANK, A, B, Tensors
from vllm_nway_lora.adapters.expert_types import Given, Half
from vllm_nway_lora.adapters.target import Pair


def pair(tensors: Tensors, module: str) -> Pair:
    return Pair(tensors[f".{module}{A}"], tensors[f".{module}{B}"], 2.0)


def unflatten(tensors: Tensors, is_interleaved: bool) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return per projection A ``(experts, r, columns)`` and B ``(experts, rows, r)``."""
    found = {}
    for kind, module in (("gate_up", "base_layer."), ("down", "")):
        a, b, _ = vars(pair(tensors, module)).values()
        b = b.reshape(b.shape[0], RANK, EXPERTS).permute(2, 0, 1)
        found[kind] = a.reshape(EXPERTS, RANK, -1), b
    a, b = found["gate_up"]
    gate, up = (b[:, ::2], b[:, 1::2]) if is_interleaved else b.chunk(2, 1)
    return found | {"gate": (a, gate), "up": (a, up)}


NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
LETTERS = {"gate": "w1", "up": "w3", "down": "w2"}


def build_files(tensors: Tensors, is_interleaved: bool) -> dict[str, tuple[dict[str, Given], Any]]:
    """Return one trained function in every layout: its modules and changes of the configuration."""
    split = unflatten(tensors, is_interleaved)
    nested = {"base_layer": pair(tensors, "base_layer."), "": pair(tensors, "")}

    def nest(by_expert: bool, is_swapped: bool) -> dict[str, Given]:
        modules: dict[str, Given] = {}
        for module, kind in (("base_layer", "gate_up"), ("", "down")):
            a, b = split[kind]
            a, b = (b.mT, a.mT) if is_swapped else (a, b)
            b = b.permute(1, 0, 2) if by_expert else b.permute(1, 2, 0)
            modules[module] = Pair(a.flatten(0, 1).contiguous(), b.flatten(1).contiguous(), 2.0)
        return modules

    def apart(names: dict[str, str]) -> dict[str, Given]:
        return {
            f"{e}.{name}": Pair(split[kind][0][e].clone(), split[kind][1][e].clone(), 2.0)
            for e in range(EXPERTS)
            for kind, name in names.items()
        }

    deep = {name: Pair(*(t.clone() for t in split[kind]), 2.0) for kind, name in LETTERS.items()}
    halves: dict[str, Given] = {}
    for name, given in deep.items():
        halves[name] = Half(given.a, None, 2.0)
        halves |= {f"{e}.{name}": Half(None, b, 2.0) for e, b in enumerate(given.b.unbind())}
    fused = {"gate_up_proj": split["gate_up"], "down_proj": split["down"]}
    by_expert = {"vllm_nway_lora": {"expert_lora_b": "expert-major"}}
    return {
        "PEFT 0.19": (nested, {}),
        "PEFT 0.18": (nest(False, True), {"peft_version": "0.18.1"}),
        "Megatron-Bridge packed": (nest(True, True), by_expert | {"peft_version": None}),
        "Unsloth before 1269": (nest(True, False), by_expert),
        "apart": (apart(NAMES), {}),
        "apart, w1 to w3": (apart(LETTERS), {}),
        "Tinker": (deep, {}),
        "Megatron-Bridge in memory": ({n: Pair(*t, 2.0) for n, t in fused.items()}, {}),
        "A stacked, B apart": (halves, {}),
    }
