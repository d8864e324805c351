# SPDX-License-Identifier: Apache-2.0
"""Fold the variants of LoRA that are plain LoRA in other words. Pure torch, no vLLM.

The formulas are those of ``get_delta_weight`` and ``forward`` in PEFT 0.21.2 (peft/tuners).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_nway_lora.adapters.config import MLX, find_rank_and_scaling, get_kind
from vllm_nway_lora.adapters.forms import LEAF, PREFIX, split
from vllm_nway_lora.adapters.target import LayoutError, Pair

Tensors = Mapping[str, torch.Tensor]

#: The highest rank that vLLM has slots for (``MaxLoRARanks``, vllm/config/lora.py, 0.17.0 to 0.33.0).
MAX_RANK = 512

#: PEFT saves VeRA's projections, which all modules share, as ``base_model.vera_A`` and ``vera_B``.
_SHARED = "base_model"


@dataclass(frozen=True)
class Folded:
    """Tensors of plain LoRA.

    Attributes:
        tensors: PEFT's name -> tensor; the given mapping itself if nothing is to be folded.
        scalings: module, without ``base_model.model.`` -> its scaling, where it is not the one that
            the configuration gives a module of plain LoRA.
        rules: what was folded, as phrases for messages.
    """

    tensors: Tensors
    scalings: Mapping[str, float] = field(default_factory=dict)
    rules: tuple[str, ...] = ()


def fold(tensors: Tensors, config: Mapping[str, Any]) -> Folded:
    """Return the tensors of plain LoRA that have the same product.

    Folded matrices are float32, or float64 if the file's are: a product of two bfloat16 numbers is
    rounded once, when vLLM converts it.

    Args:
        tensors: PEFT's name -> tensor, from :func:`vllm_nway_lora.adapters.forms.read_forms`.
        config: adapter_config.json as it was read; empty if there is none.

    Raises:
        LayoutError: a module lacks a tensor, its tensors do not fit together, or its folded rank is
            above :data:`MAX_RANK`.
    """
    kind = get_kind(config)
    if kind == MLX:
        scale = float(config["lora_parameters"]["scale"])
        return Folded(tensors, {split(name)[0]: scale for name in tensors})
    if kind in _FOLDS:
        return _fold_modules(tensors, config, kind)
    if config.get("use_bdlora"):
        return _expand_blocks(tensors, config)
    if config.get("use_qalora"):
        return _expand_groups(tensors, config)
    return Folded(tensors)


def _fold_modules(tensors: Tensors, config: Mapping[str, Any], kind: str) -> Folded:
    """Fold each module that has a variant's parameters."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    folded: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if found := LEAF.match(name):
            parts.setdefault(found["module"], {})[found["leaf"]] = tensor
        else:
            folded[name] = tensor  # such as a base weight, which `tensors.py` judges
    shared = parts.pop(_SHARED, {})
    scalings: dict[str, float] = {}
    ranks = []
    for path, own in parts.items():
        module = path.removeprefix(PREFIX)
        pair = _FOLDS[kind](_Module(module, kind, {**shared, **own}, config))
        if not len(pair.a):  # AdaLoRA has left no rank to it, so that its product is zero
            continue
        if len(pair.a) > MAX_RANK:
            raise LayoutError(
                f"module {module}: {kind} folds into LoRA of rank {len(pair.a)}, and vLLM has slots for "
                f"at most {MAX_RANK}. Merge it into the model with PEFT's merge_and_unload"
            )
        folded[f"{path}.lora_A.weight"], folded[f"{path}.lora_B.weight"] = pair.a, pair.b
        scalings[module] = pair.scaling
        ranks.append(len(pair.a))
    rule = f"{kind} folded into LoRA of rank {max(ranks, default=0)}"
    return Folded(folded, scalings, (rule,))


@dataclass(frozen=True)
class _Module:
    """One module of a variant; ``parts`` are its parameters by PEFT's name."""

    name: str
    kind: str
    parts: Tensors
    config: Mapping[str, Any]

    def read(self, *names: str) -> list[torch.Tensor]:
        """Return parameters, in float32 or float64."""
        missing = [name for name in names if name not in self.parts]
        if missing:
            raise LayoutError(
                f"module {self.name}: {self.kind} needs {', '.join(names)}, and the file has "
                f"{', '.join(self.parts)}. Save the adapter again with all of its tensors"
            )
        tensors = [self.parts[name] for name in names]
        wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        return [tensor.to(wide) for tensor in tensors]

    def require(self, fits: bool, expected: str) -> None:
        """Raise an error with all shapes unless ``fits``."""
        if not fits:
            shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in self.parts.items())
            raise LayoutError(
                f"module {self.name}: {self.kind} expects {expected}, found {shapes}. Save the adapter "
                "again with PEFT"
            )


def _fold_adalora(module: _Module) -> Pair:
    """Fold ``B diag(E) A``; A is ``(r, columns)``, B ``(rows, r)``, E ``(r, 1)``.

    PEFT divides by ``ranknum``, which is `init_r` for modules of fewer ranks too: `resize_modules_by_
    rank_pattern` of peft/tuners/adalora/model.py keeps it.
    """
    a, b, e = module.read("lora_A", "lora_B", "lora_E")
    module.require(
        a.ndim == b.ndim == 2 and tuple(e.shape) == (len(a), 1) and b.shape[1] == len(a),
        "lora_A (r, columns), lora_B (rows, r) and lora_E (r, 1)",
    )
    alpha = module.config.get("lora_alpha", 8)
    scaling = alpha if alpha > 0 else float(len(a))
    return Pair(a * e, b, scaling / (module.config.get("init_r", 12) + 1e-5))


def _fold_vera(module: _Module) -> Pair:
    """Fold ``diag(lambda_b) B diag(lambda_d) A``.

    The shared projections are as large as the largest module: A is ``(r, columns of the largest)``,
    B ``(rows of the largest, r)``. `lambda_b` has the module's rows. Its columns are in no file, so
    that A keeps all; the module's are the first ones.
    """
    a, b, rows, ranks = module.read("vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d")
    module.require(
        a.ndim == b.ndim == 2
        and b.shape[1] == len(a)
        and tuple(ranks.shape) == (len(a),)
        and rows.ndim == 1
        and len(rows) <= len(b),
        "vera_A (r, columns), vera_B (rows, r), vera_lambda_d (r) and vera_lambda_b (at most rows)",
    )
    return Pair(ranks[:, None] * a, rows[:, None] * b[: len(rows)])


def _fold_loha(module: _Module) -> Pair:
    """Fold ``(w1_a w1_b) * (w2_a w2_b)``, a product by elements, into rank r * r."""
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    w1_a, w1_b, w2_a, w2_b = module.read(*names)
    rank, scaling = find_rank_and_scaling(module.config, module.name)
    module.require(
        w1_a.ndim == w1_b.ndim == 2
        and w1_a.shape == w2_a.shape
        and w1_b.shape == w2_b.shape
        and w1_a.shape[1] == len(w1_b) == rank,
        f"hada_w1_a, hada_w2_a (rows, {rank}) and hada_w1_b, hada_w2_b ({rank}, columns), where "
        f"adapter_config.json gives r={rank}",
    )
    a = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
    b = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1, 2)
    return Pair(a, b, scaling)


def _fold_lokr(module: _Module) -> Pair:
    """Fold ``kron(w1, w2)``: ``kron(l1 r1, l2 r2) = kron(l1, l2) kron(r1, r2)``."""
    _, scaling = find_rank_and_scaling(module.config, module.name)
    left_1, right_1 = _factor(module, "lokr_w1")
    left_2, right_2 = _factor(module, "lokr_w2")
    return Pair(torch.kron(right_1, right_2), torch.kron(left_1, left_2), scaling)


def _factor(module: _Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of a LoKr matrix, with the least number of columns of the left one."""
    if name in module.parts:
        [whole] = module.read(name)
        module.require(whole.ndim == 2, f"{name} of two dimensions")
        factors = []
    else:
        left, right = module.read(f"{name}_a", f"{name}_b")
        module.require(
            left.ndim == right.ndim == 2 and left.shape[1] == len(right),
            f"{name}_a (rows, r) and {name}_b (r, columns)",
        )
        whole = left @ right
        factors = [(left, right)]
    rows, columns = (
        torch.eye(size, dtype=whole.dtype, device=whole.device) for size in whole.shape
    )
    return min([*factors, (rows, whole), (whole, columns)], key=lambda pair: pair[0].shape[1])


_FOLDS: Mapping[str, Callable[[_Module], Pair]] = {
    "ADALORA": _fold_adalora,
    "LOHA": _fold_loha,
    "LOKR": _fold_lokr,
    "VERA": _fold_vera,
}


def _expand_blocks(tensors: Tensors, config: Mapping[str, Any]) -> Folded:
    """Lay the blocks of BD-LoRA on the diagonal (``BlockDiagonalLinear``, peft/tuners/lora/variants.py).

    A block-diagonal LoRA-A is ``(r, columns / blocks)`` in the file, a LoRA-B ``(rows, r / blocks)``.
    """
    settings = config["use_bdlora"]
    if not isinstance(settings, Mapping):  # PEFT's BdLoraConfig, in memory
        settings = vars(settings)
    blocks = settings.get("nblocks") or 1
    expanded = dict(tensors)
    for half, key in (("A", "target_modules_bd_a"), ("B", "target_modules_bd_b")):
        patterns: Sequence[str] = settings.get(key) or ()
        for name, tensor in tensors.items():
            module, end = split(name)
            if end != f"lora_{half}.weight" or not any(pattern in module for pattern in patterns):
                continue
            if tensor.ndim != 2 or len(tensor) % blocks:
                raise LayoutError(
                    f"module {module}: adapter_config.json divides LoRA-{half} into {blocks} blocks, "
                    f"found {tuple(tensor.shape)}. Save the adapter again with PEFT"
                )
            expanded[name] = torch.block_diag(*tensor.chunk(blocks))
    return Folded(expanded, {}, (f"{blocks} blocks of BD-LoRA laid on the diagonal",))


def _expand_groups(tensors: Tensors, config: Mapping[str, Any]) -> Folded:
    """Repeat the columns of QALoRA's LoRA-A, ``(r, columns / group)`` in the file.

    ``QALoraLinearVariant.forward`` (peft/tuners/lora/variants.py) multiplies LoRA-A by the mean of each
    group of inputs, and by the number of groups.
    """
    group = config.get("qalora_group_size") or 16
    expanded = dict(tensors)
    scalings = {}
    for name, tensor in tensors.items():
        module, end = split(name)
        if end == "lora_A.weight":
            expanded[name] = tensor.repeat_interleave(group, dim=-1)
            scaling = find_rank_and_scaling(config, module)[1]
            scalings[module] = scaling * tensor.shape[-1] / group
    return Folded(expanded, scalings, (f"QALoRA's groups of {group} columns repeated",))
