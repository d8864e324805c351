"""adapter_config.json and tensors' names: what vLLM would ignore or misread is refused."""

from __future__ import annotations

import dataclasses
import enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_nway_lora.adapters.config import validate_config
from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.tensors import validate_tensors


@dataclasses.dataclass
class OldHelper:
    """The fields of ``PEFTHelper`` until 0.31.0 that matter here."""

    r: int = 8
    use_dora: bool = False


@dataclasses.dataclass
class NewHelper(OldHelper):
    """The fields of 0.32.0."""

    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    init_lora_weights: bool | str = True


class Kind(str, enum.Enum):
    """PEFT's ``PeftType``, as a configuration in memory has it."""

    LORA = "LORA"
    XLORA = "XLORA"


def validate(helper: type, **config: Any) -> Any:
    return validate_config(lambda passed: passed, helper, (config,), {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("lora_bias", True),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 1]]),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 3}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "PiSSA_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_setting_that_the_release_ignores_is_refused(key: str, value: object) -> None:
    with pytest.raises(AdapterError, match=f"adapter_config.json has {key}="):
        validate(OldHelper, **{key: value})


@pytest.mark.parametrize(
    ("helper", "config"),
    [
        (NewHelper, {"rank_pattern": {"q_proj": 4}, "init_lora_weights": "pissa"}),
        (OldHelper, {"use_dora": True}),  # vLLM refuses it itself
        (OldHelper, {"rank_pattern": {}, "alpha_pattern": None, "arrow_config": None}),
        *((OldHelper, {"init_lora_weights": init}) for init in (True, "gaussian", "eva", None)),
        *((OldHelper, {"peft_type": kind}) for kind in ("LORA", "lora", Kind.LORA, None)),
        (OldHelper, {"bias": "none"}),
    ],
)
def test_other_settings_pass_unchanged(helper: type, config: dict[str, Any]) -> None:
    assert validate(helper, **config) == config


@pytest.mark.parametrize("kind", ["XLORA", "IA3", Kind.XLORA])
def test_other_kinds_of_adapter_are_refused(kind: str) -> None:
    with pytest.raises(AdapterError, match="adapter_config.json has peft_type=.*plain LoRA"):
        validate(NewHelper, peft_type=kind)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_bias_is_judged_by_the_tensors(bias: str) -> None:
    config = {"bias": bias, "r": 8}
    passed = validate_config(lambda config: config, OldHelper, (config,), {})
    assert passed == {"bias": "none", "r": 8}
    assert config["bias"] == bias


def test_unknown_bias_is_left_to_vllm() -> None:
    assert validate(OldHelper, bias="x") == {"bias": "x"}


MODULE = "base_model.model.model.layers.0.q_proj"


def load(tensors: dict[str, torch.Tensor], **helper: Any) -> str:
    """Return what `validate_tensors` returns for a release that accepts every name."""
    arguments = {"tensors": tensors, "peft_helper": SimpleNamespace(**helper)}
    return str(validate_tensors(lambda **_: "loaded", None, (), arguments))


@pytest.mark.parametrize("half", ["A", "B"])
def test_lora_bias_is_refused_by_name(half: str) -> None:
    name = f"{MODULE}.lora_{half}.bias"
    with pytest.raises(AdapterError, match=f"tensor {name} is a LoRA bias"):
        load({name: torch.ones(8)})


def test_modules_saved_whole_have_two_tensors() -> None:
    """A classifier's weight and bias, which vLLM parses as one place (from 0.31.0 on)."""
    saved = {f"base_model.model.score.{name}": torch.ones(2) for name in ("weight", "bias")}
    assert load(saved, modules_to_save=["score"]) == "loaded"


def test_two_tensors_of_one_place_are_refused() -> None:
    twice = {
        name: torch.ones(2)
        for name in (f"{MODULE}.lora_A.weight", "model.layers.0.q_proj.lora_A.weight")
    }
    with pytest.raises(AdapterError, match="are both LoRA-A of module model.layers.0.q_proj"):
        load(twice)
