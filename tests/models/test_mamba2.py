"""Mamba2's mixer: built with a quantised ``in_proj``, and the rows of ``in_proj`` in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.lora import worker_manager  # noqa: F401  (applies the patches)
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import ModelWeightParameter

import vllm_nway_lora
from vllm_nway_lora.diagnosis.offline import Rank, StandInGroup, initialize
from vllm_nway_lora.models import mamba2
from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.notes import LayerNotes, get_notes

HIDDEN, INNER, STATE, HEADS = 16, 32, 8, 4


class PackedMethod(LinearMethodBase):
    """Weights of four bits, packed by eight, as GPTQ's and compressed-tensors': there is no ``weight``."""

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        packed = ModelWeightParameter(
            data=torch.empty(
                sum(output_partition_sizes), input_size_per_partition // 8, dtype=torch.int32
            ),
            input_dim=1,
            output_dim=0,
            weight_loader=attributes["weight_loader"],
        )
        layer.register_parameter("weight_packed", packed)

    def apply(self, *args: Any) -> torch.Tensor:
        raise NotImplementedError


class PackedConfig(QuantizationConfig):
    def get_name(self) -> Any:
        return "packed"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethodBase:
        return PackedMethod()


def configure(lora: bool) -> VllmConfig:
    vllm_config = VllmConfig()
    if lora:  # set afterwards: the configuration would look at the model's
        vllm_config.lora_config = LoRAConfig()
    return vllm_config


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Return a function that builds a mixer on the first of several tensor-parallel ranks."""
    monkeypatch.setenv("VLLM_NWAY_LORA", "1")
    initialize()

    def build(*, groups: int, size: int, packed: bool, lora: bool, plugin: bool = True) -> Any:
        (vllm_nway_lora.register if plugin else vllm_nway_lora.unregister)()
        with Rank(StandInGroup(0, size), configure(lora)).current():
            return MambaMixer2(
                hidden_size=HIDDEN,
                ssm_state_size=STATE,
                conv_kernel_size=4,
                intermediate_size=INNER,
                use_conv_bias=True,
                use_bias=False,
                n_groups=groups,
                num_heads=HEADS,
                head_dim=INNER // HEADS,
                quant_config=PackedConfig() if packed else None,
                prefix="model.layers.0.mamba",
            )

    yield build
    vllm_nway_lora.unregister()


@pytest.mark.parametrize("plugin", [False, True], ids=["stock", "plugin"])
@pytest.mark.parametrize("lora", [False, True], ids=["no LoRA", "LoRA"])
def test_quantised_mixer_is_built(build: Callable[..., Any], lora: bool, plugin: bool) -> None:
    mixer = build(groups=1, size=1, packed=True, lora=lora, plugin=plugin)
    assert [name for name, _ in mixer.in_proj.named_parameters()] == ["weight_packed"]
    assert get_notes(mixer.in_proj) == LayerNotes()


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (1, 2), (2, 2)])
def test_rows_of_a_checkpoint_count_a_group_once(
    build: Callable[..., Any], groups: int, size: int
) -> None:
    """With one group on two ranks each rank holds the group, and the layer counts it twice."""
    layer = build(groups=groups, size=size, packed=False, lora=True).in_proj
    with Rank(StandInGroup(0, size), VllmConfig()).current():
        assert mamba2.checkpoint_rows(layer) == 2 * INNER + 2 * groups * STATE + HEADS
    assert (layer.output_size > 2 * INNER + 2 * groups * STATE + HEADS) == (groups < size)


def test_rows_of_other_layers_are_those_of_the_layer() -> None:
    def load(parameter: Any, weight: torch.Tensor) -> None:
        parameter.data.copy_(weight)

    layer: Any = SimpleNamespace(weight=SimpleNamespace(), output_size=24, prefix="proj")
    assert mamba2.checkpoint_rows(layer) == 24
    layer.weight.weight_loader = load
    assert mamba2.checkpoint_rows(layer) == 24  # a replicated layer has no rank
    layer.tp_rank, layer.tp_size, layer.output_size_per_partition = 0, 2, 12
    assert mamba2.checkpoint_rows(layer) == 24  # the loader cannot be built for rank 1


def make_loader(tp_rank: int, tp_size: int) -> Callable[..., Any]:
    return lambda *args: (tp_rank, tp_size, args)


def make_loader_without_rank(tp_size: int) -> Callable[..., Any]:
    return lambda *args: (tp_size, args)


def make_loader_of_more(tp_rank: int, tp_size: int) -> Callable[..., Any]:
    rows = tp_size
    return lambda *args: (tp_rank, rows, args)


def test_loader_is_built_for_another_rank() -> None:
    layer: Any = SimpleNamespace(tp_rank=0, prefix="model.layers.0.mamba.in_proj")
    loader = mamba2._loader_for_rank(layer, make_loader(0, 2), 1)
    assert loader("weight") == (1, 2, ("weight",))


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (make_loader_without_rank(2), "does not depend on a rank"),
        (make_loader_of_more(0, 2), "cannot be built for other ranks"),
    ],
)
def test_loader_of_another_kind_serves_its_own_rank_only(loader: Any, words: str) -> None:
    layer: Any = SimpleNamespace(tp_rank=0, prefix="model.layers.0.mamba.in_proj")
    assert mamba2._loader_for_rank(layer, loader, 0) is loader
    with pytest.raises(PlanError, match=words):
        mamba2._loader_for_rank(layer, loader, 1)
