"""The tensors of other trainers are read under PEFT's names, in PEFT's orientation."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.forms import PREFIX, is_plain, read_forms, split
from vllm_nway_lora.adapters.origin import get_origin
from vllm_nway_lora.adapters.target import LayoutError
from vllm_nway_lora.adapters.tensors import validate_tensors

Tensors = dict[str, torch.Tensor]

Q, K = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
EMBED = "model.embed_tokens"

#: Form -> the names of the halves of module ``M``.
FORMS = {
    "PEFT": ("base_model.model.M.lora_A.weight", "base_model.model.M.lora_B.weight"),
    "state dict": (
        "base_model.model.M.lora_A.default.weight",
        "base_model.model.M.lora_B.default.weight",
    ),
    "other adapter's name": ("M.lora_A.my_adapter.weight", "M.lora_B.my_adapter.weight"),
    "kohya": ("M.lora_down.weight", "M.lora_up.weight"),
    "diffusers": ("M.lora.down.weight", "M.lora.up.weight"),
    "MLX-LM": ("M.lora_a", "M.lora_b"),
    "torch.compile": (
        "_orig_mod.base_model.model.M.lora_A.weight",
        "base_model.model._orig_mod.M.lora_B.weight",
    ),
    "DDP": ("module.base_model.model.M.lora_A.weight", "base_model.model.module.M.lora_B.weight"),
    "FSDP": (
        "_fsdp_wrapped_module.base_model.model.M.lora_A.default.weight",
        "module._orig_mod.base_model.model.module.M._checkpoint_wrapped_module.lora_B.default.weight",
    ),
}


def write(form: str, module: str, a: torch.Tensor, b: torch.Tensor) -> Tensors:
    """Return a pair in a form; ``a`` is ``(r, columns)``, ``b`` ``(rows, r)``."""
    if form == "MLX-LM":
        a, b = a.t().contiguous(), b.t().contiguous()
    return {name.replace("M", module): half for name, half in zip(FORMS[form], (a, b), strict=True)}


@given(
    form=st.sampled_from(list(FORMS)),
    rank=st.integers(1, 5),
    columns=st.integers(1, 5),
    rows=st.integers(1, 5),
)
def test_every_form_is_pefts_bit_for_bit(form: str, rank: int, columns: int, rows: int) -> None:
    a, b = torch.randn(rank, columns), torch.randn(rows, rank)
    read = read_forms(write(form, Q, a, b))
    named = {split(name): tensor for name, tensor in read.tensors.items()}
    assert named.keys() == {(Q, "lora_A.weight"), (Q, "lora_B.weight")}
    assert torch.equal(named[Q, "lora_A.weight"], a)
    assert torch.equal(named[Q, "lora_B.weight"], b)
    assert all(tensor.is_contiguous() for tensor in named.values())
    assert bool(read.rules) == (form != "PEFT")
    assert not read.scalings


def test_plain_tensors_are_not_copied() -> None:
    plain = write("PEFT", Q, torch.ones(2, 3), torch.ones(4, 2))
    plain |= {f"{PREFIX}{EMBED}.lora_embedding_{half}": torch.ones(2, 2) for half in "AB"}
    plain |= {f"{PREFIX}lm_head.base_layer.weight": torch.ones(2), "score.weight": torch.ones(2)}
    plain |= {f"{PREFIX}mlp.experts.base_layer.lora_A.weight": torch.ones(2, 3)}
    assert all(map(is_plain, plain))
    assert read_forms(plain).tensors is plain


def test_wrappers_are_whole_components_and_the_module_in_the_file_is_kept() -> None:
    read = read_forms(write("DDP", Q, torch.ones(2, 3), torch.ones(4, 2)))
    assert read.modules == {Q: f"module.{Q}"}
    assert read.rules == ("module left out of names",)
    for name in ("model.module.q_proj", "my_orig_mod.q_proj", "modules.q_proj"):
        assert is_plain(f"{PREFIX}{name}.lora_A.weight")


def test_embeddings_of_a_state_dict_are_read() -> None:
    tensors = {f"{PREFIX}{EMBED}.lora_embedding_{half}.default": torch.ones(2, 2) for half in "AB"}
    read = read_forms(tensors)
    assert list(read.tensors) == [f"{PREFIX}{EMBED}.lora_embedding_{half}" for half in "AB"]
    assert read.rules == ("adapter's name 'default' left out of names",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("form", ["kohya", "diffusers", "PEFT"])
def test_alpha_gives_the_scaling_of_its_module(form: str, dtype: torch.dtype) -> None:
    tensors = write(form, Q, torch.ones(4, 3), torch.ones(5, 4))
    [first, _] = tensors
    alpha = f"{split(first)[0]}.alpha"
    tensors[PREFIX + alpha if first.startswith(PREFIX) else alpha] = torch.tensor(6, dtype=dtype)
    tensors |= write(form, K, torch.ones(2, 3), torch.ones(5, 2))
    read = read_forms(tensors)
    assert read.scalings == {Q: 1.5}
    assert len(read.tensors) == 4


def test_kohyas_underscored_names_stay_the_modules() -> None:
    """Which dots they had is known only with the model."""
    module = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    read = read_forms(write("kohya", module, torch.ones(4, 3), torch.ones(5, 4)))
    assert {split(name)[0] for name in read.tensors} == {module}


@pytest.mark.parametrize("is_old", [False, True])
def test_experts_of_mlx_lm_are_not_turned(is_old: bool) -> None:
    """``LoRASwitchLinear``: A is ``(experts, r, columns)``, in old versions flat; B ``(experts, rows, r)``."""
    module = "model.layers.0.mlp.switch_mlp.gate_proj"
    a, b = torch.randn(4, 2, 6), torch.randn(4, 5, 2)
    tensors = {f"{module}.lora_a": a.flatten(0, 1) if is_old else a, f"{module}.lora_b": b}
    read = read_forms(tensors)
    assert list(read.tensors) == [f"{module}.lora_A.weight", f"{module}.lora_B.weight"]
    for found, expected in zip(read.tensors.values(), (a, b), strict=True):
        assert torch.equal(found, expected)


def test_training_buffers_are_left_out() -> None:
    tensors = write("PEFT", Q, torch.ones(2, 3), torch.ones(4, 2))
    read = read_forms(tensors | {f"{PREFIX}{Q}.lora_velora_embed": torch.ones(1)})
    assert read.tensors == tensors
    assert read.rules == ("VeLoRA's training buffers left out",)


#: Tensors -> the words of their refusal.
REFUSED: dict[str, tuple[Tensors, str]] = {
    "DoRA": ({f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(4)}, r"q_proj.lora_magnitude_vector \(4,\) is DoRA's magnitude"),
    "DoRA of a state dict": ({f"{PREFIX}{Q}.lora_magnitude_vector.default.weight": torch.ones(4)}, "is DoRA's magnitude"),
    "DoRA of kohya": ({f"{Q}.dora_scale": torch.ones(4)}, "is DoRA's magnitude"),
    "KaSA": ({f"{PREFIX}{Q}.lora_diag": torch.ones(4)}, "is of KaSA"),
    "IA3": ({f"{PREFIX}{Q}.ia3_l": torch.ones(4)}, "is of IA3"),
    "trainable tokens": ({f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(4, 2)}, "replaces rows of the embedding"),
    "MonteCLoRA": ({f"{PREFIX}{Q}.lora_monteclora_sampler.mean": torch.ones(4)}, "is of MonteCLoRA's sampler"),
    "LoCon": ({f"{Q}.lora_mid.weight": torch.ones(4, 2)}, "is of a convolution"),
    "LoHa's convolution": ({f"{PREFIX}{Q}.hada_t1": torch.ones(4, 2)}, "is of a convolution"),
    "LoKr's convolution": ({f"{PREFIX}{Q}.lokr_t2": torch.ones(4, 2)}, "is of a convolution"),
    "two adapters": ({f"{PREFIX}{Q}.lora_A.first.weight": torch.ones(4, 2), f"{PREFIX}{K}.lora_A.second.weight": torch.ones(4, 2)}, rf"two adapters, 'first' \(tensor {PREFIX}{Q}.lora_A.first.weight\) and 'second' \(tensor"),
    "one name twice": ({f"{PREFIX}{Q}.lora_A.default.weight": torch.ones(4, 2), f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 2)}, f"tensors {PREFIX}{Q}.lora_A.default.weight and {PREFIX}{Q}.lora_A.weight are both"),
    "embedding of MLX-LM": ({f"{EMBED}.lora_a": torch.ones(4, 2)}, f"module {EMBED}: MLX-LM adds the LoRA of an embedding to the output too"),
    "alpha alone": ({f"{Q}.alpha": torch.ones(())}, f"tensor {Q}.alpha is the alpha of module {Q}, which has no LoRA-A"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_the_tensor_and_the_reason(case: str) -> None:
    tensors, words = REFUSED[case]
    with pytest.raises(LayoutError, match=words):
        read_forms(tensors)


def load(tensors: Tensors, mapper: Any = None, **helper: Any) -> Any:
    """Return the result of `validate_tensors` for a release that accepts every name."""

    def loaded(tensors: Tensors, peft_helper: Any, weights_mapper: Any = None) -> Any:
        return SimpleNamespace(loras={}, tensors=tensors)

    arguments = {"tensors": tensors, "peft_helper": SimpleNamespace(**helper)}
    return validate_tensors(loaded, None, (), {**arguments, "weights_mapper": mapper})


@pytest.mark.parametrize("half", ["A", "B"])
def test_lora_bias_is_refused_by_name(half: str) -> None:
    name = f"{PREFIX}{Q}.lora_{half}.bias"
    with pytest.raises(AdapterError, match=f"tensor {name} is a LoRA bias"):
        load({name: torch.ones(8)})
    with pytest.raises(AdapterError, match=f"tensor {name} is a LoRA bias"):
        load({name.replace(".bias", ".default.bias"): torch.ones(8)})


def test_modules_saved_whole_have_two_tensors() -> None:
    """A classifier's weight and bias, which vLLM parses as one place (from 0.31.0 on)."""
    saved = {f"base_model.model.score.{name}": torch.ones(2) for name in ("weight", "bias")}
    assert load(saved, modules_to_save=["score"]).tensors == saved


def test_two_tensors_of_one_place_are_refused() -> None:
    twice = {name: torch.ones(2) for name in (f"{PREFIX}{Q}.lora_A.weight", f"{Q}.lora_A.weight")}
    with pytest.raises(AdapterError, match=f"are both LoRA-A of module {Q}"):
        load(twice)


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
MLX_CONFIG = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 1.5}}


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_loaded_from_memory(form: str) -> None:
    """vLLM's own loader gets PEFT's names, and its weights the scaling of their file."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    a, b = torch.randn(4, 3), torch.randn(5, 4)
    config = MLX_CONFIG if form == "MLX-LM" else CONFIG
    tensors = write(form, Q, a, b)
    if form == "kohya":
        config = {**CONFIG, "r": 8}  # its alpha decides
        tensors[f"{Q}.alpha"] = torch.tensor(6)
    adapter = LoRAModel.from_lora_tensors(1, tensors, PEFTHelper.from_dict(config), device="cpu")
    [(module, weights)] = adapter.loras.items()
    assert module == Q
    assert torch.equal(weights.lora_a, a)
    assert torch.equal(weights.lora_b, b)
    assert (weights.rank, weights.scaling) == (4, 1.5)
    origin = get_origin(adapter)
    assert origin.config == config
    assert origin.names.keys() == {Q}
    assert bool(origin.rules) == (form != "PEFT")
    assert json.dumps(origin.rules)


@pytest.mark.usefixtures("plugin")
def test_names_are_those_of_the_file_and_paths_those_of_the_model() -> None:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.models.utils import WeightsMapper

    tensors = write("torch.compile", Q, torch.ones(4, 3), torch.ones(5, 4))
    adapter = LoRAModel.from_lora_tensors(
        lora_model_id=1,
        tensors=tensors,
        peft_helper=PEFTHelper.from_dict(CONFIG),
        device="cpu",
        weights_mapper=WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}),
    )
    assert list(adapter.loras) == [f"language_model.{Q}"]
    assert list(get_origin(adapter).names) == [f"language_model.{Q}"]
    assert "_orig_mod" in get_origin(adapter).names[f"language_model.{Q}"]


def test_a_helper_that_from_dict_has_not_made_has_no_configuration() -> None:
    adapter = load(write("PEFT", Q, torch.ones(4, 3), torch.ones(5, 4)))
    assert get_origin(adapter).config == {}
