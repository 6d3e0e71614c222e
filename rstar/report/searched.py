"""The sections about each round's search: outcomes, Q and N, what the PPM knew, newly solved and unsolved problems."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from rstar.report.charts import Point, Series, bar_chart, line_chart
from rstar.report.look import BINS, Look
from rstar.report.results import Results, RoundResult, Table, count
from rstar.report.sample import Sample
from rstar.report.sections import table_html

EXAMPLES = 6  # newly solved problems shown of each round
UNSOLVED = 20
QUESTION = 110  # characters of a question
ENOUGH = 10  # answers below the steps of a bin, without which it is not drawn


def search(found: Results, looks: Sequence[Look]) -> str:
    """How the steps of each round's search ended, their Q and N, and what the PPM knew of them."""
    table, bars = _outcomes([one for one in found.rounds if one.outcomes])
    charts = [bars, *_distributions(looks)]
    part = any(len(one.problems) < one.total for one in looks)
    read = max((len(one.problems) for one in looks), default=0)
    notes = [
        f"Q, N and PPM scores are those of {read:,} problems a round." * part,
        "The PPM is trained on pairs: its order counts, its level need not meet the diagonal." * bool(charts[-1]),
    ]
    said = "".join(f"<p class=note>{note}</p>" for note in notes if note)
    return table + (f"<div class=figures>{''.join(charts)}</div>{said}" if any(charts) else "")


def _outcomes(rounds: Sequence[RoundResult]) -> tuple[str, str]:
    order = {"live": 0, "answer": 1, "code_error": 2, "malformed": 3, "max_depth": 4, "dead_end": 5}
    kinds = sorted({kind for one in rounds for kind in one.outcomes}, key=lambda kind: (order.get(kind, 9), kind))
    if not rounds:
        return "", ""
    bars = [(f"round {one.number}", {kind: float(one.outcomes.get(kind, 0)) for kind in kinds}) for one in rounds]
    rows = [
        (
            str(one.number),
            count(one.trees),
            count(one.rollouts),
            count(sum(one.outcomes.values())),
            *(
                f"{count(one.outcomes.get(kind, 0))} ({one.outcomes.get(kind, 0) / sum(one.outcomes.values()):.0%})"
                for kind in kinds
            ),
        )
        for one in rounds
    ]
    table = Table(
        "step outcomes",
        ("",) * (4 + len(kinds)),
        ("round", "trees", "rollouts", "steps", *kinds),
        tuple(rows),
        ("live: a step that can be continued; code_error and malformed steps are filtered and never backed up",),
    )
    return table_html(table), bar_chart("How steps ended", bars, kinds=kinds, unit="steps", whole=True)


def _distributions(looks: Sequence[Look]) -> list[str]:
    """Charts of Q, of N, and of the answers found below a step over its PPM score."""
    visited = [found for found in looks if any(power > 0 for power in found.n)]  # elsewhere N is 1 throughout
    powers = range(max((power for found in visited for power in found.n), default=0) + 1)
    centres = [(2 * k + 1) / BINS - 1 for k in range(BINS)]
    ends = [(-1.0, "-1"), (0.0, "0"), (1.0, "1")]

    def scored(found: Look) -> Series:
        enough = ((k, right, n) for k, (right, n) in found.scored.items() if n >= ENOUGH)
        return Series(f"round {found.number}", tuple(Point(centres[k], 100 * right / n) for k, right, n in enough))

    ppm = [scored(found) for found in looks]
    if any(one.points for one in ppm):
        ppm.append(Series("calibrated", (Point(-1, 0), Point(1, 100)), strong=True, marks=False))
    return [
        line_chart("Q of the visited steps, % of the steps", [_shares(one, one.q, centres) for one in visited], ends,
                   x_name="Q"),
        line_chart("N of the visited steps, % of the steps", [_shares(one, one.n, powers) for one in visited],
                   [(float(k), str(2**k)) for k in powers], x_name="N: 1, 2 to 3, 4 to 7, ..."),
        line_chart("Correct answers below a step, %, by its PPM score", ppm, ends, x_name="PPM score (before search)"),
    ]  # fmt: skip


def _shares(found: Look, counts: Mapping[int, int], places: Sequence[float]) -> Series:
    total = sum(counts.values())
    points = (Point(place, 100 * counts.get(k, 0) / total) for k, place in enumerate(places))
    return Series(f"round {found.number}", tuple(points))


def problems(found: Results, looks: Sequence[Look], sample: Sample) -> str:
    """Examples newly solved in each round, and the unsolved ones of the last finished search with their answers."""
    searched = {one.number for one in found.rounds if one.stages}
    shown = {(entry["round"], entry["problem"]): entry for entry in sample.entries}

    def link(number: int, problem: str) -> str:
        entry = shown.get((number, problem))
        ident = quote(str(entry["id"]), safe="!'()*") if entry else ""  # as encodeURIComponent does
        return f"#tree={number}/{ident}" if entry else ""

    part = " among those looked at" if any(len(one.problems) < one.total for one in looks) else ""
    parts, rows, links = [], [], []
    for one in looks:
        newly = sorted(one.newly, key=lambda problem: not link(one.number, problem))  # those with a tree here first
        rows += [(problem, str(one.number), _short(one.newly[problem])) for problem in newly[:EXAMPLES]]
        links += [link(one.number, problem) for problem in newly[:EXAMPLES]]
    if rows:
        counts = "; ".join(f"{count(len(one.newly))} in round {one.number}" for one in looks if one.newly)
        table = Table(f"newly solved{part}: {counts}", ("",) * 3, ("problem", "round", "question"), tuple(rows))
        parts.append(table_html(table, links=links, words=True))
    last = next((one for one in reversed(looks) if one.number in searched), None)
    if last and last.unsolved:
        first = last.unsolved[:UNSOLVED]
        notes = [
            "an answer that most solutions agree on and that is not the reference is the sign of a wrong reference",
            *([f"{len(last.unsolved) - UNSOLVED} more: `rstar report RUN --unsolved N` lists them"]
              if len(last.unsolved) > UNSOLVED else []),
        ]  # fmt: skip
        table = Table(
            f"{count(len(last.unsolved))} unsolved in round {last.number}{part}, by how many answers agree",
            ("",) * 5,
            ("problem", "level", "reference", "most frequent answer", "question"),
            tuple((u.problem_id, u.level, u.reference, u.given, _short(u.question)) for u in first),
            tuple(notes),
        )
        parts.append(table_html(table, links=[link(last.number, u.problem_id) for u in first], words=True))
    return "".join(parts)


def _short(text: str) -> str:
    return textwrap.shorten(text, QUESTION, placeholder=" ...")
