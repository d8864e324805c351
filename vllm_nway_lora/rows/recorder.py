# SPDX-License-Identifier: Apache-2.0
"""Run a model's ``load_weights`` and record what reaches the weight loaders of its parameters.

No loader runs, so no memory is written. Nothing of vLLM is imported here.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vllm_nway_lora.rows.errors import PlanError

#: A model whose loader fails on more modules than this is not asked about the others.
_MAX_FAILURES = 100


class TraceError(PlanError):
    """A module whose weight does not arrive as a copy of its rows and columns."""


@dataclass
class Call:
    """One call of a parameter's weight loader: the path, and what follows the parameter."""

    path: str
    loaded: torch.Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    parameter: Any = field(repr=False)
    loader: Callable[..., Any] = field(repr=False)

    def signature(self) -> tuple[Any, ...]:
        """Return what is equal for modules of other layers that land in the same way."""
        shapes = tuple(self.loaded.shape), tuple(self.parameter.shape)
        # The arguments are compared as they are: they have the shard id.
        return (fold(self.path), repr(self.args), repr(self.kwargs), shapes)

    def shard_ids(self) -> Sequence[Any]:
        """Return the shard ids among the arguments; None is that of a whole weight."""
        given = [*self.args, *self.kwargs.values()]
        if not given:
            return []
        return list(given[0]) if isinstance(given[0], (tuple, list)) else [given[0]]


@functools.lru_cache(2**16)
def fold(name: str) -> str:
    """Return ``name`` with the numbers of layers replaced by ``#``: ``layers.0.w1`` is ``layers.#.w1``."""
    return re.sub(r"\b\d+\b", "#", name)


def renumber(path: str, first: str, other: str) -> str:
    """Return ``path`` with the layer numbers of ``other`` in place of those of ``first``."""
    old, new = (re.findall(r"\b\d+\b", name) for name in (first, other))
    if re.findall(r"\b\d+\b", path) != old:
        return ""
    numbers = iter(new)
    return re.sub(r"\b\d+\b", lambda _: next(numbers), path)


def record(
    twin: nn.Module,
    weights: Mapping[str, torch.Tensor],
    suffix: str = ".weight",
    copies: bool = False,
) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """Pass weights to ``load_weights`` and return each module's calls of loaders, and its fault.

    A failure ends ``load_weights``. It starts again behind the module that has failed.

    Args:
        twin: the model's class, built on the meta device for this rank and without quantisation.
        weights: module's name in a checkpoint -> its weight.
        suffix: what follows the module's name in the name of its weight.
        copies: whether a whole parameter that the model copies itself is a call too, of a loader that
            copies.
    """
    calls: dict[str, list[Call]] = {}
    faults: dict[str, str] = {}
    current: list[str] = []

    def feed(names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            current.append(name)
            yield f"{name}{suffix}", weights[name]

    def keep(call: Call) -> None:
        calls.setdefault(current[-1], []).append(call)

    with _recording(twin, keep), _Copies(twin, keep) if copies else contextlib.nullcontext():
        rest = list(weights)
        while rest:
            current.clear()
            try:
                _consume(twin.load_weights(feed(rest)))
            except Exception as error:  # any model class, also of other packages
                if len(current) < len(rest) or current[-1] not in calls:
                    faults[current[-1] if current else rest[0]] = say(error)
            rest = rest[max(1, len(current)) :]
            if len(faults) > _MAX_FAILURES:
                faults |= dict.fromkeys(rest, "its model fails to load too many others")
                break
    return calls, faults


def _consume(result: Any) -> None:
    # `load_weights` of some classes is a generator.
    if isinstance(result, Iterator):
        for _ in result:
            pass


@contextlib.contextmanager
def _recording(twin: nn.Module, keep: Callable[[Call], None]) -> Iterator[None]:
    """Replace the loaders of parameters and layers by ones that record their calls and load nothing."""
    paths = {id(parameter): path for path, parameter in twin.named_parameters()}

    def recorder(loader: Callable[..., Any]) -> Callable[..., Any]:
        def load(*given: Any, **kwargs: Any) -> bool:
            # Experts' weights are passed by name in some releases.
            named = [kwargs.pop(name) for name in ("param", "loaded_weight")[len(given) :]]
            parameter, loaded, *args = *given, *named
            if loaded.dim() > 1 and id(parameter) in paths:  # a bias has one dimension
                path = paths[id(parameter)]
                keep(Call(path, loaded, tuple(args), kwargs, parameter, loader))
            return True  # experts' loaders say whether they have an expert

        return load

    with contextlib.ExitStack() as stack:
        for holder in [*twin.parameters(), *twin.modules()]:
            own = getattr(holder, "weight_loader", None)
            if own is None and isinstance(holder, nn.Module):
                continue
            holder.weight_loader = recorder(own or _copy)
            if own is None or isinstance(holder, nn.Module):
                stack.callback(delattr, holder, "weight_loader")
            else:
                stack.callback(setattr, holder, "weight_loader", own)
        yield


class _Copies(TorchFunctionMode):
    """Record copies into whole parameters, and keep tensors that take no memory from taking some."""

    def __init__(self, twin: nn.Module, keep: Callable[[Call], None]) -> None:
        super().__init__()
        self._keep = keep
        self._parameters = {
            parameter.untyped_storage()._cdata: (path, parameter)
            for path, parameter in twin.named_parameters()
        }

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.contiguous and 0 in args[0].stride():
            return args[0]
        if function is torch.Tensor.copy_ and args[0].is_meta:
            path, parameter = self._parameters.get(args[0].untyped_storage()._cdata, ("", args[0]))
            if path and parameter.shape == args[0].shape:
                self._keep(Call(path, args[1], (), {}, parameter, _copy))
                return args[0]
        return function(*args, **(kwargs or {}))


def _copy(parameter: Any, loaded: torch.Tensor) -> None:
    """Copy; the loader of a parameter that has none."""
    if parameter.shape != loaded.shape:
        raise TraceError(f"expected {tuple(parameter.shape)}, found {tuple(loaded.shape)}")
    parameter.data.copy_(loaded)


def say(error: BaseException) -> str:
    """Return an error's class and the start of its text."""
    return f"{type(error).__name__}: {error}"[:200]
