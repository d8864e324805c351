"""adapter_config.json: in vLLM's terms where that is exact, else refused with the reason."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

import pytest
import torch

from vllm_nway_lora.adapters.config import (
    find_rank_and_scaling,
    get_config,
    get_kind,
    ignores_patterns,
    validate_config,
)
from vllm_nway_lora.adapters.errors import AdapterError


@dataclasses.dataclass
class OldHelper:
    """The fields of ``PEFTHelper`` until 0.31.0 that matter here; ``passed`` is what vLLM gets."""

    r: int = 8
    use_dora: bool = False
    passed: Any = None


@dataclasses.dataclass
class NewHelper(OldHelper):
    """The fields of 0.32.0."""

    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    init_lora_weights: bool | str = True


class Kind(str, enum.Enum):
    """PEFT's ``PeftType``, as a configuration in memory has it."""

    LORA = "LORA"
    XLORA = "XLORA"
    VERA = "VERA"


def read(helper: type, **config: Any) -> Any:
    return validate_config(lambda passed: helper(passed=passed), helper, (config,), {})


def validate(helper: type, **config: Any) -> Any:
    return read(helper, **config).passed


#: Setting -> a value, and a word of the reason.
REFUSED = {
    "use_dora": (True, "full rank"),
    "lora_bias": (True, "bias"),
    "alora_invocation_tokens": ([1], "only the tokens after"),
    "layer_replication": ([[0, 1]], "repeated"),
    "arrow_config": ({"top_k": 3}, "routes every token"),
    "kasa_config": ({"beta": 1}, "truncates"),
    "monteclora_config": ({"n": 1}, "samples"),
    "use_mora": (True, "square matrix"),
    "trainable_token_indices": ([1, 2], "rows of the embedding"),
    "modules_to_save": (["lm_head"], "saved whole"),
}


@pytest.mark.parametrize("helper", [OldHelper, NewHelper])
@pytest.mark.parametrize("key", REFUSED)
def test_setting_that_no_release_serves_is_refused(helper: type, key: str) -> None:
    value, reason = REFUSED[key]
    with pytest.raises(AdapterError, match=f"adapter_config.json has {key}=.*: .*{reason}.*\\. "):
        validate(helper, **{key: value})


@pytest.mark.parametrize("init", ["pissa", "PiSSA_niter_16", "olora", "corda", "loftq"])
def test_base_weights_that_peft_has_changed_are_refused(init: str) -> None:
    with pytest.raises(
        AdapterError, match=f"init_lora_weights='{init}': PEFT has changed the base"
    ):
        validate(OldHelper, init_lora_weights=init)
    assert validate(NewHelper, init_lora_weights=init)  # vLLM refuses it itself


@pytest.mark.parametrize(
    ("helper", "config"),
    [
        (NewHelper, {"rank_pattern": {"q_proj": 4}}),
        (OldHelper, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 1}}),
        (OldHelper, {"rank_pattern": {}, "alpha_pattern": None, "arrow_config": None}),
        (OldHelper, {"modules_to_save": ["score"]}),  # from 0.31.0 on vLLM serves it
        *((OldHelper, {"init_lora_weights": init}) for init in (True, "gaussian", "eva", None)),
        *((OldHelper, {"peft_type": kind}) for kind in ("LORA", "lora", Kind.LORA, None)),
        (OldHelper, {"bias": "none"}),
        (OldHelper, {"velora_config": {"scale": 1.0}}),
    ],
)
def test_other_settings_pass_unchanged(helper: type, config: dict[str, Any]) -> None:
    assert validate(helper, **config) == config


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("XLORA", "weighs several adapters"),
        (Kind.XLORA, "weighs several adapters"),
        ("IA3", "multiplies activations"),
        ("OFT", "a rotation"),
        ("BOFT", "a rotation"),
        ("HRA", "reflections"),
        ("TRAINABLE_TOKENS", "rows of the embedding"),
        ("MISS", "vLLM would read the adapter as plain LoRA"),
    ],
)
def test_other_kinds_of_adapter_are_refused(kind: str, reason: str) -> None:
    with pytest.raises(AdapterError, match=f"adapter_config.json has peft_type=.*: .*{reason}"):
        validate(NewHelper, peft_type=kind)


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "LOKR", "VERA", Kind.VERA])
def test_folded_kinds_are_plain_lora_for_vllm(kind: str) -> None:
    """Their ranks are those of the folded tensors, which admission compares with the limit."""
    config = {"peft_type": kind, "init_r": 12, "r": 9, "alpha": 4, "use_rslora": True}
    config |= {"rank_pattern": {"q_proj.lora_E": [True]}, "target_modules": None}
    helper = read(NewHelper, **config)
    passed = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "use_rslora": False}
    passed |= {"rank_pattern": {}, "alpha_pattern": {}, "target_modules": []}
    assert helper.passed == config | passed
    assert get_config(helper) == config


def test_blocks_and_groups_are_plain_lora_for_vllm() -> None:
    passed = validate(NewHelper, use_bdlora={"nblocks": 2}, r=4)
    assert passed == {"use_bdlora": None, "r": 4}
    assert validate(NewHelper, use_qalora=True) == {"use_qalora": None}
    with pytest.raises(
        AdapterError, match="use_bdlora and use_qalora: PEFT has no layer with both"
    ):
        validate(NewHelper, use_bdlora={"nblocks": 2}, use_qalora=True)


def test_projections_that_are_not_saved_are_refused() -> None:
    with pytest.raises(AdapterError, match="save_projection=False: .*vera_A and vera_B are not in"):
        validate(NewHelper, peft_type="VERA", save_projection=False)


@pytest.mark.parametrize("bias", ["all", "lora_only", "vera_only"])
def test_bias_is_judged_by_the_tensors(bias: str) -> None:
    config = {"bias": bias, "r": 8}
    assert validate(OldHelper, **config) == {"bias": "none", "r": 8}
    assert config["bias"] == bias


def test_unknown_bias_is_left_to_vllm() -> None:
    assert validate(OldHelper, bias="x") == {"bias": "x"}


def test_the_configuration_stays_as_it_was_read() -> None:
    config = {"r": 8, "peft_version": "0.21.2", "target_parameters": ["gate_up_proj"]}
    helper = read(OldHelper, **config, vllm_max_position_embeddings=64, vllm_nway_lora={"a": 1})
    assert helper.passed["vllm_max_position_embeddings"] == 64
    assert get_config(helper) == {**config, "vllm_nway_lora": {"a": 1}}
    assert get_config(OldHelper()) == {}


MLX_CONFIG = {"fine_tune_type": "lora", "num_layers": 16, "model": "m", "seed": 0}


def mlx(**parameters: Any) -> dict[str, Any]:
    return {**MLX_CONFIG, "lora_parameters": parameters}


def test_mlx_lm_is_read_in_pefts_terms() -> None:
    """``scale`` is the factor itself."""
    config = mlx(rank=8, scale=20.0, dropout=0.0, keys=["self_attn.q_proj"])
    helper = read(OldHelper, **config, vllm_max_position_embeddings=64)
    assert helper.passed == {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 160.0,
        "target_modules": ["self_attn.q_proj"],
        "vllm_max_position_embeddings": 64,
    }
    assert get_config(helper) == config
    assert get_kind(config) == "MLX"
    assert validate(OldHelper, **mlx(rank=8, scale=2))["target_modules"] == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**MLX_CONFIG, "fine_tune_type": "dora"}, "fine_tune_type='dora', and only 'lora'"),
        ({**MLX_CONFIG, "fine_tune_type": "full"}, "fine_tune_type='full', and only 'lora'"),
        ({**mlx(rank=8, scale=2), "use_dora": True}, "fine_tune_type='dora', and only 'lora'"),
        (mlx(rank=8, scale=10.0, alpha=16.0), "lora_parameters.alpha: old versions multiply scale"),
        (mlx(rank=8), "lacks lora_parameters.scale"),
        (mlx(scale=8), "lacks lora_parameters.rank"),
        (MLX_CONFIG, "lacks lora_parameters.rank"),
    ],
)
def test_other_files_of_mlx_lm_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=f"adapter_config.json of MLX-LM .*{words}"):
        validate(NewHelper, **config)


@pytest.mark.parametrize(
    ("module", "rank", "alpha"),
    [
        ("model.layers.0.self_attn.q_proj", 4, 16),
        ("model.layers.0.self_attn.new_q_proj", 8, 16),  # keys begin at a dot
        ("model.layers.1.self_attn.k_proj", 2, 3),  # the first key that matches
        ("model.layers.0.mlp.experts.base_layer", 16, 16),
        ("model.layers.0.mlp.experts", 8, 5),
        ("model.layers.0.mlp.up_proj", 8, 16),
    ],
)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_are_pefts(module: str, rank: int, alpha: int, use_rslora: bool) -> None:
    config = {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": use_rslora,
        "rank_pattern": {
            "q_proj": 4,
            "layers.1.*k_proj": 2,
            "k_proj": 1,
            ".*\\.gate_up_proj": 16,
        },
        "alpha_pattern": {"^model.layers.1.self_attn.k_proj": 3, "down_proj": 5},
    }
    scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
    assert find_rank_and_scaling(config, module) == (rank, scaling)


def test_patterns_are_ignored_by_releases_without_the_field() -> None:
    patterns = {"rank_pattern": {"q_proj": 4}}
    assert ignores_patterns(read(OldHelper, **patterns))
    assert not ignores_patterns(read(NewHelper, **patterns))
    assert not ignores_patterns(read(OldHelper, rank_pattern={}, alpha_pattern=None))


def test_rank_and_scaling_are_those_of_vllm() -> None:
    """From 0.32.0 on ``PEFTHelper`` has the rule itself."""
    from vllm.lora.peft_helper import PEFTHelper

    if not hasattr(PEFTHelper, "get_rank_and_scaling"):
        pytest.skip("this release has no such method")
    config = {"r": 8, "lora_alpha": 12, "target_modules": [], "use_rslora": True}
    config |= {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {".*gate_up_proj": 7}}
    helper = PEFTHelper.from_dict(config)
    for module in ("a.q_proj", "a.k_proj", "a.experts", "a.experts.base_layer"):
        assert find_rank_and_scaling(config, module) == helper.get_rank_and_scaling(module)


@pytest.mark.usefixtures("plugin")
def test_patterns_reach_the_weights_on_every_release() -> None:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    module = "base_model.model.model.layers.0."
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    config |= {"rank_pattern": {".*\\.gate_up_proj": 16}, "alpha_pattern": {"q_proj": 4}}
    tensors = {
        f"{module}self_attn.{name}.lora_{half}.weight": torch.ones(8, 8)
        for name in ("q_proj", "k_proj")
        for half in "AB"
    }
    tensors[f"{module}mlp.experts.base_layer.lora_A.weight"] = torch.ones(64, 8)
    adapter = LoRAModel.from_lora_tensors(1, tensors, PEFTHelper.from_dict(config), device="cpu")
    found = {name.rpartition("0.")[2]: (w.rank, w.scaling) for name, w in adapter.loras.items()}
    assert found == {
        "self_attn.q_proj": (8, 0.5),
        "self_attn.k_proj": (8, 2.0),
        "mlp.experts.base_layer": (16, 1.0),
    }
