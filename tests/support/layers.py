"""Real vLLM fused layers with LoRA on one TP rank, and the dense product they must equal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from support.cpu import disable_pinned_memory

INPUT_SIZE = 32
TOKENS = 12
MAX_LORAS = 4
MAX_RANK = 8


@dataclass(frozen=True)
class Fusion:
    """A fused projection.

    Attributes:
        name: last part of the layer's path.
        sizes: rows of each output.
        modules: names of the modules, as adapters see them.
        groups: per module the indices of the outputs that it covers.
    """

    name: str
    sizes: tuple[int, ...]
    modules: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    disable_tp: bool = False
    bias: bool = False

    def rows(self, module: int) -> int:
        """Return the rows of a module's LoRA-B."""
        return sum(self.sizes[output] for output in self.groups[module])


@dataclass(frozen=True)
class Case:
    """One layer and the adapters in its slots.

    Attributes:
        adapters: per slot the modules that the adapter has (indices into ``fusion.modules``).
        rank: LoRA's r.
        plugin: True with the plugin, False for stock vLLM.
    """

    fusion: Fusion
    adapters: tuple[tuple[int, ...], ...]
    rank: int = 6
    fully_sharded: bool = False
    plugin: bool = True
    prefill: bool = True

    def stock(self) -> Case:
        """Return the same case without the plugin."""
        return replace(self, plugin=False)


@dataclass
class Result:
    """One TP rank's output, ``(TOKENS, local width)``, and figures of the layer that computed it."""

    output: torch.Tensor
    layer_class: str
    n_slices: int
    lora_a_bytes: int
    gathered_columns: int = field(default=0)


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, list[list[Any]], list[int]]:
    """Return the input, the base weight, the adapters, and the slot of each token.

    The adapters are, per slot and module, ``(A, B)`` or None. Slot -1 means no LoRA. The seed is
    fixed, so all TP ranks get the same tensors. The values are small integers in float32, whose sums
    of products float32 represents exactly. Results are therefore equal to the last bit, in any order
    of summation.
    """
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=generator).float()

    fusion = case.fusion
    x, weight = random(TOKENS, INPUT_SIZE), random(sum(fusion.sizes), INPUT_SIZE)
    adapters = [
        [
            (random(case.rank, INPUT_SIZE), random(fusion.rows(module), case.rank))
            if module in adapted
            else None
            for module in range(len(fusion.modules))
        ]
        for adapted in case.adapters
    ]
    # Whole sequences, as in a prefill: first one without LoRA, then one per slot.
    per_sequence = TOKENS // (len(adapters) + 1)
    slots = [-1] * (TOKENS - per_sequence * len(adapters))
    slots += [slot for slot in range(len(adapters)) for _ in range(per_sequence)]
    return x, weight, adapters, slots


def dense(case: Case, slots: Sequence[int] = ()) -> torch.Tensor:
    """Return the reference: ``x (W + B A)^T``, with the full weight of each token's adapter.

    Args:
        case: the layer and its adapters.
        slots: the slot of each token; by default those of :func:`tensors`.
    """
    x, weight, adapters, usual = tensors(case)
    slots = slots or usual
    starts = [sum(case.fusion.sizes[:i]) for i in range(len(case.fusion.sizes))]
    merged = []
    for adapter in adapters:
        delta = torch.zeros_like(weight)
        for pair, group in zip(adapter, case.fusion.groups, strict=True):
            if pair is not None:
                a, b = pair
                first = starts[group[0]]
                delta[first : first + b.shape[0]] = b @ a
        merged.append(weight + delta)
    rows = [x[t] @ (weight if slot < 0 else merged[slot]).T for t, slot in enumerate(slots)]
    return torch.stack(rows) + (_bias(case.fusion) if case.fusion.bias else 0)


def assemble(fusion: Fusion, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the full output: for each fused output, the concatenated parts of all TP ranks."""
    if fusion.disable_tp:
        for output in outputs[1:]:
            assert torch.equal(output, outputs[0])
        return outputs[0]
    local = [size // len(outputs) for size in fusion.sizes]
    parts = [output.split(local, dim=1) for output in outputs]
    return torch.cat([part[i] for i in range(len(local)) for part in parts], dim=1)


def run(case: Case) -> Result:
    """Build the layer on this TP rank, write the adapters into its slots and run it."""
    layer = build(case)
    x, _, adapters, slots = tensors(case)
    for slot, adapter in enumerate(adapters):
        set_adapter(layer, slot, adapter)
    return apply(case, layer, x, slots)


def build(case: Case) -> Any:
    """Build the fused layer, load its weight and have vLLM wrap it for LoRA."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora import utils, worker_manager  # noqa: F401  (this import applies the patches)
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    import vllm_nway_lora
    from vllm_nway_lora.compat import registration

    vllm_nway_lora.unregister()
    os.environ["VLLM_NWAY_LORA"] = "1"  # an earlier test may have set another mode on this TP rank
    if case.plugin:
        vllm_nway_lora.register()
    assert bool(registration.applied()) == case.plugin
    fusion = case.fusion
    base = MergedColumnParallelLinear(
        INPUT_SIZE,
        list(fusion.sizes),
        bias=fusion.bias,
        params_dtype=torch.float32,
        prefix=f"model.layers.0.mixer.{fusion.name}",
        disable_tp=fusion.disable_tp,
    )
    weights = tensors(case)[1].split(fusion.sizes)
    for shard, weight in enumerate(weights):
        base.weight.weight_loader(base.weight, weight, shard)
    if fusion.bias:
        for shard, bias in enumerate(_bias(fusion).split(fusion.sizes)):
            base.bias.weight_loader(base.bias, bias, shard)
    base.quant_method.process_weights_after_loading(base)
    config = LoRAConfig(
        max_lora_rank=MAX_RANK,
        max_loras=MAX_LORAS,
        fully_sharded_loras=case.fully_sharded,
        lora_dtype=torch.float32,
    )
    return utils.from_layer(base, MAX_LORAS, config, list(fusion.modules), None)


def set_adapter(layer: Any, slot: int, adapter: Sequence[Any]) -> None:
    """Set a slot as vLLM's manager does: with lists of A and B, or with tensors if M is 1."""
    lora_a = [pair and pair[0] for pair in adapter]
    lora_b = [pair and pair[1] for pair in adapter]
    if len(adapter) == 1:
        lora_a, lora_b = lora_a[0], lora_b[0]
    layer.set_lora(slot, lora_a, lora_b)


def apply(case: Case, layer: Any, x: torch.Tensor, slots: Sequence[int]) -> Result:
    """Run a layer on a batch."""
    punica = punica_wrapper(case.plugin)
    layer.set_mapping(punica)
    return Result(
        output=forward(case, layer, punica, x, slots),
        layer_class=type(layer).__name__,
        n_slices=len(layer.lora_a_stacked),
        lora_a_bytes=sum(a.nbytes for a in layer.lora_a_stacked),
        gathered_columns=sum(a.shape[2] for a in layer.lora_a_stacked),
    )


def run_batches(
    case: Case, batches: Sequence[Sequence[int]], backend: str | None
) -> list[torch.Tensor]:
    """Build the layer on this TP rank and run it on one batch after another.

    Args:
        case: the layer and its adapters.
        batches: per batch the slot of each token (-1: no LoRA), at most ``TOKENS`` tokens.
        backend: backend of torch.compile, which compiles the layer as one graph; None for eager.
    """
    layer = build(case)
    x, _, adapters, _ = tensors(case)
    for slot, adapter in enumerate(adapters):
        set_adapter(layer, slot, adapter)
    punica = punica_wrapper()
    layer.set_mapping(punica)
    call = torch.compile(layer, fullgraph=True, backend=backend) if backend else layer
    return [forward(case, call, punica, x[: len(slots)], slots) for slots in batches]


def punica_wrapper(plugin: bool = True) -> Any:
    """Return a new CPU punica wrapper: of this package, or vLLM's own."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from vllm_nway_lora.layers.punica import group_by_adapter

    disable_pinned_memory()
    config = LoRAConfig(max_lora_rank=MAX_RANK, max_loras=MAX_LORAS)
    wrapper = PunicaWrapperCPU(TOKENS, TOKENS, "cpu", lora_config=config)
    return group_by_adapter(wrapper) if plugin else wrapper


def map_tokens(punica: Any, slots: Sequence[int], prefill: bool = True) -> None:
    """Map each token of a batch to its slot, as vLLM's manager does."""
    from vllm.lora.layers import LoRAMapping

    # Adapter ids are slot + 1 here; id 0 means no LoRA.
    ids = tuple(slot + 1 for slot in slots)
    mapping = LoRAMapping(ids, ids, is_prefill=prefill)
    punica.update_metadata(mapping, list(range(1, MAX_LORAS + 1)), MAX_LORAS + 1, 512)


def forward(
    case: Case, layer: Any, punica: Any, x: torch.Tensor, slots: Sequence[int]
) -> torch.Tensor:
    """Map the tokens to their slots and return the layer's output."""
    map_tokens(punica, slots, case.prefill)
    output = layer(x)
    output = output[0] if isinstance(output, tuple) else output
    return output.detach()


def _bias(fusion: Fusion) -> torch.Tensor:
    return torch.arange(sum(fusion.sizes), dtype=torch.float32) / 8


def layer_class(case: Case) -> str:
    """Return the layer's class after vLLM's wrapping for LoRA; unchanged if vLLM does not wrap it."""
    return type(build(case)).__name__
