"""The texts of docs/troubleshooting.md are texts of this package or of vLLM, and tests expect them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_nway_lora.compat.defects import DEFECTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
STOCK, OWN = PAGE.split("## An adapter is refused")
#: Texts of vLLM about what this package leaves to it.
OF_VLLM = {
    "is unsupported LoRA weight",
    "is greater than max_lora_rank",
    "is not supported for LoRA",
    "LoRA is not supported for",
}


def texts(page: str) -> list[str]:
    """Return the first cells of a page's tables, without the quotes."""
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def strings(folder: Path) -> Iterator[str]:
    """Yield the string constants of every module in a folder."""
    for path in folder.rglob("*.py"):
        if path != Path(__file__):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


EXPECTED = "\n".join(strings(ROOT / "tests"))
PRODUCED = "\n".join(strings(ROOT / "vllm_nway_lora"))


def test_the_page_has_texts_of_both_kinds() -> None:
    assert len(texts(STOCK)) > 5
    assert len(texts(OWN)) > 15


@pytest.mark.parametrize("text", texts(STOCK))
def test_texts_of_stock_are_those_of_its_defects(text: str) -> None:
    assert text in {message for d in DEFECTS for seen in d.seen for message in seen.messages}


@pytest.mark.parametrize("text", texts(OWN))
def test_own_texts_are_produced_and_tested(text: str) -> None:
    for part in text.split(" ... "):
        if text not in OF_VLLM:
            assert part in PRODUCED
        assert part in EXPECTED
