"""LoRA on ``kv_b_proj`` in vLLM's MLA attention: exact as dense attention with merged weights, or refused."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import mla, mla_cases
from support.examples import ANY_TIME
from support.mla_cases import Case, Request
from support.ranks import Ranks

#: Decodes with and without LoRA, a prefill, and prefills with context of more and less than one chunk.
MIXED = Case(
    (
        Request(9, 1, 1),
        Request(3, 1, -1),
        Request(0, 1, 0),
        Request(0, 5, 2),
        Request(40, 4, 0),
        Request(0, 3, -1),
        Request(17, 6, 1),
        Request(23, 2, -1),
    )
)


def compare(ranks: Ranks, case: Case) -> tuple[float, float]:
    """Return the largest error of the ranks' output, and the largest effect of LoRA."""
    output = torch.cat(ranks.run(mla.run, case), dim=1)
    expected = mla_cases.compute_dense(case)
    effect = (expected - mla_cases.compute_dense(case, lora=False)).abs().max().item()
    return (output - expected).abs().max().item(), effect


@pytest.mark.parametrize("masked", [False, True], ids=["by-adapter", "masked"])
@pytest.mark.parametrize("workspace", [16, 256])
def test_mixed_batch_equals_merged_weights(ranks: Ranks, masked: bool, workspace: int) -> None:
    case = dataclasses.replace(MIXED, masked=masked, workspace=workspace)
    error, effect = compare(ranks, case)
    assert effect > 1
    assert error < 1e-4


@pytest.mark.parametrize("masked", [False, True], ids=["by-adapter", "masked"])
def test_bfloat16_is_as_exact_as_the_base_model(ranks: Ranks, masked: bool) -> None:
    case = dataclasses.replace(MIXED, dtype=torch.bfloat16, masked=masked)
    error, effect = compare(ranks, case)
    assert error < effect / 20


_REQUESTS = st.builds(
    Request,
    st.integers(0, mla_cases.CACHE - 6),
    st.integers(1, 6),
    st.integers(-1, mla_cases.MAX_LORAS - 2),
)


@ANY_TIME
@given(
    requests=st.lists(_REQUESTS, min_size=1, max_size=8),
    lora_ranks=st.tuples(*[st.integers(1, mla_cases.MAX_RANK)] * 3),
    workspace=st.sampled_from([32, 64, 512]),
    masked=st.booleans(),
)
def test_any_batch_equals_merged_weights(
    ranks: Ranks,
    requests: list[Request],
    lora_ranks: tuple[int, int, int],
    workspace: int,
    masked: bool,
) -> None:
    ordered = tuple(sorted(requests, key=lambda request: request.new > 1))
    error, _ = compare(ranks, Case(ordered, lora_ranks, workspace=workspace, masked=masked))
    assert error < 1e-3


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


@pytest.mark.parametrize("ranks", [1], indirect=True)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (own_forward, "Own.forward_impl is its own"),
        (own_prefill, "Own.forward_mha is its own"),
        (own_reader, "Own.fuse reads the weight too"),
        (reading_holder, "Own.f reads the weight too"),
        (own_copy, "its kernels have their own copy of the weight"),
        (quantised_cache, "its cache is fp8"),
        (sparse, "its attention is sparse"),
        (context_parallel, "it does not see all tokens of a batch with their context"),
        (lost_attribute, "'MLAAttention' object has no attribute 'kv_cache_dtype'"),
        (other_platform, "its kernels on xpu are not known"),
        (full_graphs, "CUDA graphs record its decode without LoRA"),
        (eager_gpu, ""),
        (piecewise_graphs, ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_attention_is_corrected_only_where_all_readers_are_known(
    ranks: Ranks, change: Callable[[Any, contextlib.ExitStack], None], reason: str
) -> None:
    [found] = ranks.run(mla.find_reason, MIXED, change)
    assert found.startswith(reason)
    assert bool(found) is bool(reason)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_cut_lora_a_is_not_served(ranks: Ranks) -> None:
    case = dataclasses.replace(MIXED, fully_sharded=True)
    found = ranks.run(mla.find_reason, case, eager_gpu)
    assert found == ["--fully-sharded-loras has cut its LoRA-A"] * 2


@pytest.mark.parametrize("ranks", [1], indirect=True)
def test_decode_around_the_attention_is_an_error_only_with_lora(ranks: Ranks) -> None:
    [error] = ranks.run(mla.decode_around, MIXED)
    assert "its adapters are not known here" in error
