"""Lines in an SVG file, with nothing but text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Line", "draw"]

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 110, 20, 50
_COLOURS = ("#999999", "#d95f02", "#1b6ca8", "#444444", "#7570b3")


@dataclass
class Line:
    """A named line through points (x, y)."""

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)
    dashed: bool = False


def draw(path: Path, lines: Sequence[Line], x_label: str, y_label: str) -> None:
    """Write the lines over one pair of axes that begin at 0."""
    most_x = max(x for line in lines for x, _ in line.points)
    most_y = 1.05 * max(y for line in lines for _, y in line.points)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = x / most_x * (_WIDTH - _LEFT - _RIGHT), y / most_y * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(_HEIGHT - _BOTTOM - up, 1)

    middle = _HEIGHT // 2
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _path([at(0, most_y), at(0, 0), at(most_x, 0)], "#000000", 1, dashed=False),
        f'<text x="{(_WIDTH - _RIGHT + _LEFT) // 2}" y="{_HEIGHT - 10}" text-anchor="middle">{x_label}</text>',
        f'<text x="15" y="{middle}" text-anchor="middle" transform="rotate(-90 15 {middle})">{y_label}</text>',
    ]
    for share in range(1, 5):
        x, y = at(0, share / 4 * most_y / 1.05)
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{share / 4 * most_y / 1.05:.0f}</text>')
    for value in sorted({x for line in lines for x, _ in line.points}):
        x, y = at(value, 0)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{value:g}</text>')
    for line, colour in zip(lines, _COLOURS, strict=False):
        points = [at(*point) for point in sorted(line.points)]
        parts.append(_path(points, colour, 2, dashed=line.dashed))
        parts.append(f'<text x="{points[-1][0] + 8}" y="{points[-1][1] + 4}" fill="{colour}">{line.name}</text>')
    path.write_text("\n".join([*parts, "</svg>", ""]))


def _path(points: Sequence[tuple[float, float]], colour: str, width: int, *, dashed: bool) -> str:
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    joined = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>'
