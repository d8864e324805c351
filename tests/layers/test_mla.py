"""LoRA on ``kv_b_proj`` in vLLM's MLA attention: exact as dense attention with merged weights, or refused."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import mla, mla_cases, mla_obstacles
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


@pytest.mark.parametrize("ranks", [1], indirect=True)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (mla_obstacles.own_forward, "Own.forward_impl is its own"),
        (mla_obstacles.own_prefill, "Own.forward_mha is its own"),
        (mla_obstacles.own_reader, "Own.fuse reads the weight too"),
        (mla_obstacles.reading_holder, "Own.f reads the weight too"),
        (mla_obstacles.own_copy, "its kernels have their own copy of the weight"),
        (mla_obstacles.quantised_cache, "its cache is fp8"),
        (mla_obstacles.sparse, "its attention is sparse"),
        (
            mla_obstacles.context_parallel,
            "context parallelism or dual-batch overlap splits its tokens",
        ),
        (mla_obstacles.lost_attribute, "'MLAAttention' object has no attribute 'kv_cache_dtype'"),
        (mla_obstacles.other_platform, "its kernels on xpu are not known"),
        (mla_obstacles.full_graphs, "CUDA graphs record its decode without LoRA"),
        (mla_obstacles.eager_gpu, ""),
        (mla_obstacles.piecewise_graphs, ""),
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
    found = ranks.run(mla.find_reason, case, mla_obstacles.eager_gpu)
    assert found == ["--fully-sharded-loras has cut its LoRA-A"] * 2


@pytest.mark.parametrize("ranks", [1], indirect=True)
def test_decode_around_the_attention_is_an_error_only_with_lora(ranks: Ranks) -> None:
    [error] = ranks.run(mla.decode_around, MIXED)
    assert "vLLM called its attention without forward_impl" in error
