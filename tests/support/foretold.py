"""What ``vllm-nway-lora check`` says of the adapters that engines are tested with, before any engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from support.processes import evaluate
from support.server import engine_environment

_CODE = """
import json, sys
from vllm_nway_lora.check import check

model, adapters, options = json.loads(sys.argv[1])
reports = {name: check(model, folder, **options) for name, folder in adapters.items()}
sides = ("stock", "plugin")
words = {side: {name: getattr(r, side).word for name, r in reports.items()} for side in sides}
rows = {
    side: {name: {row.layer: getattr(row, side).word for row in r.rows} for name, r in reports.items()}
    for side in sides
}
print(json.dumps([words, rows]))
"""


def foretell(
    checkpoint: Path,
    adapters: Mapping[str, Path],
    arguments: Sequence[str] = (),
    *,
    plugin: bool,
    tensor_parallel_size: int,
) -> dict[str, str]:
    """Return, per adapter, what ``check`` says of it as a whole: ``exact``, ``wrong``, ``ignored``, ``refused``.

    ``arguments`` are the server's. Some row must be what the adapter is as a whole, and the others
    exact.
    """
    options = {
        "tensor_parallel_size": tensor_parallel_size,
        "fully_sharded": "--fully-sharded-loras" in arguments,
        "max_lora_rank": 16,
        "model_impl": "transformers" if "transformers" in arguments else "auto",
    }
    job = [str(checkpoint), {name: str(folder) for name, folder in adapters.items()}, options]
    words, rows = _check(json.dumps(job))
    side = "plugin" if plugin else "stock"
    for name, word in words[side].items():
        found = set(rows[side][name].values())
        # What refuses an adapter need not be about one layer.
        assert word in found or word == "refused", (name, word, rows[side][name])
        assert found <= {word, "exact"}, (name, rows[side][name])
    return dict(words[side])


@cache
def _check(job: str) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, dict[str, str]]]]:
    path = engine_environment(True, 1)["PYTHONPATH"]
    words, rows = evaluate(_CODE, job, PYTHONPATH=path, VLLM_LOGGING_LEVEL="ERROR")
    return words, rows
