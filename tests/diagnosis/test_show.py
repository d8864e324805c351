"""Tests of the text that ``check`` and ``plan`` print."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from vllm_nway_lora.diagnosis.report import Cost, Outcome, Report, Row, Verdict
from vllm_nway_lora.diagnosis.show import break_path, format_bytes, show_check, show_plan


def text_of(show: Callable[[Report, Console], None], report: Report) -> str:
    output = io.StringIO()
    show(report, Console(file=output, width=80))
    return output.getvalue()


@pytest.mark.parametrize(("rank", "expected"), [(16, False), (32, True)])
def test_a_rank_over_the_servers_default_is_said(rank: int, expected: bool) -> None:
    report = Report([], Verdict(), Verdict(), max_lora_rank=rank)
    assert ("the server needs --max-lora-rank 32" in text_of(show_check, report)) == expected


def test_exact_says_that_modules_are_left_out() -> None:
    report = Report([], Verdict(), Verdict(), left_out={"no LoRA there": ["visual.qkv"]})
    text = text_of(show_check, report)
    assert "left out with a warning: visual.qkv (no LoRA there)" in text
    assert "without the modules that are left out" in text


def test_a_plan_groups_modules_by_outcome_and_gives_the_cost() -> None:
    rows = [
        Row("model.layers.*.mlp.down_proj", {"down_proj": None}, 0),
        Row(
            "model.layers.*.attn.kv_b_proj",
            {"kv_b_proj": None},
            0,
            stock=Verdict(Outcome.IGNORED, "past its LoRA"),
            plugin=Verdict(Outcome.REFUSED, "past its LoRA"),
        ),
    ]
    costs = {"stock": Cost(3, 1024), "plugin": Cost(2, 1024)}
    text = text_of(show_plan, Report(rows, Verdict(), Verdict(), costs=costs, max_lora_rank=64))
    assert "exact: down_proj" in text
    assert "refused: kv_b_proj (past its LoRA)" in text
    assert "cost of a slot at --max-lora-rank 64: 2 slices, 64.0 KiB on each GPU" in text
    assert "down_proj" not in text.partition("LoRA on this model")[0]


def test_paths_break_at_dots_only() -> None:
    path = "lora.model_manager.LoRAModelManager._create_lora_modules"
    lines = break_path(path, 24).split("\n")
    assert "".join(lines) == path
    assert all(line.endswith(".") for line in lines[:-1])


def test_sizes() -> None:
    assert [format_bytes(size) for size in (512, 2048, 3 << 20, 5 << 30)] == [
        "512 bytes",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]
