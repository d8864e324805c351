"""The operations of a GPU for LoRA on ``kv_b_proj``: no other adapter's weights, and no look at a value."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_nway_lora.layers import mla_products
from vllm_nway_lora.layers.mla_products import HeadLoRA

TOKENS, HEADS, NOPE, VALUE, LATENT, RANK, LORAS = 5, 2, 3, 4, 6, 2, 3
#: Per method of ``HeadLoRA``, the shapes of what it adds to and of its input.
SHAPES = {
    "add_to_keys_and_values": ((TOKENS, HEADS * (NOPE + VALUE)), (TOKENS, LATENT)),
    "add_to_queries": ((TOKENS, HEADS, LATENT), (TOKENS, HEADS, NOPE)),
    "add_to_output": ((TOKENS, HEADS, VALUE), (TOKENS, HEADS, LATENT)),
}


@pytest.fixture(params=SHAPES)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(mla_products, "_add", mla_products._add_masked)
    name: str = request.param
    return name


def make_lora() -> HeadLoRA:
    a, b = torch.ones(LORAS, RANK, LATENT), torch.ones(LORAS, HEADS, NOPE + VALUE, RANK)
    return HeadLoRA(a, b, NOPE, range(LORAS))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_reach_only_their_own_tokens(method: str, value: float) -> None:
    lora = make_lora()
    lora.a[1], lora.b[1] = value, value
    output, given = (torch.ones(shape) for shape in SHAPES[method])
    getattr(lora, method)(output, given, torch.tensor([0, 1, -1, 2, 0]))
    is_finite = output.flatten(1).isfinite().all(1)
    assert is_finite.tolist() == [True, False, True, True, True]
    assert (output[2] == 1).all()
    assert (output[[0, 3, 4]] != 1).all()


def test_no_operation_depends_on_a_value(method: str) -> None:
    """A look at one, as by ``tolist`` or ``nonzero``, is an error with tensors that have none."""
    with FakeTensorMode():
        lora = make_lora()
        output, given = (torch.ones(shape) for shape in SHAPES[method])
        getattr(lora, method)(output, given, torch.zeros(TOKENS, dtype=torch.long))
        with pytest.raises(Exception, match="aten"):
            torch.zeros(TOKENS).nonzero()
