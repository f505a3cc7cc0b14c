"""A bar chart as SVG text, written by hand so that the bench needs no plotting library.

One bar a server, from zero, so that lengths compare as the numbers do; a thin line
over each bar's end runs from the slowest to the fastest round. Knows nothing of what
is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, ROW, TOP = 720, 144, 110, 44, 64
STYLE = (
    "text{font:14px sans-serif;fill:#222}.small{font-size:12px;fill:#666}"
    ".bar{fill:#b8c4d6}.first{fill:#2f6db5}line{stroke:#222;stroke-width:2}"
)


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    value: float
    low: float
    high: float


def draw(title: str, note: str, bars: Sequence[Bar]) -> str:
    """An SVG document; the first bar is the one in colour."""
    height = TOP + ROW * len(bars) + 16
    scale = (WIDTH - LEFT - RIGHT) / max(bar.high for bar in bars)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img">'
        ),
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="16" y="26">{escape(title)}</text>',
        f'<text x="16" y="46" class="small">{escape(note)}</text>',
    ]
    for index, bar in enumerate(bars):
        y = TOP + ROW * index
        end, low, high = (LEFT + v * scale for v in (bar.value, bar.low, bar.high))
        kind = "bar first" if index == 0 else "bar"
        middle = y + 14
        shown = f"{bar.value:,.0f}" if bar.value >= 100 else f"{bar.value:.1f}"
        parts += [
            (
                f'<text x="{LEFT - 10}" y="{y + 19}" text-anchor="end">'
                f"{escape(bar.label)}</text>"
            ),
            (
                f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="28" '
                f'class="{kind}"/>'
            ),
            f'<line x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>',
            f'<text x="{high + 8:.1f}" y="{y + 19}">{shown}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
