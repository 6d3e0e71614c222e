"""The files of a comparison: results.json, results.md, accuracy_vs_tokens.svg, records.jsonl."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from rstar.comparison.methods import Row
from rstar.comparison.published import COLUMNS, PUBLISHED, Published
from rstar.comparison.run import Found, Questions, Settings, flagged
from rstar.config import to_dict
from rstar.problems import BENCHMARKS
from rstar.report.charts import HEIGHT, WIDTH, Point, Series, line_chart, log_ticks
from rstar.report.results import NONE, count, measure
from rstar.store import write_json, write_rows

NOTES = """\
* Accuracy is in percent of all problems, with the 95% bootstrap interval over problems; an unanswered problem is wrong.
* `@k` is the number of trajectories: samples, or searches of their own. Samples are interchangeable, so k of n samples
  is the mean over random subsets, the same nested ones for every method; searches are counted off by seed (the first 1,
  4, ... of the same searches).
* `pass @k` counts a problem if any of k samples is right (unbiased estimate); nobody could choose that answer without
  the reference, so it is a bound for the choosing methods and not one of them.
* Tokens are all tokens that the policy generated, of failed and dropped steps too; what a verifier reads is not
  counted. Seconds are wall time of a problem beside those in flight with it. A part of the samples is charged that
  part of their cost.
* The first row is what every other is compared with, on the same problems: difference of the means with its paired
  bootstrap interval; wins and losses; p of McNemar's exact test, two-sided, where every value is right or wrong.
* Rows marked (paper) are rStar-Math's own figures (arXiv 2501.04519), not measured here; only for whole benchmarks.
"""


def write_comparison(found: Found, settings: Settings, out: Path) -> str:
    """Write the four files to `out`; returns the main table."""
    main = _main_table(found)
    write_json(out / "results.json", as_json(found, settings))
    write_rows(out / "records.jsonl", _records(found))
    (out / "accuracy_vs_tokens.svg").write_text(plot(found), encoding="utf-8")
    (out / "results.md").write_text(_markdown(found, main), encoding="utf-8")
    return main


def as_json(found: Found, settings: Settings) -> dict[str, Any]:
    """Everything that was measured, for programs."""
    return {
        "version": importlib.metadata.version("rstar"),
        "settings": to_dict(settings),
        "models": [asdict(contender) for contender in found.contenders],
        "benchmarks": [
            {"name": q.name, "problems": len(q.problems), "column": q.column, "needs_image": flagged(q)}
            for q in found.questions
        ],
        "rows": [asdict(row) for row in found.rows],
        "equal_tokens": [
            {"model": model, "benchmark": benchmark, "budgets": found.budgets[model, benchmark], "methods": table}
            for (model, benchmark), table in found.equal_tokens.items()
        ],
        "paper": [asdict(row) | {"accuracy": _shown(row, found)} for row in PUBLISHED if _shown(row, found)],
    }


def _records(found: Found) -> Iterator[dict[str, Any]]:
    """One line per model, benchmark, way of making answers, number of trajectories and problem."""
    listed = {row.trajectories for row in found.rows}
    for (model, benchmark), ways in found.records.items():
        pictures = {i for q in found.questions if q.name == benchmark for i in flagged(q)}
        for way, records in ways.items():
            for k in sorted(k for k in records if k in listed or way == "greedy"):
                for record in records[k]:
                    head = {"model": model, "benchmark": benchmark, "answers": way, "trajectories": k}
                    yield head | asdict(record) | {"needs_image": record.problem_id in pictures}


# -- tables ------------------------------------------------------------------------------------------------------------


def _markdown(found: Found, main: str) -> str:
    parts = ["# Evaluation", main, NOTES.rstrip(), *_warnings(found), "![Accuracy](accuracy_vs_tokens.svg)"]
    for q in found.questions:
        parts += [f"## {q.name}: {len(q.problems):,} problems", _details(found, q)]
        for contender in found.contenders:
            parts += [f"### {q.name}, {contender.name}: at equal tokens", _equal(found, contender.name, q.name)]
    return "\n\n".join(parts) + "\n"


def _warnings(found: Found) -> list[str]:
    said = []
    for q in found.questions:
        if pictures := flagged(q):
            shown = ", ".join(pictures[:10]) + (", ..." if len(pictures) > 10 else "")
            said.append(f"* {q.name}: {len(pictures)} problems need a picture that is not in their text ({shown}).")
        if q.name in BENCHMARKS and BENCHMARKS[q.name].column and not q.column:
            size = BENCHMARKS[q.name].size
            said.append(f"* {q.name}: {len(q.problems):,} problems of the paper's {size:,}; its figures are not shown.")
    return ["\n".join(said)] if said else []


def _main_table(found: Found) -> str:
    """The paper's columns first, then what else was evaluated; a row per model, method and k; the paper's rows last."""
    heads = {q.name: q.column or _column(q) for q in found.questions}
    columns = [*COLUMNS, *(name for name in heads.values() if name not in COLUMNS)]
    lines: list[Sequence[str]] = []
    for contender in found.contenders:
        own = [row for row in found.rows if row.model == contender.name]
        for label in dict.fromkeys(row.label for row in own):
            cells = {heads[row.benchmark]: row for row in own if row.label == label}
            tokens = fmean(row.tokens for row in cells.values())
            shown = (measure(cells[c].accuracy) if c in cells else NONE for c in columns)
            lines.append((contender.name, label, *shown, count(round(tokens))))
    for row in PUBLISHED:
        if known := _shown(row, found):
            shown = (f"{known[c]:.1f}" if c in known else NONE for c in columns)
            lines.append((f"{row.system} (paper, {row.source})", row.method, *shown, NONE))
    return _table(("model", "method", *columns, "tokens/problem"), lines)


def _column(q: Questions) -> str:
    """A part of one of the paper's benchmarks stands in its column, and says that it is a part."""
    known = BENCHMARKS.get(q.name)
    return known.column if known is not None and known.column else q.name


def _shown(row: Published, found: Found) -> dict[str, float]:
    """The paper's figures that have one of ours beside them."""
    return {q.column: row.accuracy[q.column] for q in found.questions if q.column in row.accuracy}


def _details(found: Found, q: Questions) -> str:
    lines = []
    for row in (row for row in found.rows if row.benchmark == q.name):
        against, p = row.against_first, ""
        if against is not None:
            p = "-" if against.p_value is None else f"{against.p_value:.3g}"
        lines.append(
            (
                row.model,
                row.label,
                measure(row.accuracy),
                count(round(row.tokens)),
                f"{row.seconds:.1f}",
                f"{row.engine_calls:.1f}",
                "first" if against is None else measure(against.difference),
                "" if against is None else f"{against.wins}/{against.losses}",
                p,
            )
        )
    heads = ("model", "method", "accuracy", "tokens/problem", "s/problem", "calls/problem")
    return _table((*heads, "against the first", "wins/losses", "McNemar p"), lines)


def _equal(found: Found, model: str, benchmark: str) -> str:
    """Budgets down, methods across: the accuracy of as many trajectories as the budget pays for."""
    table = found.equal_tokens[model, benchmark]
    lines = [
        (f"{budget:,.0f}", *(NONE if cell is None else f"{100 * cell[1]:.1f} @{cell[0]}" for cell in cells))
        for budget, *cells in zip(found.budgets[model, benchmark], *table.values(), strict=True)
    ]
    return _table(("tokens/problem, at most", *table), lines)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---" if head in ("model", "method") else "---:" for head in heads]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in (heads, rule, *lines))
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


# -- plot --------------------------------------------------------------------------------------------------------------


def plot(found: Found) -> str:
    """Accuracy against generated tokens per problem (logarithmic), a panel per benchmark and model, one SVG file."""
    panels = []
    for q in found.questions:
        for contender in found.contenders:
            own = [row for row in found.rows if (row.model, row.benchmark) == (contender.name, q.name)]
            panel = _panel([row for row in own if row.choice] or own)
            panels.append((f"{q.name}, {contender.name}: accuracy, %", panel))
    columns = min(len(found.contenders), len(panels))
    wide, high = WIDTH + 20, HEIGHT + 34
    parts = []
    for i, (title, chart) in enumerate(panels):
        x, y = (i % columns) * wide + 10, (i // columns) * high
        parts.append(f'<text class="title" x="{x + 8}" y="{y + 20}">{escape(title)}</text>')
        parts.append(f'<svg x="{x}" y="{y + 30}" width="{WIDTH}" height="{HEIGHT}" {chart.partition("<svg ")[2]}')
    size = columns * wide, math.ceil(len(panels) / columns) * high
    style = resources.files("rstar.report").joinpath("report.css").read_text(encoding="utf-8")
    style += f"svg svg {{ width: {WIDTH}px; height: {HEIGHT}px; }} svg text.title {{ fill: var(--front); }}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
        f'height="{size[1]}" font-family="sans-serif"><style>{escape(style, quote=False)}</style>'
        f'<rect width="100%" height="100%" style="fill: var(--back)"/>{"".join(parts)}</svg>\n'
    )


def _panel(own: Sequence[Row]) -> str:
    """One chart as text from its opening tag `<svg ` to its closing tag."""
    series = []
    for name in dict.fromkeys(row.method for row in own):
        points = (
            Point(math.log2(max(1.0, r.tokens)), *(100 * v for v in (r.accuracy.mean, r.accuracy.low, r.accuracy.high)))
            for r in own
            if r.method == name
        )
        series.append(Series(_SHORT.get(name.partition(" of top ")[0], name), tuple(points)))
    ticks = log_ticks([p.x for one in series for p in one.points])
    chart = line_chart("", series, ticks, x_name="generated tokens per problem")
    return chart.partition("</figcaption>")[2].removesuffix("</figure>")


_SHORT: Mapping[str, str] = {
    "weighted majority PPM": "maj PPM",
    "weighted majority ORM": "maj ORM",
    "best-of-n PPM": "best PPM",
    "best-of-n ORM": "best ORM",
    "mcts top score": "mcts top",
    "mcts majority": "mcts maj",
    "mcts weighted": "mcts weight",
}
