"""Inline SVG: lines with intervals, and stacked bars. Colours are classes c0..c7 of report.css, shapes repeat them.

Text is escaped here; nothing that a chart shows is trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 40, 110, 14, 40
BAR_HEIGHT, BAR_GAP, BAR_LEFT = 22, 12, 92
LABEL_GAP = 15.0


@dataclass(frozen=True)
class Point:
    """One point; `low` and `high` bound its interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """A named line. `strong` draws it in the text's colour and thicker."""

    name: str
    points: tuple[Point, ...]
    strong: bool = False
    marks: bool = True


def line_chart(
    title: str,
    series: Sequence[Series],
    ticks: Sequence[tuple[float, str]],
    *,
    x_name: str,
    percent: bool = True,
) -> str:
    """A figure with one line per series, named at its right end. Empty text where no series has a point.

    Args:
        title: Caption.
        series: Lines in the order of their colours.
        ticks: (x, label) of the horizontal axis.
        x_name: What the horizontal axis counts.
        percent: Values are percentages: the axis starts at 0 and ends at 100 at most.
    """
    kinds = _kinds(series)
    shown = [one for one in series if one.points]
    if not shown:
        return ""
    values = [v for one in shown for p in one.points for v in (p.y, p.low, p.high) if v is not None]
    low, high, step = _scale(values, percent)
    xs = [x for x, _ in ticks] + [p.x for one in shown for p in one.points]
    first, last = min(xs), max(xs)

    def at_x(x: float) -> float:
        room = WIDTH - LEFT - RIGHT - 16
        return LEFT + 8 + (room / 2 if last == first else room * (x - first) / (last - first))

    def at_y(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    parts: list[str] = []
    for i in range(round((high - low) / step) + 1):
        y = low + i * step
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        parts.append(_text(LEFT - 6, at_y(y) + 4, f"{y:g}", "end"))
    parts.extend(_text(at_x(x), HEIGHT - BOTTOM + 18, label, "middle") for x, label in ticks)
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_name, "middle"))
    ends = _spread([at_y(one.points[-1].y) for one in shown], TOP + 4, HEIGHT - BOTTOM)
    for k, (one, end) in enumerate(zip(shown, ends, strict=True)):
        kind, mark = kinds[one.name]
        shift = 4.0 * (k - (len(shown) - 1) / 2) if any(p.low is not None for p in one.points) else 0.0
        parts.append(_line(one, mark, kind, at_x, at_y, shift))
        tail = one.points[-1]
        parts.append(
            f'<line class="lead {kind}" x1="{at_x(tail.x) + shift + 5:.1f}" y1="{at_y(tail.y):.1f}" '
            f'x2="{WIDTH - RIGHT + 8}" y2="{end:.1f}"/>'
        )
        parts.append(_text(WIDTH - RIGHT + 11, end + 4, _short(one.name, 13), "start", f"label {kind}"))
    unit = "%" if percent else ""
    says = "; ".join(f"{one.name}: " + ", ".join(f"{p.y:.3g}{unit}" for p in one.points[-12:]) for one in shown)
    return _figure(title, f"{title}. {says}", WIDTH, HEIGHT, parts)


def _kinds(series: Sequence[Series]) -> dict[str, tuple[str, int]]:
    """Name -> (class, shape) of every line, drawn or not: a round keeps its colour where another has no points."""
    plain = [one.name for one in series if not one.strong]
    found = {name: (f"c{i % COLOURS}", i) for i, name in enumerate(plain)}
    return found | {one.name: ("strong", len(plain)) for one in series if one.strong}


def log_ticks(exponents: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks of an axis of log2 values: the powers of two around `exponents`, nine at most."""
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    ticks = [(float(e), f"{2**e}" if e < 10 else f"{2 ** (e - 10)}k" if e < 20 else f"{2 ** (e - 20)}M")
             for e in range(low, high + 1)]  # fmt: skip
    return ticks[:: 1 + len(ticks) // 9]


def _line(
    one: Series, k: int, kind: str, at_x: Callable[[float], float], at_y: Callable[[float], float], shift: float
) -> str:
    places = [(at_x(p.x) + shift, at_y(p.y), p) for p in one.points]
    parts = [f'<polyline class="line {kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)}"/>']
    for x, y, p in places if one.marks else []:
        if p.low is not None and p.high is not None:
            parts.append(
                f'<line class="line {kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{at_y(p.low):.1f}" y2="{at_y(p.high):.1f}"/>'
            )
        between = f" [{p.low:.1f}, {p.high:.1f}]" if p.low is not None and p.high is not None else ""
        parts.append(f"<g>{_mark(k, x, y, kind)}<title>{escape(one.name)}: {p.y:.1f}{between}</title></g>")
    return "".join(parts)


def _mark(k: int, x: float, y: float, kind: str) -> str:
    match k % 4:
        case 0:
            return f'<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        case 1:
            return f'<rect class="mark {kind}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
        case 2:
            return f'<path class="mark {kind}" d="M{x:.1f} {y - 5:.1f} l5 8.5 h-10 z"/>'
        case _:
            return f'<path class="mark {kind}" d="M{x:.1f} {y - 5:.1f} l5 5 l-5 5 l-5 -5 z"/>'


def _scale(values: Sequence[float], percent: bool) -> tuple[float, float, float]:
    """(low, high, step) of a vertical axis: round numbers, at most six steps."""
    low, high = (0.0, max(values)) if percent or min(values) >= 0 else (min(values), max(values))
    span = max(high - low, 1.0 if percent else 1e-6)
    step = 10 ** math.floor(math.log10(span))
    step *= next(m for m in (0.2, 0.5, 1.0, 2.0, 5.0) if span / (step * m) <= 5)
    low = math.floor(low / step) * step
    high = low + math.ceil((low + span - low) / step) * step if high > low else low + step
    return low, min(high, 100.0) if percent else high, step


def _spread(places: Sequence[float], top: float, bottom: float) -> list[float]:
    """Places of labels: near their lines, at least LABEL_GAP apart while there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    gap = min(LABEL_GAP, (bottom - top) / max(1, len(places) - 1))
    found = list(places)
    previous = top - gap
    for i in order:
        found[i] = previous = max(places[i], previous + gap)
    limit = bottom
    for i in reversed(order):
        found[i] = min(found[i], limit)
        limit = found[i] - gap
    return found


def bar_chart(
    title: str, rows: Sequence[tuple[str, Mapping[str, float]]], *, kinds: Sequence[str], unit: str, whole: bool = False
) -> str:
    """Stacked horizontal bars with a legend, parts in the order of `kinds`; `whole` stretches every bar to 100%.

    Empty text without a value.
    """
    rows = [(label, parts) for label, parts in rows if sum(parts.values()) > 0]
    if not rows:
        return ""
    longest = max(sum(parts.values()) for _, parts in rows)
    room = WIDTH - BAR_LEFT - 60
    parts: list[str] = []
    for i, (label, values) in enumerate(rows):
        y = 4 + i * (BAR_HEIGHT + BAR_GAP)
        total = sum(values.values())
        x = float(BAR_LEFT)
        parts.append(_text(BAR_LEFT - 8, y + BAR_HEIGHT / 2 + 4, _short(label, 13), "end"))
        for k, kind in enumerate(kinds):
            wide = room * values.get(kind, 0.0) / (total if whole else longest)
            if wide > 0:
                says = f"{label}, {kind}: {_number(values[kind])} {unit} ({values[kind] / total:.0%})"
                parts.append(
                    f'<rect class="bar c{k % COLOURS}" x="{x:.1f}" y="{y}" width="{wide:.1f}" '
                    f'height="{BAR_HEIGHT}"><title>{escape(says)}</title></rect>'
                )
            x += wide
        parts.append(_text(x + 6, y + BAR_HEIGHT / 2 + 4, _number(total), "start"))
    legend = "".join(
        '<li><svg viewBox="0 0 10 10" aria-hidden="true">'
        f'<rect class="bar c{i % COLOURS}" width="10" height="10"/></svg>{escape(kind)}</li>'
        for i, kind in enumerate(kinds)
    )
    says = "; ".join(f"{label}: " + ", ".join(f"{k} {_number(v)}" for k, v in values.items()) for label, values in rows)
    height = 4 + len(rows) * (BAR_HEIGHT + BAR_GAP)
    return _figure(title, f"{title}. {says}", WIDTH, height, parts, f'<ul class="legend">{legend}</ul>')


def _figure(title: str, says: str, width: int, height: int, parts: Sequence[str], after: str = "") -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(says)}">{"".join(parts)}</svg>{after}</figure>'
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _number(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
