# SPDX-License-Identifier: Apache-2.0
"""LoRA on layers whose weight their model multiplies itself, by ``torch.mm`` in float32.

DeepSeek-V4's attention multiplies by the weight of its compressors, GLM-5-Next's indexer by a float32 copy of
a part of a weight. In place of the weight, both get an object that adds LoRA to the product: torch passes the
call of ``torch.mm`` to it. The rows of the input are the tokens of the batch, as for a LoRA layer.

A reader is known by the names in its code. Any other one is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import nn
from vllm import platforms
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from vllm_nway_lora.rows.notes import add_refusals

_COMPRESSORS = ("wkv", "wgate")
#: All that a reader of a compressor's weight names: `torch.mm(hidden_states, ...weight.T, out_dtype=...)`.
#: Source: models/deepseek_v4/attention.py and deepseek_v41/attention.py, 0.21.0 to 0.33.0.
_PRODUCT = frozenset(
    {"torch", "mm", "float32", "T", "weight", "fused_wkv_wgate", "compressor", "indexer"}
)
_COPY = "_wp_fp32"


class DirectError(RuntimeError):
    """A model uses a weight in another way than this module knows."""


class DirectWeight:
    """Takes the place of a weight, transposed, in ``torch.mm``; the product has LoRA.

    Args:
        lora_layer: the LoRA layer on the weight's layer.
        first: the first of the layer's slices that belong to the product.
        rows: the rows of the weight that are multiplied.
        copied: whether the product takes a float32 copy of the weight, made at the first product.
    """

    def __init__(self, lora_layer: Any, first: int, rows: slice, *, copied: bool) -> None:
        self._lora_layer = lora_layer
        self._first = first
        self._rows = rows
        self._copied = copied
        self._weight: torch.Tensor | None = None

    @property
    def T(self) -> DirectWeight:
        """The transposed weight, which this object stands for in a product."""
        return self

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Return the product with LoRA.

        Raises:
            DirectError: the call is no product with the weight.
        """
        if function is not torch.mm or len(args) != 2 or not isinstance(args[1], cls):
            raise DirectError(f"LoRA is not known in {function}. Report this")
        return args[1]._multiply(args[0], kwargs or {})

    def _multiply(self, x: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """Return ``(tokens, rows)`` of ``x``, ``(tokens, columns)``, in the type that ``torch.mm`` gives it."""
        layer = self._lora_layer
        weight = layer.base_layer.weight[self._rows].T if self._weight is None else self._weight
        if self._copied and self._weight is None:
            weight = self._weight = weight.contiguous().float()
        y = torch.mm(x, weight, **options)
        a, b, widths = (
            tuple(of[self._first :])
            for of in (layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices)
        )
        # In its type: vLLM's kernel for several slices reads LoRA-B in the type of the output.
        lora = torch.zeros_like(y, dtype=a[0].dtype)
        layer.punica_wrapper.add_lora_linear(lora, x.to(a[0].dtype), a, b, 1.0, widths)
        return y.add_(lora)


class _WithDirectWeight(nn.Module):
    """Mixin before a LoRA layer's class, whose weight the model multiplies itself."""

    @property
    def weight(self) -> DirectWeight:
        """What the model multiplies by."""
        return DirectWeight(self, 0, slice(None), copied=False)


def serve_direct_products(model: nn.Module) -> None:
    """Serve LoRA on the compressors and indexers in ``model``; refuse it where it cannot be exact.

    Args:
        model: the model, its LoRA layers in place.
    """
    # A large model has a hundred compressors, of one class, and its code is long.
    find_other_reader = functools.cache(lambda: _find_other_reader(model))
    for parent in model.modules():
        if _is_compressor(parent):
            layer: Any = parent.fused_wkv_wgate
            if obstacle := _find_first(find_other_reader, functools.partial(_find_obstacle, layer)):
                _refuse(
                    layer, _COMPRESSORS, f"DeepSeek-V4's attention reads its weight: {obstacle}"
                )
            else:
                served: Any = type(layer)
                layer.__class__ = _with_direct_weight(served)
        elif hasattr(parent, _COPY) and _has_lora(parent, "wk_weights_proj"):
            layer = parent.wk_weights_proj
            if obstacle := _find_first(
                functools.partial(_find_change, parent), functools.partial(_find_obstacle, layer)
            ):
                _refuse(layer, ("weights_proj",), f"its indexer multiplies by a copy: {obstacle}")
            else:
                rows = slice(parent.head_dim, None)
                setattr(parent, _COPY, DirectWeight(layer, 1, rows, copied=True))


@functools.cache
def _with_direct_weight(served: type) -> type:
    """Return a subclass of a class of LoRA layers whose weight the model multiplies itself."""
    return type(served.__name__, (_WithDirectWeight, served), {})


def _is_compressor(parent: Any) -> bool:
    """Return whether a module is a compressor with a LoRA layer."""
    names = {owner.__name__ for owner in type(parent).__mro__}
    return "DeepseekCompressor" in names and _has_lora(parent, "fused_wkv_wgate")


def _has_lora(parent: Any, name: str) -> bool:
    return isinstance(getattr(parent, name, None), BaseLinearLayerWithLoRA)


def _find_first(*checks: Callable[[], str]) -> str:
    """Return the first obstacle that a check finds, or the error of a check; empty if there is none."""
    try:
        return next(filter(None, (check() for check in checks)), "")
    except Exception as error:  # another release has other attributes
        return str(error)


def find_read_compressors(model: nn.Module) -> list[Any]:
    """Return the LoRA layers on compressors in ``model`` whose weight it multiplies itself."""
    if not any(_list_readers(model)):
        return []
    return [parent.fused_wkv_wgate for parent in model.modules() if _is_compressor(parent)]


def _find_other_reader(model: nn.Module) -> str:
    """Return a function that uses compressors in a way that is not known; empty if there is none."""
    others = [function for function, names in _list_readers(model) if not names <= _PRODUCT]
    return others[0] if others else ""


def _list_readers(model: nn.Module) -> Iterator[tuple[str, set[str]]]:
    """Yield each function that reads the weight of compressors, and the names in its code."""
    for kind in {type(module) for module in model.modules()}:
        for function, codes in _list_functions(kind):
            for code in codes:
                if {"fused_wkv_wgate", "weight"} <= {*code.co_names}:
                    yield function, {*code.co_names}


def _find_change(indexer: Any) -> str:
    """Return in what an indexer differs from the known one; empty if in nothing."""
    layer, copy = indexer.wk_weights_proj, getattr(indexer, _COPY)
    if copy is not None or list(layer.output_slices) != [indexer.head_dim, indexer.n_head]:
        return "the indexer is not the one that is known"
    for function, codes in _list_functions(type(indexer)):
        named = {name for code in codes for name in code.co_names}
        if _COPY in named and not ({"mm", "wk_weights_proj", "float"} <= named):
            return function
    return ""


def _list_functions(kind: type) -> Iterator[tuple[str, list[CodeType]]]:
    """Yield the name of each function of a class but its constructor, and its code with all inner ones."""
    for owner in kind.__mro__:
        for name, member in vars(owner).items():
            code = getattr(inspect.unwrap(getattr(member, "fget", member)), "__code__", None)
            if code is not None and name != "__init__":
                yield f"{owner.__qualname__}.{name}", list(_list_codes(code))


def _list_codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _list_codes(constant)


def _find_obstacle(layer: Any) -> str:
    """Return why LoRA cannot be added to a product with the weight of a layer; empty if it can."""
    platform = platforms.current_platform
    if not (platform.is_cpu() or platform.is_cuda()):
        return f"its kernels on {platform.device_name} are not known"
    pairs = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
    if any(a.shape[2] != b.shape[3] for a, b in pairs):
        return "--fully-sharded-loras has cut its LoRA-A"
    return ""


def _refuse(layer: Any, modules: Sequence[str], reason: str) -> None:
    add_refusals(layer.base_layer, dict.fromkeys(modules, reason))
