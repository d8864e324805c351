"""The pages of docs/upstream: their tests fail on stock vLLM as they state, and pass with their fixes."""

from __future__ import annotations

import re

import pytest
import vllm
from support.processes import evaluate
from support.upstream import PASSED, code_of, pages

from vllm_nway_lora.compat import defects
from vllm_nway_lora.compat.defects import DEFECTS

PAGES = pages()
RUN = """
import json
from support.upstream import run_all
from vllm_nway_lora.compat import registration

outcomes = run_all()
assert not registration.applied()
print()
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    found: dict[str, list[str]] = evaluate(RUN, VLLM_NWAY_LORA="0", OMP_NUM_THREADS="1")
    return found


def test_every_defect_of_the_newest_release_has_a_page() -> None:
    assert PAGES.keys() == {defect.name for defect in DEFECTS if defect.seen[-1].last is None}


@pytest.mark.parametrize(
    "name", [name for name in PAGES if defects.find(name).affects(vllm.__version__)]
)
def test_the_test_of_a_page_fails_on_stock_as_stated(
    name: str, outcomes: dict[str, list[str]]
) -> None:
    [stated] = re.findall(r"^It fails with `(.+)`\.$", PAGES[name].read_text(), re.MULTILINE)
    assert outcomes[name][0].startswith(stated), f"vLLM {vllm.__version__}: {outcomes[name][0]}"


@pytest.mark.parametrize("name", [name for name in PAGES if len(code_of(PAGES[name])) == 2])
def test_the_test_of_a_page_passes_with_its_fix(name: str, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[name][1] == PASSED
