"""How vLLM, with the plugin or without, serves adapters on a family's fused projections."""

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

from support.families.family import EXACT, FAILS, IGNORED, REFUSED, WRONG, Family, Fused
from support.models import MAX_RANK, RankModel, forward_all
from vllm_nway_lora.diagnosis.report import Outcome

TOKENS = 5
Weights = dict[str, torch.Tensor]


def is_in_installed_vllm(family: Family) -> bool:
    """Return True if the installed vLLM has the family."""
    release = Version(vllm.__version__).release
    last = Version(family.until).release if family.until else release
    return Version(family.since).release <= release <= last


def measure_outcomes(family: Family, size: int, fully_sharded: bool) -> list[tuple[str, Outcome]]:
    """Return each fused projection's path and its outcome, at one tensor-parallel size.

    A projection's outcome is the worst outcome of adapters on subsets of its modules: on every subset
    if there are up to four modules, otherwise on a sample.
    """
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        # Float32 represents all sums of products of these exactly, so outputs can be compared bitwise.
        return torch.randint(-3, 4, shape, generator=generator).float()

    base: Weights = {}
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for fused in family.fused:
        for module, rows in fused.modules.items():
            base[module] = integers(rows, fused.columns)
            pairs[module] = integers(MAX_RANK, fused.columns), integers(rows, MAX_RANK)
    inputs = {fused.layer: integers(TOKENS, fused.columns) for fused in family.fused}
    found: list[tuple[str, Outcome]] = []
    with stub_dependencies(family):
        try:
            references = [RankModel(family.config, rank, size) for rank in range(size)]
            ranks = [RankModel(family.config, rank, size, fully_sharded) for rank in range(size)]
            for rank in ranks:
                rank.load(_build_checkpoint(family, base))
                rank.wrap()
                rank.warm_up()
        except Exception:
            traceback.print_exc()
            return [(fused.layer, FAILS) for fused in family.fused]
        if size == 1:  # at larger sizes, vLLM builds layers with one group differently
            assert {f.layer: f.n_outputs for f in family.fused} == {
                f.layer: _count_outputs(references[0].model.get_submodule(f.layer))
                for f in family.fused
            }
        for fused in family.fused:
            layer, x = fused.layer, inputs[fused.layer]
            unadapted = _compute_reference(references, _build_checkpoint(family, base), layer, x)
            outcomes = []
            for subset in _choose_subsets(list(fused.modules)):
                adapter = {module: pairs[module] for module in subset}
                merged = base | {m: base[m] + b @ a for m, (a, b) in adapter.items()}
                checkpoint = _build_checkpoint(family, merged)
                expected = _compute_reference(references, checkpoint, layer, x)
                outcomes.append(_measure_outcome(ranks, adapter, fused, x, expected, unadapted))
            found.append((layer, Outcome.worst(outcomes)))
    return found


def _count_outputs(layer: torch.nn.Module) -> int:
    # Step5's layer lists the indexer's outputs separately; `output_sizes` has the attention's only.
    own = getattr(layer, "INDEXER_SHARD_IDS", ())
    if type(layer).__name__ == "MuseSpark1xQKVOGateParallelLinear":
        # It has no `output_sizes`; count the names of outputs that its loader compares with.
        return inspect.getsource(type(layer).weight_loader).count('loaded_shard_id == "')
    return len(getattr(layer, "output_sizes", ("whole",))) + len(own)


def _choose_subsets(modules: list[str]) -> list[tuple[str, ...]]:
    every = [s for n in range(len(modules)) for s in itertools.combinations(modules, n + 1)]
    if len(modules) <= 4:
        return every
    chosen = [s for s in every if len(s) in (1, len(modules) - 1, len(modules))]
    return chosen + random.Random(0).sample(every, 4)


def _measure_outcome(
    ranks: list[RankModel],
    adapter: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    fused: Fused,
    x: torch.Tensor,
    expected: list[torch.Tensor],
    unadapted: list[torch.Tensor],
) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), adapter)
        try:
            for rank in ranks:
                rank.add_adapter("adapter", 1, Path(folder))
                rank.select_adapter(1, TOKENS)
        except Exception as error:
            print(f"{fused.layer}: {error}")
            return REFUSED
        else:
            outputs = (
                forward_all(ranks, fused.layer, x)
                if fused.called
                else _multiply_by_weights(ranks, fused, x)
            )
        finally:
            for rank in ranks:
                rank.remove_adapter(1)
    if fused.loaded and all(map(torch.equal, outputs, expected)):
        return EXACT
    return IGNORED if all(map(torch.equal, outputs, unadapted)) else WRONG


def _compute_reference(
    references: list[RankModel], checkpoint: Weights, layer: str, x: torch.Tensor
) -> list[torch.Tensor]:
    """Return the output of each rank's base layer after it has loaded ``checkpoint``."""
    outputs = []
    for rank in references:
        rank.load(checkpoint)
        outputs.append(_product(x, rank.model.get_submodule(layer)))
    return outputs


def _multiply_by_weights(
    ranks: list[RankModel], fused: Fused, x: torch.Tensor
) -> list[torch.Tensor]:
    layers = [rank.model.get_submodule(fused.layer) for rank in ranks]
    return [_product(x, layer) for layer in layers]


def _product(x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    if not isinstance(layer.weight, torch.Tensor):  # `layers/direct.py`
        return torch.mm(x, layer.weight.T)
    return torch.nn.functional.linear(x, layer.weight.flatten(1))  # a convolution's weight is 3D


def _build_checkpoint(family: Family, weights: Weights) -> Weights:
    weights = dict(weights)
    for fused in family.fused:
        if not fused.loaded:
            weights = {name: w for name, w in weights.items() if name not in fused.modules}
        if fused.stored_as:
            weights[fused.stored_as] = torch.cat([weights.pop(module) for module in fused.modules])
    checkpoint = {
        f"{module}.weight": weight.T if family.transposed else weight
        for module, weight in weights.items()
    }
    return checkpoint | {name: torch.zeros(shape) for name, shape in family.required.items()}


def save_adapter(folder: Path, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Save an adapter as PEFT does: with a prefix before the names of the checkpoint's modules.

    Args:
        folder: an existing folder.
        pairs: module's path in the checkpoint -> (LoRA-A, LoRA-B).
    """
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
def stub_dependencies(family: Family) -> Iterator[None]:
    """Replace the parts of vLLM that a family cannot be built with on CPU (see :class:`Family`)."""
    with ExitStack() as stack:
        for module in family.modules:
            # `patch.dict` would also remove the modules that are imported inside this context.
            sys.modules[module] = mock.MagicMock()
            stack.callback(sys.modules.pop, module)
        if family.classes:
            stack.enter_context(
                mock.patch.dict(ModelRegistry.models)
            )  # restores the registry on exit
            for architecture, model_class in family.classes.items():
                ModelRegistry.register_model(architecture, model_class)
        for stub in family.stubs:
            path, answer = stub if isinstance(stub, tuple) else (stub, None)
            # The stub is a class, so that `isinstance` checks against the stubbed name still work.
            stub_class = type("Stub", (), {"__new__": lambda cls, *_, answer=answer, **__: answer})
            with suppress(AttributeError, ModuleNotFoundError):  # its path differs between releases
                stack.enter_context(mock.patch(path, stub_class))
        for path, substitute in family.replaced.items():
            stack.enter_context(mock.patch(path, substitute))
        yield
