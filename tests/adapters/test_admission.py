"""vLLM's own LoRA manager admits an adapter whole, or refuses it before anything changes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support import embeddings, manager, mutations, tiny
from support.ranks import Ranks
from support.tiny import PREFIX, RANK, SHAPES

LAYER = f"{PREFIX}model.layers.0."
Q, Z, ROUTER = (LAYER + m for m in ("self_attn.q_proj", "linear_attn.in_proj_z", "mlp.router"))
INPUT, HEAD, EMBED = (
    f"{LAYER}mlp.input_linear",
    f"{PREFIX}lm_head",
    f"{PREFIX}model.embed_tokens.lora_embedding_",
)
EMBED_BASE, HEAD_BASE = (
    f"{PREFIX}{m}.base_layer.weight" for m in ("model.embed_tokens", "lm_head")
)
A, B = ".lora_A.weight", ".lora_B.weight"

Tensors = dict[str, torch.Tensor]


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def pair(module: str, columns: int, rows: int, rank: int = RANK) -> Tensors:
    return {module + A: ones(rank, columns), module + B: ones(rows, rank)}


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
def test_good_adapters_are_admitted(ranks: Ranks, tmp_path: Path, fully_sharded: bool) -> None:
    ranks.run(manager.start, fully_sharded=fully_sharded)
    subsets = [tuple(SHAPES), *((module,) for module in SHAPES if ".layers.1." not in module)]
    for seed, modules in enumerate(subsets):
        folder = tiny.save(tmp_path / "good", tiny.tensors(seed, modules))
        assert ranks.run(manager.add, "good", seed + 1, folder) == [""] * ranks.size
        if not fully_sharded:  # where A is sharded, one rank's tensors do not make up its weight
            assert all(ranks.run(manager.is_exact, seed + 1, folder)), modules


def test_log_line_names_what_is_applied(ranks: Ranks, tmp_path: Path) -> None:
    tensors = tiny.tensors(
        0, [f"{LAYER.removeprefix(PREFIX)}{m}" for m in ("mlp.down_proj", "linear_attn.in_proj_z")]
    )
    folder = tiny.save(tmp_path / "a", tensors)
    ranks.run(manager.start)
    ranks.run(manager.said, logging.INFO)
    ranks.run(manager.add, "a", 1, folder)
    size = sum(tensor.nbytes for tensor in tensors.values())
    for [line] in ranks.run(manager.said, logging.INFO):
        assert line == (
            f"LoRA adapter 'a' ({folder}) is served: 2 modules, 1 of them in N-way fused projections, "
            f"rank {RANK}, {size} bytes."
        )


#: Case -> tensors to add to a good adapter (None: to remove), its config, part of the error.
REFUSED: dict[str, tuple[dict[str, torch.Tensor | None], dict[str, Any], str]] = {
    "no B": ({Q + B: None}, {}, "module model.layers.0.self_attn.q_proj: it has LoRA-A but no LoRA-B"),
    "no A": ({Z + A: None}, {}, "module model.layers.0.linear_attn.in_proj_z: it has LoRA-B but no"),
    "too few rows": ({Q + B: ones(31, RANK)}, {}, "QKVParallelLinear): expected LoRA-A (r, 32) and LoRA-B (32, r), found (4, 32) and (31, 4)"),
    "too many rows": ({Q + B: ones(64, RANK)}, {}, "LoRA-B (32, r), found (4, 32) and (64, 4)"),
    "too few rows, N-way": ({Z + B: ones(31, RANK)}, {}, "module in_proj_z of in_proj_qkvz: expected LoRA-A (r, 32) and LoRA-B (32, r), found (4, 32) and (31, 4)"),
    "half the rows, N-way": ({Z + B: ones(16, RANK)}, {}, "module in_proj_z of in_proj_qkvz: expected LoRA-A (r, 32) and LoRA-B (32, r), found (4, 32) and (16, 4)"),
    "no rows": ({Q + B: ones(0, RANK)}, {}, "LoRA-B (32, r), found (4, 32) and (0, 4)"),
    "one module of two outputs": ({INPUT + B: ones(24, RANK)}, {}, "expected LoRA-A (r, 32) and LoRA-B (48, r), found (4, 32) and (24, 4)"),
    "embedding": ({EMBED + "B": ones(31, RANK)}, {}, "module model.embed_tokens (layer model.embed_tokens, VocabParallelEmbedding): expected LoRA-A (r, 64) and LoRA-B (32, r), found (4, 64) and (31, 4)"),
    "lm_head, too few rows": ({HEAD + B: ones(63, RANK)}, {}, "expected LoRA-A (r, 32) and LoRA-B (64, r), found (4, 32) and (63, 4)"),
    "lm_head, too few columns": ({HEAD + A: ones(RANK, 31)}, {}, "expected LoRA-A (r, 32) and LoRA-B (64, r), found (4, 31) and (64, 4)"),
    "too few columns": ({ROUTER + A: ones(RANK, 31)}, {}, "ReplicatedLinear): expected LoRA-A (r, 32)"),
    "ranks differ": ({Q + A: ones(3, 32)}, {}, "the ranks of LoRA-A (3, 32) and LoRA-B (32, 4) differ"),
    "another rank than configured": (pair(Q, 32, 32, rank=2), {}, "adapter_config.json says rank 4, found LoRA-A (2, 32)"),
    "rank 0": (pair(Q, 32, 32, rank=0), {}, "says rank 4, found LoRA-A (0, 32)"),
    "1-D": ({Q + B: ones(32)}, {}, "expected two-dimensional tensors, found LoRA-A (4, 32) and LoRA-B (32,)"),
    "3-D": ({Q + A: ones(1, 4, 32)}, {}, "expected two-dimensional tensors"),
    "NaN": ({Q + A: ones(4, 32) * float("nan")}, {}, "LoRA-A times its scaling 1.0 has NaN or infinity"),
    "infinity": ({Z + B: ones(32, 4) * float("inf")}, {}, "LoRA-B times its scaling 2.0 has NaN or inf"),
    "bias": ({f"{Q}.lora_B.bias": ones(32)}, {}, "self_attn.q_proj.lora_B.bias"),
    "integers": ({Q + A: torch.ones(4, 32, dtype=torch.int8)}, {}, f"tensor {Q}{A} is torch.int8"),
    "one place twice": ({Q.removeprefix(PREFIX) + A: ones(4, 32)}, {}, "are both LoRA-A of module model.layers.0.self_attn.q_proj"),
    "no such layer": (pair(f"{PREFIX}model.layers.7.self_attn.q_proj", 32, 32), {}, "module model.layers.7.self_attn.q_proj: this model has no such layer"),
    "no such module": (pair(f"{LAYER}linear_attn.q_proj", 32, 32), {}, "layers.0.linear_attn.q_proj: this model has no such layer"),
    "trained embedding": ({EMBED_BASE: ones(64, 32)}, {}, f"tensor {EMBED_BASE} (64, 32) differs from the model's own weight (64, 32), and vLLM would ignore it"),
    "more tokens": ({EMBED_BASE: ones(70, 32)}, {}, f"tensor {EMBED_BASE} (70, 32) differs from the model's own weight (64, 32)"),
    "trained lm_head": ({HEAD_BASE: ones(64, 32)}, {}, f"tensor {HEAD_BASE} (64, 32) differs from the model's own"),
    "trained lm_head without LoRA": ({HEAD_BASE: ones(64, 32), HEAD + A: None, HEAD + B: None}, {}, f"tensor {HEAD_BASE} (64, 32) is not a LoRA tensor"),
    "base weight of a projection": ({f"{Q}.base_layer.weight": ones(32, 32)}, {}, "layers.0.self_attn.q_proj.base_layer.weight is unsupported"),
    "lm_head saved whole": ({f"{HEAD}.weight": ones(64, 32)}, {}, "lm_head.weight is unsupported"),
    "lm_head saved whole, by a wrapper": ({f"{HEAD}.modules_to_save.weight": ones(64, 32)}, {}, "lm_head.modules_to_save.weight is unsupported"),
    "X-LoRA": ({}, {"peft_type": "XLORA"}, "adapter_config.json has peft_type='XLORA'"),
    "Arrow": ({}, {"arrow_config": {"top_k": 3}}, "adapter_config.json has arrow_config={'top_k': 3}"),
    "unknown suffix": (pair(f"{LAYER}mlp.x_proj", 32, 32), {}, "module model.layers.0.mlp.x_proj: this model has no such layer"),
    "DoRA": ({}, {"use_dora": True}, "DoRA"),
    "rank above the limit": ({}, {"r": 16}, "16 is greater than max_lora_rank"),
    "alpha of no number": ({}, {"lora_alpha": float("nan")}, "times its scaling nan has NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_the_fault_and_changes_nothing(
    ranks: Ranks, tmp_path: Path, case: str
) -> None:
    changes, config, words = REFUSED[case]
    tensors = {**tiny.tensors(0), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    folder = tiny.save(tmp_path / "bad", kept, tiny.config(**config))
    tiny.save(tmp_path / "resident", tiny.tensors(1))
    ranks.run(manager.start)
    for attempt in ranks.run(manager.attempt, folder, tmp_path / "resident"):
        assert attempt.error.startswith(
            f"AdapterError: LoRA adapter 'mutant' ({folder}) is refused"
        )
        assert words in attempt.error
        assert attempt.good, attempt


def test_adapter_without_tensors_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(manager.start)
    folder = tiny.save(tmp_path / "empty", {})
    for error in ranks.run(manager.add, "empty", 1, folder):
        assert "it has no LoRA tensors" in error


def test_patterns_are_exact_on_every_release(ranks: Ranks, tmp_path: Path) -> None:
    """Until 0.31.0 vLLM ignores them."""
    tensors = tiny.tensors(0) | pair(Q, 32, 32, rank=2)
    folder = tiny.save(
        tmp_path / "a",
        tensors,
        tiny.config(rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"k_proj": 1}),
    )
    ranks.run(manager.start)
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    assert all(ranks.run(manager.is_exact, 1, folder))


@given(adapter=mutations.adapters())
@settings(max_examples=200, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_mutations_are_exact_or_refused(
    ranks: Ranks, tmp_path: Path, adapter: mutations.Adapter
) -> None:
    """``python3 ci/stress.py mutations`` does the same with 10,000 of them."""
    resident = tmp_path / "resident"
    if not resident.exists():
        tiny.save(resident, tiny.tensors(99))
        ranks.run(manager.start)
    for attempt in ranks.run(manager.attempt, adapter.save(tmp_path / "mutant"), resident):
        assert attempt.good, attempt
        assert not attempt.error or attempt.error.startswith("AdapterError: LoRA adapter 'mutant'")


def test_workaround_for_qwen3_5_serves_adapters_of_peft(ranks: Ranks, tmp_path: Path) -> None:
    """ART and older prime-rl change the mapping of Qwen3.5's class (vllm-project/vllm#36372)."""
    packed = {"in_proj_qkvz": ["in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"]}
    ranks.run(manager.start, packed=packed)
    for number, names in enumerate(["in_proj", "in_proj_qkv", "in_proj_z"], start=1):
        tensors = tiny.tensors(number, [module for module in SHAPES if names in module])
        folder = tiny.save(tmp_path / names, tensors)
        assert ranks.run(manager.add, names, number, folder) == [""] * ranks.size
        assert all(ranks.run(manager.is_exact, number, folder))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_bias_in_the_configuration_alone_is_served(ranks: Ranks, tmp_path: Path, bias: str) -> None:
    folder = tiny.save(tmp_path / "a", tiny.tensors(0), tiny.config(bias=bias))
    ranks.run(manager.start)
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    assert all(ranks.run(manager.is_exact, 1, folder))
    name = f"{Q}.bias"
    folder = tiny.save(tmp_path / "b", tiny.tensors(0) | {name: ones(32)}, tiny.config(bias=bias))
    for error in ranks.run(manager.add, "b", 2, folder):
        assert "self_attn.q_proj.bias" in error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unchanged_copies_of_base_weights_are_served(
    ranks: Ranks, tmp_path: Path, dtype: torch.dtype
) -> None:
    """PEFT saves the base weight of an embedding that has LoRA (``save_embedding_layers``)."""
    ranks.run(manager.start)
    whole = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    ranks.run(embeddings.load, whole)
    copies = {EMBED_BASE: whole.to(dtype), HEAD_BASE: whole.to(dtype).clone()}
    folder = tiny.save(tmp_path / "a", tiny.tensors(0) | copies)
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    assert all(ranks.run(manager.is_exact, 1, folder))
    copies[HEAD_BASE][-1, -1] += 1  # on the last rank only
    folder = tiny.save(tmp_path / "b", tiny.tensors(0) | copies)
    errors = ranks.run(manager.add, "b", 2, folder)
    assert f"tensor {HEAD_BASE} (64, 32) differs" in errors[-1]
    assert not any(errors[:-1])


def test_rank_equal_to_the_limit_is_exact(ranks: Ranks, tmp_path: Path) -> None:
    tensors = tiny.tensors(0, rank=tiny.MAX_RANK)
    folder = tiny.save(tmp_path / "a", tensors, tiny.config(r=tiny.MAX_RANK))
    ranks.run(manager.start)
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    assert all(ranks.run(manager.is_exact, 1, folder))


#: Modules that vLLM's own classes serve exactly, so that a test depends on one defect only.
STOCK_MODULES = [module for module in SHAPES if "in_proj" not in module]


class TestStock:
    """vLLM without this package. A test fails when upstream has fixed its defect."""

    @pytest.mark.parametrize("what", ["too few rows", "a layer that is not there"])
    def test_stock_serves_adapters_in_part(self, ranks: Ranks, tmp_path: Path, what: str) -> None:
        ranks.run(manager.start, mode="0")
        tensors = tiny.tensors(0, STOCK_MODULES)
        if what == "too few rows":
            tensors[Q + B] = tensors[Q + B][:31].contiguous()
        else:
            tensors |= pair(f"{PREFIX}model.layers.7.mlp.down_proj", 48, 32)
        folder = tiny.save(tmp_path / "a", tensors)
        assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size

    def test_stock_loses_the_old_adapter_on_failed_replacement(
        self, ranks: Ranks, tmp_path: Path
    ) -> None:
        tensors = tiny.tensors(0, STOCK_MODULES)
        good = tiny.save(tmp_path / "good", tensors)
        bad = tiny.save(tmp_path / "bad", {n: t for n, t in tensors.items() if n != ROUTER + B})
        ranks.run(manager.start, mode="0")
        assert ranks.run(manager.add, "a", 1, good) == [""] * ranks.size
        assert all(ranks.run(manager.add, "a", 1, bad, True))
        assert not any(ranks.run(manager.has, 1))
