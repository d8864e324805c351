# SPDX-License-Identifier: Apache-2.0
"""The answer of ``check`` and ``plan``: outcomes, verdicts and one row per kind of layer."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_nway_lora.rows.plan import FusionPlan


#: vLLM's default of ``--max-lora-rank`` (vllm/config/lora.py, 0.17.0 to 0.33.0).
DEFAULT_RANK = 16


class Outcome(enum.Enum):
    """How an adapter on a layer is served. The members are in order, the worst first."""

    #: The engine does not start.
    FAILS = "fails"
    #: This machine cannot build the model. A machine with a GPU may be able to.
    UNKNOWN = "cannot tell"
    #: The output differs from PEFT's, and vLLM reports no error.
    WRONG = "wrong"
    #: The base model answers under the adapter's name.
    IGNORED = "ignored"
    #: The adapter does not load; the error gives the reason.
    REFUSED = "refused"
    #: The output equals PEFT's.
    EXACT = "exact"

    @classmethod
    def worst(cls, outcomes: Iterable[Outcome]) -> Outcome:
        """Return the worst of ``outcomes``, and ``EXACT`` if there is none."""
        return min(outcomes, key=list(cls).index, default=cls.EXACT)


@dataclass
class Verdict:
    """How one side serves an adapter's part of a layer: the worst outcome over all ranks.

    Attributes:
        outcome: the outcome.
        reason: the error's text, or a description of the fault.
    """

    outcome: Outcome = Outcome.EXACT
    reason: str = ""

    def worsen(self, outcome: Outcome, reason: str = "") -> None:
        """Replace the verdict by ``outcome`` and ``reason`` if that outcome is worse."""
        if outcome is not self.outcome and Outcome.worst((outcome, self.outcome)) is outcome:
            self.outcome, self.reason = outcome, reason


@dataclass
class Row:
    """One layer for which an adapter has modules.

    Attributes:
        layer: its path in vLLM's model. In a folded row, layer numbers are ``*``.
        modules: adapter-visible modules -> rows of LoRA-B over all ranks; None where not adapted.
        rank: LoRA's r, the largest of its modules.
        plan: its :class:`FusionPlan` on each rank, in rank order; empty for vLLM's own layers.
        stock: the verdict on vLLM without the plugin.
        plugin: the verdict on vLLM with the plugin.
        count: the number of layers that the row stands for.
        by_table: whether its rows were not traced, so that vLLM's and this package's tables place them.
        unservable: the reason why no LoRA layer can serve a module of the adapter; empty if one can.
        is_fused: whether vLLM fuses its modules into one projection.
        is_adaptable: whether PEFT adapts it when asked for all linear layers. It adapts no convolution.
    """

    layer: str
    modules: dict[str, int | None]
    rank: int
    plan: list[FusionPlan] = field(default_factory=list)
    stock: Verdict = field(default_factory=Verdict)
    plugin: Verdict = field(default_factory=Verdict)
    count: int = 1
    by_table: bool = False
    unservable: str = ""
    is_fused: bool = False
    is_adaptable: bool = True


@dataclass
class Cost:
    """The cost of one adapter on one tensor-parallel rank.

    Attributes:
        slices: the number of LoRA-A and LoRA-B pairs that the kernels read per token, over all layers
            but those of experts.
        bytes_per_lora_rank: the bytes of a slot per unit of ``--max-lora-rank``, at two bytes per number.
    """

    slices: int = 0
    bytes_per_lora_rank: int = 0


@dataclass
class Report:
    """The rows, and the verdicts on the adapter as a whole, without and with the plugin.

    Attributes:
        rows: one per kind of layer.
        stock: the verdict on vLLM without the plugin: the worst of the rows that are adaptable.
        plugin: the verdict on vLLM with the plugin. A refusal's reason is the server's whole message.
        rules: the translations of the adapter's layout with the plugin.
        left_out: reason -> modules that a server leaves out with a warning. Layer numbers are ``*``.
        costs: ``stock`` and ``plugin`` -> the cost of an adapter on every module; only of ``plan``.
        max_lora_rank: the value of ``--max-lora-rank`` for which the verdicts hold.
    """

    rows: list[Row]
    stock: Verdict
    plugin: Verdict
    rules: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    max_lora_rank: int = DEFAULT_RANK


def build_report(rows: Mapping[str, Row], verdicts: Mapping[bool, Verdict]) -> Report:
    """Return the report of ``rows``; each side's verdict becomes the worst of its rows.

    Args:
        rows: layer's path -> its row.
        verdicts: True for the plugin, False for stock vLLM -> the verdict on the whole so far.
    """
    folded = fold_rows(rows.values())
    for plugin, verdict in verdicts.items():
        for row in folded:
            part = row.plugin if plugin else row.stock
            if row.is_adaptable:
                verdict.worsen(part.outcome, part.reason)
            if verdict.outcome in (Outcome.FAILS, Outcome.UNKNOWN):
                part.worsen(verdict.outcome, verdict.reason)
    return Report(folded, verdicts[False], verdicts[True])


def fold_names(modules: Iterable[str]) -> list[str]:
    """Return the names of modules with ``*`` for layers' numbers, each once."""
    return list(dict.fromkeys(re.sub(r"\b\d+\b", "*", module) for module in modules))


def fold_rows(rows: Iterable[Row]) -> list[Row]:
    """Merge rows that differ only in the layer's number; the first of them gets the count."""
    folded: dict[object, Row] = {}
    for row in rows:
        pattern = re.sub(r"\b\d+\b", "*", row.layer)
        modules = tuple(row.modules.items())
        outcomes = (row.stock.outcome, row.plugin.outcome)
        flags = (row.by_table, row.is_fused, row.is_adaptable)
        key = (pattern, modules, row.rank, outcomes, flags)
        if key in folded:
            folded[key].count += 1
        else:
            row.layer = pattern
            folded[key] = row
    return list(folded.values())
