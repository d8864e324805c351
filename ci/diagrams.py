"""The drawings of docs/how-it-works.md: the slices of a fused projection, and the trace of its rows.

``ci/pictures.py`` saves them. A drawing has its own background, for pages of any colour, and the fonts of
the machine that shows it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

PUBLISHED = Path(__file__).resolve().parent.parent / "tests" / "published"
WIDTH = 760
STYLE = """
.page { fill: #ffffff; stroke: #d0d7de } .ink { fill: #1f2328 } .dim { fill: #59636e }
.box { fill: #eef1f4; stroke: #59636e } .line { stroke: #59636e; fill: none }
.a { fill: #bfdbfe } .b { fill: #bbf7d0 } .c { fill: #fde68a } .d { fill: #fbcfe8 }
.off { fill: #eef1f4 } .cell { stroke: #59636e }
.on { fill: #1f2328 }
text { font: 13px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
.small { font-size: 11px } .head { font-weight: 600; font-size: 14px }
.code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #3d444d } .ink { fill: #f0f6fc } .dim { fill: #9198a1 }
.box, .off { fill: #212830 } .box, .cell, .line { stroke: #9198a1 }
}
"""


@dataclass
class Drawing:
    """Shapes on a page of the width :data:`WIDTH`."""

    height: int
    title: str
    shapes: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, kind: str = "ink", anchor: str = "start") -> None:
        """Write a line of text; ``y`` is its baseline."""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, kind: str, text: str = ""
    ) -> None:
        """Draw a rectangle with a text in its middle. The text on a colour is dark in every scheme."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"'
            f' class="cell {kind}"/>'
        )
        ink = "ink" if kind in ("off", "box") else "on"
        self.text(x + width / 2, y + height / 2 + 4.5, text, f"{ink} small code", "middle")

    def band(self, left: float, top: float, right: float, bottom: float, width: float) -> None:
        """Join two rectangles of one width: the lower edge of one and the upper edge of the other."""
        points = ((left, top), (left + width, top), (right + width, bottom), (right, bottom))
        corners = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.shapes.append(f'<polygon points="{corners}" class="dim" opacity="0.18"/>')

    def arrow(self, x: float, y: float, length: float) -> None:
        """Draw an arrow to the right."""
        end = x + length
        self.shapes.append(
            f'<path d="M{x:g} {y:g}H{end:g}m-6 -4l6 4l-6 4" class="line" stroke-width="1.5"/>'
        )

    def svg(self) -> str:
        """Return the drawing as SVG."""
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        page = f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{self.height - 1}" rx="6" class="page"/>'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{STYLE}</style>",
                page,
                *self.shapes,
                "</svg>\n",
            ]
        )


def draw_slices() -> str:
    """Return the picture of Qwen3.5-9B's ``in_proj_qkvz`` on the first of two ranks."""
    text = json.loads((PUBLISHED / "Qwen3.5-9B.json").read_text())["text_config"]
    key = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    value = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    sizes = {"q": key, "k": key, "v": value, "z": value}
    kinds = dict(zip(sizes, "abcd", strict=True))
    unit = 600 / sum(sizes.values())
    drawing = Drawing(400, "Which rows of LoRA-B a rank takes, and the slices of its slot")
    drawing.text(20, 30, "LoRA-B of the two modules of an adapter (Qwen3.5-9B, its rows from left to right)",
                 "ink head")  # fmt: skip
    x, out = 50.0, 50.0
    modules = {"in_proj_qkv": "qkv", "in_proj_z": "z"}
    for module, outputs in modules.items():
        drawing.text(x, 52, f"{module}: {sum(sizes[o] for o in outputs)} rows", "dim small code")
        for name in outputs:
            half = sizes[name] / 2 * unit
            drawing.box(x, 60, half, 26, kinds[name], f"{name} {sizes[name] // 2}")
            drawing.box(x + half, 60, half, 26, "off", "rank 1")
            drawing.band(x, 86, out, 164, half)
            drawing.box(out, 164, half, 26, kinds[name], f"{name} {sizes[name] // 2}")
            x, out = x + 2 * half, out + half
        x += 20
    drawing.text(out + 14, 175, "Output of in_proj_qkvz on rank 0 of 2", "ink head")
    drawing.text(out + 14, 192, f"{sum(sizes.values()) // 2} columns", "dim small")
    drawing.text(20, 230, "Slices of the slot on rank 0", "ink head")
    rows = (("stock vLLM", [(name, name) for name in sizes]), ("this plugin", [*modules.items()]))
    for line, (side, slices) in enumerate(rows):
        y, x = 250 + line * 66, 130.0
        drawing.text(20, y + 29, side)
        for number, (_, outputs) in enumerate(slices):
            drawing.box(x, y, 26, 44, "box", "A")
            x += 30
            for name in outputs:
                half = sizes[name] / 2 * unit
                drawing.box(x, y, half, 44, kinds[name], f"B {name}")
                x += half
            x += 18 if number + 1 < len(slices) else 8
        copies = len(slices) - len(modules)
        note = f"A of in_proj_qkv {copies + 1} times" if copies else "each A once"
        drawing.text(x, y + 20, f"{len(slices)} slices,", "dim small")
        drawing.text(x, y + 36, note, "dim small")
    return drawing.svg()


#: Examples of the trace: module, rows in the checkpoint, and for each place the numbers that arrive there.
TRACES: tuple[tuple[str, int, dict[str, tuple[int, ...]], str], ...] = (
    (
        "in_proj_qkv of Qwen3.5, rank 0 of 2",
        8,
        {"in_proj_qkvz: q": (0,), "k": (2,), "v": (4, 5)},
        "consecutive outputs, a part of each",
    ),
    (
        "q_proj of Llama 4, a head of 8 rows",
        8,
        {"qkv_proj: q": (0, 2, 4, 6, 1, 3, 5, 7)},
        "permuted for the rotary embedding",
    ),
    ("k_proj of Gemma 4 31B", 4, {"qkv_proj: k": (0, 1, 2, 3), "v": (0, 1, 2, 3)}, "loaded twice"),
)


def draw_tracing() -> str:
    """Return the picture of three traces: numbered rows in, and where the numbers arrive."""
    cell, kinds = 24, "abcd"
    drawing = Drawing(360, "Numbered weights through load_weights show where each row goes")
    drawing.text(20, 30, "Row i of the weight contains the number i", "ink head")
    drawing.text(452, 30, "The numbers that arrive", "ink head")
    drawing.box(282, 46, 112, 292, "box")
    for line, words in enumerate(
        ("load_weights", "of the model's", "own class,", "on a twin", "without memory")
    ):
        kind = "ink small code" if line == 0 else "ink small"
        drawing.text(338, 160 + 18 * line, words, kind, "middle")
    for line, (module, rows, places, note) in enumerate(TRACES):
        y = 72 + 96 * line
        drawing.text(20, y - 8, module, "dim small")
        for row in range(rows):
            drawing.box(20 + row * cell, y, cell, cell, kinds[row * 4 // rows], str(row))
        drawing.arrow(20 + rows * cell + 8, y + cell / 2, 254 - rows * cell - 4)
        drawing.arrow(398, y + cell / 2, 46)
        x = 452.0
        for place, numbers in places.items():
            drawing.text(x, y - 8, place, "dim small")
            for number in numbers:
                drawing.box(x, y, cell, cell, kinds[number * 4 // rows], str(number))
                x += cell
            x += max(14, 6.2 * len(place) - cell * len(numbers) + 14)
        drawing.text(452, y + cell + 18, note, "dim small")
    drawing.text(452, 344, "The rows of LoRA-B go the same way.")
    return drawing.svg()


DIAGRAMS = {"slices": draw_slices, "tracing": draw_tracing}
