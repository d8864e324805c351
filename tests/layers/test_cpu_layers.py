"""Every LoRA class of vLLM with grouped products on CPU: as with vLLM's own products."""

from __future__ import annotations

import pytest
import torch
import vllm
from support import cpu_layers
from support.cpu_layers import Case
from support.ranks import Ranks

from vllm_nway_lora.compat import defects

CLASSES = {"column", "merged", "qkv", "qkv whole", "row", "replicated", "embedding", "logits"}
BATCHES = {
    "one adapter": ((1,) * 9, (1, 1)),
    "no adapter": ((-1,) * 5, (-1,)),
    "several, some without": ((2, 2, -1, 0, 0, 1, 2), (2, -1, 0, 1, 2)),
    "speculative tokens": ((0, 0, 0, 1, 1, 1, 2, 2, 2), (0, 0, 0, 1, 1, 1, 2, 2, 2)),
    "one token": ((1,), (1,)),
}


@pytest.fixture(scope="module")
def rank() -> Ranks:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("dtype", "lora_dtype", "rounding"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 2**-7),
        (torch.bfloat16, torch.float32, 2**-6),  # vLLM rounds LoRA-B too
    ],
    ids=["float32", "bfloat16", "bfloat16-float32"],
)
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_stock_within_rounding(
    rank: Ranks,
    batch: str,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    rounding: float,
    prefill: bool,
) -> None:
    [found] = rank.run(cpu_layers.run, Case(*BATCHES[batch], dtype, lora_dtype, prefill))
    assert found.keys() == CLASSES
    for name, (ours, stock) in found.items():
        bound = rounding * float(stock.abs().max())
        torch.testing.assert_close(
            ours, stock, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_tokens_without_lora_beside_full_slots(rank: Ranks) -> None:
    """Stock adds the last slot's LoRA to them, until the release that the defect names."""
    tokens, prompts = (3, -1, 0, -1), (3, -1, 0, -1)
    full = Case(tokens, prompts, has_full_slots=True)
    [found] = rank.run(cpu_layers.run, full)
    without = Case((3, 3, 0, 0), (3, 3, 0, 0), has_full_slots=True)  # every token has LoRA
    [with_lora] = rank.run(cpu_layers.run, without)
    none = Case((-1,) * 4, (-1,) * 4, has_full_slots=True)
    [base] = rank.run(cpu_layers.run, none)
    is_wrong = defects.find("last-slot-on-cpu").affects(vllm.__version__)
    for name, (ours, stock) in found.items():
        torch.testing.assert_close(ours[::2], with_lora[name][0][::2])
        torch.testing.assert_close(ours[1::2], base[name][0][1::2], rtol=0, atol=1e-5)
        assert torch.allclose(stock, ours, atol=1e-4) != is_wrong, name
