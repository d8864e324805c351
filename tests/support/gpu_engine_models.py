"""The models and adapters of ``gpu_engine``, and the comparison of its answers with PEFT.

Arguments: ``save FOLDER`` saves them with the expected logprobs; ``compare FOLDER RESULTS`` compares all
tokens of the answers, the generated ones too, and prints a line for each adapter.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from support import adapters, checkpoints, moe_adapters
from support.adapters import ATTENTION, MLP, Answer, Reference, ServedModel, prompts

PROMPTS = prompts(2)
#: Rounding of bfloat16 in the base model's logprobs.
NOISE = 0.2
EXPERT_ROWS = ("gated delta net", "experts, 2-D", "experts, 3-D", "everything, 3-D")

#: The model whose attention reads ``kv_b_proj`` past its layer, and its attention's modules.
MLA = "deepseek_v3"
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

Save = Callable[[Path], Path]
#: The model -> what saves its checkpoint, and its adapters' modules.
MODELS: dict[str, tuple[Save, Mapping[str, Sequence[str]]]] = {
    "llama": (
        checkpoints.save_llama,
        {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP},
    ),
    "qwen3_5": (checkpoints.save_qwen3_5, adapters.QWEN3_5),
    "granite_hybrid": (checkpoints.save_granite_hybrid, adapters.GRANITE_HYBRID),
    "falcon_h1": (checkpoints.save_falcon_h1, {"in_proj": ("in_proj",)}),
    MLA: (
        checkpoints.save_deepseek_v3,
        {"kv_b_proj": ("kv_b_proj",), "attention": LATENT, "all": LATENT + MLP},
    ),
}
MIXTURE = "qwen3_5_moe"
EVERY = (*MODELS, MIXTURE)


def list_modes(model: str) -> tuple[str, ...]:
    """Return the modes of ``gpu_engine`` in which a model is served.

    With graphs of the decode, adapters on ``kv_b_proj`` are refused.
    """
    return ("eager", "piecewise") if model == MLA else ("eager", "graph", "compile")


def save(root: Path, models: Iterable[str] = EVERY) -> None:
    """Save models below ``root``, each with its adapters and ``expected.json``."""
    rows = {name: moe_adapters.ROWS[name] for name in EXPERT_ROWS}
    for name in models:
        if name == MIXTURE:
            with mock.patch.object(moe_adapters, "ROWS", rows):
                saved = moe_adapters.save_rows(root / name, checkpoints.save_qwen3_5_moe)
        else:
            saved = adapters.save_served_model(root / name, *MODELS[name])
        _write_expected(saved)


def _write_expected(model: ServedModel) -> None:
    def score(adapter: str | None) -> list[list[float]]:
        scores = [model.reference.logprobs(adapter, prompt) for prompt in PROMPTS]
        return [
            [round(row[token].item(), 5) for row, token in zip(found[:-1], prompt[1:], strict=True)]
            for found, prompt in zip(scores, PROMPTS, strict=True)
        ]

    found = {
        "prompts": PROMPTS,
        "noise": NOISE,
        "base": score(None),
        "adapters": {
            name: {"folder": folder.name, "logprobs": score(name)}
            for name, folder in model.adapters.items()
        },
    }
    (model.folder.parent / "expected.json").write_text(json.dumps(found))


def compare(root: Path, results: Path) -> list[dict[str, Any]]:
    """Print and return each adapter's worst comparison of every run in ``results``.

    The error and the effect of an adapter that was refused are None.
    """
    rows = []
    for run in json.loads(results.read_text()):
        folder = root / run["model"]
        reference = _load_reference(folder)
        answers: list[tuple[str, str, dict[str, Any]]] = [
            ("alone", name, answer)
            for name, result in run["adapters"].items()
            for answer in result.get("answers", ())
        ]
        answers += [("together", name, answer) for name, answer in run["together"]]
        worst: dict[tuple[str, str], adapters.Comparison] = {}
        for where, name, answer in answers:
            found = reference.compare(name or None, Answer(**answer))
            best = worst.get((where, name))
            if best is None or found.error > best.error:
                worst[where, name] = found
        side = "plugin" if run["plugin"] else "stock"
        for name, result in run["adapters"].items():
            if result["outcome"] == "refused":
                rows.append(_row(run, side, "alone", name, result["outcome"], None, None))
                print(f"{run['model']:15} {run['mode']:12} {side:7} {name}: {result['refusal']}")
        for (where, name), found in worst.items():
            error = max(found.error, found.greedy_gap)
            outcome = found.outcome.value if name else ("exact" if error < NOISE else "wrong")
            rows.append(_row(run, side, where, name, outcome, error, found.effect))
            print(
                f"{run['model']:15} {run['mode']:12} {side:7} {where:9} {name or 'base':18} {outcome:8}"
                f" error {found.error:.3f} gap {found.greedy_gap:.3f} effect {found.effect:.3f}"
            )
    return rows


def _row(
    run: Mapping[str, Any],
    side: str,
    where: str,
    name: str,
    outcome: str,
    error: float | None,
    effect: float | None,
) -> dict[str, Any]:
    return {
        **{key: run[key] for key in ("card", "vllm", "model", "mode")},
        "side": side,
        "batch": where,
        "adapter": name,
        "outcome": outcome,
        "error": error and round(error, 3),
        "effect": effect and round(effect, 3),
    }


def _load_reference(folder: Path) -> Reference:
    expected = json.loads((folder / "expected.json").read_text())
    saved = {name: folder / found["folder"] for name, found in expected["adapters"].items()}
    if folder.name != MIXTURE:
        return Reference(folder / "model", saved)
    merged = {
        name: folder / path.name.replace("adapter", "merged")
        for name, path in saved.items()
        if moe_adapters.ROWS[name].experts == "2-D"
    }
    return moe_adapters.MixtureReference(folder / "model", saved, merged)


if __name__ == "__main__":
    if sys.argv[1] == "save":
        shutil.rmtree(sys.argv[2], ignore_errors=True)
        save(Path(sys.argv[2]))
    else:
        found = compare(Path(sys.argv[2]), Path(sys.argv[3]))
        sys.exit(any(row["outcome"] != "exact" for row in found))
