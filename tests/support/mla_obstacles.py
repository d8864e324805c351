"""Changes of an MLA attention layer that keep LoRA on ``kv_b_proj`` from being exact.

A rank imports them by name, which it cannot do with functions of a test module.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

from support import mla


def _read_weight(self: Any) -> Any:
    return self.kv_b_proj.weight


def _absorb(self: Any) -> Any:
    return self.mla_attn.W_UK_T


def replace_class(thing: Any, **members: Any) -> None:
    """Give an object a subclass of its class."""
    thing.__class__ = type("Own", (type(thing),), members)


def own_forward(attention: Any, _: contextlib.ExitStack) -> None:
    replace_class(attention, forward_impl=_read_weight)


def own_prefill(attention: Any, _: contextlib.ExitStack) -> None:
    replace_class(attention.impl, forward_mha=_read_weight)


def own_reader(attention: Any, _: contextlib.ExitStack) -> None:
    replace_class(attention.impl, fuse=_read_weight)


def own_copy(attention: Any, _: contextlib.ExitStack) -> None:
    attention.is_amx_bmm_enabled = True


def quantised_cache(attention: Any, _: contextlib.ExitStack) -> None:
    attention.kv_cache_dtype = "fp8"


def sparse(attention: Any, _: contextlib.ExitStack) -> None:
    attention.use_sparse = True


def context_parallel(attention: Any, _: contextlib.ExitStack) -> None:
    attention.impl.dcp_world_size = 2


def lost_attribute(attention: Any, _: contextlib.ExitStack) -> None:
    del attention.kv_cache_dtype


def reading_holder(_: Any, stack: contextlib.ExitStack) -> None:
    stack.enter_context(
        mock.patch.object(mla, "Holder", type("Own", (mla.Holder,), {"f": _absorb}))
    )


def change_platform(stack: contextlib.ExitStack, name: str, full: bool, eager: bool) -> None:
    from vllm_nway_lora.layers import mla as package

    asked = {f"is_{kind}": lambda kind=kind: kind == name for kind in ("cpu", "cuda")}
    platform = SimpleNamespace(**asked, device_name=name)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: full)
        ),
        model_config=SimpleNamespace(enforce_eager=eager),
    )
    stack.enter_context(
        mock.patch.object(package, "platforms", SimpleNamespace(current_platform=platform))
    )
    stack.enter_context(
        mock.patch.object(package, "get_current_vllm_config_or_none", return_value=config)
    )


def other_platform(_: Any, stack: contextlib.ExitStack) -> None:
    change_platform(stack, "xpu", full=False, eager=True)


def full_graphs(_: Any, stack: contextlib.ExitStack) -> None:
    change_platform(stack, "cuda", full=True, eager=False)


def eager_gpu(_: Any, stack: contextlib.ExitStack) -> None:
    change_platform(stack, "cuda", full=True, eager=True)


def piecewise_graphs(_: Any, stack: contextlib.ExitStack) -> None:
    change_platform(stack, "cuda", full=False, eager=False)
