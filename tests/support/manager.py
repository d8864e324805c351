"""The model of ``tiny.py`` with vLLM's own LoRA manager, on the TP rank of this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from support import deliveries
from support.tiny import MAX_LORAS, MAX_RANK, PARTS, SHAPES, VOCAB, build, read_deltas


class Rank:
    """One TP rank's model and its ``LRUCacheWorkerLoRAManager``.

    Attributes:
        delivery: how adapters get into it, one of :data:`support.deliveries.ALL`.
    """

    def __init__(
        self,
        *,
        mode: str = "1",
        fully_sharded: bool = False,
        multimodal: bool = False,
        unwrappable: bool = False,
        kv_shared: bool = False,
        target_modules: list[str] | None = None,
        max_cpu_loras: int = MAX_LORAS,
        packed: Mapping[str, list[str]] | None = None,
        delivery: str = "files",
    ) -> None:
        import vllm.lora.worker_manager
        from vllm.config.lora import LoRAConfig

        import vllm_nway_lora
        from vllm_nway_lora.compat import registration

        global _replacements
        if _replacements is None:
            _replacements = deliveries.Replacements()
        vllm_nway_lora.unregister()
        _replacements.restore()
        replace_classes = _replacements.build_classes()
        if delivery == "classes before":
            replace_classes()
        if delivery == "method before":
            _replacements.replace_method()
        os.environ["VLLM_NWAY_LORA"] = mode
        vllm_nway_lora.register()
        assert bool(registration.applied()) == (mode != "0")
        if delivery == "classes after":
            replace_classes()
        options = {} if target_modules is None else {"target_modules": target_modules}
        lora_config = LoRAConfig(
            max_lora_rank=MAX_RANK,
            max_loras=MAX_LORAS,
            max_cpu_loras=max_cpu_loras,
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
        model = build(multimodal, unwrappable, kv_shared)
        model.packed_modules_mapping = {**model.packed_modules_mapping, **(packed or {})}
        self.worker_manager = vllm.lora.worker_manager.LRUCacheWorkerLoRAManager(
            vllm_config, torch.device("cpu"), model.embedding_modules
        )
        self.worker_manager.create_lora_manager(model, vllm_config)
        self.manager = self.worker_manager._adapter_manager
        self.delivery = delivery
        if delivery == "method after":
            _replacements.replace_method()

    def add(self, name: str, number: int, folder: Path, *, inplace: bool = False) -> str:
        """Add an adapter by ``delivery``; return the error's class and text, or an empty string."""
        try:
            self._add(name, number, folder, inplace)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _add(self, name: str, number: int, folder: Path, inplace: bool) -> None:
        request = self.request(name, number, folder, inplace=inplace)
        if self.delivery not in deliveries.BY_MANAGER:
            self.worker_manager.add_adapter(request)
            return
        if inplace:
            self.manager.remove_adapter(number)
        getattr(self.manager, self.delivery)(
            deliveries.load_from_memory(self.worker_manager, request)
        )
        self.manager.activate_adapter(number)

    def request(self, name: str, number: int, folder: Path, *, inplace: bool = False) -> Any:
        """Return a request as ``delivery`` has it: with a path, or with tensors."""
        from vllm.lora.request import LoRARequest

        if self.delivery == "files":
            return LoRARequest(name, number, str(folder), load_inplace=inplace)
        fields = {} if self.delivery.startswith("classes") else {"load_inplace": inplace}
        return deliveries.request(name, number, folder, **fields)

    def buffers(self) -> list[torch.Tensor]:
        """Return copies of the stacked tensors of all layers."""
        return [
            tensor.clone()
            for layer in self.manager.modules.values()
            for stack in (layer.lora_a_stacked, layer.lora_b_stacked)
            for tensor in (stack if isinstance(stack, tuple) else (stack,))
        ]

    def is_exact(self, number: int, folder: Path, unused: Sequence[str] = ()) -> bool:
        """Return True if an adapter's slots equal its files.

        The expected tensors are the files' deltas, loaded by the base layers' own weight loaders.
        ``unused`` ends the names of modules that the model does not use.
        """
        slot = self.manager.lora_index_to_id.index(number)
        deltas = read_deltas(folder)
        for name, layer in self.manager.modules.items():
            expected, loaded = self._load_expected(name, layer, deltas)
            for module in loaded:
                deltas.pop(module)
            if not torch.allclose(_compute_delta(layer, slot), expected, rtol=1e-5, atol=1e-5):
                return False
        return not any(
            delta.any() for module, delta in deltas.items() if not module.endswith(tuple(unused))
        )

    def _load_expected(
        self, name: str, layer: Any, deltas: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, list[str]]:
        """Return what a slot must add to the layer's weight, and the modules that contribute to it."""
        parent, _, last = name.rpartition(".")
        if last in ("embed_tokens", "lm_head"):
            shape = SHAPES[name][::-1]
            return deltas.get(name, torch.zeros(shape)), [name] if name in deltas else []
        weight = layer.base_layer.weight
        saved = weight.data.clone()
        weight.data.zero_()
        loaded = []
        for module, shard, rows in PARTS.get(last, [(last, None, slice(None))]):
            path = f"{parent}.{module}"
            if path in deltas:
                shard_id = () if shard is None else (shard,)
                weight.weight_loader(weight, deltas[path][rows].contiguous(), *shard_id)
                loaded.append(path)
        expected = weight.data.clone()
        weight.data.copy_(saved)
        return expected, list(dict.fromkeys(loaded))


def _compute_delta(layer: Any, slot: int) -> torch.Tensor:
    """Return what a slot of a layer adds to the layer's weight on this TP rank."""
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    if isinstance(a, tuple):
        return torch.cat([y[slot, 0] @ x[slot, 0] for x, y in zip(a, b)])
    if a.ndim == 3:  # embeddings store A transposed
        return b[slot, 0] @ a[slot].T
    return b[slot, 0] @ a[slot, 0]


_rank: Rank
_replacements: deliveries.Replacements | None = None
_messages: list[tuple[int, str]] = []


class _MessageCollector(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _messages.append((record.levelno, record.getMessage()))


def start(**options: Any) -> list[str]:
    """Build this process's TP rank; return the paths of the layers that vLLM wrapped for LoRA."""
    global _rank
    logger = logging.getLogger("vllm.nway_lora")
    if not any(isinstance(handler, _MessageCollector) for handler in logger.handlers):
        logger.addHandler(_MessageCollector())
        logger.setLevel(logging.INFO)
    _rank = Rank(**options)
    return list(_rank.manager.modules)


def get_rank() -> Rank:
    """Return this process's TP rank."""
    return _rank


def add(name: str, number: int, folder: Path, inplace: bool = False) -> str:
    """Add an adapter on this process's TP rank; return the error, or an empty string."""
    return _rank.add(name, number, folder, inplace=inplace)


def has(number: int) -> bool:
    """Return True if this process's TP rank has an adapter, or a slot for one."""
    manager = _rank.manager
    return (
        number in manager.list_adapters()
        or number in manager.lora_index_to_id
        or number in manager._active_adapters
    )


def resident() -> list[int]:
    """Return the ids of the adapters on this process's TP rank."""
    return sorted(_rank.manager.list_adapters())


def said(level: int) -> list[str]:
    """Return the plugin's log messages of one level since the last call; forget those of all levels."""
    lines = [line for message_level, line in _messages if message_level == level]
    _messages.clear()
    return lines


def is_exact(number: int, folder: Path, unused: Sequence[str] = ()) -> bool:
    """Return True if an adapter's slots on this process's TP rank equal its files."""
    return _rank.is_exact(number, folder, unused)


@dataclass(frozen=True)
class Attempt:
    """The result of adding an adapter.

    Attributes:
        error: the error's class and text if the adapter was refused; otherwise empty.
        unchanged: True if every stacked tensor, slot and registration is the same as before.
        exact: True if the adapter was not refused and its slots equal its files.
        resident: True if the slots of the adapter that was loaded before still equal its files.
    """

    error: str
    unchanged: bool
    exact: bool
    resident: bool

    @property
    def good(self) -> bool:
        """True if the adapter is exact, or refused with nothing changed, and ``resident`` is True."""
        passed = self.unchanged if self.error else self.exact
        return passed and self.resident


def attempt(folder: Path, resident: Path) -> Attempt:
    """Add an adapter as number 2 while ``resident`` is number 1; compare; remove it again."""
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
