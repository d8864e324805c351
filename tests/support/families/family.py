"""Classes and shared values for the tables of model families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vllm_nway_lora.diagnosis.report import Outcome

EXACT, WRONG, IGNORED = Outcome.EXACT, Outcome.WRONG, Outcome.IGNORED
REFUSED, FAILS = Outcome.REFUSED, Outcome.FAILS
HIDDEN = 64


@dataclass(frozen=True)
class Fused:
    """One fused projection of a family.

    Attributes:
        layer: its path in vLLM's model.
        modules: path in a checkpoint of each module, as adapters see it -> rows of its weight.
        stock: outcomes on stock vLLM 0.29.0 to 0.33.0: at TP 1, at TP > 1, and then both again with
            ``fully_sharded_loras``.
        plugin: outcome with the plugin.
        columns: width of its input.
        outputs: number of outputs; by default one per module of ``modules``.
        stored_as: the module that stores the modules' weights concatenated in a checkpoint; empty if
            each module's weight is stored separately.
        called: False if the model does not call the layer and multiplies by its weight directly.
        loaded: False if a checkpoint has no weights with these modules' shapes.
    """

    layer: str
    modules: Mapping[str, int]
    stock: tuple[Outcome, Outcome, Outcome, Outcome]
    plugin: Outcome = EXACT
    columns: int = HIDDEN
    stored_as: str = ""
    called: bool = True
    loaded: bool = True
    outputs: int | None = None

    @property
    def n_outputs(self) -> int:
        """The number of outputs."""
        return self.outputs or len(self.modules)


@dataclass(frozen=True)
class Family:
    """One model class with a tiny configuration.

    Attributes:
        name: its name in the README; also names the models that have the same layers.
        config: content of the checkpoint's ``config.json``.
        fused: its fused projections.
        stubs: paths of functions and classes that are replaced by stubs while the model is built,
            because they need a GPU or a MoE layer (LoRA on MoE layers needs Triton). A stub returns
            None, or the second item of a pair (path, returned value).
        replaced: path of an object -> its replacement while the model is built.
        modules: Python modules that cannot be imported without Triton or a GPU, replaced by mocks.
        classes: architecture -> the class to build, as ``module:class``, if vLLM builds another one on
            CPU.
        since: first release that has the family in its present form.
        until: last release that has it; None if 0.33.0 has it.
        sizes: tensor-parallel sizes at which the model can be built.
        required: name -> shape of further weights that its loader requires in a checkpoint.
        transposed: whether a checkpoint stores the modules' weights as input by output.
    """

    name: str
    config: Mapping[str, Any]
    fused: tuple[Fused, ...]
    stubs: tuple[str | tuple[str, Any], ...] = ()
    replaced: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)
    since: str = "0.17.0"
    until: str | None = None
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    required: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    transposed: bool = False


class StubExperts(nn.Module):
    """A stub for a MoE layer, with the attributes that models read: LoRA on experts needs Triton."""

    experts = None
    n_logical_experts = n_physical_experts = n_local_physical_experts = 0
    n_routed_experts = n_redundant_experts = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


ALWAYS_EXACT = (EXACT,) * 4
#: One module that covers one output, or unequal ones; stock vLLM cuts it into two halves at TP > 1.
HALVES = (EXACT, WRONG, EXACT, WRONG)
#: Three or more outputs, and one module or three or more; stock vLLM does not wrap these layers with
#: ``fully_sharded_loras``.
UNWRAPPED = (EXACT, EXACT, IGNORED, IGNORED)

COMMON: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}

#: Nemotron-H's text model: one Mamba2 layer with 8 groups, one attention layer.
NEMOTRON_H: Mapping[str, Any] = {
    **COMMON,
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "num_hidden_layers": 2,
    "hybrid_override_pattern": "M*",
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 16,
    "expand": 2,
}
GDN: Mapping[str, Any] = {
    **COMMON,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}
VLLM = "vllm.model_executor"
LAYER = "model.layers.0"
GDN_LAYER = f"{LAYER}.linear_attn"
#: Stub for models with state that the Transformers backend does not support; it does not change how
#: their other layers are built.
NO_ATTENTION = (f"{VLLM}.models.transformers.base.Base._create_attention_instances",)
