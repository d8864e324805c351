"""Which layers this package serves: of vLLM's classes, of platforms' and of models' own classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from vllm import platforms
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.lora import model_manager, utils, worker_manager  # noqa: F401  (applies the patches)
from vllm.lora.layers import ColumnParallelLinearWithLoRA, MergedColumnParallelLinearWithLoRA
from vllm.model_executor import custom_op
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

import vllm_nway_lora
from vllm_nway_lora.diagnosis.offline import Rank, initialize
from vllm_nway_lora.diagnosis.stand_ins import StandInGroup
from vllm_nway_lora.layers import claims
from vllm_nway_lora.layers.claims import plan_for
from vllm_nway_lora.layers.nway import NWayLinearWithLoRA
from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.notes import set_notes
from vllm_nway_lora.rows.plan import FusionPlan

QKVZ = (8, 8, 16, 16)
MODULES = ["in_proj_qkv", "in_proj_z"]
PAIR = ["gate_proj", "up_proj"]


@pytest.fixture(autouse=True)
def _rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this process the first of two tensor-parallel ranks, with the plugin on."""
    monkeypatch.setenv("VLLM_NWAY_LORA", "1")
    initialize()
    vllm_nway_lora.register()
    with Rank(StandInGroup(0, 2), VllmConfig()).current():
        yield


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(claims, "_left_to_vllm", set())
    monkeypatch.setattr(claims.logger, "warning", lambda text, *args: lines.append(text % args))
    return lines


def build(
    layer_class: Any, sizes: Sequence[int], name: str = "in_proj_qkvz", **options: Any
) -> Any:
    prefix = f"model.layers.0.{name}"
    return layer_class(
        16, list(sizes), bias=False, params_dtype=torch.float32, prefix=prefix, **options
    )


def wrap(layer: Any, modules: list[str], function: Any = None) -> Any:
    """Return what vLLM's ``from_layer`` makes of a layer."""
    config = LoRAConfig(max_lora_rank=8, max_loras=1, lora_dtype=torch.float32)
    return (function or utils.from_layer)(layer, 1, config, modules, None)


class PlatformLinear(MergedColumnParallelLinear):
    """As vLLM-Ascend's: registered in place of vLLM's class."""

    def forward(self, input_: torch.Tensor) -> Any:
        return super().forward(input_)


class OtherProduct(MergedColumnParallelLinear):
    def forward(self, input_: torch.Tensor) -> Any:
        return super().forward(input_ * 2)


class Replicated(MergedColumnParallelLinear):
    """Each rank holds the second output whole, so ``output_sizes`` counts it once per rank."""

    def weight_loader(self, param: Any, loaded_weight: torch.Tensor, shard_id: int) -> None:
        own = self.output_sizes[0] // self.tp_size
        if shard_id == 0:
            param.data[:own] = loaded_weight[self.tp_rank * own : (self.tp_rank + 1) * own]
        else:
            param.data[own:] = loaded_weight[: len(param.data) - own]


class Inherited(MergedColumnParallelLinear):
    """A loader of its own that places rows as vLLM's."""

    def weight_loader(self, param: Any, loaded_weight: torch.Tensor, shard_id: int) -> None:
        super().weight_loader(param, loaded_weight, shard_id)


class Failing(MergedColumnParallelLinear):
    """A loader that takes only the weights themselves."""

    def weight_loader(self, param: Any, loaded_weight: torch.Tensor, shard_id: int) -> None:
        if not loaded_weight.is_floating_point():
            raise TypeError("not a weight")
        super().weight_loader(param, loaded_weight, shard_id)


class Greedy(ColumnParallelLinearWithLoRA):
    """As a class of vLLM-Ascend 0.26: claims every layer."""

    @classmethod
    def can_replace_layer(cls, *args: Any, **kwargs: Any) -> bool:
        return True


@pytest.mark.parametrize("module", [utils, model_manager], ids=lambda module: module.__name__)
@pytest.mark.parametrize("is_replaced", [True, False], ids=["replaced", "in front"])
def test_table_of_another_package_does_not_come_first(
    monkeypatch: pytest.MonkeyPatch, is_replaced: bool, module: Any
) -> None:
    table = utils._all_lora_classes
    container = type(table)
    monkeypatch.setattr(
        utils, "_all_lora_classes", container((Greedy, *(() if is_replaced else table)))
    )
    layer = build(MergedColumnParallelLinear, QKVZ)
    assert type(wrap(layer, MODULES, module.from_layer)) is NWayLinearWithLoRA
    pair = build(MergedColumnParallelLinear, (16, 16), "gate_up_proj")
    lora_layer = wrap(pair, ["gate_up_proj"], module.from_layer)
    assert isinstance(lora_layer, ColumnParallelLinearWithLoRA)
    assert type(lora_layer) is not NWayLinearWithLoRA


def test_layer_is_built_from_keyword_arguments() -> None:
    config = LoRAConfig(max_lora_rank=8, max_loras=3, lora_dtype=torch.float32)
    lora_layer = utils.from_layer(
        layer=build(MergedColumnParallelLinear, QKVZ),
        max_loras=3,
        lora_config=config,
        packed_modules_list=MODULES,
    )
    assert type(lora_layer) is NWayLinearWithLoRA
    assert [tuple(a.shape) for a in lora_layer.lora_a_stacked] == [(3, 1, 8, 16)] * 2


def test_layers_on_tpu_stay_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = type(platforms.current_platform)
    monkeypatch.setattr(platform, "is_tpu", lambda self: True)
    layer = build(MergedColumnParallelLinear, (8, 8, 8))
    assert isinstance(wrap(layer, ["q", "k", "v"]), MergedColumnParallelLinearWithLoRA)


def test_layer_of_a_platform_is_served(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setitem(custom_op.op_registry_oot, "MergedColumnParallelLinear", PlatformLinear)
    layer = build(MergedColumnParallelLinear, QKVZ)
    assert type(layer) is PlatformLinear
    assert type(wrap(layer, MODULES)) is NWayLinearWithLoRA
    assert not warnings


@pytest.mark.parametrize(
    ("sizes", "modules"),
    [(QKVZ, MODULES), ((8, 8, 8), ["q", "k", "v"]), ((16, 16), ["gate_up_proj"]), (QKVZ, [])],
    ids=str,
)
def test_layer_with_another_product_is_left_to_vllm_and_named_once(
    warnings: list[str], sizes: tuple[int, ...], modules: list[str]
) -> None:
    for _ in range(2):
        assert plan_for(build(OtherProduct, sizes), modules) is None
    [warning] = warnings
    assert "leaves LoRA on model.layers.0.in_proj_qkvz to vLLM" in warning
    assert f"{OtherProduct.__module__}.OtherProduct" in warning


@pytest.mark.parametrize("modules", [PAIR, []], ids=str)
def test_pair_with_another_product_is_not_named(warnings: list[str], modules: list[str]) -> None:
    assert plan_for(build(OtherProduct, (16, 16)), modules) is None
    assert not warnings


def test_same_product_by_another_kernel_is_served() -> None:
    same = type("DeepSeekV2FusedQkvAProj", (OtherProduct,), {})
    assert plan_for(build(same, QKVZ), MODULES) is not None


@pytest.mark.parametrize(
    ("sizes", "modules", "served"),
    [
        ((16, 16), ["gate_up_proj"], False),
        ((16, 8), ["gate_up_proj"], True),
        ((16, 16), [], False),  # vLLM has no class for it, as it has none for any name of it
        ((16, 8), [], False),
        ((16, 16, 8), [], True),
        ((16,), [], False),
        ((16,), ["in_proj"], True),
    ],
    ids=str,
)
def test_merged_layers_that_vllm_serves_stay_vllms(
    sizes: tuple[int, ...], modules: list[str], served: bool
) -> None:
    assert (plan_for(build(MergedColumnParallelLinear, sizes), modules) is not None) == served


def test_pair_with_a_replicated_output_is_served_by_the_rows_of_a_checkpoint() -> None:
    plan = plan_for(build(Replicated, (16, 16)), ["gate_up_proj"])
    assert plan is not None
    [part] = plan.slices
    assert part.rows == 16 + 8
    assert part.local.tolist() == [*range(8), *range(16, 24)]
    assert plan_for(build(Inherited, (16, 16)), ["gate_up_proj"]) is None


def test_loader_that_fails_on_row_numbers(warnings: list[str]) -> None:
    """A pair that vLLM serves stays vLLM's. Of other layers it is unknown where the rows are."""
    assert plan_for(build(Failing, (16, 16)), ["gate_up_proj"]) is None
    assert not warnings
    plan = plan_for(build(Failing, QKVZ), MODULES)
    assert plan is not None
    assert list(plan.refusals) == MODULES
    [warning] = warnings
    assert "its weight loader fails on row numbers (TypeError: not a weight)" in warning


def test_vllms_class_for_qkv_stays() -> None:
    layer = QKVParallelLinear(
        16, 4, 4, 2, bias=False, params_dtype=torch.float32, prefix="model.layers.0.qkv_proj"
    )
    assert plan_for(layer, ["qkv_proj"]) is None
    assert plan_for(layer, ["q_proj", "k_proj", "v_proj"]) is None


@pytest.mark.parametrize(
    ("version", "own", "whole"),
    [("0.19.1", False, True), ("0.24.0", True, True), ("0.25.0", False, False)],
)
def test_pairs_are_served_where_vllm_gathers_too_much(
    monkeypatch: pytest.MonkeyPatch, version: str, own: bool, whole: bool
) -> None:
    """Two defects: of layers that are sharded over all ranks, and of layers that each rank holds whole."""
    monkeypatch.setattr("vllm.__version__", version)
    for disable_tp, served in ((False, own), (True, whole)):
        layer = build(MergedColumnParallelLinear, (16, 16), disable_tp=disable_tp)
        assert (plan_for(layer, PAIR) is not None) == served


def refused_modules(plan: FusionPlan | None) -> dict[str, str]:
    assert plan is not None
    return dict(plan.refusals)


def test_layer_with_one_refused_module_serves_the_other() -> None:
    layer = build(MergedColumnParallelLinear, QKVZ)
    set_notes(layer, refusals={"in_proj_z": "because"})
    plan = plan_for(layer, MODULES)
    assert refused_modules(plan) == {"in_proj_z": "because"}
    assert plan is not None
    assert [(part.rows, part.width) for part in plan.slices] == [(32, 16), (16, 8)]


def test_pair_with_a_refused_module_is_served() -> None:
    layer = build(MergedColumnParallelLinear, (16, 16), disable_tp=True)
    set_notes(layer, refusals={"gate_proj": "because"})
    plan = plan_for(layer, PAIR)
    assert refused_modules(plan) == {"gate_proj": "because"}
    assert plan is not None
    assert [part.local.tolist() for part in plan.slices] == [list(range(16))] * 2


def test_layer_with_every_module_refused_gives_the_reasons() -> None:
    """Also if which outputs each module covers is not known."""
    layer = build(MergedColumnParallelLinear, QKVZ, "unknown")
    refusals = {"x": "first", "y": "second", "z": "third"}
    set_notes(layer, refusals=refusals)
    assert refused_modules(plan_for(layer, ["x", "y", "z"])) == refusals


def test_layer_without_a_plan_refuses_every_adapter_or_ends_a_strict_start(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    layer = build(MergedColumnParallelLinear, QKVZ, "unknown")
    refusals = refused_modules(plan_for(layer, ["x", "y", "z"]))
    assert list(refusals) == ["x", "y", "z"]
    assert [f"{refusals['x']}. Adapters on it will be refused."] == warnings
    monkeypatch.setenv("VLLM_NWAY_LORA", "strict")
    with pytest.raises(PlanError, match="which outputs each module covers is not known"):
        plan_for(layer, ["x", "y", "z"])
