"""What vLLM's LoRA layers of mixtures take, and their slots after a translation to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from support.expert_files import LETTERS, NAMES, build_files, pair
from support.moe import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    PATH,
    RANK,
    A,
    B,
    Experts,
    flat,
    per_expert,
    shared,
)
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager

from vllm_nway_lora.adapters.expert_layouts import translate_experts
from vllm_nway_lora.adapters.expert_types import USUAL, Mixture, Swaps
from vllm_nway_lora.adapters.mixtures import read_mixture
from vllm_nway_lora.adapters.target import LayoutError, Pair
from vllm_nway_lora.compat import defects

HAS_MIXED = hasattr(LoRAModelManager, "_convert_3d_to_2d_moe_lora")
HAS_SHARED = hasattr(PackedLoRALayerWeights, "pack_moe_stacked")
HAS_EXPERT_PARALLEL = hasattr(LoRAModelManager, "_restrict_to_local_experts")

GPT_OSS = {"architecture": "GptOssForCausalLM"}
TPS = pytest.mark.parametrize("tp", [(0, 1), (0, 2), (1, 2)], ids=str)
CONFIG = {"r": RANK, "lora_alpha": 2 * RANK, "peft_version": "0.19.1"}


def read(experts: Experts) -> Mixture:
    adapter = SimpleNamespace(is_3d_lora_weight=experts.is_3d_file)
    return read_mixture(experts.manager, adapter, PATH, experts.layer)


@TPS
def test_sizes_and_names(tp: tuple[int, int]) -> None:
    mixture = read(Experts(tp=tp))
    sizes = (mixture.experts, mixture.hidden, mixture.intermediate)
    assert sizes == (EXPERTS, HIDDEN, INTERMEDIATE)
    assert mixture.path == PATH
    assert mixture.modules[2] == {"gate": "2.gate_proj", "down": "2.down_proj", "up": "2.up_proj"}
    assert len(mixture.modules) == EXPERTS
    assert list(mixture.local) == list(range(EXPERTS))
    assert mixture.is_gated
    assert not mixture.is_stacked
    assert not mixture.is_shared
    assert not mixture.is_interleaved
    assert mixture.swaps == USUAL
    alike = defects.find("experts-without-rslora").affects(vllm.__version__)
    assert mixture.scales_alike == alike
    ungated = read(Experts(gated=False, tp=tp))
    assert not ungated.is_gated
    assert ungated.modules[1] == {"up": "1.up_proj", "down": "1.down_proj"}
    stacked = read(Experts(stacked=True, tp=tp))
    assert stacked.is_stacked
    assert (stacked.modules, stacked.scales_alike) == ((), False)
    assert (stacked.experts, stacked.hidden, stacked.intermediate) == sizes


def test_request_tells_the_layout_of_the_mixed_format() -> None:
    assert read(Experts(mixed=True, is_3d_file=True)).is_stacked
    assert not read(Experts(mixed=True)).is_stacked
    assert not read(Experts(is_3d_file=True)).is_stacked


def test_shared() -> None:
    mixture = read(Experts(shared=True))
    assert mixture.is_shared
    assert mixture.modules == ()


@pytest.mark.parametrize(
    ("architecture", "swaps"),
    [
        ("GptOssForCausalLM", Swaps(old=False, new=None)),
        ("Llama4ForConditionalGeneration", Swaps(old=False, new=True)),
        ("Qwen3VLMoeForConditionalGeneration", Swaps(old=None, new=None)),
        ("Qwen3MoeForCausalLM", USUAL),
        ("Qwen3_5MoeForConditionalGeneration", USUAL),
    ],
)
def test_architectures(architecture: str, swaps: Swaps) -> None:
    for stacked in (False, True):
        mixture = read(Experts(stacked=stacked, architecture=architecture))
        assert mixture.swaps == swaps
        assert mixture.is_interleaved == (architecture == "GptOssForCausalLM")


@pytest.mark.skipif(not HAS_EXPERT_PARALLEL, reason="no expert parallelism with LoRA")
@pytest.mark.parametrize("ep_rank", [0, 1])
def test_local_experts(ep_rank: int) -> None:
    half = EXPERTS // 2
    mixture = read(Experts(ep_rank=ep_rank))
    assert list(mixture.local) == list(range(ep_rank * half, ep_rank * half + half))
    assert (mixture.experts, len(mixture.modules)) == (EXPERTS, EXPERTS)
    assert read(Experts(ep_rank=ep_rank, stacked=True)).experts == EXPERTS


def test_other_number_of_modules_is_refused() -> None:
    experts = Experts()
    experts.manager.packed_modules[PATH].pop()
    with pytest.raises(LayoutError, match="vLLM has 17 modules for gate, down, up of 6 experts"):
        read(experts)


def slots(experts: Experts) -> list[torch.Tensor]:
    layer = experts.layer
    names = ("w13_lora_a", "w13_lora_b", "w2_lora_a", "w2_lora_b")
    return [t for name in names for t in getattr(layer, f"{name}_stacked")]


def fill(pairs: dict[str, Pair], **options: Any) -> list[torch.Tensor]:
    """Add an adapter to vLLM without this package, and return the slots."""
    experts = Experts(**options)
    tensors = {}
    for module, of in pairs.items():
        dot = f".{module}." if module else "."
        tensors |= {f"{dot}{A}": of.a, f"{dot}{B}": of.b}
    assert experts.add(tensors) == ""
    return slots(experts)


#: Kind of layer -> arguments of `Experts`.
KINDS: dict[str, dict[str, Any]] = {
    "apart": {},
    "stacked": {"stacked": True},
    "GPT-OSS": {"stacked": True} | GPT_OSS,
}
if HAS_MIXED:
    KINDS["mixed format, flagged"] = {"mixed": True, "is_3d_file": True}
    KINDS["mixed format, not flagged"] = {"mixed": True}
    KINDS["GPT-OSS, mixed format, flagged"] = {"mixed": True, "is_3d_file": True} | GPT_OSS
    KINDS["GPT-OSS, mixed format, not flagged"] = {"mixed": True} | GPT_OSS


@TPS
@pytest.mark.parametrize("sizes", [(32, 16), (24, 24)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_slots_are_equal_in_every_layout(
    kind: str, sizes: tuple[int, int], tp: tuple[int, int]
) -> None:
    """Also where one of both parameters is square."""
    options = KINDS[kind] | {"tp": tp, "sizes": sizes}
    tensors = flat(sizes=sizes)
    mixture = read(Experts(**options))
    files = build_files(tensors, mixture.is_interleaved)
    own = files["PEFT 0.19" if mixture.is_stacked else "apart"][0]
    expected = fill({name: Pair(p.a, p.b) for name, p in own.items()}, **options)
    assert all(slot.any() for slot in expected)
    for name, (pairs, config) in files.items():
        written, rule = translate_experts(pairs, mixture, CONFIG | config)
        assert (rule == "") == (pairs is own), name
        assert {of.scaling for of in written.values()} == {2.0}
        for found, wanted in zip(fill(written, **options), expected, strict=True):
            assert torch.equal(found, wanted), name


@TPS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["gate_up", "down"])
def test_one_parameter_leaves_zeros_in_the_other_slots(
    part: str, kind: str, tp: tuple[int, int]
) -> None:
    options = KINDS[kind] | {"tp": tp, "sizes": (24, 16)}
    mixture = read(Experts(**options))
    files = build_files(flat(sizes=(24, 16)), mixture.is_interleaved)
    whole = fill(translate_experts(files["PEFT 0.19"][0], mixture, CONFIG)[0], **options)
    of = files["PEFT 0.19"][0]["base_layer" if part == "gate_up" else ""]
    found = fill(translate_experts({"": of}, mixture, CONFIG)[0], **options)
    first = len(whole) - 2
    for number, (slot, full) in enumerate(zip(found, whole, strict=True)):
        assert torch.equal(slot, full) == ((number < first) == (part == "gate_up"))
        if (number < first) != (part == "gate_up"):
            assert not slot.any()


@TPS
def test_modules_apart_with_matrices_of_their_own_on_stacked_experts(tp: tuple[int, int]) -> None:
    """The rank of gate_up_proj is the sum of both ranks."""
    tensors = per_expert()
    pairs = {
        name.removesuffix(f".{A}").removeprefix("."): pair(tensors, name.removesuffix(A)[1:])
        for name in tensors
        if name.endswith(A)
    }
    options: dict[str, Any] = {"stacked": True, "tp": tp}
    written, rule = translate_experts(pairs, read(Experts(**options)), CONFIG)
    assert "rank 8" in rule
    stacked, apart = Experts(**options), Experts(tp=tp)
    experts_tensors = {}
    for module, of in written.items():
        dot = f".{module}." if module else "."
        experts_tensors |= {f"{dot}{A}": of.a, f"{dot}{B}": of.b}
    assert stacked.add(experts_tensors) == ""
    assert apart.add(tensors) == ""
    for found, wanted in zip(stacked.deltas(), apart.deltas(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.skipif(not HAS_EXPERT_PARALLEL, reason="no expert parallelism with LoRA")
@pytest.mark.parametrize("ep_rank", [0, 1])
@pytest.mark.parametrize("kind", ["apart", "stacked"])
def test_slots_of_a_rank_with_some_experts(kind: str, ep_rank: int) -> None:
    options = KINDS[kind] | {"ep_rank": ep_rank}
    mixture = read(Experts(**options))
    files = build_files(flat(), False)
    expected = fill(dict(files["PEFT 0.19" if mixture.is_stacked else "apart"][0]), **options)
    for name, (pairs, config) in files.items():
        written, _ = translate_experts(pairs, mixture, CONFIG | config)
        for found, wanted in zip(fill(written, **options), expected, strict=True):
            assert torch.equal(found, wanted), name


@TPS
def test_experts_without_a_gate(tp: tuple[int, int]) -> None:
    tensors = per_expert(gated=False)
    options: dict[str, Any] = {"gated": False, "tp": tp}
    own = {
        name.removesuffix(f".{A}").removeprefix("."): pair(tensors, name.removesuffix(A)[1:])
        for name in tensors
        if name.endswith(A)
    }
    deep = {
        kind: Pair(
            torch.stack([own[f"{e}.{kind}"].a for e in range(EXPERTS)]),
            torch.stack([own[f"{e}.{kind}"].b for e in range(EXPERTS)]),
            2.0,
        )
        for kind in ("up_proj", "down_proj")
    }
    written, _ = translate_experts(deep, read(Experts(**options)), {})
    for found, wanted in zip(fill(written, **options), fill(own, **options), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.skipif(not HAS_SHARED, reason="no shared experts' tensors")
@TPS
def test_shared_matrices(tp: tuple[int, int]) -> None:
    """``--enable-moe-shared-loras`` takes what experts share, also under other names."""
    tensors = shared()
    own = {f"w{n}": pair(tensors, f"w{n}.") for n in (1, 2, 3)}
    renamed = {NAMES[kind]: own[name] for kind, name in LETTERS.items()}
    options: dict[str, Any] = {"shared": True, "tp": tp}
    mixture = read(Experts(**options))
    assert translate_experts(own, mixture, {})[1] == ""
    written, rule = translate_experts(renamed, mixture, {})
    assert rule == "stacked experts: stacked as w1, w2 and w3"
    for found, wanted in zip(fill(written, **options), fill(own, **options), strict=True):
        assert torch.equal(found, wanted)
