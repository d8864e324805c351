"""The variants that are plain LoRA in other words: PEFT's own files against PEFT's own products."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import manager, tiny
from support.examples import ANY_TIME
from support.ranks import Ranks
from torch import nn

from vllm_nway_lora.adapters.config import find_rank_and_scaling, get_kind
from vllm_nway_lora.adapters.forms import PREFIX, read_forms
from vllm_nway_lora.adapters.variants import fold

Tensors = dict[str, torch.Tensor]


class Model(nn.Module):
    """Three projections; a product of two factors has several shapes of Kronecker factors."""

    def __init__(self, columns: int = 12, rows: int = 20) -> None:
        super().__init__()
        self.q_proj = nn.Linear(columns, rows, bias=False)
        self.k_proj = nn.Linear(columns, 8, bias=False)
        self.down_proj = nn.Linear(rows, columns, bias=False)


NAMES = ("q_proj", "k_proj", "down_proj")


def save(model: nn.Module, folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """Save a random adapter with PEFT; return the model that PEFT loads from it."""
    from peft import PeftModel, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), config).to(dtype)
    for name, parameter in adapted.named_parameters():
        if "base_layer" not in name:
            parameter.data = torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    base = copy.deepcopy(model).to(dtype)
    return PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()


def read(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return tensors, json.loads((folder / "adapter_config.json").read_text())


def product_of(folder: Path) -> Callable[[str], torch.Tensor]:
    """Return a function from a module to its product as this package serves it."""
    tensors, config = read(folder)
    forms = read_forms(tensors)
    folded = fold(forms.tensors, config)
    rules = (*forms.rules, *folded.rules)
    assert rules
    assert json.dumps(rules)

    def product(module: str) -> torch.Tensor:
        names = [f"{PREFIX}{module}.lora_{half}.weight" for half in "AB"]
        if names[0] not in folded.tensors:
            return torch.zeros(1, 1)
        a, b = (folded.tensors[name] for name in names)
        scaling = folded.scalings.get(module)
        if scaling is None:
            assert get_kind(config) == "LORA"
            rank, scaling = find_rank_and_scaling(config, module)
            assert len(a) == rank
        return scaling * b @ a

    return product


def assert_equal_products(
    model: nn.Module, folder: Path, config: Any, dtype: torch.dtype = torch.float64
) -> None:
    torch.manual_seed(0)
    loaded = save(model, folder, config, dtype)
    product = product_of(folder)
    for name in NAMES:
        layer = loaded.base_model.model.get_submodule(name)
        variant = getattr(layer, "lora_variant", {}).get("default")
        zero = torch.zeros_like(layer.base_layer.weight)
        expected = (
            layer.get_delta_weight("default")
            if variant is None
            else variant.merge_safe(layer, "default", zero)
        )
        columns = expected.shape[1]  # VeRA's LoRA-A has the columns of the largest module
        found = product(name)[..., :columns].expand(expected.shape)
        assert expected.any() or name == "down_proj"
        # In float32 PEFT multiplies in another order.
        bound = 1e-13 if dtype == torch.float64 else 1e-5
        assert (found - expected).abs().max() <= bound * max(1, expected.abs().max())


@ANY_TIME
@given(rank=st.integers(1, 4), rows=st.integers(2, 24))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["AdaLora", "Vera", "LoHa", "LoKr"])
def test_folded_products_are_pefts(
    tmp_path: Path, kind: str, dtype: torch.dtype, rank: int, rows: int
) -> None:
    import peft

    options: dict[str, Any] = {
        "AdaLora": {"init_r": rank, "target_r": 1, "total_step": 10, "lora_alpha": 5},
        "Vera": {"r": rank},
        "LoHa": {"r": rank, "alpha": 1.5 * rank},  # PEFT rounds this scaling to float32
        "LoKr": {"r": rank, "alpha": 5},
    }[kind]
    config = getattr(peft, f"{kind}Config")(target_modules=list(NAMES), **options)
    assert_equal_products(Model(rows=rows), tmp_path, config, dtype)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_patterns_of_rank_and_alpha(tmp_path: Path, kind: str) -> None:
    import peft

    config = getattr(peft, f"{kind}Config")(
        target_modules=list(NAMES),
        r=2,
        alpha=3,
        rank_pattern={"q_proj": 1, "down_proj": 3},
        alpha_pattern={"k_proj": 7},
    )
    assert_equal_products(Model(), tmp_path, config)


@pytest.mark.parametrize("decompose_both", [False, True])
@pytest.mark.parametrize("decompose_factor", [-1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 12])
def test_every_form_of_lokr(
    tmp_path: Path, decompose_both: bool, decompose_factor: int, rank: int
) -> None:
    from peft import LoKrConfig

    config = LoKrConfig(
        target_modules=list(NAMES),
        r=rank,
        alpha=3,
        decompose_both=decompose_both,
        decompose_factor=decompose_factor,
    )
    assert_equal_products(Model(12, 24), tmp_path, config)


@pytest.mark.parametrize("alpha", [6, 0])
def test_adalora_after_the_allocation_of_ranks(tmp_path: Path, alpha: int) -> None:
    """A module without ranks is left out; the others are still divided by `init_r`."""
    from peft import AdaLoraConfig

    pattern = {
        "q_proj.lora_E": [True, False, True, True],
        "k_proj.lora_E": [True] * 4,
        "down_proj.lora_E": [False] * 4,
    }
    config = AdaLoraConfig(
        target_modules=list(NAMES),
        init_r=4,
        target_r=2,
        total_step=10,
        lora_alpha=alpha,
        rank_pattern={f"{name}.default": ranks for name, ranks in pattern.items()},
    )
    assert_equal_products(Model(), tmp_path, config)
    tensors, written = read(tmp_path)
    assert written["rank_pattern"].keys() == pattern.keys()
    folded = fold(tensors, written)
    assert {name: len(t) for name, t in folded.tensors.items() if "lora_A" in name} == {
        f"{PREFIX}q_proj.lora_A.weight": 3,
        f"{PREFIX}k_proj.lora_A.weight": 4,
    }


@pytest.mark.parametrize(
    ("a", "b"), [(["q_proj"], ["k_proj"]), (["_proj"], None), (None, ["proj"])]
)
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_blocks_are_laid_on_the_diagonal(
    tmp_path: Path, a: list[str] | None, b: list[str] | None, blocks: int
) -> None:
    from peft import LoraConfig
    from peft.tuners.lora.config import BdLoraConfig

    block_config = BdLoraConfig(
        target_modules_bd_a=a, target_modules_bd_b=b, nblocks=blocks, match_strict=False
    )
    config = LoraConfig(
        target_modules=list(NAMES), r=4, lora_alpha=6, use_rslora=True, use_bdlora=block_config
    )
    assert_equal_products(Model(), tmp_path, config)
    tensors, written = read(tmp_path)
    in_memory = {**written, "use_bdlora": block_config}
    for name, tensor in fold(tensors, in_memory).tensors.items():
        assert torch.equal(tensor, fold(tensors, written).tensors[name])


def test_velora_is_plain_in_its_file(tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.tuners.lora.config import VeloraConfig

    config = LoraConfig(
        target_modules=list(NAMES), r=4, velora_config=VeloraConfig(num_groups=4), lora_alpha=6
    )
    torch.manual_seed(0)
    loaded = save(Model(), tmp_path, config, torch.float64)
    assert any("velora" in name for name in read(tmp_path)[0])
    product = product_of(tmp_path)
    for name in NAMES:
        layer = loaded.base_model.model.get_submodule(name)
        inputs = torch.randn(3, layer.base_layer.in_features, dtype=torch.float64)
        found = inputs @ product(name).T
        torch.testing.assert_close(found, layer(inputs) - layer.base_layer(inputs))


@pytest.mark.usefixtures("plugin")
def test_folded_weights_have_their_own_rank(tmp_path: Path) -> None:
    """Through vLLM's loader: rank 1 of the configuration is replaced."""
    from peft import LoHaConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    from vllm_nway_lora.adapters.origin import get_origin

    save(Model(), tmp_path, LoHaConfig(target_modules=list(NAMES), r=3, alpha=6), torch.float32)
    tensors, config = read(tmp_path)
    helper = PEFTHelper.from_dict(config)
    adapter = LoRAModel.from_lora_tensors(1, tensors, helper, device="cpu")
    assert adapter.rank == 9
    for weights in adapter.loras.values():
        assert (weights.rank, weights.scaling, weights.lora_alpha) == (9, 2.0, 18.0)
        assert len(weights.lora_a) == 9
    assert get_origin(adapter).rules == ("LOHA folded into LoRA of rank 9",)
    assert get_origin(adapter).config["peft_type"] == "LOHA"


def test_a_worker_serves_a_variant_up_to_its_rank(ranks: Ranks, tmp_path: Path) -> None:
    """LoHa of r=2 fills slots of rank 4; r=3 needs 9, and the server has 8."""
    columns, rows = tiny.SHAPES["model.layers.0.self_attn.q_proj"]
    ranks.run(manager.start)
    for rank in (2, 3):
        torch.manual_seed(rank)
        parts = {"w1_a": (rows, rank), "w2_a": (rows, rank)}
        parts |= {"w1_b": (rank, columns), "w2_b": (rank, columns)}
        module = f"{PREFIX}model.layers.0.self_attn.q_proj"
        tensors = {
            f"{module}.hada_{name}": torch.randint(-3, 4, shape).float()
            for name, shape in parts.items()
        }
        config = {"peft_type": "LOHA", "r": rank, "alpha": 2 * rank, "target_modules": ["q_proj"]}
        folder = tiny.save(tmp_path / str(rank), tensors, config)
        plain = tiny.save(
            tmp_path / "plain",
            dict(fold(tensors, config).tensors),
            tiny.config(r=rank**2, lora_alpha=2 * rank**2),
        )
        for error in ranks.run(manager.add, "a", rank, folder):
            if rank == 2:
                assert not error
            else:
                assert "q_proj: its rank 9 is above --max-lora-rank 8" in error
        if rank == 2:
            assert all(ranks.run(manager.is_exact, 2, plain))
