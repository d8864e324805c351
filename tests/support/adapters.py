"""LoRA adapters saved by PEFT for a checkpoint, and the reference: PEFT's logprobs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from vllm_nway_lora.diagnosis.report import Outcome

# Tensors of this size change logprobs by 1 to 5, far more than bf16 noise of 0.03 to 0.15.
TENSOR_STD = 0.2
RANK = 8

GDN = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

#: Adapters on Qwen3.5: name -> modules.
QWEN3_5 = {
    "qkv+z": ("in_proj_qkv", "in_proj_z"),
    "qkv": ("in_proj_qkv",),
    "z": ("in_proj_z",),
    "b": ("in_proj_b",),
    "a": ("in_proj_a",),
    "all": GDN + ATTENTION + MLP,
}

#: Adapters on the model of ``fused_llama``: name -> modules.
FUSED_LLAMA = {
    "qkv+z": ("in_proj_qkv", "in_proj_z"),
    "qkv": ("in_proj_qkv",),
    "z": ("in_proj_z",),
    "ba": ("in_proj_ba",),
    "attention": ATTENTION,
    "all": ("in_proj_qkv", "in_proj_z", "down_proj", *ATTENTION),
}

#: Adapters on Qwen3-Next, whose checkpoints already store both projections fused.
QWEN3_NEXT = {
    "qkvz": ("in_proj_qkvz",),
    "ba": ("in_proj_ba",),
    "all": ("in_proj_qkvz", "in_proj_ba", "out_proj", *ATTENTION, *MLP),
}

#: Adapters on hybrids whose fused projection is one module. No other module is adapted, so an error
#: can come only from this projection.
GRANITE_HYBRID = {"in_proj": ("in_proj",)}
LFM2 = {"in_proj": ("in_proj",)}

#: Adapters on AFMoE's attention without its gate, whose name (``gate_proj``) the MLP also has.
AFMOE = {"q": ("q_proj",), "kv": ("k_proj", "v_proj")}


def _load_model(checkpoint: Path) -> torch.nn.Module:
    """Load a checkpoint with transformers, in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from support import fused_llama

    logging.disable_progress_bar()
    [architecture] = json.loads((checkpoint / "config.json").read_text())["architectures"]
    ours = architecture == fused_llama.ARCHITECTURE
    model_class = fused_llama.FusedLlamaForCausalLM if ours else AutoModelForCausalLM
    return model_class.from_pretrained(checkpoint, dtype=torch.float32)


def save_adapter(checkpoint: Path, folder: Path, modules: Sequence[str], seed: int) -> Path:
    """Save a random adapter on ``modules``; its tensors are exactly representable in bfloat16."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(modules))
    model = get_peft_model(_load_model(checkpoint), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * TENSOR_STD / 2**0.5
            parameter.data = values.bfloat16().float()
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class ServedModel:
    """A checkpoint and adapters for a server, with their reference."""

    folder: Path
    adapters: dict[str, Path]
    reference: Reference


def save_served_model(
    root: Path, save: Callable[[Path], Path], adapters: Mapping[str, Sequence[str]]
) -> ServedModel:
    """Save a checkpoint and random adapters below ``root``.

    Args:
        root: the folder.
        save: saves the checkpoint into a folder and returns that folder.
        adapters: adapter's name -> its modules.
    """
    folder = save(root / "model")
    saved = {
        name: save_adapter(folder, root / name, modules, seed)
        for seed, (name, modules) in enumerate(adapters.items())
    }
    return ServedModel(folder, saved, Reference(folder, saved))


class Reference:
    """PEFT on transformers in float32, with the checkpoint and adapters that vLLM serves."""

    def __init__(self, checkpoint: Path, adapters: dict[str, Path]) -> None:
        self._checkpoint = checkpoint
        self._adapters = adapters
        self._model = cache(self._load_adapted)

    def _load_adapted(self, adapter: str | None) -> torch.nn.Module:
        model = _load_model(self._checkpoint)
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
        """Compare a served answer with the reference, token by token, on the served tokens."""
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
    """A server's answer.

    Attributes:
        tokens: the prompt's tokens, then the generated ones.
        logprobs: of the last tokens; as many as the server has returned.
        prompt_length: number of the prompt's tokens.
    """

    tokens: list[int]
    logprobs: list[float]
    prompt_length: int


@dataclass(frozen=True)
class Comparison:
    """Largest differences, in logprob, between an answer and the reference.

    Attributes:
        error: between a token's logprob in the answer and in the reference.
        change: between a token's logprob in the answer and in the reference without the adapter.
        effect: between the reference with the adapter and the reference without it.
        greedy_gap: between the reference's most likely token and the generated token, both in the
            reference.
    """

    error: float
    change: float
    effect: float
    greedy_gap: float

    @property
    def is_exact(self) -> bool:
        """True if ``error`` and ``greedy_gap`` are bf16 noise: under a fifth of ``effect``."""
        return max(self.error, self.greedy_gap) < self.effect / 5

    @property
    def outcome(self) -> Outcome:
        """``EXACT``; ``IGNORED`` if the base model answered; otherwise ``WRONG``."""
        if self.is_exact:
            return Outcome.EXACT
        return Outcome.IGNORED if self.change < self.effect / 5 else Outcome.WRONG


def prompts(count: int = 3) -> list[list[int]]:
    """Return ``count`` prompts, as token ids, of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, 512, (20 + 7 * n,), generator=generator).tolist() for n in range(count)
    ]
