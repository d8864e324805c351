"""Outcomes that ``vllm-nway-lora check`` predicts for adapters, before an engine serves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from support.processes import evaluate
from support.server import engine_environment
from vllm_nway_lora.diagnosis.report import Outcome

_CODE = """
import json, sys
from vllm_nway_lora.diagnosis.check import check_adapter
from vllm_nway_lora.diagnosis.options import ServerOptions

model, adapters, options = json.loads(sys.argv[1])
options = ServerOptions(**options)
reports = {name: check_adapter(model, folder, options) for name, folder in adapters.items()}
sides = ("stock", "plugin")
outcomes = {
    side: {name: getattr(report, side).outcome.value for name, report in reports.items()}
    for side in sides
}
rows = {
    side: {
        name: {row.layer: getattr(row, side).outcome.value for row in report.rows}
        for name, report in reports.items()
    }
    for side in sides
}
print(json.dumps([outcomes, rows]))
"""


def predict_outcomes(
    checkpoint: Path,
    adapters: Mapping[str, Path],
    arguments: Sequence[str] = (),
    *,
    plugin: bool,
    tensor_parallel_size: int,
) -> dict[str, Outcome]:
    """Return the outcome that ``check_adapter`` predicts for each adapter as a whole.

    Also check that the report's rows agree: at least one row has the adapter's outcome, and every
    other row is exact.

    Args:
        checkpoint: the model's folder.
        adapters: name -> adapter folder.
        arguments: the server's arguments.
        plugin: True for vLLM with the plugin, False for stock vLLM.
        tensor_parallel_size: the server's tensor-parallel size.
    """
    options = {
        "tensor_parallel_size": tensor_parallel_size,
        "fully_sharded_loras": "--fully-sharded-loras" in arguments,
        "max_lora_rank": 16,
        "model_impl": "transformers" if "transformers" in arguments else "auto",
    }
    job = [str(checkpoint), {name: str(folder) for name, folder in adapters.items()}, options]
    outcomes, rows = _check_adapters(json.dumps(job))
    side = "plugin" if plugin else "stock"
    predicted = {name: Outcome(value) for name, value in outcomes[side].items()}
    for name, outcome in predicted.items():
        found = {Outcome(value) for value in rows[side][name].values()}
        # An adapter can be refused for a reason that belongs to no single layer.
        assert outcome in found or outcome is Outcome.REFUSED, (name, outcome, rows[side][name])
        assert found <= {outcome, Outcome.EXACT}, (name, rows[side][name])
    return predicted


@cache
def _check_adapters(
    job: str,
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, dict[str, str]]]]:
    """Run ``check_adapter`` in a process of its own.

    Returns:
        Side (``stock`` or ``plugin``) -> adapter -> outcome; and side -> adapter -> layer -> outcome.
    """
    path = engine_environment(True, 1)["PYTHONPATH"]
    outcomes, rows = evaluate(_CODE, job, PYTHONPATH=path, VLLM_LOGGING_LEVEL="ERROR")
    return outcomes, rows
