"""Random mutations of a good adapter, drawn by hypothesis; each result must be exact or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st

from support import tiny

Tensors = dict[str, torch.Tensor]


class Adapter:
    """An adapter's files, in memory.

    Attributes:
        tensors: name -> tensor.
        config: content of ``adapter_config.json``.
        damage: functions that change the written files.
        steps: what was done: indices of :data:`MUTATIONS`, then some of the changed shapes.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.config = tiny.config()
        self.damage: list[Callable[[Path], object]] = []
        self.steps: list[Any] = []

    def __repr__(self) -> str:
        return f"Adapter(steps={self.steps}, config={self.config})"

    def save(self, folder: Path) -> Path:
        """Save the adapter and apply ``damage`` to the files; return ``folder``."""
        tiny.save(folder, self.tensors, self.config)
        for damage in self.damage:
            damage(folder)
        return folder


MUTATIONS: list[Callable[[Adapter, Random], object]] = []


def mutation(
    function: Callable[[Adapter, Random], object],
) -> Callable[[Adapter, Random], object]:
    """Add a function to :data:`MUTATIONS`."""
    MUTATIONS.append(function)
    return function


def _choose_name(adapter: Adapter, random: Random) -> str:
    """Return the name of a random tensor; empty if there is none."""
    return random.choice(sorted(adapter.tensors)) if adapter.tensors else ""


def _change(
    change: Callable[[torch.Tensor, Random], torch.Tensor],
) -> Callable[[Adapter, Random], None]:
    """Return a mutation that applies ``change`` to one tensor."""

    def apply(adapter: Adapter, random: Random) -> None:
        name = _choose_name(adapter, random)
        if name:
            adapter.tensors[name] = change(adapter.tensors[name], random)

    return apply


def _rename(rename: Callable[[str, Random], str]) -> Callable[[Adapter, Random], None]:
    """Return a mutation that renames one tensor, or both tensors of its module."""

    def apply(adapter: Adapter, random: Random) -> None:
        name = _choose_name(adapter, random)
        module = name.rpartition(".lora_")[0]
        both = random.random() < 0.7
        for old in [n for n in adapter.tensors if n.startswith(f"{module}.lora_") and both] or [
            name
        ]:
            if old:
                adapter.tensors[rename(old, random)] = adapter.tensors.pop(old)

    return apply


def _resize(tensor: torch.Tensor, random: Random) -> torch.Tensor:
    if not tensor.ndim or not tensor.numel():
        return tensor
    dim = random.randrange(tensor.ndim)
    size = tensor.shape[dim]
    wanted = random.choice([0, 1, size // 2, size - 1, size + 1, size * 2, size + 16])
    if wanted <= size:
        return tensor.narrow(dim, 0, max(wanted, 0)).contiguous()
    return (
        torch.cat([tensor] * (1 + wanted // max(size, 1)), dim).narrow(dim, 0, wanted).contiguous()
    )


def _insert_non_finite(tensor: torch.Tensor, random: Random) -> torch.Tensor:
    if not tensor.numel() or not tensor.is_floating_point():
        return tensor
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    tensor.view(-1)[random.randrange(tensor.numel())] = random.choice(
        [float("nan"), float("inf"), float("-inf")]
    )
    return tensor


_DTYPES = [torch.int8, torch.int64, torch.bool, torch.float64, torch.float16, torch.bfloat16,
           torch.complex64, torch.uint8]  # fmt: skip

for _function in (
    _change(_resize),
    _change(_resize),
    _change(_insert_non_finite),
    _change(lambda tensor, random: tensor.to(random.choice(_DTYPES))),
    _change(lambda tensor, random: tensor.T.contiguous() if tensor.ndim == 2 else tensor),
    # Makes the tensor non-contiguous and does not change its values.
    _change(lambda tensor, random: tensor.T.contiguous().T if tensor.ndim == 2 else tensor),
    _change(lambda tensor, random: tensor.flatten()),
    _change(lambda tensor, random: tensor.unsqueeze(random.randrange(tensor.ndim + 1))),
    _change(lambda tensor, random: tensor.new_zeros(())),
    _change(lambda tensor, random: torch.zeros_like(tensor)),
    _change(lambda tensor, random: (tensor.float() + random.randrange(3)).contiguous()),
    _rename(lambda name, random: name.replace(".layers.0.", f".layers.{random.randrange(5)}.")),
    _rename(lambda name, random: name.removeprefix(tiny.PREFIX)),
    _rename(lambda name, random: name.replace("q_proj", "qkv_proj")),
    _rename(lambda name, random: name.replace("in_proj_z", "in_proj_qkvz")),
    _rename(lambda name, random: name.replace("model.layers", "mtp.layers")),
    _rename(lambda name, random: name.replace("self_attn", random.choice(["mlp", "attn", ""]))),
    _rename(lambda name, random: name.replace("_proj", random.choice(["_PROJ", "", "_proj.default"]))),
    _rename(lambda name, random: name.replace("lora_", random.choice(["lora.", "LoRA_"]))),
    _rename(lambda name, random: name.replace(".weight", random.choice(["", ".bias", ".default.weight"]))),
    _rename(lambda name, random: name.replace("lora_A", "lora_C").replace("lora_B", "lora_A").replace("lora_C", "lora_B")),
):  # fmt: skip
    mutation(_function)


@mutation
def drop(adapter: Adapter, random: Random) -> None:
    adapter.tensors.pop(_choose_name(adapter, random), None)


@mutation
def keep_one_module(adapter: Adapter, random: Random) -> None:
    module = _choose_name(adapter, random).rpartition(".lora_")[0]
    adapter.tensors = {n: t for n, t in adapter.tensors.items() if n.startswith(f"{module}.")}


@mutation
def keep_nothing(adapter: Adapter, random: Random) -> None:
    adapter.tensors = {}


@mutation
def swap(adapter: Adapter, random: Random) -> None:
    one, other = _choose_name(adapter, random), _choose_name(adapter, random)
    if one:
        values = adapter.tensors
        values[one], values[other] = values[other].clone(), values[one].clone()


@mutation
def name_twice(adapter: Adapter, random: Random) -> None:
    name = _choose_name(adapter, random)
    if name:
        adapter.tensors[name.removeprefix(tiny.PREFIX)] = adapter.tensors[name] * 2


@mutation
def add_tensor(adapter: Adapter, random: Random) -> None:
    name = random.choice(
        ["model.layers.0.self_attn.q_proj.lora_B.bias", "model.embed_tokens.base_layer.weight",
         "lm_head.base_layer.weight", "model.layers.0.mlp.experts.0.w1.lora_A.weight",
         "model.norm.weight", "score.weight", "x", "model.layers.2.mlp.up_proj.lora_A.weight"]
    )  # fmt: skip
    adapter.tensors[tiny.PREFIX + name] = torch.ones(4, 32)


@mutation
def reconfigure(adapter: Adapter, random: Random) -> None:
    key, value = random.choice(
        [("r", 2), ("r", 16), ("r", 0), ("r", -4), ("r", "4"), ("r", None), ("lora_alpha", 16),
         ("lora_alpha", 0), ("lora_alpha", -3.5), ("lora_alpha", "x"), ("lora_alpha", float("nan")),
         ("lora_alpha", 1e39), ("use_rslora", True),
         ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("lora_bias", True), ("rank_pattern", {"q_proj": 2}),
         ("rank_pattern", {"q_proj": 64}), ("alpha_pattern", {"q_proj": 16}),
         ("alpha_pattern", {"[": 16}), ("modules_to_save", ["lm_head"]), ("modules_to_save", ["score"]),
         ("init_lora_weights", "pissa"), ("layer_replication", [[0, 1], [0, 1]]),
         ("alora_invocation_tokens", [1, 2]), ("target_modules", "all-linear"), ("unknown", 1)]
    )  # fmt: skip
    adapter.config[key] = value


@mutation
def leave_out_of_config(adapter: Adapter, random: Random) -> None:
    adapter.config.pop(random.choice(["r", "lora_alpha", "target_modules", "bias"]), None)


@mutation
def damage_a_file(adapter: Adapter, random: Random) -> None:
    kind, position = random.randrange(6), random.random()

    def damage(folder: Path) -> None:
        file = next(folder.glob("adapter_model.*"), None)
        if file is None:
            return
        content = file.read_bytes()
        at = int(position * len(content))
        if kind == 0:
            file.write_bytes(content[:at])
        elif kind == 1:
            file.write_bytes(content + b"\0" * 9)
        elif kind == 2:
            file.unlink()
        elif kind == 3:
            # Only bytes of the header: a changed tensor value would still be a valid adapter.
            at = at % 200
            file.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        elif kind == 4:
            (folder / "adapter_config.json").write_text(json.dumps(adapter.config)[:-9])
        else:
            (folder / "adapter_config.json").unlink(missing_ok=True)

    adapter.damage.append(damage)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Draw a good adapter and apply one to three mutations."""
    adapter = Adapter(tiny.tensors(draw(st.integers(0, 9))))
    chosen = draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=3))
    random = draw(st.randoms(use_true_random=False))
    good = {name: (tensor.shape, tensor.dtype) for name, tensor in adapter.tensors.items()}
    for mutate in chosen:
        mutate(adapter, random)
        adapter.steps.append(MUTATIONS.index(mutate))
    bad = {name: (tensor.shape, tensor.dtype) for name, tensor in adapter.tensors.items()}
    adapter.steps += sorted(good.items() ^ bad.items(), key=str)[:8]
    return adapter
