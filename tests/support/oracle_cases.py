"""Cases of the oracle: a checkpoint's modules, an adapter on each, and the merged checkpoint."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RANK = 4
SCALE = 2.0
# B A is then about as large as the weights of the checkpoints (standard deviation 0.08).
TENSOR_STD = 0.14

#: Last names of modules that are no linear layers: embeddings of tokens, and of positions.
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings")
_OTHERS = ("embed_positions", "wpe", "position_embeddings", "conv1d")

#: The end of a case's name whose adapter has the experts of a layer in PEFT's stacked tensors.
STACKED = ", stacked"
_KINDS = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))

Pair = tuple[torch.Tensor, torch.Tensor]


def read_checkpoint(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the tensor of each weight of a checkpoint."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                yield name, weights.get_tensor(name)


def list_modules(folder: Path) -> dict[str, torch.Size]:
    """Return the checkpoint's modules with a matrix, in its order, and the shape of each."""
    return {
        name.removesuffix(".weight"): weight.shape
        for name, weight in read_checkpoint(folder)
        if name.endswith(".weight")
        and weight.dim() == 2
        and name.removesuffix(".weight").rpartition(".")[2] not in _OTHERS
    }


def list_cases(modules: Iterable[str]) -> dict[str, list[str]]:
    """Return each case's name and modules: each module alone, and the experts of a layer together.

    One expert stands for the others of its layer.
    """
    cases: dict[str, list[str]] = {}
    for module in modules:
        together = re.sub(r"\.experts\.\d+\.\w+$", ".experts", module)
        if together != module:
            cases.setdefault(together, []).append(module)
            cases.setdefault(together + STACKED, []).append(module)
        if together == module or ".experts.1." in module:
            cases[module] = [module]
    return cases


def draw_pair(module: str, shape: Sequence[int]) -> Pair:
    """Return LoRA-A and LoRA-B of a module, in float32; they depend on the module's name only."""
    generator = torch.Generator().manual_seed(zlib.crc32(module.encode()))
    sizes = (RANK, shape[1]), (shape[0], RANK)
    a, b = (torch.randn(size, generator=generator) * TENSOR_STD for size in sizes)
    return a.bfloat16().float(), b.bfloat16().float()


def is_embedding(module: str) -> bool:
    """Return whether a module is an embedding of tokens."""
    return module.rpartition(".")[2] in EMBEDDINGS


def stack_experts(shapes: dict[str, torch.Size], modules: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of PEFT 0.19 and later for the experts of one layer.

    gate and up have one LoRA-A together, of both ranks. A's rows are ordered by expert, B's columns by
    rank.
    """
    path = modules[0][: modules[0].index(".experts.")] + ".experts"
    pairs: dict[str, list[Pair]] = {}
    for kind in _KINDS:
        of = [m for m in modules if m.rpartition(".")[2] in kind]
        pairs[kind[0]] = [draw_pair(module, shapes[module]) for module in of]
    both = zip(pairs["gate_proj"], pairs["up_proj"], strict=True)
    gate_up = [(torch.cat([g[0], u[0]]), torch.block_diag(g[1], u[1])) for g, u in both]
    tensors = {}
    for module, of_experts in ((f"{path}.base_layer", gate_up), (path, pairs["down_proj"])):
        name = f"base_model.model.{module}.lora"
        tensors[f"{name}_A.weight"] = torch.cat([a for a, _ in of_experts])
        tensors[f"{name}_B.weight"] = torch.stack([b for _, b in of_experts], -1).flatten(1)
    return tensors


def save_adapter(
    folder: Path, shapes: dict[str, torch.Size], modules: Sequence[str], stacked: bool = False
) -> Path:
    """Save an adapter on ``modules`` as PEFT does; with ``stacked``, as from 0.19 on for experts."""
    tensors = stack_experts(shapes, modules) if stacked else {}
    for module in () if stacked else modules:
        a, b = draw_pair(module, shapes[module])
        name = f"base_model.model.{module}.lora"
        if is_embedding(module):  # its weight is transposed: one row per token
            tensors |= {
                f"{name}_embedding_A": b.T.contiguous(),
                f"{name}_embedding_B": a.T.contiguous(),
            }
        else:
            tensors |= {f"{name}_A.weight": a, f"{name}_B.weight": b}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK * SCALE,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
    }
    if stacked:
        pattern = r".*\.gate_up_proj"
        config |= {
            "target_modules": [],
            "target_parameters": ["gate_up_proj", "down_proj"],
            "rank_pattern": {pattern: 2 * RANK},
            "alpha_pattern": {pattern: 2 * RANK * SCALE},
            "peft_version": "0.21.2",
        }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def is_transposed(module: str, transposed: Sequence[str]) -> bool:
    """Return whether a checkpoint stores a module's weight as input by output, given such names."""
    return module.rpartition(".")[2] in transposed


def merge(
    checkpoint: Iterable[tuple[str, torch.Tensor]],
    modules: Sequence[str],
    transposed: Sequence[str] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a checkpoint's weights, with ``W + s B A`` for the weight of each of ``modules``."""
    for name, weight in checkpoint:
        module = name.removesuffix(".weight")
        if module in modules and module != name:
            turn = is_transposed(module, transposed)
            a, b = draw_pair(module, weight.shape[::-1] if turn else weight.shape)
            product = b.double() @ a.double()
            product = product.T if turn else product
            weight = (weight.double() + SCALE * product).to(weight.dtype)
        yield name, weight
