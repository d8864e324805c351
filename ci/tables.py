"""Tables in Markdown, and the places between two comments that they are written to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping


def fill(text: str, tables: Mapping[str, Callable[[], str]], script: str) -> str:
    """Return ``text`` with every table made anew, between the comments that name it and ``script``.

    Raises:
        ValueError: the text has no place for a table.
    """
    for name, make in tables.items():
        opening, closing = f"<!-- {name}, by {script} -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not found or not ended:
            raise ValueError(f"there is no place for the table {name!r} of {script}")
        text = f"{before}{opening}{make()}{closing}{after}"
    return text


def table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [headings, ("---",) * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
