"""Every way into vLLM's LoRA manager leads through admission."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import deliveries, incidents, manager, tiny
from support.ranks import Ranks
from support.tiny import MAX_LORAS, PREFIX, SHAPES

Tensors = dict[str, torch.Tensor]

LAYER = "model.layers.0."
QKV, Z = "linear_attn.in_proj_qkv", "linear_attn.in_proj_z"


@pytest.mark.parametrize("delivery", deliveries.ALL)
def test_good_adapters_are_exact_and_logged(ranks: Ranks, tmp_path: Path, delivery: str) -> None:
    ranks.run(manager.start, delivery=delivery)
    for number, modules in enumerate(
        (tuple(SHAPES), [LAYER + QKV, LAYER + Z], [LAYER + QKV], [LAYER + Z]), start=1
    ):
        folder = tiny.save(tmp_path / str(number), tiny.tensors(number, modules))
        ranks.run(manager.said, logging.INFO)
        assert ranks.run(manager.add, f"a{number}", number, folder) == [""] * ranks.size
        assert all(ranks.run(manager.is_exact, number, folder)), modules
        for [line] in ranks.run(manager.said, logging.INFO):
            named = (
                f"'a{number}' ({folder})"
                if delivery in deliveries.BY_WORKER
                else f"with id {number}"
            )
            assert line.startswith(f"LoRA adapter {named}")
            assert f" is served: {len(modules)} modules, " in line


def rename(module: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n.replace(module, f"{module}x"): t for n, t in tensors.items()}


def cut(module: str) -> Callable[[Tensors], Tensors]:
    name = f"{PREFIX}{LAYER}{module}.lora_B.weight"
    return lambda tensors: tensors | {name: tensors[name][:-4].contiguous()}


def remove(module: str) -> Callable[[Tensors], Tensors]:
    name = f"{PREFIX}{LAYER}{module}.lora_B.weight"
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def round_down(module: str) -> Callable[[Tensors], Tensors]:
    name = f"{PREFIX}{LAYER}{module}.lora_B.weight"
    return lambda tensors: tensors | {name: tensors[name].int()}


#: Fault -> function from good tensors to damaged ones, a part of the error.
FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "z misnamed": (rename("in_proj_z"), "in_proj_zx"),
    "q misnamed": (rename("q_proj"), "q_projx"),
    "z short": (cut(Z), "LoRA-B (32, r), found (4, 32) and (28, 4)"),
    "q short": (cut("self_attn.q_proj"), "LoRA-B (32, r), found (4, 32) and (28, 4)"),
    "o short": (cut("self_attn.o_proj"), "LoRA-B (32, r), found (4, 32) and (28, 4)"),
    "gate short": (cut("mlp.gate_proj"), "LoRA-B (48, r), found (4, 32) and (44, 4)"),
    "down short": (cut("mlp.down_proj"), "LoRA-B (32, r), found (4, 48) and (28, 4)"),
    "z without B": (remove(Z), "it has LoRA-A but no LoRA-B"),
    "q without B": (remove("self_attn.q_proj"), "it has LoRA-A but no LoRA-B"),
    "integers": (round_down(Z), "is torch.int32, not a floating-point type"),
}


@pytest.mark.parametrize("delivery", deliveries.ALL)
def test_damaged_adapters_are_refused_and_change_nothing(
    ranks: Ranks, tmp_path: Path, delivery: str
) -> None:
    resident = tiny.save(tmp_path / "resident", tiny.tensors(0))
    ranks.run(manager.start, delivery=delivery)
    for name, (damage, text) in FAULTS.items():
        folder = tiny.save(tmp_path / "bad", damage(tiny.tensors(1)))
        for attempt in ranks.run(manager.attempt, folder, resident):
            assert attempt.error.startswith("AdapterError: "), (name, attempt.error)
            assert text in attempt.error
            assert attempt.good, name


@pytest.mark.parametrize("delivery", deliveries.BY_WORKER)
def test_refusal_evicts_nothing(ranks: Ranks, tmp_path: Path, delivery: str) -> None:
    ranks.run(manager.start, delivery=delivery)
    good = tiny.save(tmp_path / "good", tiny.tensors(0))
    for number in range(1, MAX_LORAS + 1):
        assert ranks.run(manager.add, str(number), number, good) == [""] * ranks.size
    bad = tiny.save(tmp_path / "bad", cut(Z)(tiny.tensors(1)))
    assert all(ranks.run(manager.add, "bad", 9, bad))
    assert ranks.run(manager.resident) == [list(range(1, MAX_LORAS + 1))] * ranks.size


@pytest.mark.parametrize("delivery", ["files", "method before", "method after"])
def test_refused_replacement_keeps_the_old_adapter(
    ranks: Ranks, tmp_path: Path, delivery: str
) -> None:
    ranks.run(manager.start, delivery=delivery)
    good = tiny.save(tmp_path / "good", tiny.tensors(0))
    bad = tiny.save(tmp_path / "bad", cut(Z)(tiny.tensors(1)))
    assert ranks.run(manager.add, "a", 1, good) == [""] * ranks.size
    assert all(ranks.run(manager.add, "a", 1, bad, True))
    assert all(ranks.run(manager.is_exact, 1, good))
    assert ranks.run(manager.add, "a", 1, good, True) == [""] * ranks.size


@pytest.mark.parametrize("delivery", deliveries.ALL)
def test_failed_activation_leaves_nothing(ranks: Ranks, tmp_path: Path, delivery: str) -> None:
    path = f"{LAYER}mlp.down_proj"
    folder = tiny.save(tmp_path / "a", tiny.tensors(0))
    ranks.run(manager.start, delivery=delivery)
    ranks.run(incidents.break_layer, path)
    assert ranks.run(manager.add, "a", 1, folder) == [f"MemoryError: {path}"] * ranks.size
    assert not any(ranks.run(manager.has, 1))
    ranks.run(incidents.repair_layer, path)
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    assert all(ranks.run(manager.is_exact, 1, folder))


def test_interrupted_activation_leaves_nothing(ranks: Ranks, tmp_path: Path) -> None:
    """A notebook's user presses Ctrl-C."""
    folder = tiny.save(tmp_path / "a", tiny.tensors(0))
    ranks.run(manager.start)
    path = f"{LAYER}mlp.down_proj"
    assert ranks.run(incidents.interrupt, path, folder) == [False] * ranks.size


def test_adapter_without_a_slot_stays_registered(ranks: Ranks, tmp_path: Path) -> None:
    """As in stock vLLM, whose own tests expect it: no slot has been written."""
    folder = tiny.save(tmp_path / "a", tiny.tensors(0))
    ranks.run(manager.start, max_cpu_loras=MAX_LORAS + 1)
    ranks.run(incidents.pin_all, folder)
    for error in ranks.run(manager.add, "a", 9, folder):
        assert "pinned" in error
    assert all(ranks.run(manager.has, 9))


@pytest.mark.parametrize("delivery", ["files", "method before", "method after", "classes before"])
def test_prepared_adapter_is_loaded_and_examined_once(
    ranks: Ranks, tmp_path: Path, delivery: str
) -> None:
    folder = tiny.save(tmp_path / "a", tiny.tensors(0))
    ranks.run(manager.start, delivery=delivery)
    assert ranks.run(incidents.count_work, "a", 1, folder) == [(1, 1)] * ranks.size
    assert all(ranks.run(manager.is_exact, 1, folder))


@pytest.mark.parametrize(
    "other",
    [{"number": 2}, {"name": "b"}, {"path": "other"}],
    ids=["number", "name", "path"],
)
def test_adapter_that_was_prepared_for_another_request_is_not_used(
    ranks: Ranks, tmp_path: Path, other: dict[str, Any]
) -> None:
    request = {"name": "a", "number": 1, "path": "own"}
    for path in ("own", "other"):
        tiny.save(tmp_path / path, tiny.tensors(2))
    ranks.run(manager.start)
    ranks.run(incidents.prepare, tmp_path, **request | other)
    own = tiny.save(tmp_path / "own", tiny.tensors(1))
    assert ranks.run(manager.add, "a", 1, own) == [""] * ranks.size
    assert all(ranks.run(manager.is_exact, 1, own))


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
def test_dummy_adapters_of_warm_up_are_not_examined(ranks: Ranks, fully_sharded: bool) -> None:
    ranks.run(manager.start, fully_sharded=fully_sharded)
    ranks.run(manager.said, logging.INFO)
    assert ranks.run(incidents.warm_up) == [list(range(1, MAX_LORAS + 1))] * ranks.size
    assert ranks.run(manager.said, logging.INFO) == [[]] * ranks.size


def test_dummy_adapters_without_fused_layers_are_not_examined(ranks: Ranks) -> None:
    if not has_target_modules():
        pytest.skip("this release has no target_modules")
    ranks.run(manager.start, target_modules=["o_proj"])
    ranks.run(manager.said, logging.INFO)
    assert ranks.run(incidents.warm_up) == [list(range(1, MAX_LORAS + 1))] * ranks.size
    assert ranks.run(manager.said, logging.INFO) == [[]] * ranks.size


@pytest.mark.parametrize("delivery", deliveries.ALL)
def test_adapter_without_tensors_is_refused(ranks: Ranks, tmp_path: Path, delivery: str) -> None:
    ranks.run(manager.start, delivery=delivery)
    folder = tiny.save(tmp_path / "empty", {})
    for error in ranks.run(manager.add, "empty", 1, folder):
        assert "it has no LoRA tensors" in error


def test_adapter_is_examined_again_by_another_manager(ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "a", tiny.tensors(0))
    ranks.run(manager.start)
    for [line] in ranks.run(incidents.move_to_another_manager, folder):
        assert line.startswith("LoRA adapter with id 1 (from memory) is served: ")


def test_copy_of_an_added_adapter_is_added(ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "a", tiny.tensors(0))
    ranks.run(manager.start)
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    ranks.run(incidents.clone, 1, 2)
    assert all(ranks.run(manager.is_exact, 2, folder))


@pytest.mark.parametrize("delivery", ["files", "method after", "classes before", "classes after"])
def test_manager_is_ours_if_it_loads_through_admission(ranks: Ranks, delivery: str) -> None:
    ranks.run(manager.start, delivery=delivery)
    assert ranks.run(incidents.is_ours) == [delivery != "classes after"] * ranks.size
    assert ranks.run(incidents.is_ours, foreign=True) == [False] * ranks.size


def test_foreign_manager_loads_without_admission(ranks: Ranks, tmp_path: Path) -> None:
    """A platform's own manager below vLLM's worker manager."""
    folder = tiny.save(tmp_path / "a", cut(Z)(tiny.tensors(0)))
    ranks.run(manager.start)
    assert ranks.run(incidents.load_with_foreign_manager, folder) == ["LoRAModel"] * ranks.size


def has_target_modules() -> bool:
    from vllm.config.lora import LoRAConfig

    return "target_modules" in LoRAConfig.__dataclass_fields__


def test_objects_of_other_kinds_are_not_ours() -> None:
    from vllm_nway_lora.adapters.hooks import owns_manager

    for other in (None, SimpleNamespace(), SimpleNamespace(_load_adapter=None)):
        assert not owns_manager(other)
