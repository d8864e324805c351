"""The texts of docs/troubleshooting.md are texts of this package or of vLLM, and tests expect them."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
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
    "does not support LoRA yet",
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


def test_drawings_are_up_to_date() -> None:
    code = (
        "import diagrams, json; print(json.dumps({n: d() for n, d in diagrams.DIAGRAMS.items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "ci", check=True, capture_output=True, text=True
    )
    drawings = json.loads(done.stdout)
    assert len(drawings) == 2
    for name, drawing in drawings.items():
        text = (ROOT / "docs" / f"{name}.svg").read_text()
        assert text == drawing, "run `python3 ci/pictures.py diagrams`"
        assert f"]({name}.svg)" in (ROOT / "docs" / "how-it-works.md").read_text()


def test_every_picture_is_on_a_page() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {link for page in pages for link in re.findall(r"\]\(([^)]+\.svg)\)", page.read_text())}
    pictures = {path.name for path in (ROOT / "docs").glob("*.svg")}
    assert len(pictures) == 5
    assert pictures == {Path(link).name for link in shown}


def test_links_between_the_pages_lead_to_files() -> None:
    pages = [*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")]
    links = [
        (page, link.partition("#")[0])
        for page in pages
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if ":" not in link and not link.startswith("#")
    ]
    assert len(links) > 50
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []
