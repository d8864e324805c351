"""Plots as SVG, written with the standard library only."""

from __future__ import annotations

from collections.abc import Mapping

COLOURS = {"stock": "#b0413e", "slices": "#d9a441", "plugin": "#2f6f9f", "PEFT": "#8a8a8a"}
#: Width of the longest bar, and height of a bar with the gap below it, in pixels.
WIDTH, HEIGHT = 360, 18


def bars(title: str, unit: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """Return horizontal bars in groups, each bar with its value, and a line at 1.

    Args:
        title: above the plot.
        unit: what 1 stands for.
        groups: the label of each group, with the values by name. What labels share up to a colon is
            written once, above the first group that has it.
    """
    # A letter of the labels is at most seven pixels wide on average.
    left = 44 + 7 * max((len(label.split(": ")[-1]) for label in groups), default=0)
    longest = max((value for group in groups.values() for value in group.values()), default=1)
    scale = WIDTH / max(longest, 1)
    parts, y, heading = [], 62, ""
    for label, group in groups.items():
        *above, own = label.split(": ")
        if above and above[0] != heading:
            heading = above[0]
            y += 6
            parts.append(f'<text x="10" y="{y + 12}" font-weight="bold">{heading}</text>')
            y += HEIGHT + 4
        parts.append(f'<text x="{24 if above else 10}" y="{y + 12}">{own}</text>')
        for name, value in group.items():
            length = max(1, round(scale * value))
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length}" height="14" fill="{COLOURS[name]}"/>'
            )
            parts.append(
                f'<text x="{left + length + 6}" y="{y + 12}" paint-order="stroke" stroke="white" '
                f'stroke-width="5">{name} {value:.2f}</text>'
            )
            y += HEIGHT
        y += 8
    place = round(left + scale)
    line = (
        f'<text x="{place}" y="48" text-anchor="middle" fill="#555">{unit}</text>\n'
        f'<path d="M{place} 54V{y - 4}" stroke="#555" stroke-dasharray="4 3"/>'
    )
    width = max(left + WIDTH + 110, 20 + 8 * len(title))
    body = "\n".join([f'<text x="10" y="22" font-weight="bold">{title}</text>', line, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 6}" '
        'font-family="sans-serif" font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n'
        f"{body}\n</svg>\n"
    )
