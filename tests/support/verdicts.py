"""What vLLM, with the plugin or without, makes of adapters on a family's fused projections."""

from __future__ import annotations

import inspect
import itertools
import json
import random
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest import mock

import torch
import vllm
from packaging.version import Version
from safetensors.torch import save_file
from vllm.model_executor.models import ModelRegistry

from support.family import EXACT, FAILS, IGNORED, REFUSED, WRONG, Family, Fused
from support.models import MAX_RANK, RankModel, forward_all

TOKENS = 5
Weights = dict[str, torch.Tensor]
#: From worst to best: a projection's verdict is the worst that any subset of its modules met.
WORST_FIRST = (FAILS, WRONG, IGNORED, REFUSED, EXACT)


def runs_here(family: Family) -> bool:
    """Tell whether the installed vLLM has the family."""
    release = Version(vllm.__version__).release
    last = Version(family.until).release if family.until else release
    return Version(family.since).release <= release <= last


def family_verdicts(family: Family, size: int, fully_sharded: bool) -> list[tuple[str, str]]:
    """Return each fused projection and the verdict on it, at one tensor-parallel size.

    Every subset of a projection's modules is tried if it has up to four, else a sample.
    """
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        # Float32 holds all sums of products of these, so equal means equal to the last bit.
        return torch.randint(-3, 4, shape, generator=generator).float()

    base: Weights = {}
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for fused in family.fused:
        for module, rows in fused.modules.items():
            base[module] = integers(rows, fused.columns)
            pairs[module] = integers(MAX_RANK, fused.columns), integers(rows, MAX_RANK)
    inputs = {fused.layer: integers(TOKENS, fused.columns) for fused in family.fused}
    found: list[tuple[str, str]] = []
    with stubbed(family):
        references = [RankModel(family.config, rank, size) for rank in range(size)]
        if size == 1:  # else a layer of one group is built in another way
            assert {f.layer: f.n_outputs for f in family.fused} == {
                f.layer: _outputs(references[0].model.get_submodule(f.layer)) for f in family.fused
            }
        try:
            ranks = [RankModel(family.config, rank, size, fully_sharded) for rank in range(size)]
            for rank in ranks:
                rank.load(_checkpoint(family, base))
                rank.wrap()
                rank.warm_up()
        except Exception:
            traceback.print_exc()
            return [(fused.layer, FAILS) for fused in family.fused]
        for fused in family.fused:
            layer, x = fused.layer, inputs[fused.layer]
            unadapted = _reference(references, _checkpoint(family, base), layer, x)
            verdicts = []
            for subset in subsets(list(fused.modules)):
                adapter = {module: pairs[module] for module in subset}
                merged = base | {m: base[m] + b @ a for m, (a, b) in adapter.items()}
                expected = _reference(references, _checkpoint(family, merged), layer, x)
                verdicts.append(_verdict(ranks, adapter, fused, x, expected, unadapted))
            found.append((layer, min(verdicts, key=WORST_FIRST.index)))
    return found


def _outputs(layer: torch.nn.Module) -> int:
    # Step5's indexer has its parts beside those of the attention, which alone have sizes.
    own = getattr(layer, "INDEXER_SHARD_IDS", ())
    if type(layer).__name__ == "MuseSpark1xQKVOGateParallelLinear":
        # It has no sizes; its loader compares with the name of each part.
        return inspect.getsource(type(layer).weight_loader).count('loaded_shard_id == "')
    return len(getattr(layer, "output_sizes", ("whole",))) + len(own)


def subsets(modules: list[str]) -> list[tuple[str, ...]]:
    every = [s for n in range(len(modules)) for s in itertools.combinations(modules, n + 1)]
    if len(modules) <= 4:
        return every
    chosen = [s for s in every if len(s) in (1, len(modules) - 1, len(modules))]
    return chosen + random.Random(0).sample(every, 4)


def _verdict(
    ranks: list[RankModel],
    adapter: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    fused: Fused,
    x: torch.Tensor,
    expected: list[torch.Tensor],
    unadapted: list[torch.Tensor],
) -> str:
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), adapter)
        try:
            for rank in ranks:
                rank.add_adapter("adapter", 1, Path(folder))
                rank.select(1, TOKENS)
        except Exception as error:
            print(f"{fused.layer}: {error}")
            return REFUSED
        else:
            outputs = (
                forward_all(ranks, fused.layer, x) if fused.called else _multiply(ranks, fused, x)
            )
        finally:
            for rank in ranks:
                rank.remove_adapter(1)
    if fused.loaded and all(map(torch.equal, outputs, expected)):
        return EXACT
    return IGNORED if all(map(torch.equal, outputs, unadapted)) else WRONG


def _reference(
    references: list[RankModel], checkpoint: Weights, layer: str, x: torch.Tensor
) -> list[torch.Tensor]:
    """Return what each rank's base layer computes from a checkpoint."""
    outputs = []
    for rank in references:
        rank.load(checkpoint)
        outputs.append(_product(x, rank.model.get_submodule(layer)))
    return outputs


def _multiply(ranks: list[RankModel], fused: Fused, x: torch.Tensor) -> list[torch.Tensor]:
    layers = [rank.model.get_submodule(fused.layer) for rank in ranks]
    return [_product(x, layer) for layer in layers]


def _product(x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.weight.flatten(1))  # a convolution's is 3D


def _checkpoint(family: Family, weights: Weights) -> Weights:
    weights = dict(weights)
    for fused in family.fused:
        if not fused.loaded:
            weights = {name: w for name, w in weights.items() if name not in fused.modules}
        if fused.stored_as:
            weights[fused.stored_as] = torch.cat([weights.pop(module) for module in fused.modules])
    checkpoint = {f"{module}.weight": weight for module, weight in weights.items()}
    return checkpoint | {name: torch.zeros(shape) for name, shape in family.required.items()}


def save_adapter(folder: Path, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Save an adapter as PEFT does: its names are the checkpoint's modules, below a prefix."""
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": tensor.contiguous()
        for module, pair in pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": MAX_RANK,
        "lora_alpha": MAX_RANK,
        "target_modules": sorted({module.rpartition(".")[2] for module in pairs}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@contextmanager
def stubbed(family: Family) -> Iterator[None]:
    with ExitStack() as stack:
        for module in family.modules:
            # Not `patch.dict`, which forgets what else is imported meanwhile.
            sys.modules[module] = mock.MagicMock()
            stack.callback(sys.modules.pop, module)
        if family.classes:
            stack.enter_context(mock.patch.dict(ModelRegistry.models))  # put back what was there
            for architecture, model_class in family.classes.items():
                ModelRegistry.register_model(architecture, model_class)
        for stub in family.stubs:
            path, answer = stub if isinstance(stub, tuple) else (stub, None)
            # A class, so that code can still ask whether something is an instance of what it was.
            stub_class = type("Stub", (), {"__new__": lambda cls, *_, answer=answer, **__: answer})
            with suppress(AttributeError, ModuleNotFoundError):  # releases have it in other places
                stack.enter_context(mock.patch(path, stub_class))
        for path, substitute in family.replaced.items():
            stack.enter_context(mock.patch(path, substitute))
        yield
