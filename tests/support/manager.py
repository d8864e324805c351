"""A tiny model under vLLM's own LoRA manager, on this process's rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from support.tiny import MAX_LORAS, MAX_RANK, PARTS, SHAPES, VOCAB, build, read_deltas


class Rank:
    """One rank's model and its ``LRUCacheWorkerLoRAManager``."""

    def __init__(
        self,
        *,
        mode: str = "1",
        fully_sharded: bool = False,
        multimodal: bool = False,
        unwrappable: bool = False,
        target_modules: list[str] | None = None,
    ) -> None:
        from vllm.config.lora import LoRAConfig
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

        import vllm_nway_lora
        from vllm_nway_lora import patches

        vllm_nway_lora.unregister()
        os.environ["VLLM_NWAY_LORA"] = mode
        vllm_nway_lora.register()
        assert bool(patches.applied()) == (mode != "0")
        options = {} if target_modules is None else {"target_modules": target_modules}
        lora_config = LoRAConfig(
            max_lora_rank=MAX_RANK,
            max_loras=MAX_LORAS,
            max_cpu_loras=MAX_LORAS,
            fully_sharded_loras=fully_sharded,
            lora_dtype=torch.float32,
            **options,
        )
        model_config = SimpleNamespace(
            get_vocab_size=lambda: VOCAB,
            hf_config=SimpleNamespace(
                get_text_config=lambda: SimpleNamespace(max_position_embeddings=64)
            ),
            is_encoder_decoder=False,
            multimodal_config=None,
        )
        vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=64),
            model_config=model_config,
            lora_config=lora_config,
            parallel_config=SimpleNamespace(enable_expert_parallel=False),
        )
        model = build(multimodal, unwrappable)
        self.worker_manager = LRUCacheWorkerLoRAManager(
            vllm_config, torch.device("cpu"), model.embedding_modules
        )
        self.worker_manager.create_lora_manager(model, vllm_config)
        self.manager = self.worker_manager._adapter_manager

    def add(self, name: str, number: int, folder: Path, *, inplace: bool = False) -> str:
        """Add an adapter as a worker does; return the error's class and text, or nothing."""
        from vllm.lora.request import LoRARequest

        try:
            self.worker_manager.add_adapter(
                LoRARequest(name, number, str(folder), load_inplace=inplace)
            )
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def buffers(self) -> list[torch.Tensor]:
        """Every tensor that adapters are served from, copied."""
        return [
            tensor.clone()
            for layer in self.manager.modules.values()
            for stack in (layer.lora_a_stacked, layer.lora_b_stacked)
            for tensor in (stack if isinstance(stack, tuple) else (stack,))
        ]

    def is_exact(self, number: int, folder: Path) -> bool:
        """Whether an adapter's slot is what its files say, merged as the base weights would be."""
        slot = self.manager.lora_index_to_id.index(number)
        deltas = read_deltas(folder)
        for name, layer in self.manager.modules.items():
            expected, taken = self._expected(name, layer, deltas)
            for module in taken:
                deltas.pop(module)
            if not torch.allclose(_served(layer, slot), expected, rtol=1e-5, atol=1e-5):
                return False
        return not deltas

    def _expected(
        self, name: str, layer: Any, deltas: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, list[str]]:
        parent, _, last = name.rpartition(".")
        if last in ("embed_tokens", "lm_head"):
            shape = SHAPES[name][::-1]
            return deltas.get(name, torch.zeros(shape)), [name] if name in deltas else []
        weight = layer.base_layer.weight
        kept = weight.data.clone()
        weight.data.zero_()
        taken = []
        for module, shard, rows in PARTS.get(last, [(last, None, slice(None))]):
            path = f"{parent}.{module}"
            if path in deltas:
                shard_id = () if shard is None else (shard,)
                weight.weight_loader(weight, deltas[path][rows].contiguous(), *shard_id)
                taken.append(path)
        expected = weight.data.clone()
        weight.data.copy_(kept)
        return expected, list(dict.fromkeys(taken))


def _served(layer: Any, slot: int) -> torch.Tensor:
    """Return what a layer's slot adds to its rank's weight."""
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    if isinstance(a, tuple):
        return torch.cat([y[slot, 0] @ x[slot, 0] for x, y in zip(a, b)])
    if a.ndim == 3:  # embeddings: A is stored transposed
        return b[slot, 0] @ a[slot].T
    return b[slot, 0] @ a[slot, 0]


_rank: Rank
_said: list[tuple[int, str]] = []


class _Keep(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _said.append((record.levelno, record.getMessage()))


def start(**options: Any) -> list[str]:
    """Build this process's rank; return the names of the modules that have LoRA layers."""
    global _rank
    logger = logging.getLogger("vllm.nway_lora")
    if not any(isinstance(handler, _Keep) for handler in logger.handlers):
        logger.addHandler(_Keep())
        logger.setLevel(logging.INFO)
    _rank = Rank(**options)
    return list(_rank.manager.modules)


def add(name: str, number: int, folder: Path, inplace: bool = False) -> str:
    """Add an adapter to this process's rank; return the error, or nothing."""
    return _rank.add(name, number, folder, inplace=inplace)


def has(number: int) -> bool:
    """Whether this process's rank has an adapter."""
    return number in _rank.worker_manager.list_adapters()


def said(level: int) -> list[str]:
    """Return what this package has said at a level since the last call for any."""
    lines = [line for of, line in _said if of == level]
    _said.clear()
    return lines


def is_exact(number: int, folder: Path) -> bool:
    """Whether this process's rank serves an adapter as its files say."""
    return _rank.is_exact(number, folder)


@dataclass(frozen=True)
class Attempt:
    """What came of an adapter: the error if it was refused, and what else is true then.

    Attributes:
        unchanged: a refusal left every buffer, slot and registration as it was.
        exact: an adapter that was not refused is served as its files say.
        resident: the adapter that was there before is served as its files say.
    """

    error: str
    unchanged: bool
    exact: bool
    resident: bool

    @property
    def good(self) -> bool:
        whole = self.unchanged if self.error else self.exact
        return whole and self.resident


def attempt(folder: Path, resident: Path) -> Attempt:
    """Add an adapter as number 2 beside number 1, look, and take it out again."""
    rank = _rank
    if 1 not in rank.worker_manager.list_adapters():
        assert rank.add("resident", 1, resident) == ""
    before = (
        rank.buffers(),
        list(rank.manager.lora_index_to_id),
        rank.worker_manager.list_adapters(),
    )
    error = rank.add("mutant", 2, folder)
    after = rank.buffers(), list(rank.manager.lora_index_to_id), rank.worker_manager.list_adapters()
    unchanged = before[1:] == after[1:] and all(map(torch.equal, before[0], after[0]))
    exact = not error and rank.is_exact(2, folder)
    rank.worker_manager.remove_adapter(2)
    return Attempt(error, unchanged, exact, rank.is_exact(1, resident))
