# SPDX-License-Identifier: Apache-2.0
"""Modules that are finer or coarser than the model's: fold them, or split them, exactly.

Pure torch, no vLLM. Both directions keep every product ``scaling * b @ a``:

- pieces of one module become ``a = cat(a_i)`` and ``b = block_diag(b_i)``; the rank is the sum;
- a fused layer's tensor becomes one pair per module, with the same A and that module's rows of B.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_nway_lora.adapters.target import LayoutError, Pair, Part, Target


def split_fused(pairs: Mapping[str, Pair], target: Target) -> tuple[dict[str, Pair], list[str]]:
    """Split the pairs of fused layers into those of their modules.

    Args:
        pairs: path of a module or of a fused layer -> its pair.
        target: what the model takes.

    Returns:
        The pairs of modules, and a phrase per kind of layer that was split.

    Raises:
        LayoutError: a tensor has another number of rows than the layer's modules together, or a
            module has a pair of its own too.
    """
    found = {path: pair for path, pair in pairs.items() if path not in target.fused}
    rules: dict[str, None] = {}
    for path, pair in pairs.items():
        if path not in target.fused:
            continue
        modules = target.fused[path]
        sizes = [target.modules[module] or 0 for module in modules]
        names = [module.rpartition(".")[2] for module in modules]
        if pair.b.ndim != 2 or pair.b.shape[0] != sum(sizes):
            raise LayoutError(
                f"module {path} is the fused layer of {', '.join(names)}: expected a LoRA-B of "
                f"{' + '.join(map(str, sizes))} = {sum(sizes)} rows, found {tuple(pair.b.shape)}"
            )
        for module, rows in zip(modules, pair.b.split(sizes), strict=True):
            _add(found, module, Pair(pair.a, rows, pair.scaling), path)
        rules[f"{path.rpartition('.')[2]} split into {', '.join(names)}"] = None
    return found, list(rules)


def fold_parts(pairs: Mapping[str, Pair], target: Target) -> tuple[dict[str, Pair], list[str]]:
    """Fold the pairs of single outputs into those of the modules that have these outputs together.

    An output without a pair has zero rows.

    Args:
        pairs: path of a module or of a part -> its pair.
        target: what the model takes.

    Returns:
        The pairs of modules, and a phrase per kind of module that was folded.

    Raises:
        LayoutError: a piece has another number of rows than its output, pieces have A of different
            widths, or the module has a pair of its own too.
    """
    found = {path: pair for path, pair in pairs.items() if path not in target.parts}
    pieces: dict[str, list[tuple[Part, str, Pair]]] = {}
    for path, pair in pairs.items():
        if part := target.parts.get(path):
            pieces.setdefault(part.module, []).append((part, path, pair))
    rules: dict[str, None] = {}
    for module, of in pieces.items():
        of.sort(key=lambda piece: piece[0].start)
        rows = target.modules[module] or 0
        folded = _fold(module, rows, of)
        names = [path.rpartition(".")[2] for _, path, _ in of]
        _add(found, module, folded, ", ".join(names))
        rules[
            f"{', '.join(names)} folded into {module.rpartition('.')[2]} of rank {len(folded.a)}"
        ] = None
    return found, list(rules)


def _fold(module: str, rows: int, pieces: list[tuple[Part, str, Pair]]) -> Pair:
    widths = {pair.a.shape[1] for _, _, pair in pieces}
    for part, path, pair in pieces:
        expected = part.stop - part.start
        if pair.b.shape[0] != expected or len(widths) > 1:
            raise LayoutError(
                f"module {path} is a part of {module}: expected a LoRA-B of {expected} rows, and the "
                f"same columns of LoRA-A in all parts, found LoRA-A {tuple(pair.a.shape)} and LoRA-B "
                f"{tuple(pair.b.shape)}"
            )
    # A part without effect must not raise the rank.
    pieces = [piece for piece in pieces if bool(piece[2].b.any())] or pieces[:1]
    rank = sum(len(pair.a) for _, _, pair in pieces)
    scalings = {pair.scaling for _, _, pair in pieces}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    b = pieces[0][2].b.new_zeros(rows, rank)
    column = 0
    for part, _, pair in pieces:
        own = slice(column, column + len(pair.a))
        b[part.start : part.stop, own] = _scale(pair.b, pair.scaling, scaling)
        column = own.stop
    return Pair(torch.cat([pair.a for _, _, pair in pieces]), b, scaling)


def _scale(b: torch.Tensor, own: float, common: float) -> torch.Tensor:
    """Return a LoRA-B of scaling ``own`` for a pair of scaling ``common``; its values if they are equal."""
    return b if own == common else (b.double() * own / common).to(b.dtype)


def _add(found: dict[str, Pair], module: str, pair: Pair, source: str) -> None:
    if module in found:
        raise LayoutError(f"both module {module} and {source} have LoRA on the same rows")
    found[module] = pair
