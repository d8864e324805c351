# SPDX-License-Identifier: Apache-2.0
"""The LoRA layer: one slice per adapter-visible module, for any number of outputs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
import vllm
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.distributed.utils import divide
from vllm.lora.layers.column_parallel_linear import ColumnParallelLinearWithLoRA, _mcp_apply
from vllm.model_executor.layers.linear import ColumnParallelLinear

from vllm_nway_lora import __version__, settings
from vllm_nway_lora.compat import releases
from vllm_nway_lora.layers.claims import plan_for
from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.notes import get_notes, set_notes
from vllm_nway_lora.rows.plan import FusionPlan

logger = logging.getLogger("vllm.nway_lora")


class LoRATensorError(ValueError):
    """LoRA tensors that do not fit their layer."""


class NWayLinearWithLoRA(ColumnParallelLinearWithLoRA):
    """LoRA on a column-parallel projection of N outputs that adapters see as M modules.

    Has M slices, one per module. Slice ``i`` owns ``lora_a_stacked[i]`` of shape
    ``(max_loras, 1, max_lora_rank, input_size)`` and ``lora_b_stacked[i]`` of shape
    ``(max_loras, 1, output_slices[i], max_lora_rank)``, both of ``lora_config.lora_dtype``. Under
    ``fully_sharded_loras`` each rank has ``max_lora_rank / tp_size`` of A's rows. If an adapter
    leaves a module out, the module's slice stays zero.

    The parent is the only LoRA layer class of vLLM whose constructor, ``forward`` and ``apply``
    are the same from 0.17.0 on; the ``Merged...`` classes couple the slices to the outputs.
    """

    def __init__(self, base_layer: ColumnParallelLinear) -> None:
        super().__init__(base_layer)
        self.plan = cast(FusionPlan, get_notes(base_layer).plan)  # set by `can_replace_layer`
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
        """Return True for a layer that vLLM's own classes serve wrongly or at a cost.

        Raises:
            PlanError: see :func:`vllm_nway_lora.layers.claims.plan_for`.
        """
        _log_that_plugin_is_on()
        plan = plan_for(source_layer, packed_modules_list)
        if plan is None:
            return False
        set_notes(source_layer, plan=plan)
        return True

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        """Allocate the zeroed LoRA tensors, once: kernels keep their addresses."""
        self.lora_config = lora_config
        # `_mcp_apply` gathers over the whole tensor-parallel group, so a layer that is not sharded
        # over that group (`disable_tp`) keeps all of its A.
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
        """Write one adapter's tensors for this layer into slot ``index``.

        Args:
            index: the slot, below ``max_loras``.
            lora_a: per module ``(r, input_size)``, None where the adapter leaves the module out. A
                single tensor if adapters see the projection as one module.
            lora_b: per module ``(rows of the module over all ranks, r)``, scaling folded in; None or
                a single tensor as for ``lora_a``.

        Raises:
            LoRATensorError: a tensor does not fit. Nothing has been written then.
        """
        a_list = [lora_a] if isinstance(lora_a, torch.Tensor) else list(lora_a)
        b_list = [lora_b] if isinstance(lora_b, torch.Tensor) else list(lora_b)
        try:
            self.validate(a_list, b_list)
        except LoRATensorError:
            if not self._is_warm_up(b_list):
                raise
            a_list = b_list = [None] * self.n_slices
        for number in range(self.n_slices):
            source = self.plan.source(number)
            a, b = a_list[source], b_list[source]
            if a is None or b is None:
                self.lora_a_stacked[number][index].zero_()
                self.lora_b_stacked[number][index].zero_()
            else:
                self._write(index, number, a, b)

    def _write(self, index: int, number: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Write one module's tensors, which fit, into a slot of its slice."""
        part = self.plan.slices[number]
        a_slot = self.lora_a_stacked[number][index, 0]
        # Rows outside of the run stay zero: nothing ever writes them.
        b_slot = self.lora_b_stacked[number][index, 0, part.run]
        b = part.take(b)
        if self.shards_lora_a:
            a = a[self.tp_rank * len(a_slot) : (self.tp_rank + 1) * len(a_slot)]
        a_slot[: len(a)].copy_(a, non_blocking=True)
        b_slot[:, : b.shape[1]].copy_(b, non_blocking=True)
        if len(a) < len(a_slot):  # the rest of an earlier adapter with a higher rank
            a_slot[len(a) :].zero_()
        if b.shape[1] < b_slot.shape[1]:
            b_slot[:, b.shape[1] :].zero_()

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return base output plus LoRA: ``(tokens, input_size)`` to ``(tokens, local width)``."""
        if self.shards_lora_a:
            return _mcp_apply(x, bias, self)
        return super().apply(x, bias)

    def validate(
        self, lora_a: Sequence[torch.Tensor | None], lora_b: Sequence[torch.Tensor | None]
    ) -> None:
        """Check that tensors fit the layer; write nothing.

        Args:
            lora_a: as for :meth:`set_lora`, one item per module.
            lora_b: as for :meth:`set_lora`, one item per module.

        Raises:
            LoRATensorError: a tensor does not fit.
        """
        max_rank = self.lora_config.max_lora_rank
        try:
            self.plan.validate(lora_a, lora_b, columns=self.input_size, max_rank=max_rank)
        except PlanError as error:
            where = f"LoRA on {self.base_layer.prefix} (vLLM {vllm.__version__})"
            raise LoRATensorError(f"{where}: {error}") from None

    def _is_warm_up(self, lora_b: list[torch.Tensor | None]) -> bool:
        """Return whether this is vLLM's dummy adapter: LoRA-B with this rank's rows only, all zero.

        See ``create_dummy_lora`` (vllm/lora/model_manager.py): until 0.20.2 it creates one tensor
        per module, from 0.21.0 on one per slice.
        """
        return all(
            b is not None and b.numel() and b.shape[:1] == (width,) and not b.any()
            for b, width in zip(lora_b, self.output_slices, strict=False)
        )


@functools.cache
def _log_that_plugin_is_on() -> None:
    """Log, once per process that builds LoRA layers, that this package is on."""
    is_tested = releases.support(vllm.__version__) is releases.Support.TESTED
    logger.info(
        "vllm-nway-lora %s is on for vLLM %s (%s release): LoRA on N-way fused projections has one "
        "slice per adapter module. %s=0 turns it off.",
        __version__,
        vllm.__version__,
        "a tested" if is_tested else "an untested",
        settings.VARIABLE,
    )
