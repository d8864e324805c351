"""What a model family is to the tests, and what the tables of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

EXACT, WRONG, IGNORED, REFUSED, FAILS = "exact", "wrong", "ignored", "refused", "fails"
HIDDEN = 64


@dataclass(frozen=True)
class Fused:
    """One fused projection of a family.

    Attributes:
        layer: its path in vLLM's model.
        modules: adapter-visible module's path in a checkpoint -> rows of its weight.
        stock: what stock vLLM makes of adapters on it, of 0.29.0 to 0.33.0: at TP 1, at TP > 1, and
            both again under ``fully_sharded_loras``.
        plugin: what this package makes of them.
        columns: width of its input.
        outputs: how many parts the layer has, if not one per module of ``modules``.
        stored_as: the one module whose weight a checkpoint has in place of theirs, if it has.
        called: False where the model multiplies by the layer's weight by itself.
        loaded: False where a checkpoint has no weight of these modules' shapes.
    """

    layer: str
    modules: Mapping[str, int]
    stock: tuple[str, str, str, str]
    plugin: str = EXACT
    columns: int = HIDDEN
    stored_as: str = ""
    called: bool = True
    loaded: bool = True
    outputs: int | None = None

    @property
    def n_outputs(self) -> int:
        return self.outputs or len(self.modules)


@dataclass(frozen=True)
class Family:
    """One model class with a tiny configuration.

    Attributes:
        name: what the README calls it, with the models that share its layers.
        config: of the checkpoint, ``config.json``.
        fused: its fused projections.
        stubs: functions, by their paths, that do nothing while the model is built: what needs a MoE
            layer (LoRA on one needs Triton) or a GPU. Or a pair, of the path and what it returns.
        replaced: objects, by their paths, and what stands in for each while the model is built.
        modules: modules that cannot be imported without Triton or a GPU, and are stood in for.
        classes: architecture -> the class to build, as ``module:class``, where vLLM has another one
            for CPUs.
        since: the first release that has it, as vLLM has it now.
        until: the last release that has it; None if 0.33.0 does.
        sizes: tensor-parallel sizes that the model can be built for.
        required: shapes of the weights without which its loader refuses a checkpoint.
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


class NoExperts(nn.Module):
    """What a model asks of its MoE layers, and no layer: LoRA on one needs Triton."""

    experts = None
    n_logical_experts = n_physical_experts = n_local_physical_experts = 0
    n_routed_experts = n_redundant_experts = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


ALWAYS_EXACT = (EXACT,) * 4
#: One module over one output, or over unequal ones: cut into two halves at TP > 1.
HALVES = (EXACT, WRONG, EXACT, WRONG)
#: Three outputs or more, seen as one module or as three or more: not wrapped when fully sharded.
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

#: Nemotron-H's text model: one Mamba2 layer of 8 groups, one of attention.
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
#: The models have state that the Transformers backend cannot keep; their layers are built alike.
NO_ATTENTION = (f"{VLLM}.models.transformers.base.Base._create_attention_instances",)
