"""Markdown tables, and the places in a text, between two comments, where they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping


def fill(text: str, tables: Mapping[str, Callable[[], str]], script: str) -> str:
    """Return ``text`` with every table replaced, between the comments with its name and ``script``.

    Raises:
        ValueError: the text has no such comments for a table.
    """
    for name, make in tables.items():
        opening, closing = f"<!-- {name}, by {script} -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not found or not ended:
            raise ValueError(f"the text has no place for the table {name!r} of {script}")
        text = f"{before}{opening}{make()}{closing}{after}"
    return text


def table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ("---",) * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mark(verdict: str) -> str:
    """Return a verdict in bold if the adapter is not served as PEFT serves it."""
    outcome, colon, rest = verdict.partition(":")
    return verdict if outcome in ("exact", "matches") else f"**{outcome}**{colon}{rest}"
