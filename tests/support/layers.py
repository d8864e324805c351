"""Real vLLM fused layers with LoRA, run on one rank; and the dense arithmetic they must equal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from support.cpu import unpin

INPUT_SIZE = 32
TOKENS = 12
MAX_LORAS = 4
MAX_RANK = 8


@dataclass(frozen=True)
class Fusion:
    """A fused projection: its name, outputs, modules and which outputs each module covers."""

    name: str
    sizes: tuple[int, ...]
    modules: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    disable_tp: bool = False
    bias: bool = False

    def rows(self, module: int) -> int:
        return sum(self.sizes[output] for output in self.groups[module])


@dataclass(frozen=True)
class Case:
    """One layer and the adapters in its slots.

    Attributes:
        adapters: per slot, the modules that the adapter has (indices into ``fusion.modules``).
        rank: LoRA's r.
        plugin: whether vllm-nway-lora is on.
    """

    fusion: Fusion
    adapters: tuple[tuple[int, ...], ...]
    rank: int = 6
    fully_sharded: bool = False
    plugin: bool = True
    prefill: bool = True

    def stock(self) -> Case:
        return replace(self, plugin=False)


@dataclass
class Result:
    """What one rank computed: its output ``(TOKENS, local width)`` and the layer that did it."""

    output: torch.Tensor
    layer_class: str
    n_slices: int
    lora_a_bytes: int
    gathered_columns: int = field(default=0)


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, list[list[Any]], list[int]]:
    """Make input, base weight, adapters (per slot and module ``(A, B)`` or None), slot per token.

    The same on every rank, from one seed. Tokens with slot -1 have no LoRA. The values are small
    integers in float32, whose products and sums here float32 holds exactly: what is equal in
    arithmetic is equal to the last bit, whichever order a machine's kernels add in.
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
    # Whole sequences, as in a prefill: the first has no LoRA, then one per slot.
    per_sequence = TOKENS // (len(adapters) + 1)
    slots = [-1] * (TOKENS - per_sequence * len(adapters))
    slots += [slot for slot in range(len(adapters)) for _ in range(per_sequence)]
    return x, weight, adapters, slots


def dense(case: Case, slots: Sequence[int] = ()) -> torch.Tensor:
    """The reference: ``x (W + B A)^T`` with the whole weight of each token's adapter.

    Args:
        slots: the slot of each token; those of :func:`tensors` if not given.
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
    """Put the ranks' outputs together: per fused output, rank after rank."""
    if fusion.disable_tp:
        for output in outputs[1:]:
            assert torch.equal(output, outputs[0])
        return outputs[0]
    local = [size // len(outputs) for size in fusion.sizes]
    parts = [output.split(local, dim=1) for output in outputs]
    return torch.cat([part[i] for i in range(len(local)) for part in parts], dim=1)


def run(case: Case) -> Result:
    """Build the layer on this rank, put the adapters into its slots and run it."""
    layer = build(case)
    x, _, adapters, slots = tensors(case)
    for slot, adapter in enumerate(adapters):
        set_adapter(layer, slot, adapter)
    return apply(case, layer, x, slots)


def build(case: Case) -> Any:
    """Build the fused layer, load its weight and let vLLM wrap it for LoRA."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora import utils, worker_manager  # noqa: F401  (its import applies the patches)
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    import vllm_nway_lora
    from vllm_nway_lora import patches

    vllm_nway_lora.unregister()
    os.environ["VLLM_NWAY_LORA"] = "1"  # whatever the tests before have set on this rank
    if case.plugin:
        vllm_nway_lora.register()
    assert bool(patches.applied()) == case.plugin
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
    """Hand an adapter's pairs to the layer as vLLM's manager does: lists, or tensors where M is 1."""
    lora_a = [pair and pair[0] for pair in adapter]
    lora_b = [pair and pair[1] for pair in adapter]
    if len(adapter) == 1:
        lora_a, lora_b = lora_a[0], lora_b[0]
    layer.set_lora(slot, lora_a, lora_b)


def apply(case: Case, layer: Any, x: torch.Tensor, slots: Sequence[int]) -> Result:
    punica = punica_wrapper()
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
    """Build the layer on this rank and run it on one batch after another.

    Args:
        batches: per batch the slot of each token (-1: none), at most ``TOKENS`` of them.
        backend: torch.compile's, which makes one graph of the layer; None to run it as it is.
    """
    layer = build(case)
    x, _, adapters, _ = tensors(case)
    for slot, adapter in enumerate(adapters):
        set_adapter(layer, slot, adapter)
    punica = punica_wrapper()
    layer.set_mapping(punica)
    call = torch.compile(layer, fullgraph=True, backend=backend) if backend else layer
    return [forward(case, call, punica, x[: len(slots)], slots) for slots in batches]


def punica_wrapper() -> Any:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    unpin()
    config = LoRAConfig(max_lora_rank=MAX_RANK, max_loras=MAX_LORAS)
    return PunicaWrapperCPU(TOKENS, TOKENS, "cpu", lora_config=config)


def map_tokens(punica: Any, slots: Sequence[int], prefill: bool = True) -> None:
    """Give each token of a batch its slot, as vLLM's manager does."""
    from vllm.lora.layers import LoRAMapping

    # The manager's ids are slot + 1; 0 is "no LoRA".
    ids = tuple(slot + 1 for slot in slots)
    mapping = LoRAMapping(ids, ids, is_prefill=prefill)
    punica.update_metadata(mapping, list(range(1, MAX_LORAS + 1)), MAX_LORAS + 1, 512)


def forward(
    case: Case, layer: Any, punica: Any, x: torch.Tensor, slots: Sequence[int]
) -> torch.Tensor:
    map_tokens(punica, slots, case.prefill)
    output = layer(x)
    output = output[0] if isinstance(output, tuple) else output
    return output.detach()


def _bias(fusion: Fusion) -> torch.Tensor:
    return torch.arange(sum(fusion.sizes), dtype=torch.float32) / 8


def layer_class(case: Case) -> str:
    """Return the class that the layer has once vLLM has wrapped it for LoRA, or has not."""
    return type(build(case)).__name__


def try_set(fusion: Fusion, lora_a: Any, lora_b: Any) -> tuple[str, bool]:
    """Set a slot that an adapter is in; return the error and whether the slot is as it was."""
    layer = build(Case(fusion, ()))
    rows = [fusion.rows(module) for module in range(len(fusion.modules))]
    rank = 4
    lora_a_before = [torch.ones(rank, INPUT_SIZE)] * len(rows)
    layer.set_lora(1, lora_a_before, [torch.full((r, rank), 2.0) for r in rows])
    stacks = (*layer.lora_a_stacked, *layer.lora_b_stacked)
    before = [stack.clone() for stack in stacks]
    try:
        layer.set_lora(1, lora_a, lora_b)
    except ValueError as error:
        return str(error), all(map(torch.equal, before, stacks))
    return "", False


def set_in_turn(case: Case) -> bool:
    """Set slot 1 to the case's adapter, in one layer after another adapter on everything.

    Returns:
        Whether LoRA's tensors are the same in both layers.
    """
    used, fresh = build(case), build(case)
    whole = replace(case, rank=MAX_RANK, adapters=(tuple(range(len(case.fusion.modules))),))
    for layer, cases in ((used, (whole, case)), (fresh, (case,))):
        for each in cases:
            [adapter] = tensors(each)[2]
            set_adapter(layer, 1, adapter)
    pairs = zip(
        (*used.lora_a_stacked, *used.lora_b_stacked),
        (*fresh.lora_a_stacked, *fresh.lora_b_stacked),
        strict=True,
    )
    return all(torch.equal(a, b) and bool(a[0].eq(0).all()) for a, b in pairs)


def warm_up(fusion: Fusion) -> str:
    """Set what vLLM's `create_dummy_lora` makes, this rank's rows, all zero; return the error."""
    layer = build(Case(fusion, ()))
    dummies = [torch.zeros(b.shape[2], 4) for b in layer.lora_b_stacked]
    for count in {len(fusion.modules), len(dummies)}:
        try:
            layer.set_lora(0, [torch.ones(4, INPUT_SIZE)] * count, dummies[:count])
        except ValueError as error:
            return str(error)
    return ""
