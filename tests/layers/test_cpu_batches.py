"""Batches of any shape: each row gets its own adapter's LoRA, or the call goes to vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import cpu_layers, layers
from support.examples import ANY_TIME
from support.layers import MAX_LORAS, MAX_RANK, TOKENS
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_nway_lora.layers import cpu_batches
from vllm_nway_lora.layers.cpu_batches import group

WIDTHS, INPUT_SIZE = (6, 3), 8
SLOTS = st.integers(-1, MAX_LORAS - 1)
MAPPINGS = st.one_of(
    st.lists(SLOTS, max_size=TOKENS),
    st.lists(SLOTS, min_size=1, max_size=4).map(lambda s: [x for x in s for _ in range(3)]),
    st.tuples(SLOTS, st.integers(1, TOKENS)).map(lambda pair: [pair[0]] * pair[1]),
)


@pytest.fixture(params=[cpu_batches.FEW, 0], ids=["few", "many"])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Limit the tokens of one batched product to the usual number, or to none."""
    monkeypatch.setattr(cpu_batches, "FEW", request.param)
    return int(request.param)


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float()


A = [integers(MAX_LORAS, 1, MAX_RANK, INPUT_SIZE, seed=1 + n) for n in range(len(WIDTHS))]
B = [integers(MAX_LORAS, 1, width, MAX_RANK, seed=9 + width) for width in WIDTHS]


def expect(y: torch.Tensor, x: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
    """Return ``y + x A^T B^T`` with each row's slot; rows after the end of ``slots`` stay as they are."""
    y = y.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            y[row] += torch.cat([b[slot, 0] @ (a[slot, 0] @ x[row]) for a, b in zip(A, B)])
    return y


def wrapper(tokens: Sequence[int], prompts: Sequence[int] = ()) -> Any:
    punica = layers.punica_wrapper()
    # vLLM cannot map an empty prefill.
    cpu_layers.map_batch(punica, tokens, prompts, prefill=bool(tokens))
    return punica


@ANY_TIME
@given(mapping=MAPPINGS, padding=st.integers(0, 3), three_dimensions=st.booleans())
def test_every_row_gets_its_own_adapter(
    few: int, mapping: list[int], padding: int, three_dimensions: bool
) -> None:
    rows = len(mapping) + padding
    x, y = integers(rows, INPUT_SIZE, seed=3), integers(rows, sum(WIDTHS), seed=4)
    # One adapter and no token without: padding can have it too, and is never read.
    read = len(mapping) if len({*mapping}) == 1 else rows
    expected = expect(y, x, mapping)
    if three_dimensions:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    wrapper(mapping).add_lora_linear(y, x, A, B, 1.0, WIDTHS)
    assert torch.equal(y.flatten(0, -2)[:read], expected[:read])


@ANY_TIME
@given(mapping=MAPPINGS.filter(len))
def test_shrink_and_expand_equal_the_whole_product(few: int, mapping: list[int]) -> None:
    x, y = integers(len(mapping), INPUT_SIZE, seed=3), integers(len(mapping), sum(WIDTHS), seed=4)
    expected = expect(y, x, mapping)
    punica = wrapper(mapping)
    buffers = torch.zeros(len(WIDTHS), len(mapping), MAX_RANK)
    punica.add_shrink(buffers, x, A, 1.0)
    punica.add_expand(y, buffers, B, WIDTHS, offset_start=0, add_input=True)
    assert torch.equal(y, expected)


@ANY_TIME
@given(slot=SLOTS, rows=st.integers(0, TOKENS), mapped=st.integers(1, TOKENS))
def test_batch_of_one_adapter_holds_for_any_number_of_rows(
    slot: int, rows: int, mapped: int
) -> None:
    """As where a forward sees a part of the tokens, or logits of more rows than prompts."""
    x, y = integers(rows, INPUT_SIZE, seed=3), integers(rows, sum(WIDTHS), seed=4)
    expected = expect(y, x, [slot] * rows)
    wrapper([slot] * mapped).add_lora_linear(y, x, A, B, 1.0, WIDTHS)
    assert torch.equal(y, expected)
    logits = integers(rows, WIDTHS[0] + 2, seed=5)  # with two columns of padding
    wanted = logits.clone()
    for row in range(rows if slot >= 0 else 0):
        wanted[row, : WIDTHS[0]] += B[0][slot, 0] @ (A[0][slot, 0] @ x[row])
    wrapper([0], [slot] * mapped).add_lora_logits(logits, x, A[0], B[0], 1.0)
    assert torch.equal(logits, wanted)


@pytest.mark.parametrize(
    "method", ["add_lora_linear", "add_shrink", "add_expand", "add_lora_logits"]
)
def test_fewer_rows_than_tokens_of_several_adapters_go_to_vllm(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing says which of the tokens they are. vLLM's own products fail."""
    calls = []
    monkeypatch.setattr(PunicaWrapperCPU, method, lambda self, *a, **k: calls.append(a))
    punica = wrapper((0, 1, 1), (0, 1, 1))
    x, y = torch.zeros(2, INPUT_SIZE), torch.zeros(2, sum(WIDTHS))
    arguments: dict[str, tuple[Any, ...]] = {
        "add_lora_linear": (y, x, A, B, 1.0, WIDTHS),
        "add_shrink": (torch.zeros(2, 2, MAX_RANK), x, A, 1.0),
        "add_expand": (y, torch.zeros(2, 2, MAX_RANK), B, WIDTHS),
        "add_lora_logits": (y, x, A[0], B[0], 1.0),
    }
    getattr(punica, method)(*arguments[method])
    assert len(calls) == 1


def test_nothing_is_added_before_the_first_mapping() -> None:
    y = torch.zeros(3, sum(WIDTHS))
    layers.punica_wrapper().add_lora_linear(y, integers(3, INPUT_SIZE), A, B, 1.0, WIDTHS)
    assert not y.any()


@pytest.mark.parametrize("mapping", [(0, 1, 2, -1, 0), (0, 0, 1, 2, -1)])
def test_adapter_that_is_not_finite_leaves_other_tokens_unchanged(
    few: int, mapping: tuple[int, ...]
) -> None:
    b = [tensor.clone() for tensor in B]
    for tensor in b:
        tensor[1] = float("inf")
    x, y = integers(len(mapping), INPUT_SIZE), torch.zeros(len(mapping), sum(WIDTHS))
    wrapper(mapping).add_lora_linear(y, x, A, b, 1.0, WIDTHS)
    others = torch.tensor(mapping) != 1
    assert torch.equal(y[others], expect(torch.zeros_like(y), x, mapping)[others])


@ANY_TIME
@given(mapping=st.lists(SLOTS, max_size=2 * cpu_batches.FEW))
def test_groups_hold_each_token_with_lora_once(mapping: list[int]) -> None:
    indices = torch.tensor(mapping, dtype=torch.long)
    batch = group(indices)
    found = {}
    for slot, rows in batch.groups:
        for token in torch.arange(len(mapping))[rows].tolist():
            assert found.setdefault(token, slot) == slot
    assert found == {token: slot for token, slot in enumerate(mapping) if slot >= 0}
    few = batch.few
    if few is not None:
        assert len(few.tokens) <= cpu_batches.FEW
        slots = torch.arange(MAX_LORAS)[few.slots]
        assert len(slots) == few.adapters == len({*mapping} - {-1}) > 1
        rows = torch.arange(len(mapping)) if few.rows is None else few.rows
        assert torch.equal(few.tokens[few.places], rows)
        most = len(few.tokens) // few.adapters
        assert torch.equal(slots[few.places // most], indices[rows])
