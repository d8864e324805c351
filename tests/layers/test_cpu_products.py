"""The products on CPU, grouped by adapter: equal to vLLM's own and to dense arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import layers
from support.layers import MAX_LORAS, MAX_RANK, TOKENS, Case, Fusion
from support.ranks import Ranks
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_nway_lora.layers.punica import group_by_adapter

QKVZ = Fusion("in_proj_qkvz", (16, 16, 32, 32), ("in_proj_qkv", "in_proj_z"), ((0, 1, 2), (3,)))
#: The slot of each token. One slot stays empty: see the reference in each test.
BATCHES = {
    "one adapter": (1,) * TOKENS,
    "no adapter": (-1,) * TOKENS,
    "sequences": (0, 0, 0, -1, -1, 1, 1, 1, 1, 2, 2, -1),
    "interleaved": (2, -1, 0, 1, 0, -1, 2, 2, 1, -1, 0, 2),
    "one token": (2,),
    "one token without": (-1,),
}


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
def test_mixed_batches_equal_dense_arithmetic(ranks: Ranks, fully_sharded: bool, how: str) -> None:
    # Every rank would compile the same C++ code, so several ranks only trace the graph.
    compiled_by = "inductor" if ranks.size == 1 else "aot_eager"
    backend = compiled_by if how == "compiled" else None
    # The last slot has an adapter too, which must not be applied to tokens without an adapter.
    case = Case(QKVZ, ((0, 1), (0,), (1,), (0, 1)), fully_sharded=fully_sharded)
    per_rank = ranks.run(layers.run_batches, case, list(BATCHES.values()), backend)
    for number, slots in enumerate(BATCHES.values()):
        output = layers.assemble(QKVZ, [outputs[number] for outputs in per_rank])
        torch.testing.assert_close(output, layers.dense(case, slots), rtol=0, atol=0)


WIDTHS = (24, 8)
INPUT_SIZE = 64


def operands(dtype: torch.dtype, lora_dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments for ``add_lora_linear``, whose sums float32 cannot represent exactly."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    lora_a = [random(MAX_LORAS, 1, MAX_RANK, INPUT_SIZE).to(lora_dtype) for _ in WIDTHS]
    lora_b = [random(MAX_LORAS, 1, width, MAX_RANK).to(lora_dtype) for width in WIDTHS]
    for tensor in (*lora_a, *lora_b):
        tensor[-1] = 0  # vLLM until 0.32.0 applies the last slot to tokens without LoRA
    return {
        "y": random(TOKENS, sum(WIDTHS)).to(dtype),
        "x": random(TOKENS, INPUT_SIZE).to(dtype),
        "lora_a_stacked": tuple(lora_a),
        "lora_b_stacked": tuple(lora_b),
        "scale": 0.5,
        "output_slices": WIDTHS,
    }


def exact(operands: dict[str, Any], slots: Sequence[int]) -> torch.Tensor:
    """Return ``y + scale * x A^T B^T`` with each token's slot, in float64."""
    y = operands["y"].double()
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        parts = [
            b[slot, 0].double() @ (a[slot, 0].double() @ operands["x"][token].double())
            for a, b in zip(operands["lora_a_stacked"], operands["lora_b_stacked"])
        ]
        y[token] += operands["scale"] * torch.cat(parts)
    return y


@pytest.fixture
def ours() -> Any:
    return layers.punica_wrapper()


@pytest.fixture
def stock() -> PunicaWrapperCPU:
    return layers.punica_wrapper(plugin=False)


@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("dtype", "lora_dtype", "rounding"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 2**-7),
        (torch.bfloat16, torch.float32, 2**-7),
        (torch.float16, torch.float16, 2**-10),
    ],
    ids=["float32", "bfloat16", "bfloat16-float32", "float16"],
)
def test_equals_stock_within_rounding(
    ours: Any,
    stock: PunicaWrapperCPU,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    rounding: float,
    batch: str,
    prefill: bool,
) -> None:
    slots = BATCHES[batch]
    given = operands(dtype, lora_dtype)
    given |= {name: given[name][: len(slots)] for name in ("x", "y")}
    outputs = []
    for punica in (ours, stock):
        layers.map_tokens(punica, slots, prefill)
        outputs.append(given["y"].clone())
        punica.add_lora_linear(**given | {"y": outputs[-1]})
    mine, theirs = outputs
    # An absolute bound: the terms of a sum near zero are not near zero.
    largest = float(theirs.abs().max())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=rounding * largest)
    torch.testing.assert_close(
        mine.double(), exact(given, slots), rtol=0, atol=2 * rounding * largest
    )


@pytest.mark.parametrize("slots", [(1,) * TOKENS, (0, 1) * (TOKENS // 2)], ids=["one", "mixed"])
def test_expand_begins_at_its_offset(
    ours: Any, stock: PunicaWrapperCPU, slots: tuple[int, ...]
) -> None:
    """Columns before and behind the slices stay unchanged."""
    offset, behind = 5, 3
    given = operands(torch.float32, torch.float32)
    buffers = torch.randn(len(WIDTHS), TOKENS, MAX_RANK)
    y = torch.randn(TOKENS, offset + sum(WIDTHS) + behind)
    mine, theirs = y.clone(), y.clone()
    for wrapper, output in ((ours, mine), (stock, theirs)):
        layers.map_tokens(wrapper, slots)
        wrapper.add_expand(output, buffers, given["lora_b_stacked"], WIDTHS, offset_start=offset)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert torch.equal(mine[:, :offset], y[:, :offset])
    assert torch.equal(mine[:, -behind:], y[:, -behind:])
    assert not torch.equal(mine[:, offset:-behind], y[:, offset:-behind])


def test_only_vllms_cpu_wrapper_is_replaced(ours: Any, stock: PunicaWrapperCPU) -> None:
    class OfAnotherPlatform(PunicaWrapperCPU):
        pass

    for other in (OfAnotherPlatform(TOKENS, TOKENS, "cpu"), object(), ours):
        assert group_by_adapter(other) is other
    assert isinstance(ours, PunicaWrapperCPU)
    assert type(ours) is not PunicaWrapperCPU
    taken_over = vars(group_by_adapter(stock))
    assert all(taken_over[name] is value for name, value in vars(stock).items())


def test_unknown_arguments_go_to_vllm(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(name: str) -> Any:
        return lambda _, *args, **kwargs: calls.append((name, args, kwargs))

    for name in ("add_lora_linear", "add_shrink", "add_expand", "add_lora_logits"):
        monkeypatch.setattr(PunicaWrapperCPU, name, record(name))
    monkeypatch.setattr(PunicaWrapperCPU, "add_lora_embedding", record("add_lora_embedding"))
    y, x, a, b = torch.zeros(2, 8), torch.zeros(2, 4), (), ()
    stacked = torch.zeros(1, 1, 8, 4)
    ours.add_lora_linear(y, x, a, b, 1.0, (8,), later=1)
    ours.add_shrink(y, x, a, 1.0, later=2)
    ours.add_expand(y, x, b, (8,), offset_start=4, add_input=True, later=3)
    ours.add_expand(y, x, b, (8,), add_inputs=False)
    ours.add_lora_embedding(y, x, stacked, add_inputs=False)
    ours.add_lora_logits(y, x, stacked, stacked, 1.0, later=4)
    assert calls == [
        ("add_lora_linear", (y, x, a, b, 1.0, (8,)), {"later": 1}),
        ("add_shrink", (y, x, a, 1.0), {"later": 2}),
        ("add_expand", (y, x, b, (8,), 4, True), {"later": 3}),
        ("add_expand", (y, x, b, (8,), 0, False), {}),
        ("add_lora_embedding", (y, x, stacked, False), {}),
        ("add_lora_logits", (y, x, stacked, stacked, 1.0), {"later": 4}),
    ]
