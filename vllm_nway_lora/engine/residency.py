# SPDX-License-Identifier: Apache-2.0
"""The engine core's record of its workers' adapters. Reading it needs no file and no RPC."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_nway_lora.adapters.prepared import Source
    from vllm_nway_lora.engine.loading import Reply

_ATTRIBUTE = "_nway_lora_residency"


@dataclass
class Residency:
    """What is known of an engine's adapters, stored on one attribute of its executor.

    Attributes:
        capacity: ``--max-cpu-loras``: a worker evicts the least recently used adapter beyond it.
        ready: id -> adapter that every rank has, resident or prepared: a step can use it without
            reading a file.
        slots: ``--max-loras``: a rank prepares no more adapters.
        pending: ids of the adapters that are prepared on a rank. A step that uses one registers it.
        may_evict: a step that registers adapters may evict others.
        is_stale: an adapter is not in ``ready``, and a request that waits or runs may need it.
        is_relabelled: the prefix cache's label of an adapter has changed, and a waiting request may have
            been hashed before.
        is_foreign: the workers have no LoRA manager of vLLM's kind.
    """

    capacity: int
    slots: int
    ready: dict[int, Source] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)
    may_evict: bool = False
    is_stale: bool = False
    is_relabelled: bool = False
    is_foreign: bool = False

    def is_ready(self, source: Source) -> bool:
        """Return whether a step can use the adapter without reading a file."""
        return self.is_foreign or self.ready.get(source.id) == source

    def is_full(self, needed: Collection[int]) -> bool:
        """Return whether as many needed adapters are prepared as a rank prepares."""
        return len(self.pending.intersection(needed)) >= self.slots

    def learn(self, replies: Sequence[Reply], added: Source | None = None) -> None:
        """Drop the adapters that a rank lacks, and add one that every rank has."""
        self.keep(set.intersection(*({*reply.resident, *reply.prepared} for reply in replies)))
        if added:
            self.ready[added.id] = added
        self.pending = set().union(*(reply.prepared for reply in replies))
        self.may_evict = any(
            reply.prepared and len(reply.resident) + len(reply.prepared) > self.capacity
            for reply in replies
        )

    def note_step(self, used: Collection[int]) -> None:
        """Drop the adapters that a step may have evicted; ``used`` are those that it used."""
        if self.pending.isdisjoint(used):
            return
        self.pending.difference_update(used)
        if self.may_evict:
            self.may_evict = False
            self.keep(used)

    def keep(self, ids: Collection[int]) -> None:
        """Drop every adapter that is not in ``ids``."""
        before = len(self.ready)
        self.ready = {i: source for i, source in self.ready.items() if i in ids}
        self.is_stale |= len(self.ready) < before

    def forget(self, lora_id: int) -> None:
        """Drop one adapter."""
        self.keep(self.ready.keys() - {lora_id})

    def forget_all(self) -> None:
        """Drop every adapter: somebody else has called the workers."""
        self.keep(())


def get_residency(executor: Any) -> Residency:
    """Return an executor's record, created if need be."""
    residency: Residency | None = getattr(executor, _ATTRIBUTE, None)
    if residency is None:
        lora_config = executor.vllm_config.lora_config
        places = lora_config.max_cpu_loras or lora_config.max_loras
        residency = Residency(places, lora_config.max_loras)
        setattr(executor, _ATTRIBUTE, residency)
    return residency


def find_residency(executor: Any) -> Residency | None:
    """Return an executor's record; None if no adapter has been used."""
    residency: Residency | None = getattr(executor, _ATTRIBUTE, None)
    return residency
