# SPDX-License-Identifier: Apache-2.0
"""Read the tensors of other trainers under PEFT's names and in PEFT's orientation. No vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vllm_nway_lora.adapters.target import LayoutError

PREFIX = "base_model.model."

#: A parameter of a PEFT layer (0.21.2), with an adapter's name in it if it is from a model's own
#: ``state_dict()``: ``<module>.lora_A.default.weight``. Names of adapters contain no dot.
LEAF = re.compile(
    r"(?P<module>.+)\.(?P<leaf>lora_[ABE]|lora_embedding_[AB]|lora_velora_embed|vera_[AB]"
    r"|vera_lambda_[bd]|hada_(?:w[12]_[ab])|lokr_w[12](?:_[ab])?)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?P<end>\.weight|\.bias)?$"
)

#: kohya's sd-scripts name the halves ``lora_down`` and ``lora_up``, diffusers ``lora.down``.
_DOWN_UP = re.compile(r"(?P<module>.+)\.lora[_.](?P<half>down|up)\.weight$")

#: MLX-LM 0.32.2 (mlx_lm/tuner/lora.py).
_MLX = re.compile(r"(?P<module>.+)\.lora_(?P<half>[ab])$")

#: Names of embeddings. ``LoRAEmbedding.as_linear`` of MLX-LM adds their LoRA to a tied output too.
_EMBEDDINGS = ("embed_tokens", "embeddings", "tok_embeddings", "word_embeddings", "wte")

_ALPHA = ".alpha"

#: Whole path components that torch.compile, activation checkpointing and FSDP add; DDP and DeepSpeed
#: add ``module`` at the top.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPED = re.compile(rf"(?:^|\.)(?:{'|'.join(_WRAPPERS)})\.|^(?:base_model\.model\.)?module\.")

_PLAIN = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")

_MERGE = "Merge it into the model, and serve that model"

#: Tensors that no LoRA can replace -> why.
_REFUSED = {
    re.compile(r"\.(?:lora_magnitude_vector\b.*|dora_scale)$"): (
        "is DoRA's magnitude, which scales the rows of base weight plus LoRA, a change of full rank. "
        + _MERGE
    ),
    re.compile(r"\.lora_diag\b.*$"): (
        f"is of KaSA, which also truncates the base weight's singular values. {_MERGE}"
    ),
    re.compile(r"\.ia3_l\b.*$"): f"is of IA3, which multiplies activations, not LoRA. {_MERGE}",
    re.compile(r"\.trainable_tokens_(?:delta|original)\b.*$"): (
        "replaces rows of the embedding, and their change is known only with the base model's rows. "
        + _MERGE
    ),
    re.compile(r"\.(?:lora_mid\.weight|hada_t[12]\b.*|lokr_t2\b.*)$"): (
        "is of a convolution, and vLLM has LoRA on linear layers only. Train the adapter without it"
    ),
    re.compile(r"\.lora_monteclora_sampler\b.*$"): (
        "is of MonteCLoRA's sampler, which is no LoRA. Save the adapter as plain LoRA"
    ),
}


@dataclass(frozen=True)
class Forms:
    """Tensors under PEFT's names.

    Attributes:
        tensors: name -> tensor; the given mapping itself if every name is plain.
        modules: module, as named in ``tensors`` -> its name in the file, where the two differ. Both
            are without ``base_model.model.``.
        scalings: module -> its own scaling, where the file has one.
        rules: what was changed, as phrases for messages.
    """

    tensors: Mapping[str, torch.Tensor]
    modules: Mapping[str, str] = field(default_factory=dict)
    scalings: Mapping[str, float] = field(default_factory=dict)
    rules: tuple[str, ...] = ()


def is_plain(name: str) -> bool:
    """Return whether :func:`read_forms` leaves a tensor as it is; vLLM judges its name."""
    # Every wrapper has one of the two words; looking for them is faster than the pattern.
    if ("module." in name or "_orig_mod." in name) and _WRAPPED.search(name):
        return False
    if name.endswith(_PLAIN):
        return True
    patterns = (LEAF, _DOWN_UP, _MLX, *_REFUSED)
    return not (name.endswith(_ALPHA) or any(pattern.search(name) for pattern in patterns))


def split(name: str) -> tuple[str, str]:
    """Return a tensor's module, without ``base_model.model.``, and the rest of its name."""
    if name.endswith(_PLAIN[:2]):  # most names, at a third of the time
        return name[: -len(_PLAIN[0])].removeprefix(PREFIX), name[1 - len(_PLAIN[0]) :]
    found = LEAF.match(name) or _DOWN_UP.match(name) or _MLX.match(name)
    module = found["module"] if found else name.rpartition(".")[0]
    return module.removeprefix(PREFIX), name[len(module) + 1 :]


def read_forms(tensors: Mapping[str, torch.Tensor]) -> Forms:
    """Return tensors under PEFT's names, in PEFT's orientation.

    Experts of MLX-LM stay three-dimensional: LoRA-A ``(experts, r, columns)``, LoRA-B ``(experts,
    rows, r)``.

    Args:
        tensors: name -> tensor; LoRA-A is ``(r, columns)`` and LoRA-B ``(rows, r)``, those of MLX-LM
            are ``(columns, r)`` and ``(r, rows)``.

    Raises:
        LayoutError: a tensor is of no LoRA, the names are of two adapters, or two tensors have one name.
    """
    if all(map(is_plain, tensors)):
        return Forms(tensors)
    read: dict[str, torch.Tensor] = {}
    sources: dict[str, str] = {}
    modules: dict[str, str] = {}
    alphas: dict[str, torch.Tensor] = {}
    adapters: dict[str, str] = {}
    rules: dict[str, None] = {}
    for source, tensor in tensors.items():
        for pattern, reason in _REFUSED.items():
            if pattern.search(source):
                raise LayoutError(f"tensor {source} {tuple(tensor.shape)} {reason}")
        name = _strip_wrappers(source, rules)
        module, end = split(name)
        if end.startswith("lora_velora_embed"):
            rules["VeLoRA's training buffers left out"] = None
            continue
        if name.endswith(_ALPHA) and tensor.numel() == 1:
            alphas[name] = tensor
            sources[name] = source
            continue
        if _MLX.match(name):
            tensor = _turn(tensor, tensors.get(f"{source[:-1]}b"), module)
        name = _rename(name, source, adapters, rules)
        if name in read:
            raise LayoutError(f"tensors {sources[name]} and {source} are both {name}")
        read[name], sources[name] = tensor, source
        written = split(source)[0]
        if written != module:
            modules[module] = written
    if len(adapters) > 1:
        (one, first), (two, second), *_ = adapters.items()
        raise LayoutError(
            f"the tensors are of two adapters, {one!r} (tensor {first}) and {two!r} (tensor {second}). "
            "Save each adapter in a folder of its own"
        )
    scalings = _read_alphas(read, alphas, sources, rules)
    return Forms(read, modules, scalings, tuple(rules))


def _strip_wrappers(name: str, rules: dict[str, None]) -> str:
    """Return a name without the path components of wrappers."""
    if not _WRAPPED.search(name):
        return name
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    dropped = set(name.split(".")) & set(_WRAPPERS)
    for start in (0, 2):
        is_start = start == 0 or parts[:2] == ["base_model", "model"]
        while is_start and parts[start : start + 1] == ["module"]:
            del parts[start]
            dropped.add("module")
    rules[f"{', '.join(sorted(dropped))} left out of names"] = None
    return ".".join(parts)


def _turn(tensor: torch.Tensor, lora_b: torch.Tensor | None, module: str) -> torch.Tensor:
    """Return a tensor of MLX-LM in PEFT's orientation.

    Args:
        tensor: ``lora_a`` ``(columns, r)`` or ``lora_b`` ``(r, rows)``. Those of experts,
            ``(experts, r, columns)`` and ``(experts, rows, r)``, have PEFT's orientation already; old
            versions have ``(experts * r, columns)``.
        lora_b: the module's ``lora_b``; None if there is none.
        module: the module's name, for messages.
    """
    if module.rpartition(".")[2] in _EMBEDDINGS:
        raise LayoutError(
            f"module {module}: MLX-LM adds the LoRA of an embedding to the output too if the model ties "
            "the two, and the file does not tell. Train the adapter without it (lora_parameters.keys)"
        )
    if tensor.ndim != 2:
        return tensor
    if lora_b is not None and lora_b.ndim == 3:
        experts = len(lora_b)
        is_whole = experts > 0 and len(tensor) % experts == 0  # else admission refuses the shapes
        return tensor.unflatten(0, (experts, -1)) if is_whole else tensor
    return tensor.t().contiguous()


def _rename(name: str, source: str, adapters: dict[str, str], rules: dict[str, None]) -> str:
    """Return PEFT's name of a tensor."""
    if found := _DOWN_UP.match(name):
        rules["lora_down and lora_up read as lora_A and lora_B"] = None
        return f"{found['module']}.lora_{'A' if found['half'] == 'down' else 'B'}.weight"
    if found := _MLX.match(name):
        rules["MLX-LM's lora_a and lora_b read as lora_A and lora_B"] = None
        return f"{found['module']}.lora_{found['half'].upper()}.weight"
    found = LEAF.match(name)
    if found and found["adapter"]:
        adapters.setdefault(found["adapter"], source)
        rules[f"adapter's name {found['adapter']!r} left out of names"] = None
        return f"{found['module']}.{found['leaf']}{found['end'] or ''}"
    return name


def _read_alphas(
    read: dict[str, torch.Tensor],
    alphas: Mapping[str, torch.Tensor],
    sources: Mapping[str, str],
    rules: dict[str, None],
) -> dict[str, float]:
    """Return module -> alpha / r; ``alphas`` have one number each.

    Raises:
        LayoutError: a module has an alpha, and no LoRA-A.
    """
    scalings = {}
    for name, alpha in alphas.items():
        module = name.removesuffix(_ALPHA)
        lora_a = read.get(f"{module}.lora_A.weight")
        if lora_a is None or not len(lora_a):
            raise LayoutError(
                f"tensor {sources[name]} is the alpha of module {module}, which has no LoRA-A. Save the "
                "adapter again with all of its tensors"
            )
        scalings[module.removeprefix(PREFIX)] = float(alpha) / len(lora_a)
    if scalings:
        rules["alpha of each module read as its scaling alpha / r"] = None
    return scalings
