"""The sizes of vLLM's own layers, as admission reads them."""

from __future__ import annotations

import pytest
from support import sizes
from support.ranks import Ranks
from support.sizes import HIDDEN


@pytest.mark.parametrize(
    ("kind", "shapes", "faulty"),
    [
        ("qkv", [(HIDDEN, 32), (HIDDEN, 32), (HIDDEN, 16)], []),
        ("qkv", [(HIDDEN, 32), (HIDDEN, 32), (HIDDEN, 32)], ["m2"]),
        ("qkv", [(HIDDEN, 80)], []),
        # How many rows a module has is not known; its columns are.
        ("own loader", [(HIDDEN, 16), (HIDDEN, 8)], []),
        ("own loader", [(HIDDEN, 16), (HIDDEN + 1, 8)], ["m1"]),
        ("four outputs", [(HIDDEN, 48), (HIDDEN, 16)], []),
        ("four outputs", [(HIDDEN, 48), (HIDDEN + 1, 16)], ["m1"]),
        ("four outputs", [(HIDDEN, 16)] * 4, []),
        ("four outputs", [(HIDDEN, 16)] * 3 + [(HIDDEN, 8)], ["m3"]),
    ],
)
def test_sizes_of_modules(
    ranks: Ranks, kind: str, shapes: list[tuple[int, int]], faulty: list[str]
) -> None:
    for faults in ranks.run(sizes.find_faults, kind, shapes):
        assert [fault.split()[1] for fault in faults] == faulty


def test_tensors_of_other_layers_stay_flat_in_the_mode_of_shared_experts(ranks: Ranks) -> None:
    """``--enable-moe-shared-loras`` concerns experts only."""
    faults = ranks.run(sizes.find_faults, "four outputs", [(HIDDEN, 64)], shared=True)
    assert faults == [[]] * ranks.size
