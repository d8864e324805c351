"""A group of patches that its own environment variable turns off."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
import vllm
from support.cpu import disable_pinned_memory
from support.processes import run_python
from vllm import envs, platforms
from vllm.config.lora import LoRAConfig
from vllm.lora import model_manager, worker_manager  # noqa: F401  (its import applies the patches)
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms.cpu import CpuPlatform

import vllm_nway_lora
from vllm_nway_lora import settings
from vllm_nway_lora.compat import groups, registration
from vllm_nway_lora.engine.agreement import _expected_patches

[GROUP] = (group for group in groups.GROUPS if group.switch)

DOCTOR = """
import json
from vllm_nway_lora.diagnosis import doctor
report = doctor.examine()
print(json.dumps([report.warnings, {p.name: [p.state, p.reason] for p in report.patches}]))
"""


@pytest.fixture
def registered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    vllm_nway_lora.unregister()
    monkeypatch.setattr(platforms, "_current_platform", CpuPlatform())
    monkeypatch.setenv(settings.CPU_VARIABLE, request.param)
    vllm_nway_lora.register()
    yield request.param
    vllm_nway_lora.unregister()


@pytest.mark.parametrize("registered", ["", "1", "0"], indirect=True)
def test_wrapper_of_the_manager(registered: str) -> None:
    """The only patch between vLLM's manager and the products of its LoRA layers."""
    assert GROUP.switch == settings.CPU_VARIABLE
    assert groups.is_needed(GROUP, vllm.__version__)
    disable_pinned_memory()
    wrapper = model_manager.get_punica_wrapper(
        8, max_batches=2, device=torch.device("cpu"), lora_config=LoRAConfig()
    )
    assert isinstance(wrapper, PunicaWrapperCPU)
    is_on = registered != "0"
    assert (type(wrapper) is not PunicaWrapperCPU) == is_on
    applied = set(registration.applied())
    assert set(GROUP.patches) <= applied if is_on else not applied & set(GROUP.patches)
    others = [g for g in groups.GROUPS if g.anchor == GROUP.anchor and g is not GROUP]
    assert {patch for group in others for patch in group.patches} <= applied
    # A rank on which it is off computes the same.
    assert not {patch.name for patch in GROUP.patches} & {*_expected_patches()}
    assert envs.environment_variables[settings.CPU_VARIABLE]() == is_on


def test_invalid_value_is_refused_before_any_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_nway_lora.unregister()
    monkeypatch.setenv(settings.CPU_VARIABLE, "off")
    with pytest.raises(ValueError, match=r"VLLM_NWAY_LORA_CPU='off' is not a valid value"):
        vllm_nway_lora.register()
    assert not registration.applied()


@pytest.mark.parametrize("value", ["0", "off"])
def test_doctor_shows_the_switch(value: str) -> None:
    done = run_python(DOCTOR, **{settings.CPU_VARIABLE: value})
    warnings, patches = json.loads(done.stdout.splitlines()[-1])
    if value == "0":
        assert patches["products-on-cpu"] == ["switched off", "VLLM_NWAY_LORA_CPU=0"]
        assert not any("products-on-cpu" in warning for warning in warnings)
    else:
        assert warnings[-1].startswith("VLLM_NWAY_LORA_CPU='off' is not a valid value")
