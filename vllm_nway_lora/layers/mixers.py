# SPDX-License-Identifier: Apache-2.0
"""LoRA on the layers to which a state-space mixer passes a part of a batch.

The mixers of Mamba 1 and PLaMo 2 call a function with the prefilled tokens of a batch, and again with its
decoded tokens. vLLM's LoRA takes row ``i`` of a layer's input for token ``i`` of the batch. Here each call
puts its tokens at their rows of a whole batch, and the other rows are zero.

The functions are replaced on the objects. They run inside of vLLM's custom operators, so that torch.compile
does not trace them. Sizes depend on nothing but the batch, so that CUDA graphs of decodes record them.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from vllm_nway_lora.layers.mla import list_users
from vllm_nway_lora.rows.notes import add_refusals


class MixerError(RuntimeError):
    """A mixer has called its functions in another way than this module knows."""


class _Kind(NamedTuple):
    """A class of mixers.

    Attributes:
        name: the class.
        projection: its function that gets a part of the batch.
        layers: the layers that only this function calls.
    """

    name: str
    projection: str
    layers: tuple[str, ...]


_KINDS = (
    # model_executor/layers/mamba/mamba_mixer.py, 0.17.0 to 0.33.0.
    _Kind("MambaMixer", "_ssm_transform", ("x_proj", "dt_proj")),
    # model_executor/models/plamo2.py, to 0.26.0.
    _Kind("Plamo2MambaMixer", "_project_ssm_parameters", ("bcdt_proj", "dt_proj")),
)
#: Other functions that name the layers: the constructor, and one that reads the bias of `dt_proj`.
_KNOWN = ("__init__", "_time_proj_bias")
#: What `forward_impl` names, in this order: prefilled tokens come first, and are the last in the batch.
_PREFILL, _DECODE = "causal_conv1d_fn", "causal_conv1d_update"
_COUNTS = ("num_prefill_tokens", "num_decode_tokens")


def correct_mixers(model: nn.Module) -> None:
    """Serve LoRA on the layers of the mixers in ``model``; refuse it where it cannot be exact.

    Args:
        model: the model, its LoRA layers in place.
    """
    # A model has many mixers of one class, and reading its code takes milliseconds.
    find_obstacle = functools.cache(_find_obstacle)
    for mixer, kind, lora_layers in _list_mixers(model):
        owner: Any = type(mixer)  # mypy does not take a class for hashable
        if obstacle := find_obstacle(owner, kind):
            _refuse(lora_layers, obstacle)
        elif lora_layers:
            _Corrected(mixer, kind, lora_layers).install()


def list_part_layers(model: nn.Module) -> list[Any]:
    """Return the LoRA layers to which the mixers in ``model`` pass a part of a batch."""
    return [layer for _, _, lora_layers in _list_mixers(model) for layer in lora_layers]


def _list_mixers(model: nn.Module) -> Iterator[tuple[Any, _Kind, list[Any]]]:
    """Yield each mixer of a known kind, the kind, and its LoRA layers that get a part of a batch."""
    for mixer in model.modules():
        owners = {owner.__name__ for owner in type(mixer).__mro__}
        for kind in _KINDS:
            if kind.name in owners:
                found = [getattr(mixer, name, None) for name in kind.layers]
                layers = [layer for layer in found if isinstance(layer, BaseLinearLayerWithLoRA)]
                yield mixer, kind, layers


def _find_obstacle(owner: type, kind: _Kind) -> str:
    """Return in what a class of mixers differs from the known one; empty if in nothing."""
    code = getattr(inspect.unwrap(getattr(owner, "forward_impl", owner)), "__code__", None)
    names = code.co_names if code is not None else ()
    if code is None or not {_PREFILL, _DECODE, *_COUNTS} <= {*names}:
        return "its forward_impl is not known"
    calls = [i for i in dis.get_instructions(code) if i.argval == kind.projection]
    if len(calls) != 2 or names.index(_PREFILL) > names.index(_DECODE):
        return f"its forward_impl calls {kind.projection} in another order"
    known = frozenset({*_KNOWN, kind.projection})
    users = list(list_users(owner, frozenset(kind.layers), known))
    return f"{users[0]} uses them too" if users else ""


def _refuse(lora_layers: Sequence[Any], obstacle: str) -> None:
    reason = (
        "its mixer calls it with the prefilled and with the decoded tokens of a batch apart, and "
        f"{obstacle}"
    )
    for layer in lora_layers:
        base = layer.base_layer
        add_refusals(base, {base.prefix.rpartition(".")[2]: reason})


class _Corrected:
    """The functions that replace those of one mixer and of its LoRA layers."""

    def __init__(self, mixer: Any, kind: _Kind, lora_layers: Sequence[Any]) -> None:
        self._mixer = mixer
        self._kind = kind
        self._lora_layers = lora_layers
        self._forward_impl = mixer.forward_impl
        self._project = getattr(mixer, kind.projection)
        self._tokens = 0
        self._parts: Iterator[slice] = iter(())
        self._rows: slice | None = None

    def install(self) -> None:
        """Replace the functions, on these objects only."""
        self._mixer.forward_impl = self.forward_impl
        setattr(self._mixer, self._kind.projection, self.project)
        for layer in self._lora_layers:
            layer.apply = functools.partial(self.place, layer.apply)

    def forward_impl(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the mixer's ``forward_impl``; ``hidden_states`` is ``(tokens, hidden)``, padding included."""
        self._tokens = len(hidden_states)
        self._parts = _list_parts(self._mixer.prefix)
        try:
            return self._forward_impl(hidden_states, *args, **kwargs)
        finally:
            self._parts = iter(())

    def project(self, x: torch.Tensor) -> Any:
        """Call the mixer's function on a part of the batch, ``(tokens of the part, width)``.

        Raises:
            MixerError: ``x`` is no part that is due, so that each token's adapter is unknown, and an
                adapter has LoRA on these layers.
        """
        rows = next(self._parts, None)
        if rows is None or rows.stop - rows.start != len(x):
            if any(bool(b.any()) for layer in self._lora_layers for b in layer.lora_b_stacked):
                raise MixerError(f"{self._mixer.prefix}: its batch is not known here. Report this")
            rows = None  # no adapter has LoRA on these layers
        self._rows = rows
        try:
            return self._project(x)
        finally:
            self._rows = None

    def place(
        self,
        apply: Callable[..., torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what a LoRA layer's ``apply`` makes of a part of the batch, ``(tokens, local width)``."""
        rows = self._rows
        if rows is None:
            return apply(x, bias)
        after = self._tokens - rows.stop
        whole = nn.functional.pad(x, (0, 0, rows.start, after)) if rows.start or after else x
        return apply(whole.contiguous(), bias)[rows]


def _list_parts(prefix: str) -> Iterator[slice]:
    """Yield the tokens of a batch that a mixer prefills, and those that it decodes."""
    metadata = get_forward_context().attn_metadata
    found = metadata.get(prefix) if isinstance(metadata, dict) else None
    if found is None:  # vLLM measures its memory
        return
    decoded, prefilled = found.num_decode_tokens, found.num_prefill_tokens
    if prefilled:
        yield slice(decoded, decoded + prefilled)
    if decoded:
        yield slice(0, decoded)
