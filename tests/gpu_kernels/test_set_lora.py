"""What ``set_lora`` asks of a device: half of stock's copies, no readback, no index.

The operations are counted on slots of the meta device, so this needs no GPU. On a GPU the copies are
also counted by torch's profiler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from support import gpu, gpu_layers
from support.gpu_cases import QKVZ
from support.gpu_layers import KernelCase, on_rank
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_nway_lora.diagnosis.stand_ins import StandInGroup

#: Without an effect on a device.
VIEWS = ("slice", "select", "view", "split", "split_with_sizes", "expand", "detach", "alias", "t")


class Operations(TorchDispatchMode):
    """Counts copies and fills of a device's tensors, and everything else that is no view."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.counts = device, Counter[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        on_device = [x.device.type == self.device for x in args if isinstance(x, torch.Tensor)]
        if name == "copy_" and on_device == [True, False]:
            self.counts["copies"] += 1
        elif name in ("zero_", "fill_", "copy_") and all(on_device):
            self.counts["fills"] += 1  # `slot[index] = 0` is a copy within the meta device
        elif any(on_device) and name not in VIEWS:
            self.counts[f"other: {name}"] += 1
        return function(*args, **(kwargs or {}))


def setter(case: KernelCase, plugin: bool, device: str) -> Callable[[], None]:
    """Return a function that sets slot 0 of rank 0, as often as it is called."""
    gpu_layers.set_plugin(plugin)
    group, half = StandInGroup(0, case.size), torch.float16
    pin = device == "cuda"  # as vLLM's loader does
    pairs = [p and [t.to(half) for t in p] for p in gpu_layers.tensors(case).adapters[0]]
    if pin:
        pairs = [[t.pin_memory() for t in pair] for pair in pairs]
    with ExitStack() as stack:
        if device == "meta":
            where = mock.patch(
                "vllm.lora.layers.base_linear._get_lora_device", return_value=torch.device("meta")
            )
            stack.enter_context(where)
        stack.enter_context(on_rank(group))
        layer, _ = gpu_layers.build(case, half, "cpu" if device == "meta" else device)

    def set_slot() -> None:
        with on_rank(group):
            gpu_layers.set_adapter(layer, 0, pairs)

    return set_slot


def count(case: KernelCase, plugin: bool) -> dict[str, int]:
    set_slot = setter(case, plugin, "meta")
    set_slot()  # what is computed once is computed now
    with Operations("meta") as operations:
        set_slot()
    return dict(operations.counts)


@pytest.mark.parametrize("rank", [8, 16], ids="rank{}of16".format)
@pytest.mark.parametrize(
    ("size", "sharded"), [(1, False), (2, False), (2, True)], ids=["tp1", "tp2", "tp2-sharded"]
)
def test_half_of_the_copies(size: int, sharded: bool, rank: int) -> None:
    case = KernelCase("set", QKVZ, rank=rank, max_rank=16, size=size, fully_sharded=sharded)
    # Two modules have two A and two B. The rest of a slot is filled only if the rank leaves a rest.
    ours = {"copies": 4}
    a_rows = 16 // size if sharded else 16
    rest = 2 * (rank < a_rows) + 2 * (rank < 16)
    assert count(case, plugin=True) == ours | ({"fills": rest} if rest else {})
    # Stock clears and writes A and B of four slices.
    assert count(case, plugin=False) == {"copies": 8, "fills": 8}


if gpu.is_native():

    @pytest.mark.parametrize("plugin", [True, False], ids=["plugin", "stock"])
    def test_profiler_sees_these_copies(plugin: bool) -> None:
        set_slot = setter(KernelCase("set", QKVZ), plugin, "cuda")
        set_slot()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            set_slot()
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if "CUDA" in str(event.device_type)]
        print(Counter(names))
        assert sum("Memcpy HtoD" in name for name in names) == (4 if plugin else 8)
        assert not [name for name in names if "DtoH" in name or "Pageable" in name]
