"""Other families on real servers, against PEFT; and stock vLLM, which says nothing.

OLMo hybrid is held by its layers alone (``tests/families``): its forward calls Triton's kernels, and
neither it nor its convolution has another for CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from support import adapters, checkpoints
from support.adapters import Comparison, Served, make, prompts
from support.foretold import foretell
from support.server import Server

SHARDED = "--fully-sharded-loras"
IGNORED = "It will be ignored"


class Model(NamedTuple):
    """A model, its adapters, the arguments that it is served with, and what stock does then.

    ``log`` is in the log of a stock server; with it the adapter does nothing, without it harm.
    ``always`` are arguments of every server.
    """

    save: Callable[[Path], Path]
    adapters: Mapping[str, Sequence[str]]
    served_with: Sequence[Sequence[str]]
    stock_with: Sequence[str]
    log: str | None
    always: Sequence[str] = ()
    tensor_parallel_size: int = 2


MODELS = {
    # One output, seen as one module: stock cuts it into two halves.
    "qwen3_next": Model(
        checkpoints.save_qwen3_next, adapters.QWEN3_NEXT, [(), (SHARDED,)], (), None
    ),
    # Mamba2 with one group, which every rank holds: stock counts the rows as if they were split.
    "granite_hybrid": Model(
        checkpoints.save_granite_hybrid, adapters.GRANITE_HYBRID, [()], (), None
    ),
    # Three outputs, seen as one module: stock has no sharded layer for them.
    "lfm2": Model(checkpoints.save_lfm2, adapters.LFM2, [(SHARDED,)], (SHARDED,), IGNORED),
    # Four outputs and modules, merged by the Transformers backend: likewise. On two ranks the base
    # model itself fails there: its attention is split and its output projection is not.
    "afmoe": Model(
        checkpoints.save_afmoe,
        adapters.AFMOE,
        [(SHARDED,)],
        (SHARDED,),
        IGNORED,
        always=("--model-impl", "transformers"),
        tensor_parallel_size=1,
    ),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    made: dict[str, Served] = {}

    def get(name: str) -> Served:
        if name not in made:
            model = MODELS[name]
            made[name] = make(tmp_path_factory.mktemp(name), model.save, model.adapters)
        return made[name]

    return get


def serve(
    served: Served, model: Model, log: Path, arguments: Sequence[str], plugin: bool
) -> dict[str, Comparison]:
    """Return, per adapter, how the worst of a server's answers compares with PEFT's."""
    found = {}
    with Server(
        served.folder,
        log,
        *model.always,
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


def words(found: Mapping[str, Comparison]) -> dict[str, str]:
    return {name: comparison.word for name, comparison in found.items()}


def foretold(
    served: Served, model: Model, arguments: Sequence[str], plugin: bool
) -> dict[str, str]:
    return foretell(
        served.folder,
        served.adapters,
        [*model.always, *arguments],
        plugin=plugin,
        tensor_parallel_size=model.tensor_parallel_size,
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, arguments) for name, model in MODELS.items() for arguments in model.served_with],
    ids=lambda value: value if isinstance(value, str) else "sharded" if value else "whole",
)
def test_every_adapter_equals_peft(
    served: Callable[[str], Served], tmp_path: Path, name: str, arguments: Sequence[str]
) -> None:
    model, made = MODELS[name], served(name)
    found = serve(made, model, tmp_path / "log", arguments, plugin=True)
    assert all(comparison.exact for comparison in found.values()), found
    assert words(found) == foretold(made, model, arguments, plugin=True)


@pytest.mark.parametrize("name", MODELS)
def test_stock_vllm_is_wrong_and_raises_nothing(
    served: Callable[[str], Served], tmp_path: Path, name: str
) -> None:
    """Fails when upstream mends it."""
    model, made = MODELS[name], served(name)
    found = serve(made, model, tmp_path / "log", model.stock_with, plugin=False)
    for comparison in found.values():
        assert comparison.error > comparison.effect / 2, found
    assert set(words(found).values()) == {"ignored" if model.log else "wrong"}, found
    assert (IGNORED in (tmp_path / "log").read_text()) == (model.log is not None)
    assert words(found) == foretold(made, model, model.stock_with, plugin=False)
