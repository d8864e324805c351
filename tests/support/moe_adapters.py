"""Adapters on a Qwen3.5-MoE, with their reference: PEFT, or merged weights where PEFT has no such file.

PEFT writes the experts of a layer as stacked tensors (3-D). Files with one pair for each expert (2-D)
come from other frameworks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from support import oracle_cases as cases
from support.adapters import ATTENTION, GDN, MLP, RANK, TENSOR_STD, Reference, ServedModel

SHARED_EXPERT = tuple(f"shared_expert.{module}" for module in MLP)
#: The gate's name in checkpoints: it is no part of the shared expert's own module.
SHARED_GATE = "shared_expert_gate"
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
EVERY_MODULE = (*GDN, *ATTENTION, *SHARED_EXPERT, SHARED_GATE)


@dataclass(frozen=True)
class Row:
    """One adapter.

    Attributes:
        modules: the ends of its modules' names.
        experts: its form on the experts: ``"3-D"``, ``"2-D"`` or none.
        size: a factor of its tensors.
    """

    modules: Sequence[str] = ()
    experts: str = ""
    size: float = 1.0


#: The eight rows of the test plan, and the gate alone, which stock vLLM serves as the base model.
ROWS = {
    "gated delta net": Row(GDN),
    "standard attention": Row(ATTENTION),
    "in_proj_z alone": Row(("in_proj_z",)),
    "experts, 2-D": Row(experts="2-D"),
    "experts, 3-D": Row(experts="3-D"),
    "everything, 2-D": Row(EVERY_MODULE, "2-D"),
    "everything, 3-D": Row(EVERY_MODULE, "3-D"),
    "shared expert": Row((*SHARED_EXPERT, SHARED_GATE)),
    # One number for each token, in a sigmoid.
    "shared_expert_gate alone": Row((SHARED_GATE,), size=3.0),
}


def save_rows(root: Path, save: Callable[[Path], Path]) -> ServedModel:
    """Save a checkpoint and the adapters of :data:`ROWS` below ``root``."""
    checkpoint = save(root / "model")
    adapters, merged = {}, {}
    for number, (name, row) in enumerate(ROWS.items()):
        folder = root / f"adapter-{number}"
        if row.experts == "2-D":
            shapes = cases.list_modules(checkpoint)
            modules = [module for module in shapes if _is_in(module, row)]
            cases.save_adapter(folder, shapes, modules)
            merged[name] = _save_merged(checkpoint, root / f"merged-{number}", modules)
        else:
            _save_with_peft(checkpoint, folder, row, seed=number)
        adapters[name] = folder
    return ServedModel(checkpoint, adapters, MixtureReference(checkpoint, adapters, merged))


class MixtureReference(Reference):
    """The reference of a model with experts.

    Args:
        checkpoint: the model's folder.
        adapters: name -> folder.
        merged: name -> folder of the checkpoint with ``W + s B A``, for adapters that PEFT does not load.
    """

    def __init__(
        self, checkpoint: Path, adapters: dict[str, Path], merged: Mapping[str, Path]
    ) -> None:
        super().__init__(checkpoint, adapters)
        self._merged = merged

    def _load_adapted(self, adapter: str | None) -> torch.nn.Module:
        if adapter is None or adapter in self._merged:
            return _load_model(self._checkpoint if adapter is None else self._merged[adapter])
        from peft import PeftModel

        return PeftModel.from_pretrained(_load_model(self._checkpoint), self._adapters[adapter])


def _is_in(module: str, row: Row) -> bool:
    if ".experts." in module:
        return row.experts == "2-D"
    return module.endswith(tuple(f".{end}" for end in row.modules))


def _load_model(checkpoint: Path) -> torch.nn.Module:
    """Load a checkpoint in float32, as the class that its configuration names."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    [architecture] = json.loads((checkpoint / "config.json").read_text())["architectures"]
    return getattr(transformers, architecture).from_pretrained(checkpoint, dtype=torch.float32)


def _save_with_peft(checkpoint: Path, folder: Path, row: Row, seed: int) -> None:
    """Save a random adapter; its tensors are exactly representable in bfloat16."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(row.modules),
        target_parameters=list(EXPERTS) if row.experts else None,
    )
    model = get_peft_model(_load_model(checkpoint), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * TENSOR_STD / 2**0.5
            values *= row.size
            parameter.data = values.bfloat16().float()
    model.save_pretrained(folder)


def _save_merged(checkpoint: Path, folder: Path, modules: Sequence[str]) -> Path:
    """Save the checkpoint in float32 with the weights of ``modules`` merged."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = ((name, weight.float()) for name, weight in cases.read_checkpoint(checkpoint))
    merged = dict(cases.merge(weights, modules))
    save_file(merged, folder / "model.safetensors", {"format": "pt"})
    return folder
