"""A tiny model of real vLLM layers, and adapter folders for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

VOCAB, HIDDEN, INTERMEDIATE, HEAD, HEADS, KV_HEADS = 64, 32, 48, 8, 4, 2
MAX_RANK, MAX_LORAS, RANK, ALPHA = 8, 4, 4, 8
PREFIX = "base_model.model."

#: Module, as adapters see it -> (columns of LoRA-A, rows of LoRA-B).
SHAPES = {
    "model.embed_tokens": (VOCAB, HIDDEN),
    "lm_head": (HIDDEN, VOCAB),
    **{
        f"model.layers.{layer}.{module}": shape
        for layer in (0, 1)
        for module, shape in {
            "linear_attn.in_proj_qkv": (HIDDEN, 64),
            "linear_attn.in_proj_z": (HIDDEN, 32),
            "linear_attn.out_proj": (32, HIDDEN),
            "self_attn.q_proj": (HIDDEN, HEADS * HEAD),
            "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD),
            "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD),
            "self_attn.o_proj": (HEADS * HEAD, HIDDEN),
            "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
            "mlp.up_proj": (HIDDEN, INTERMEDIATE),
            "mlp.down_proj": (INTERMEDIATE, HIDDEN),
            "mlp.router": (HIDDEN, 6),
            "mlp.input_linear": (HIDDEN, 48),
        }.items()
    },
}

#: Fused projection -> its outputs: (module, shard id for the weight loader, rows of the module).
PARTS = {
    "in_proj_qkvz": [
        ("in_proj_qkv", 0, slice(0, 16)),
        ("in_proj_qkv", 1, slice(16, 32)),
        ("in_proj_qkv", 2, slice(32, 64)),
        ("in_proj_z", 3, slice(None)),
    ],
    "qkv_proj": [(f"{shard}_proj", shard, slice(None)) for shard in "qkv"],
    "gate_up_proj": [("gate_proj", 0, slice(None)), ("up_proj", 1, slice(None))],
}


def tensors(
    seed: int, modules: Sequence[str] = tuple(SHAPES), rank: int = RANK
) -> dict[str, torch.Tensor]:
    """Return a good adapter's tensors under PEFT's names; small integers, so that sums are exact."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    made = {}
    for module in modules:
        columns, rows = SHAPES[module]
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if module.endswith("embed_tokens")
            else ("lora_A.weight", "lora_B.weight")
        )
        made[f"{PREFIX}{module}.{a}"] = integers(rank, columns)
        made[f"{PREFIX}{module}.{b}"] = integers(rows, rank)
    return made


def config(**changes: Any) -> dict[str, Any]:
    """Return the content of a good ``adapter_config.json``, updated by ``changes``."""
    return {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj"],
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    } | changes


def save(
    folder: Path, values: Mapping[str, torch.Tensor], settings: Mapping[str, Any] | None = None
) -> Path:
    """Save an adapter as PEFT does; as a ``.bin`` if safetensors cannot store its tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps(config() if settings is None else settings)
    )
    for old in folder.glob("adapter_model.*"):
        old.unlink()
    if all(value.is_contiguous() and not value.is_complex() for value in values.values()):
        save_file(dict(values), folder / "adapter_model.safetensors")
    else:
        torch.save(dict(values), folder / "adapter_model.bin")
    return folder


def read_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Return ``scaling * B @ A``, as PEFT defines it, per module of an adapter folder, in float32.

    Modules that this model skips, or that belong to another pipeline rank, are left out.
    """
    from safetensors.torch import load_file

    settings = json.loads((folder / "adapter_config.json").read_text())
    file = folder / "adapter_model.safetensors"
    values = load_file(file) if file.exists() else torch.load(folder / "adapter_model.bin")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in values.items():
        module, lora, half = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if lora and not module.startswith(("mtp.", "model.layers.2", "audio.")):
            letter = half.removeprefix("embedding_")[0]  # "A", "A.default" or "embedding_A"
            halves.setdefault(module, {})[letter] = value.float()
    deltas = {}
    for module, pair in halves.items():
        if module not in SHAPES and not all(half.any() for half in pair.values()):
            continue  # The model has no such layer, and the product is zero.
        rank, alpha = (
            next(
                (
                    value
                    for key, value in settings[patterns].items()
                    if re.match(rf"(.*\.)?({key})$", module)
                ),
                settings[default],
            )
            for patterns, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        scaling = alpha / rank ** (0.5 if settings.get("use_rslora") else 1.0)
        deltas[module] = scaling * pair["B"] @ pair["A"]
    return deltas


def build(multimodal: bool, unwrappable: bool, kv_shared: bool) -> Any:
    """Build the model.

    Args:
        multimodal: True to add a vision tower, and an audio tower that this server runs without, and
            to declare the model multimodal.
        kv_shared: True to have the second layer use the keys and values of the first.
        unwrappable: True to build ``gate_up_proj`` from a class with its own ``forward``.
    """
    from torch import nn
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        ReplicatedLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )
    from vllm.model_executor.models.interfaces import SupportsLoRA
    from vllm.model_executor.models.module_mapping import MultiModelKeys
    from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer

    class GateUp(MergedColumnParallelLinear):
        """A layer with its own ``forward``; the plugin never wraps it, vLLM only if not sharded."""

        def forward(self, input_: torch.Tensor) -> Any:
            return super().forward(input_)

    gate_up_class = GateUp if unwrappable else MergedColumnParallelLinear

    def group(**layers: nn.Module) -> nn.Module:
        module = nn.Module()
        for name, layer in layers.items():
            setattr(module, name, layer)
        return module

    def block(prefix: str) -> nn.Module:
        f32 = torch.float32
        return group(
            linear_attn=group(
                in_proj_qkvz=MergedColumnParallelLinear(
                    HIDDEN, [16, 16, 32, 32], bias=False, params_dtype=f32,
                    prefix=f"{prefix}.linear_attn.in_proj_qkvz",
                ),
                out_proj=RowParallelLinear(32, HIDDEN, bias=False, params_dtype=f32),
            ),
            self_attn=group(
                qkv_proj=QKVParallelLinear(
                    HIDDEN, HEAD, HEADS, KV_HEADS, bias=False, params_dtype=f32
                ),
                o_proj=RowParallelLinear(HEADS * HEAD, HIDDEN, bias=False, params_dtype=f32),
            ),
            mlp=group(
                gate_up_proj=gate_up_class(
                    HIDDEN, [INTERMEDIATE] * 2, bias=False, params_dtype=f32
                ),
                down_proj=RowParallelLinear(INTERMEDIATE, HIDDEN, bias=False, params_dtype=f32),
                router=ReplicatedLinear(HIDDEN, 6, bias=False, params_dtype=f32),
                # Two outputs, and one module in a checkpoint.
                input_linear=MergedColumnParallelLinear(
                    HIDDEN, [24, 24], bias=False, params_dtype=f32,
                    prefix=f"{prefix}.mlp.input_linear",
                ),
            ),
        )  # fmt: skip

    class Model(nn.Module, SupportsLoRA):
        packed_modules_mapping: ClassVar = {
            "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "gate_up_proj": ["gate_proj", "up_proj"],
            "input_linear": ["input_linear"],
        }
        embedding_modules: ClassVar = {
            "embed_tokens": "input_embeddings",
            "lm_head": "output_embeddings",
        }
        lora_skip_prefixes: ClassVar = ["mtp."]
        supports_multimodal = multimodal
        supports_tower_connector_lora = False
        config = SimpleNamespace(architectures=["Model"])

        def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model.embed_tokens(input_ids)

        def get_mm_mapping(self) -> MultiModelKeys:
            return MultiModelKeys.from_string_field(
                language_model="model", connector="visual.merger", tower_model="visual."
            )

    model = Model()
    embeddings = VocabParallelEmbedding(VOCAB, HIDDEN, params_dtype=torch.float32)
    blocks = [block(f"model.layers.{n}") for n in range(2)]
    model.model = group(
        embed_tokens=embeddings,
        # The third layer belongs to another pipeline rank.
        layers=nn.ModuleList([*blocks, PPMissingLayer()]),
    )
    if kv_shared:
        blocks[1].self_attn = group(
            q_proj=ColumnParallelLinear(
                HIDDEN, HEADS * HEAD, bias=False, params_dtype=torch.float32
            ),
            o_proj=blocks[1].self_attn.o_proj,
            attn=nn.Module(),
        )
        # The attribute of vLLM's `Attention`, 0.17.0 to 0.33.0.
        blocks[1].self_attn.attn.kv_sharing_target_layer_name = "model.layers.0.self_attn.attn"
    model.lm_head = ParallelLMHead(VOCAB, HIDDEN, params_dtype=torch.float32)
    model.logits_processor = LogitsProcessor(VOCAB)
    if multimodal:
        model.audio = StageMissingLayer("audio")
        model.visual = group(
            attn=group(
                proj=ReplicatedLinear(HIDDEN, HIDDEN, bias=False, params_dtype=torch.float32)
            )
        )
    return model
