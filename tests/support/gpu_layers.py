"""Fused layers with LoRA on vLLM's GPU kernels, for all ranks of a simulated TP group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from support import gpu
from support.layers import Fusion, assemble, set_adapter
from vllm_nway_lora.diagnosis.offline import StandInGroup

#: Integers up to these are exact.
LARGEST = {torch.float16: 2048, torch.bfloat16: 256}


@dataclass(frozen=True)
class KernelCase:
    """One layer, the adapters in its slots and a batch.

    Attributes:
        title: what the case is about.
        adapters: per slot the modules that the adapter has (indices into ``fusion.modules``).
        slots: the slot of each token, -1 without LoRA; by default all slots and -1 in turn.
        size: number of TP ranks.
    """

    title: str
    fusion: Fusion
    adapters: tuple[tuple[int, ...], ...] = ((0, 1),)
    columns: int = 64
    rank: int = 8
    max_rank: int = 8
    max_loras: int = 4
    size: int = 1
    fully_sharded: bool = False
    slots: tuple[int, ...] = ()

    @property
    def batch(self) -> tuple[int, ...]:
        """The slot of each token."""
        return self.slots or tuple(t % (len(self.adapters) + 1) - 1 for t in range(12))


@dataclass(frozen=True)
class Tensors:
    """The base weight of a layer and its adapters: per slot and module ``(A, B)`` or None."""

    weight: torch.Tensor
    adapters: list[list[Any]]


def tensors(case: KernelCase) -> Tensors:
    """Return a case's weight and adapters, with entries -1, 0 and 1, in float32."""
    generator = torch.Generator().manual_seed(3)
    fusion = case.fusion

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 2, shape, generator=generator).float()

    weight = random(sum(fusion.sizes), case.columns)
    adapters = [
        [
            (random(case.rank, case.columns), random(fusion.rows(module), case.rank))
            if module in adapted
            else None
            for module in range(len(fusion.modules))
        ]
        for adapted in case.adapters
    ]
    return Tensors(weight, adapters)


def inputs(case: KernelCase, tokens: int) -> torch.Tensor:
    """Return an input of ``tokens`` rows; a third of the entries is 1 or -1, the rest is 0."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-1, 2, (tokens, case.columns), generator=generator)
    return (x * torch.randint(0, 2, x.shape, generator=generator)).float()


def dense(case: KernelCase, slots: Sequence[int]) -> torch.Tensor:
    """Return the reference in float64: ``x (W + B A)^T`` with each token's adapter."""
    given, x = tensors(case), inputs(case, len(slots)).double()
    output = x @ given.weight.double().T
    for token, slot in enumerate(slots):
        for pair, group in zip(given.adapters[slot] if slot >= 0 else (), case.fusion.groups):
            if pair is not None:
                a, b = (tensor.double() for tensor in pair)
                first = sum(case.fusion.sizes[: group[0]])
                output[token, first : first + len(b)] += b @ (a @ x[token])
    return output


@contextmanager
def on_rank(group: Any) -> Iterator[None]:
    """Make this process a rank of a simulated TP group."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    real, parallel_state._TP = parallel_state._TP, group
    try:
        with set_current_vllm_config(_config(VllmConfig)):
            yield
    finally:
        parallel_state._TP = real


_configs: list[Any] = []


def _config(build: Any) -> Any:
    if not _configs:
        _configs.append(build())
    return _configs[0]


def set_plugin(on: bool) -> None:
    """Turn the plugin on or off in this process."""
    from vllm.lora import utils, worker_manager  # noqa: F401  (this import applies the patches)

    import vllm_nway_lora

    vllm_nway_lora.unregister()
    os.environ["VLLM_NWAY_LORA"] = "1"
    if on:
        vllm_nway_lora.register()


def build(case: KernelCase, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """Return this rank's layer as vLLM wraps it for LoRA, with empty slots, and the LoRA config."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora import utils
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    fusion = case.fusion
    base = MergedColumnParallelLinear(
        case.columns,
        list(fusion.sizes),
        bias=False,
        params_dtype=dtype,
        prefix=f"model.layers.0.mixer.{fusion.name}",
    )
    weight = tensors(case).weight.to(dtype)
    for shard, part in enumerate(weight.split(fusion.sizes)):
        base.weight.weight_loader(base.weight, part, shard)
    base.to(device)
    base.quant_method.process_weights_after_loading(base)
    config = LoRAConfig(
        max_lora_rank=case.max_rank,
        max_loras=case.max_loras,
        fully_sharded_loras=case.fully_sharded,
        lora_dtype=dtype,
    )
    return utils.from_layer(base, case.max_loras, config, list(fusion.modules), None), config


class KernelLayer:
    """A case's layer on every rank, with the adapters in its slots.

    Attributes:
        layers: per rank the layer, as vLLM has wrapped it.
        wrapped: False if vLLM has not wrapped it.
    """

    def __init__(self, case: KernelCase, dtype: torch.dtype, plugin: bool = True) -> None:
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

        set_plugin(plugin)
        gpu.forget_addresses()
        self.case, self.dtype = case, dtype
        self.groups = [StandInGroup(rank, case.size) for rank in range(case.size)]
        self.layers: list[Any] = []
        for group in self.groups:
            with on_rank(group):
                layer, config = build(case, dtype, gpu.device())
                self.layers.append(layer)
        self.wrapped = all(hasattr(layer, "lora_a_stacked") for layer in self.layers)
        if not self.wrapped:
            return
        for group, layer in zip(self.groups, self.layers):
            with on_rank(group):
                for slot, adapter in enumerate(tensors(case).adapters):
                    set_adapter(
                        layer, slot, [pair and [t.to(dtype) for t in pair] for pair in adapter]
                    )
        self.punica = PunicaWrapperGPU(128, 128, gpu.device(), lora_config=config)
        for layer in self.layers:
            layer.set_mapping(self.punica)

    def map_tokens(self, slots: Sequence[int]) -> None:
        """Map each token of a batch to its slot, as vLLM's manager does."""
        from vllm.lora.layers import LoRAMapping

        ids = tuple(slot + 1 for slot in slots)
        count = self.case.max_loras + 1
        mapping = LoRAMapping(ids, ids, is_prefill=True)
        self.punica.update_metadata(mapping, list(range(1, count)), count, 512)

    def input(self, tokens: int) -> torch.Tensor:
        """Return a batch's input on the device."""
        return inputs(self.case, tokens).to(gpu.device(), self.dtype)

    def __call__(self, slots: Sequence[int]) -> torch.Tensor:
        """Return the full output of a batch, in float64 on the CPU."""
        self.map_tokens(slots)
        x = self.input(len(slots))
        outputs = self._forward(x)
        if any(group.sent for group in self.groups):
            sent = [list(group.sent) for group in self.groups]
            for group in self.groups:
                group.replies = [torch.cat(parts, -1) for parts in zip(*sent, strict=True)]
            outputs = self._forward(x)
        return assemble(self.case.fusion, [output.double().cpu() for output in outputs])

    def _forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for group, layer in zip(self.groups, self.layers):
            group.sent.clear()
            with on_rank(group):
                outputs.append(layer(x)[0])
        return outputs


def outcome(case: KernelCase, dtype: torch.dtype, plugin: bool) -> str:
    """Return ``exact``, ``wrong``, ``refused`` or ``not wrapped``.

    ``refused`` is any error while the adapters are written into their slots.
    """
    expected = dense(case, case.batch)
    assert expected.abs().max() <= LARGEST[dtype]
    try:
        layer = KernelLayer(case, dtype, plugin)
    except (AttributeError, IndexError, RuntimeError, ValueError, AssertionError) as error:
        print(f"{case.title}: {type(error).__name__}: {error}")
        return "refused"
    if not layer.wrapped:
        return "not wrapped"
    return "exact" if torch.equal(layer(case.batch), expected) else "wrong"
