"""Tracing a mixture of experts of a model class of plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from support.twin import Weights
from torch import nn

from vllm_nway_lora.rows.codes import ChangedError
from vllm_nway_lora.rows.experts import HeldExperts, trace_mixture
from vllm_nway_lora.rows.recorder import TraceError

EXPERTS, HIDDEN, LOCAL = 3, 6, 4
SHAPES = [(2 * LOCAL, HIDDEN), (HIDDEN, 2 * LOCAL), (2 * LOCAL, HIDDEN)]
STACKED = [(4 * LOCAL, HIDDEN), (HIDDEN, 2 * LOCAL)]
KINDS = ["gate", "down", "up"]
NAMES = [f"{expert}.{kind}" for expert in range(EXPERTS) for kind in KINDS]
OWN = list(range(LOCAL, 2 * LOCAL))


def parameter(rows: int, columns: int) -> Any:
    data = torch.empty(EXPERTS, rows, columns, device="meta")
    found: Any = nn.Parameter(data, requires_grad=False)
    found.weight_loader = load
    return found


def load(param: Any, loaded_weight: torch.Tensor, kind: str, expert: int) -> None:
    """Load one expert's matrix, as rank 1 of 2 does."""
    data = param.data[expert]
    if kind == "down":
        width = data.shape[1]
        data.copy_(loaded_weight.narrow(1, width, width))
        return
    half = len(data) // 2
    start = half if kind == "up" else 0
    data.narrow(0, start, half).copy_(loaded_weight.narrow(0, half, half))


class Model(nn.Module):
    """Experts one by one, or all experts of a projection in one tensor, columns before rows."""

    def __init__(self) -> None:
        super().__init__()
        self.w13, self.w2 = parameter(2 * LOCAL, HIDDEN), parameter(HIDDEN, LOCAL)

    def load_weights(self, weights: Weights) -> None:
        for name, weight in weights:
            first, _, kind = name.removesuffix(".weight").partition(".")
            if first.isdigit():
                self.load(int(first), kind, weight)
            elif first == "gate_up":
                for number, kind in enumerate(("gate", "up")):
                    for expert, one in enumerate(weight.transpose(1, 2).chunk(2, 1)[number]):
                        self.load(expert, kind, one)
            elif first == "down":
                for expert, one in enumerate(weight.transpose(1, 2)):
                    self.load(expert, "down", one)

    def load(self, expert: int, kind: str, weight: torch.Tensor) -> None:
        param = self.w2 if kind == "down" else self.w13
        param.weight_loader(param=param, loaded_weight=weight, kind=kind, expert=expert)


class Copying(Model):
    """Its experts' weights are copied without a loader, as GPT-OSS's are."""

    taken: ClassVar[list[int]] = []

    def load_weights(self, weights: Weights) -> None:
        for name, weight in weights:
            rows = weight.permute(0, 2, 1).contiguous()
            if not rows.is_meta:
                self.taken.append(rows.untyped_storage().nbytes())
            if name == "gate_up":
                self.w13.copy_(rows[:, 2 * LOCAL :])
            elif name == "down":
                self.w2.data.copy_(rows[..., LOCAL:])


def trace(model: nn.Module) -> HeldExperts | None:
    return trace_mixture(model, ("w13", "w2"), NAMES, KINDS, SHAPES)


def trace_stacked(model: nn.Module) -> HeldExperts | None:
    return trace_mixture(model, ("w13", "w2"), ["gate_up", "down"], KINDS[:2], STACKED, EXPERTS)


def test_experts_are_found_one_by_one() -> None:
    mixture = trace(Model())
    assert mixture is not None
    assert not mixture.is_stacked
    assert mixture.w13.modules.tolist() == [[3 * e] * LOCAL + [3 * e + 2] * LOCAL for e in range(3)]
    assert mixture.w13.rows.tolist() == [OWN + OWN]
    assert mixture.w13.columns.tolist() == [[list(range(HIDDEN))] * 2]
    assert mixture.w2.modules.tolist() == [[3 * e + 1] * HIDDEN for e in range(3)]
    assert mixture.w2.rows.tolist() == [list(range(HIDDEN))]
    assert mixture.w2.columns.tolist() == [[OWN] * 2]


@pytest.mark.parametrize(
    ("build", "rows"), [(Model, OWN + [2 * LOCAL + n for n in OWN]), (Copying, range(8, 16))]
)
def test_experts_are_found_in_one_tensor(build: type[Model], rows: Any) -> None:
    mixture = trace_stacked(build())
    assert mixture is not None
    assert mixture.is_stacked
    assert mixture.style == (True, build is Copying)
    assert mixture.w13.experts.tolist() == [[e] * 2 * LOCAL for e in range(3)]
    assert mixture.w13.modules.unique().tolist() == [0]
    assert mixture.w13.rows.tolist() == [list(rows)]
    assert mixture.w2.modules.unique().tolist() == [1]
    assert mixture.w2.columns.tolist() == [[OWN] * 2]


def test_experts_that_differ_are_kept_apart() -> None:
    class Other(Model):
        def load(self, expert: int, kind: str, weight: torch.Tensor) -> None:
            super().load(expert, kind, weight.flip(0) if (expert, kind) == (2, "up") else weight)

    mixture = trace(Other())
    assert mixture is not None
    assert mixture.w13.rows.tolist() == [OWN + OWN] * 2 + [[*OWN, 3, 2, 1, 0]]


def test_model_without_such_modules_has_no_trace() -> None:
    class Without(Model):
        def load(self, expert: int, kind: str, weight: torch.Tensor) -> None:
            pass

    assert trace(Without()) is None
    assert trace_stacked(Without()) is None


def fail(expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"expert {expert}")

    return change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda weight: weight * 2, ChangedError, "changes its values"),
        (lambda weight: weight.T, TraceError, "transposed or mixes|exceeds dimension size"),
        (fail(1), TraceError, "1.gate: ValueError: expert 1"),
    ],
)
def test_weights_that_are_no_copies_are_faults(
    change: Callable[[torch.Tensor], torch.Tensor], error: type[Exception], words: str
) -> None:
    class Other(Model):
        def load(self, expert: int, kind: str, weight: torch.Tensor) -> None:
            is_changed = (expert, kind) == (1, "gate")
            super().load(expert, kind, change(weight) if is_changed else weight)

    with pytest.raises(error, match=words):
        trace(Other())


def test_weights_in_a_third_place_are_a_fault() -> None:
    class Other(Model):
        def __init__(self) -> None:
            super().__init__()
            self.third = parameter(HIDDEN, LOCAL)

        def load(self, expert: int, kind: str, weight: torch.Tensor) -> None:
            super().load(expert, kind, weight)
            if kind == "down":
                self.third.weight_loader(self.third, weight, kind, expert)

    with pytest.raises(TraceError, match="loaded into third too"):
        trace(Other())


def test_tensors_without_memory_take_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contiguous copy of all experts of a real model takes gigabytes."""
    monkeypatch.setattr(Copying, "taken", [])
    assert trace_stacked(Copying()) is not None
    assert max(Copying.taken) <= 4 * 4 * LOCAL  # float32 numbers of the rows
