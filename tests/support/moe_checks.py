"""Tests of an engine with experts, for the suites that start one; ``run`` is their fixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import checkpoints
from support.adapters import Comparison, ServedModel, prompts
from support.moe_adapters import ROWS
from support.moe_engine import BASE, Served, Setup, serve
from support.predictions import predict_outcomes
from vllm_nway_lora.diagnosis.report import Outcome

#: The model class -> what saves its checkpoint.
CLASSES: dict[str, Callable[[Path], Path]] = {
    "text": checkpoints.save_qwen3_5_moe,
    "multimodal": checkpoints.save_qwen3_5_moe_multimodal,
}
PROMPTS = prompts(2)
#: Rounding of bfloat16 in the base model's logprobs: 0.03 to 0.10. Adapters change them by 1.5 to 5.
NOISE = 0.2

#: The row -> its outcome with stock vLLM 0.32.0 at TP 1.
STOCK = {
    "gated delta net": Outcome.EXACT,
    "standard attention": Outcome.EXACT,
    "in_proj_z alone": Outcome.REFUSED,
    "experts, 2-D": Outcome.EXACT,
    "experts, 3-D": Outcome.REFUSED,  # without --enable-mixed-moe-lora-format
    # The gate's part is ignored.
    "everything, 2-D": Outcome.WRONG,
    "everything, 3-D": Outcome.REFUSED,
    "shared expert": Outcome.WRONG,
    "shared_expert_gate alone": Outcome.IGNORED,
}


@dataclass(frozen=True)
class Run:
    """A model with experts and what an engine has answered."""

    model: ServedModel
    setup: Setup
    served: Served
    log: Path

    def compare(self, name: str) -> Comparison:
        """Return the comparison of an adapter's worst answer with the reference."""
        assert name not in self.served.refused, self.served.refused[name]
        answers = self.served.alone[name]
        found = [self.model.reference.compare(name or None, answer) for answer in answers]
        return max(found, key=lambda comparison: comparison.error)

    def outcome(self, name: str) -> Outcome:
        """Return an adapter's outcome."""
        return Outcome.REFUSED if name in self.served.refused else self.compare(name).outcome


def run_engine(model: ServedModel, folder: Path, setup: Setup, plugin: bool = True) -> Run:
    """Serve a model and its adapters, and complete :data:`PROMPTS`."""
    log = folder / "log"
    served = serve(model.folder, model.adapters, PROMPTS, log, setup, plugin)
    return Run(model, setup, served, log)


class EngineChecks:
    """The tests of one engine."""

    @pytest.mark.parametrize("row", ROWS)
    def test_adapter_equals_reference(
        self, run: Run, row: str, record_property: Callable[[str, object], None]
    ) -> None:
        comparison = run.compare(row)
        record_property("comparison", comparison)  # for pytest's --junitxml
        assert comparison.is_exact, comparison

    def test_adapters_in_one_batch_equal_reference(self, run: Run) -> None:
        """The batch also has requests without an adapter."""
        assert {name for name, _ in run.served.together} == {BASE, *ROWS}
        for name, answer in run.served.together:
            comparison = run.model.reference.compare(name or None, answer)
            if name == BASE:
                assert max(comparison.error, comparison.greedy_gap) < NOISE, comparison
            else:
                assert comparison.is_exact, (name, comparison)

    def test_base_model_equals_transformers(self, run: Run) -> None:
        assert run.compare(BASE).error < NOISE
        # Of the same engine, so nothing is rounded otherwise.
        assert run.served.afterwards == run.served.alone[BASE]

    def test_check_predicts_every_adapter(self, run: Run) -> None:
        predicted = predict_outcomes(
            run.model.folder,
            run.model.adapters,
            ["--fully-sharded-loras"] * run.setup.fully_sharded,
            plugin=True,
            tensor_parallel_size=run.setup.tensor_parallel_size,
        )
        assert predicted == dict.fromkeys(ROWS, Outcome.EXACT)
