"""Tests of families other than Qwen3.5 on real servers, compared with PEFT, and of stock vLLM.

With the plugin every adapter is exact. Stock vLLM serves the same adapters wrong, without an error.

OLMo hybrid has tests of its layers only (``tests/models``): its forward calls Triton kernels, and
neither the forward nor the convolution has a CPU kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from support import adapters, checkpoints
from support.adapters import Comparison, ServedModel, prompts, save_served_model
from support.predictions import predict_outcomes
from support.server import Server

from vllm_nway_lora.diagnosis.report import Outcome

SHARDED = "--fully-sharded-loras"
IGNORED_MESSAGE = "It will be ignored"


class Model(NamedTuple):
    """A model, its adapters, and how its servers are started.

    Attributes:
        save: saves the checkpoint.
        adapters: adapter's name -> its modules.
        plugin_arguments: arguments of each server with the plugin.
        stock_arguments: arguments of the server without the plugin.
        stock_outcome: the outcome on stock vLLM, ``WRONG`` or ``IGNORED``. If it is ``IGNORED``, stock
            vLLM logs ``IGNORED_MESSAGE``.
        common_arguments: further arguments of every server.
        tensor_parallel_size: of every server.
    """

    save: Callable[[Path], Path]
    adapters: Mapping[str, Sequence[str]]
    plugin_arguments: Sequence[Sequence[str]]
    stock_arguments: Sequence[str]
    stock_outcome: Outcome
    common_arguments: Sequence[str] = ()
    tensor_parallel_size: int = 2


MODELS = {
    # One module that covers one output: stock vLLM cuts it into two halves.
    "qwen3_next": Model(
        checkpoints.save_qwen3_next, adapters.QWEN3_NEXT, [(), (SHARDED,)], (), Outcome.WRONG
    ),
    # Mamba2 with one group, which is replicated on every rank: stock vLLM computes row offsets as if
    # the group were split.
    "granite_hybrid": Model(
        checkpoints.save_granite_hybrid, adapters.GRANITE_HYBRID, [()], (), Outcome.WRONG
    ),
    # One module that covers three outputs: stock vLLM has no sharded layer for it.
    "lfm2": Model(checkpoints.save_lfm2, adapters.LFM2, [(SHARDED,)], (SHARDED,), Outcome.IGNORED),
    # Four outputs and four modules, merged by the Transformers backend: stock vLLM has no sharded
    # layer for them either. On two ranks the base model itself fails on that backend: its attention is
    # split and its output projection is not.
    "afmoe": Model(
        checkpoints.save_afmoe,
        adapters.AFMOE,
        [(SHARDED,)],
        (SHARDED,),
        Outcome.IGNORED,
        common_arguments=("--model-impl", "transformers"),
        tensor_parallel_size=1,
    ),
}


@pytest.fixture(scope="module")
def get_served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ServedModel]:
    """Return a function that saves a model on its first use."""
    saved: dict[str, ServedModel] = {}

    def get(name: str) -> ServedModel:
        if name not in saved:
            model = MODELS[name]
            root = tmp_path_factory.mktemp(name)
            saved[name] = save_served_model(root, model.save, model.adapters)
        return saved[name]

    return get


def compare_with_peft(
    served: ServedModel, model: Model, log: Path, arguments: Sequence[str], plugin: bool
) -> dict[str, Comparison]:
    """Start a server; return, per adapter, the comparison of its worst answer with PEFT."""
    found = {}
    with Server(
        served.folder,
        log,
        *model.common_arguments,
        *arguments,
        plugin=plugin,
        tensor_parallel_size=model.tensor_parallel_size,
    ) as server:
        for name, folder in served.adapters.items():
            server.load(name, folder)
            answers = [server.complete(name, prompt) for prompt in prompts()]
            comparisons = [served.reference.compare(name, answer) for answer in answers]
            found[name] = max(comparisons, key=lambda comparison: comparison.error)
    return found


def get_outcomes(found: Mapping[str, Comparison]) -> dict[str, Outcome]:
    return {name: comparison.outcome for name, comparison in found.items()}


def predict(
    served: ServedModel, model: Model, arguments: Sequence[str], plugin: bool
) -> dict[str, Outcome]:
    """Return, per adapter, the outcome that ``check_adapter`` predicts."""
    return predict_outcomes(
        served.folder,
        served.adapters,
        [*model.common_arguments, *arguments],
        plugin=plugin,
        tensor_parallel_size=model.tensor_parallel_size,
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, arguments) for name, model in MODELS.items() for arguments in model.plugin_arguments],
    ids=lambda value: value if isinstance(value, str) else "sharded" if value else "unsharded",
)
def test_every_adapter_equals_peft_and_prediction(
    get_served: Callable[[str], ServedModel], tmp_path: Path, name: str, arguments: Sequence[str]
) -> None:
    model, served = MODELS[name], get_served(name)
    found = compare_with_peft(served, model, tmp_path / "log", arguments, plugin=True)
    assert all(comparison.is_exact for comparison in found.values()), found
    assert get_outcomes(found) == predict(served, model, arguments, plugin=True)


@pytest.mark.parametrize("name", MODELS)
def test_stock_vllm_is_wrong_without_error(
    get_served: Callable[[str], ServedModel], tmp_path: Path, name: str
) -> None:
    """Fails if a later release of vLLM fixes the defect."""
    model, served = MODELS[name], get_served(name)
    found = compare_with_peft(served, model, tmp_path / "log", model.stock_arguments, plugin=False)
    for comparison in found.values():
        assert comparison.error > comparison.effect / 2, found
    assert set(get_outcomes(found).values()) == {model.stock_outcome}, found
    is_logged = IGNORED_MESSAGE in (tmp_path / "log").read_text()
    assert is_logged == (model.stock_outcome is Outcome.IGNORED)
    assert get_outcomes(found) == predict(served, model, model.stock_arguments, plugin=False)
