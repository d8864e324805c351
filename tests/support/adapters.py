"""LoRA adapters that PEFT writes for a checkpoint, and PEFT's own answers: the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

# The effect of tensors of this size, 1 to 5 in logprob, towers over bf16 noise of 0.03 to 0.15.
TENSOR_STD = 0.2
RANK = 8

GDN = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

#: Adapters on Qwen3.5, by the modules that they have.
QWEN3_5 = {
    "qkv+z": ("in_proj_qkv", "in_proj_z"),
    "qkv": ("in_proj_qkv",),
    "z": ("in_proj_z",),
    "b": ("in_proj_b",),
    "a": ("in_proj_a",),
    "all": GDN + ATTENTION + MLP,
}

#: Adapters on the model of ``fused_llama``, likewise.
FUSED_LLAMA = {
    "qkv+z": ("in_proj_qkv", "in_proj_z"),
    "qkv": ("in_proj_qkv",),
    "z": ("in_proj_z",),
    "ba": ("in_proj_ba",),
    "attention": ATTENTION,
    "all": ("in_proj_qkv", "in_proj_z", "down_proj", *ATTENTION),
}

#: Adapters on Qwen3-Next, whose two projections are fused in the checkpoint already.
QWEN3_NEXT = {
    "qkvz": ("in_proj_qkvz",),
    "ba": ("in_proj_ba",),
    "all": ("in_proj_qkvz", "in_proj_ba", "out_proj", *ATTENTION, *MLP),
}

#: Adapters on the hybrids whose fused projection is one module; alone, so that it alone is at fault.
GRANITE_HYBRID = {"in_proj": ("in_proj",)}
LFM2 = {"in_proj": ("in_proj",)}

#: Adapters on AFMoE's attention without its gate, which is called like a part of its MLP.
AFMOE = {"q": ("q_proj",), "kv": ("k_proj", "v_proj")}


def _model(checkpoint: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from support import fused_llama

    logging.disable_progress_bar()
    [architecture] = json.loads((checkpoint / "config.json").read_text())["architectures"]
    ours = architecture == fused_llama.ARCHITECTURE
    model_class = fused_llama.FusedLlamaForCausalLM if ours else AutoModelForCausalLM
    return model_class.from_pretrained(checkpoint, dtype=torch.float32)


def save_adapter(checkpoint: Path, folder: Path, modules: Sequence[str], seed: int) -> Path:
    """Save a random adapter on ``modules``, whose tensors bfloat16 holds exactly."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(modules))
    model = get_peft_model(_model(checkpoint), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * TENSOR_STD / 2**0.5
            parameter.data = values.bfloat16().float()
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Served:
    """What a server is tested with: a checkpoint, adapters on it, and PEFT's answers."""

    folder: Path
    adapters: dict[str, Path]
    reference: Reference


def make(root: Path, save: Callable[[Path], Path], adapters: Mapping[str, Sequence[str]]) -> Served:
    """Save a checkpoint below ``root`` and random adapters on the modules that each one names."""
    folder = save(root / "model")
    saved = {
        name: save_adapter(folder, root / name, modules, seed)
        for seed, (name, modules) in enumerate(adapters.items())
    }
    return Served(folder, saved, Reference(folder, saved))


class Reference:
    """PEFT on transformers in float32, on the checkpoint and adapters that vLLM serves."""

    def __init__(self, checkpoint: Path, adapters: dict[str, Path]) -> None:
        self._checkpoint = checkpoint
        self._adapters = adapters
        self._model = cache(self._load)

    def _load(self, adapter: str | None) -> torch.nn.Module:
        model = _model(self._checkpoint)
        if adapter is None:
            return model
        from peft import PeftModel

        return PeftModel.from_pretrained(model, self._adapters[adapter])

    @torch.no_grad()
    def logprobs(self, adapter: str | None, tokens: Sequence[int]) -> torch.Tensor:
        """Return log-probabilities over the vocabulary at each token: ``(tokens, vocabulary)``."""
        logits = self._model(adapter)(torch.tensor([list(tokens)])).logits
        return logits[0].log_softmax(-1)

    def compare(self, adapter: str | None, answer: Answer) -> Comparison:
        """Hold a served answer against the reference, token by token, on the served tokens."""
        ids = torch.tensor(answer.tokens[1:]).unsqueeze(1)
        ours = self.logprobs(adapter, answer.tokens)[:-1]
        base = self.logprobs(None, answer.tokens)[:-1].gather(1, ids).squeeze(1)
        expected = ours.gather(1, ids).squeeze(1)
        generated = slice(answer.prompt_length - 1, None)
        scored = slice(-len(answer.logprobs), None)
        served = torch.tensor(answer.logprobs)
        return Comparison(
            error=(served - expected[scored]).abs().max().item(),
            change=(served - base[scored]).abs().max().item(),
            effect=(expected - base).abs().max().item(),
            greedy_gap=(ours.max(1).values - expected)[generated].max().item(),
        )


@dataclass(frozen=True)
class Answer:
    """What a server said: prompt and generated tokens, and the logprobs of the last of them."""

    tokens: list[int]
    logprobs: list[float]
    prompt_length: int


@dataclass(frozen=True)
class Comparison:
    """Largest differences, in logprob, between an answer and the reference.

    Attributes:
        error: of any token's logprob.
        change: of any token's logprob, from the reference's without the adapter.
        effect: of the adapter itself, reference with it against reference without.
        greedy_gap: by which a greedy token falls short of the reference's most likely one.
    """

    error: float
    change: float
    effect: float
    greedy_gap: float

    @property
    def exact(self) -> bool:
        """Within bf16 noise: under a fifth of the adapter's effect, greedy tokens included."""
        return max(self.error, self.greedy_gap) < self.effect / 5

    @property
    def word(self) -> str:
        """``exact``; ``ignored``, where it is the base model that answered; else ``wrong``."""
        return "exact" if self.exact else "ignored" if self.change < self.effect / 5 else "wrong"


def prompts(count: int = 3) -> list[list[int]]:
    """Return token prompts of differing lengths."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, 512, (20 + 7 * n,), generator=generator).tolist() for n in range(count)
    ]
