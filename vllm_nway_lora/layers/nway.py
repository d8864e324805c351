# SPDX-License-Identifier: Apache-2.0
"""The LoRA layer: one slice per adapter-visible module, whatever the number of outputs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
import vllm
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.distributed.utils import divide
from vllm.lora.layers.column_parallel_linear import ColumnParallelLinearWithLoRA, _mcp_apply
from vllm.model_executor.layers.linear import ColumnParallelLinear

from vllm_nway_lora import __version__, cpu_kernels, releases, settings
from vllm_nway_lora.claims import plan_for
from vllm_nway_lora.plan import FusionPlan, PlanError

logger = logging.getLogger("vllm.nway_lora")

#: Where `can_replace_layer` leaves the plan for `__init__`, which vLLM calls with the layer alone.
_PLAN_ATTRIBUTE = "_nway_lora_plan"


class LoRATensorError(ValueError):
    """LoRA tensors that do not fit the layer they are for."""


class NWayLinearWithLoRA(ColumnParallelLinearWithLoRA):
    """LoRA on a column-parallel projection of N outputs that adapters see as M modules.

    Has M slices, one per module (N where row counts alone can tell modules apart, see
    :attr:`FusionPlan.by_rows`). Slice ``i`` owns ``lora_a_stacked[i]`` of shape
    ``(max_loras, 1, max_lora_rank, input_size)`` and ``lora_b_stacked[i]`` of shape
    ``(max_loras, 1, output_slices[i], max_lora_rank)``, both of ``lora_config.lora_dtype``. Under
    ``fully_sharded_loras`` each rank has ``max_lora_rank / tp_size`` of A's rows. The slice of a
    module that an adapter leaves out stays zero.

    The parent is the one LoRA layer class of vLLM whose constructor, ``forward`` and ``apply``
    behave alike from 0.17.0 on; the ``Merged...`` classes tie the slices to the outputs.
    """

    def __init__(self, base_layer: ColumnParallelLinear) -> None:
        super().__init__(base_layer)
        self.plan: FusionPlan = getattr(base_layer, _PLAN_ATTRIBUTE)
        self.n_slices = len(self.plan.slices)
        self.output_slices = tuple(s.width for s in self.plan.slices)

    @classmethod
    def can_replace_layer(
        cls,
        source_layer: nn.Module,
        lora_config: Any,
        packed_modules_list: list[str],
        model_config: Any = None,
        **_: Any,
    ) -> bool:
        """Return True for a layer that vLLM's own classes serve wrongly or at a loss.

        Raises:
            PlanError: see :func:`vllm_nway_lora.claims.plan_for`.
        """
        _announce()
        plan = plan_for(source_layer, packed_modules_list)
        if plan is None:
            return False
        setattr(source_layer, _PLAN_ATTRIBUTE, plan)
        return True

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        """Allocate the zeroed LoRA tensors; they are never reallocated, kernels keep addresses."""
        self.lora_config = lora_config
        # `_mcp_apply` gathers over the whole tensor-parallel group, so a layer that is not sharded
        # over that group (`disable_tp`) keeps its A whole.
        self.shards_lora_a = (
            lora_config.fully_sharded_loras
            and self.tp_size > 1
            and self.tp_size == get_tensor_model_parallel_world_size()
        )
        max_rank = lora_config.max_lora_rank
        a_rows = divide(max_rank, self.tp_size) if self.shards_lora_a else max_rank

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(
                max_loras, 1, *shape, dtype=lora_config.lora_dtype, device=self.device
            )

        self.lora_a_stacked = tuple(zeros(a_rows, self.input_size) for _ in self.output_slices)
        self.lora_b_stacked = tuple(zeros(width, max_rank) for width in self.output_slices)

    def set_lora(
        self,
        index: int,
        lora_a: torch.Tensor | Sequence[torch.Tensor | None],
        lora_b: torch.Tensor | Sequence[torch.Tensor | None],
    ) -> None:
        """Put one adapter's tensors for this layer into slot ``index``.

        Args:
            index: the slot, below ``max_loras``.
            lora_a: per module ``(r, input_size)``, None where the adapter leaves the module out; a
                single tensor where adapters see the projection as one module.
            lora_b: per module ``(rows of the module over all ranks, r)``, scaling folded in, and
                None or a single tensor as for ``lora_a``.

        Raises:
            LoRATensorError: a tensor does not fit. Nothing has been written then.
        """
        a_list = [lora_a] if isinstance(lora_a, torch.Tensor) else list(lora_a)
        b_list = [lora_b] if isinstance(lora_b, torch.Tensor) else list(lora_b)
        try:
            writes = self.check(a_list, b_list)
        except LoRATensorError:
            if not self._is_warm_up(b_list):
                raise
            writes = []
        left = set(range(self.n_slices))
        for module, number, rows in writes:
            part = self.plan.slices[number]
            a_slot = self.lora_a_stacked[number][index, 0]
            # Nothing is ever written outside of the run.
            b_slot = self.lora_b_stacked[number][index, 0, part.run]
            a, b = a_list[module], part.take(b_list[module][rows])
            if self.shards_lora_a:
                a = a[self.tp_rank * len(a_slot) : (self.tp_rank + 1) * len(a_slot)]
            a_slot[: len(a)].copy_(a, non_blocking=True)
            b_slot[:, : b.shape[1]].copy_(b, non_blocking=True)
            if len(a) < len(a_slot):  # what an adapter of a higher rank has left there
                a_slot[len(a) :].zero_()
            if b.shape[1] < b_slot.shape[1]:
                b_slot[:, b.shape[1] :].zero_()
            left.remove(number)
        for number in left:
            self.lora_a_stacked[number][index].zero_()
            self.lora_b_stacked[number][index].zero_()

    def set_mapping(self, punica_wrapper: Any) -> None:
        """Take what does the LoRA products, and on CPU what does them in less time."""
        super().set_mapping(cpu_kernels.grouped(punica_wrapper))

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return base output plus LoRA: ``(tokens, input_size)`` to ``(tokens, local width)``."""
        if self.shards_lora_a:
            return _mcp_apply(x, bias, self)
        return super().apply(x, bias)

    def check(
        self, lora_a: Sequence[torch.Tensor | None], lora_b: Sequence[torch.Tensor | None]
    ) -> list[tuple[int, int, slice]]:
        """Hold tensors against the layer and write nothing.

        Args:
            lora_a: as for :meth:`set_lora`, one item per module.
            lora_b: as for :meth:`set_lora`, one item per module.

        Returns:
            What :meth:`FusionPlan.assign` yields for them.

        Raises:
            LoRATensorError: a tensor does not fit.
        """
        try:
            return self._fit(lora_a, lora_b)
        except PlanError as error:
            where = f"LoRA on {self.base_layer.prefix} (vLLM {vllm.__version__})"
            raise LoRATensorError(f"{where}: {error}") from None

    def _fit(
        self, lora_a: Sequence[torch.Tensor | None], lora_b: Sequence[torch.Tensor | None]
    ) -> list[tuple[int, int, slice]]:
        if len(lora_a) != len(lora_b):
            raise PlanError(f"{len(lora_a)} LoRA-A tensors but {len(lora_b)} LoRA-B tensors")
        # A number alone (0-D) has no rows.
        rows = [None if b is None else b.shape[0] if b.ndim else 0 for b in lora_b]
        writes = list(self.plan.assign(rows))
        max_rank = self.lora_config.max_lora_rank
        for module, a, b in zip(self.plan.modules, lora_a, lora_b, strict=True):
            if a is None and b is None:
                continue
            if a is None or b is None:
                given, missing = ("B", "A") if a is None else ("A", "B")
                raise PlanError(f"module {module} has LoRA-{given} but no LoRA-{missing}")
            rank = a.shape[0] if a.ndim else 0
            if a.shape != (rank, self.input_size) or b.shape[1:] != (rank,) or rank > max_rank:
                raise PlanError(
                    f"module {module}: expected LoRA-A of shape (r, {self.input_size}) and "
                    f"LoRA-B of shape (rows, r) with r at most {max_rank} (--max-lora-rank), found "
                    f"{tuple(a.shape)} and {tuple(b.shape)}"
                )
        return writes

    def _is_warm_up(self, lora_b: list[torch.Tensor | None]) -> bool:
        """Tell vLLM's dummy adapter, whose LoRA-B has this rank's rows only and is all zero.

        See ``create_dummy_lora`` (vllm/lora/model_manager.py): to 0.20.2 it makes one tensor per
        module, from 0.21.0 on one per slice.
        """
        return all(
            b is not None and b.shape[:1] == (width,) and not b.any()
            for b, width in zip(lora_b, self.output_slices, strict=False)
        )


@functools.cache
def _announce() -> None:
    """Say once per process that builds LoRA layers that this package is on."""
    tested = releases.support(vllm.__version__) is releases.Support.TESTED
    logger.info(
        "vllm-nway-lora %s is on for vLLM %s (%s release): LoRA on N-way fused projections has one "
        "slice per adapter module. %s=0 turns it off.",
        __version__,
        vllm.__version__,
        "a tested" if tested else "an untested",
        settings.VARIABLE,
    )
