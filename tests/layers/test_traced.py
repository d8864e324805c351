"""Layers whose trace differs from the slots of vLLM's own LoRA class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import vllm
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.lora import model_manager, utils, worker_manager  # noqa: F401  (applies the patches)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

import vllm_nway_lora
from vllm_nway_lora.compat import defects
from vllm_nway_lora.diagnosis.offline import Rank, initialize
from vllm_nway_lora.diagnosis.stand_ins import StandInGroup
from vllm_nway_lora.layers.nway import LoRATensorError, NWayLinearWithLoRA
from vllm_nway_lora.rows.held import Held
from vllm_nway_lora.rows.notes import get_notes, set_notes

WIDTH = 16
QKV = ["q_proj", "k_proj", "v_proj"]


@pytest.fixture(autouse=True)
def _rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this process the second of two tensor-parallel ranks, with the plugin on."""
    monkeypatch.setenv("VLLM_NWAY_LORA", "1")
    initialize()
    vllm_nway_lora.register()
    with Rank(StandInGroup(1, 2), VllmConfig()).current():
        yield


def wrap(layer: Any, modules: list[str], fully_sharded: bool = False) -> Any:
    config = LoRAConfig(
        max_lora_rank=8, max_loras=1, lora_dtype=torch.float32, fully_sharded_loras=fully_sharded
    )
    return utils.from_layer(layer, 1, config, modules, None)


def hold(rows: Any, size: int, columns: Any = None) -> Held:
    columns = torch.arange(WIDTH) if columns is None else torch.tensor(list(columns))
    return Held(size, torch.tensor(list(rows)), columns)


def column(prefix: str = "layers.0.proj") -> Any:
    return ColumnParallelLinear(WIDTH, 16, bias=False, params_dtype=torch.float32, prefix=prefix)


def row() -> Any:
    return RowParallelLinear(
        2 * WIDTH, 4, bias=False, params_dtype=torch.float32, prefix="layers.0.down"
    )


def qkv() -> Any:
    return QKVParallelLinear(
        WIDTH, 4, 4, 2, bias=False, params_dtype=torch.float32, prefix="layers.0.qkv_proj"
    )


def pair() -> Any:
    return MergedColumnParallelLinear(
        WIDTH, [8, 8], bias=False, params_dtype=torch.float32, prefix="layers.0.gate_up_proj"
    )


def replicated() -> Any:
    return ReplicatedLinear(
        WIDTH, 4, bias=False, params_dtype=torch.float32, prefix="layers.0.gate"
    )


_NONE = [-1] * 4
STRAIGHT: dict[str, tuple[Any, list[str], dict[str, Held]]] = {
    "column": (column, [], {"proj": hold(range(8, 16), 16)}),
    "row": (row, [], {"down": hold(range(4), 4, range(WIDTH, 2 * WIDTH))}),
    "replicated": (replicated, [], {"gate": hold(range(4), 4)}),
    "pair": (
        pair,
        ["gate_proj", "up_proj"],
        {"gate_proj": hold([4, 5, 6, 7, *_NONE], 8), "up_proj": hold([*_NONE, 4, 5, 6, 7], 8)},
    ),
    "qkv": (
        qkv,
        QKV,
        {
            "q_proj": hold([*range(8, 16), *_NONE, *_NONE], 16),
            "k_proj": hold([*_NONE, *_NONE, 4, 5, 6, 7, *_NONE], 8),
            "v_proj": hold([*_NONE, *_NONE, *_NONE, 4, 5, 6, 7], 8),
        },
    ),
}


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["unsharded", "sharded"])
@pytest.mark.parametrize("kind", STRAIGHT)
def test_layer_that_vllm_slices_as_its_model_loads_it_stays_vllms(
    kind: str, fully_sharded: bool
) -> None:
    build, modules, held = STRAIGHT[kind]
    layer = build()
    set_notes(layer, traced=held)
    lora_layer = wrap(layer, modules, fully_sharded)
    gathers = defects.find("gathered-when-whole").affects(vllm.__version__)
    expected = "vllm_nway_lora" if kind == "pair" and gathers else "vllm.lora"
    assert type(lora_layer).__module__.startswith(expected)
    assert get_notes(layer).refusals == {}


@pytest.mark.parametrize("kind", ["column", "pair", "qkv"])
def test_column_parallel_layer_with_other_rows_is_served_by_them(kind: str) -> None:
    build, modules, held = STRAIGHT[kind]
    layer = build()
    first = next(iter(held))
    rows = held[first].rows
    reordered = torch.where(rows >= 0, rows[rows >= 0].min() + rows[rows >= 0].max() - rows, -1)
    set_notes(layer, traced={**held, first: Held(held[first].size, reordered, held[first].columns)})
    lora_layer = wrap(layer, modules)
    assert type(lora_layer) is NWayLinearWithLoRA
    names = modules or ["proj"]
    a = [torch.ones(1, WIDTH) for _ in names]
    b = [torch.arange(float(held[name].size)).unsqueeze(1) for name in names]
    lora_layer.set_lora(0, *((a, b) if modules else (a[0], b[0])))
    found = torch.cat([stacked[0, 0, :, 0] for stacked in lora_layer.lora_b_stacked])
    expected = reordered.clone()
    for part in list(held.values())[1:]:
        expected = torch.where(part.rows >= 0, part.rows, expected)
    assert found.tolist() == expected.tolist()


def test_rows_of_k_are_written_where_its_model_loads_them_for_v() -> None:
    """Gemma 4: ``attention_k_eq_v``."""
    layer = qkv()
    held = dict(STRAIGHT["qkv"][2])
    both = torch.where(held["v_proj"].rows >= 0, held["v_proj"].rows, held["k_proj"].rows)
    set_notes(layer, traced={"q_proj": held["q_proj"], "k_proj": hold(both.tolist(), 8)})
    lora_layer = wrap(layer, QKV)
    a, b = torch.ones(1, WIDTH), torch.arange(8.0).unsqueeze(1)
    lora_layer.set_lora(0, [None, a, None], [None, b, None])
    found = torch.cat([stacked[0, 0, :, 0] for stacked in lora_layer.lora_b_stacked])
    assert found.tolist() == [0.0] * 8 + [4.0, 5.0, 6.0, 7.0] * 2
    assert all(stacked[0, 0, 0].sum() == WIDTH for stacked in lora_layer.lora_a_stacked[1:])
    with pytest.raises(LoRATensorError, match="a checkpoint has no weight of this module here"):
        lora_layer.set_lora(0, [None, None, a], [None, None, b])


@pytest.mark.parametrize(
    ("kind", "held", "words"),
    [
        ("row", hold([3, 2, 1, 0], 4, range(WIDTH, 2 * WIDTH)), "puts the rows of down elsewhere"),
        ("row", hold(range(4), 4, range(WIDTH)), "multiplies other columns of down"),
        ("replicated", hold([1, 0, 2, 3], 4), "puts the rows of gate elsewhere"),
    ],
)
def test_other_layer_with_other_rows_or_columns_is_refused(
    kind: str, held: Held, words: str
) -> None:
    build, modules, straight = STRAIGHT[kind]
    [module] = straight
    layer = build()
    set_notes(layer, traced={module: held})
    assert type(wrap(layer, modules)).__module__.startswith("vllm.lora")
    assert words in get_notes(layer).refusals[module]


def test_layer_whose_trace_no_plan_describes_refuses_every_adapter() -> None:
    layer = column()
    set_notes(layer, traced={"proj": hold([8, -1, 9, 10, 11, 12, 13, 14], 16)})
    lora_layer = wrap(layer, [])
    assert type(lora_layer) is NWayLinearWithLoRA
    with pytest.raises(LoRATensorError, match="its model does not load proj into one run of rows"):
        lora_layer.set_lora(0, torch.ones(1, WIDTH), torch.ones(16, 1))


def test_layer_without_a_trace_stays_vllms() -> None:
    assert type(wrap(column(), [])).__module__.startswith("vllm.lora")


def test_embedding_with_a_trace_stays_vllms() -> None:
    """Until 0.20.2 an embedding does not know its path."""
    layer = VocabParallelEmbedding(64, WIDTH, params_dtype=torch.float32)
    set_notes(layer, traced={"embed_tokens": hold(range(32, 64), 64)})
    assert type(wrap(layer, [])).__module__.startswith("vllm.lora")
