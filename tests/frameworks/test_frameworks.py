"""Adapters are exact or refused beside RL frameworks and platforms, whoever patches vLLM first."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from support.frameworks import packages, serve
from support.frameworks.serve import FRAMEWORKS, ORDERS, STOCK, Served
from support.ranks import Ranks

#: They take LoRA layers of vLLM's classes only.
VLLMS_OWN = {name for name, framework in FRAMEWORKS.items() if not framework.takes_layers}

pytestmark = pytest.mark.parametrize("name", packages.chosen(FRAMEWORKS))
orders = pytest.mark.parametrize("order", ORDERS)


@functools.cache
def run(name: str, order: str) -> Served:
    """Run a stand-in in a process of its own; all tests share what it did."""
    ranks = Ranks(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            [served] = ranks.run(serve.serve, name, order, Path(folder))
    finally:
        ranks.close()
    assert isinstance(served, Served)
    return served


@orders
def test_lora_manager_starts_with_the_layers_of_this_package(name: str, order: str) -> None:
    served = run(name, order)
    assert not served.failed
    assert ("NWayLinearWithLoRA" in served.classes) == (name not in VLLMS_OWN)


@orders
def test_good_adapters_are_exact(name: str, order: str) -> None:
    """A whole adapter, and one on each module alone."""
    served = run(name, order)
    assert served.is_resident
    assert len(served.good) == 15
    for adapter, outcome in served.good.items():
        if name not in VLLMS_OWN and not adapter.endswith(FRAMEWORKS[name].unserved):
            assert (outcome.error, outcome.exact) == ("", True), adapter
        assert outcome.exact or outcome.gone, adapter


@orders
def test_what_stock_serves_is_served(name: str, order: str) -> None:
    stock, served = run(name, STOCK), run(name, order)
    assert not stock.failed
    exact = {adapter for adapter, outcome in stock.good.items() if outcome.exact}
    assert exact, "stock vLLM serves nothing beside this stand-in, which proves nothing"
    assert [adapter for adapter in exact if not served.good[adapter].exact] == []


@orders
def test_damaged_adapters_are_refused_before_a_slot_is_written(name: str, order: str) -> None:
    served = run(name, order)
    assert len(served.damaged) == 14 - len(FRAMEWORKS[name].unserved)
    for fault, outcome in served.damaged.items():
        assert outcome.gone, fault
        # vLLM's own layer of four outputs finds a part of the faults, when it is written.
        if name not in VLLMS_OWN or "linear_attn.in_proj" not in fault:
            assert "is refused on vLLM" in outcome.error, fault
            assert outcome.unwritten, fault


@orders
def test_unregister_restores_vllm(name: str, order: str) -> None:
    assert run(name, order).left == []


def test_own_package_is_run_where_it_is_given(name: str) -> None:
    """``ci/frameworks.py`` gives it."""
    expected = packages.is_given(name)
    assert all(run(name, order).is_own == expected for order in ORDERS)
