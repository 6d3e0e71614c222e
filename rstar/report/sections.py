"""The sections of the report that are tables and charts, as HTML. Everything that a file said is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from itertools import zip_longest

import orjson

from rstar.evaluation import Candidate, EvalRecord, Pick, bootstrap, chosen_share, top_score, vote
from rstar.manifest import RoundDir
from rstar.report.charts import Point, Series, bar_chart, line_chart, log_ticks
from rstar.report.results import NONE, Results, RoundResult, Table, count, in_order, measure, share, training_table
from rstar.store import read_json

LOSS_POINTS = 120  # of a loss curve


def table_html(table: Table, *, links: Sequence[str] = (), words: bool = False) -> str:
    """A table with its caption and notes, scrolling sideways where it is too wide.

    Args:
        table: What it says.
        links: Where the first cell of each row leads within the page; "" for nowhere.
        words: Its cells are words rather than figures.
    """
    over = "".join(f'<th colspan="{columns}">{escape(group)}</th>' for group, columns in table.spans)
    rows = (
        f'<tr><th scope="row">{_linked(row[0], link)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row, link in zip_longest(table.rows, links, fillvalue="")
    )
    notes = "".join(f"<p class=note>{escape(note[0].upper() + note[1:])}.</p>" for note in table.notes)
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    top = f"<tr class=groups>{over}</tr>" if any(table.groups) else ""
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in table.heads)
    return (
        f"<div class=wide><table{' class=left' if words else ''}>{caption}<thead>{top}<tr>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _linked(text: str, link: str) -> str:
    return f'<a href="{escape(link)}">{escape(text)}</a>' if link else escape(text)


def curves(found: Results) -> str:
    """Solved by level, and held-out accuracy with intervals, over the rounds."""

    def solved(level: str) -> Series:
        points = (
            Point(one.number, 100 * one.solved[level][0] / one.solved[level][1])
            for one in found.rounds
            if one.solved.get(level, (0, 0))[1]
        )
        return Series("all" if level == "all" else f"level {level}", tuple(points), strong=level == "all")

    ticks = [(float(one.number), str(one.number) if one.number else "base") for one in found.rounds]
    guided = {"verifier": ("verifier", "accuracy")} if found.verified else {"PPM-guided": ("mcts", "accuracy")}
    heldout = {"greedy": ("greedy", "accuracy"), **guided}
    if (found.setting("eval", "trajectories") or 1) > 1:
        heldout["majority"] = ("mcts", "majority")
    return (
        "<div class=figures>"
        + "".join(
            [
                line_chart(
                    "Training problems solved by search, %",
                    [solved(level) for level in found.levels if level != NONE],
                    [t for t in ticks if t[0] > 0],
                    x_name="round",
                ),
                line_chart(
                    "Held-out accuracy in %, with 95% intervals",
                    [Series(name, tuple(_measured(found.rounds, *key))) for name, key in heldout.items()],
                    ticks,
                    x_name="round",
                ),
            ]
        )
        + "</div>"
    )


def recorded(found: Results) -> str:
    """The tables and curves that a recipe has put into its rounds' eval.json; a curve is {title, x_name, series: {name:
    [[x, mean, low, high]]}}, accuracies in [0, 1]."""
    charts = []
    for one in found.rounds:
        path = RoundDir(found.run, one.number).eval_json
        for curve in read_json(path).get("curves", ()) if "eval" in one.stages and path.exists() else ():
            series = [
                Series(name, tuple(Point(x, *(100 * value for value in values)) for x, *values in points))
                for name, points in curve["series"].items()
            ]
            xs = sorted({point.x for line in series for point in line.points})
            title = f"Round {one.number}: {curve['title']}"
            charts.append(line_chart(title, series, [(x, f"{x:g}") for x in xs], x_name=curve["x_name"]))
    tables = "".join(table_html(table) for one in found.rounds for table in one.tables)
    return tables + (f"<div class=figures>{''.join(charts)}</div>" if charts else "")


def _measured(rounds: Iterable[RoundResult], method: str, name: str) -> Iterable[Point]:
    for one in rounds:
        m = one.measures.get(method, {}).get(name)
        if m is not None and m.n:
            yield Point(one.number, 100 * m.mean, 100 * m.low, 100 * m.high)


def heldout(found: Results) -> str:
    """Every measure of the held-out set, and accuracy by level."""
    methods = list(dict.fromkeys((m, name) for one in found.rounds for m, by in one.measures.items() for name in by))
    if not methods:
        return ""
    rows = [
        (found.label(one.number), *(measure(one.measures.get(m, {}).get(name)) for m, name in methods))
        for one in found.rounds
        if one.measures
    ]
    words = {"mcts": "PPM-guided search", "greedy": "greedy", "sample": "sampling"}
    groups = ("", *(words.get(m, m) for m, _ in methods))
    whole = table_html(
        Table(
            "all measures, %",
            groups,
            ("round", *(name for _, name in methods)),
            tuple(rows),
            (
                "accuracy: the best-scored answer (greedy has one); majority and weighted: votes over "
                "trajectories; pass: any answer is right; every problem counts, unanswered ones as wrong",
            ),
        )
    )
    spent = accuracy_against_tokens(found)
    levels = sorted({(m, level) for one in found.rounds for m, by in one.heldout_levels.items() for level in by})
    by_level = [
        (found.label(one.number), *(share(one.heldout_levels.get(m, {}).get(level)) for m, level in levels))
        for one in found.rounds
        if one.heldout_levels
    ]
    if len({level for _, level in levels}) < 2:
        return whole + spent
    groups = ("", *(words.get(m, m) for m, _ in levels))
    table = Table("accuracy by level, %", groups, ("round", *(level for _, level in levels)), tuple(by_level))
    return whole + table_html(table) + spent


def accuracy_against_tokens(found: Results) -> str:
    """What more generated tokens buy with the newest models: greedy, and k of the solutions that each problem has."""
    last = next((one for one in reversed(found.rounds) if "eval" in one.stages), None)
    path = RoundDir(found.run, last.number).eval_json if last else None
    if last is None or path is None or not path.exists():
        return ""
    majority = partial(vote, top_k=found.setting("eval", "top_k") or 0)
    choices: Mapping[str, Mapping[str, Pick]] = {
        "greedy": {"greedy": top_score},
        "sample": {"vote": vote},
        "mcts": {"PPM-guided": top_score, "majority": majority},
    }
    series = []
    for method, one in read_json(path)["methods"].items():
        if method not in choices:
            continue
        candidates = [tuple(Candidate(**c) for c in row.pop("candidates")) for row in one.get("records", ())]
        records = [EvalRecord(candidates=c, **row) for c, row in zip(candidates, one.get("records", ()), strict=True)]
        n = max((record.samples for record in records), default=0)
        cost = sum(record.tokens for record in records) / max(1, len(records))
        if not cost:
            continue
        sizes = sorted({n, *(4**e for e in range(n.bit_length()) if 4**e < n)})
        for name, pick in choices[method].items():
            if name == "majority" and n == 1:
                continue
            measured = [(k, bootstrap([chosen_share(record, k, pick) for record in records])) for k in sizes]
            points = (Point(math.log2(cost * k / n), 100 * m.mean, 100 * m.low, 100 * m.high) for k, m in measured)
            series.append(Series(name, tuple(points)))
    if len(series) < 2:
        return ""
    chart = line_chart(
        f"Held-out accuracy of round {last.number} in %, by generated tokens",
        series,
        log_ticks([point.x for one in series for point in one.points]),
        x_name=f"tokens per problem{', at 1, 4, 16, ... solutions' if any(len(s.points) > 1 for s in series) else ''}",
    )
    return f"<div class=figures>{chart}</div>"


def training(found: Results) -> str:
    """Rows, pairs, losses and pair accuracy."""
    table = training_table(found)
    if not table.rows:
        return ""
    pairs = {
        "before": [Point(one.number, 100 * one.pairs_before.accuracy) for one in found.rounds if one.pairs_before],
        "after": [Point(one.number, 100 * one.pairs_after.accuracy) for one in found.rounds if one.pairs_after],
    }
    rounds = [(float(one.number), str(one.number)) for one in found.rounds if one.number]
    charts = [
        line_chart(
            f"Policy loss over {'the warm-up and ' if found.warmup else ''}each round's training",
            _losses(found, "policy"),
            _thirds(),
            x_name="share of the training",
            percent=False,
        ),
        line_chart(
            f"{'Verifier' if found.verified else 'PPM'} loss over each round's training",
            _losses(found, "verifier" if found.verified else "ppm"),
            _thirds(),
            x_name="share of the training",
            percent=False,
        ),
        line_chart(
            "Preference pairs that the PPM ranks rightly, %, before and after training",
            [Series(n, tuple(p)) for n, p in pairs.items()],
            rounds,
            x_name="round",
        ),
    ]
    return table_html(table) + "<div class=figures>" + "".join(charts) + "</div>"


def _thirds() -> list[tuple[float, str]]:
    return [(0.0, "0"), (0.5, "half"), (1.0, "end")]


def _losses(found: Results, which: str) -> list[Series]:
    """Loss curves, one per round, from the trainer's metrics files; each point is a mean over a stretch of steps."""
    curves = []
    for one in found.rounds:
        path = RoundDir(found.run, one.number).path / f"{which}-metrics.jsonl"
        finished = which in one.stages or (one.number == 0 and "base" in one.stages)
        if not finished or not path.exists():
            continue
        losses = [float(orjson.loads(line)["loss"]) for line in path.read_bytes().splitlines() if line]
        width = max(1, -(-len(losses) // LOSS_POINTS))
        stretches = [losses[i : i + width] for i in range(0, len(losses), width)]
        last = max(1, len(stretches) - 1)
        points = tuple(Point(i / last, sum(part) / len(part)) for i, part in enumerate(stretches))
        name = f"round {one.number}" if one.number else "warm-up"
        curves.append(Series(name, points, strong=not one.number, marks=len(points) <= 4))
    return curves


def cost(found: Results) -> str:
    """Minutes and generated tokens by stage."""
    labels = [f"round {one.number}" if one.number else "base" for one in found.rounds]
    minutes = [{name: seconds / 60 for name, seconds in one.seconds.items()} for one in found.rounds]
    tokens = [{name: float(n) for name, n in one.tokens.items()} for one in found.rounds]
    stages = sorted({name for one in found.rounds for name in one.seconds}, key=in_order)
    token_kinds = sorted(
        {name for one in found.rounds for name in one.tokens}, key=lambda kind: (kind != "search", kind)
    )
    if not stages:
        return ""
    rows = [
        (
            found.label(one.number),
            *(f"{one.seconds[s] / 60:.1f}" if s in one.seconds else NONE for s in stages),
            *(count(one.tokens.get(kind)) for kind in token_kinds),
        )
        for one in found.rounds
    ]
    groups = ("", *["minutes"] * len(stages), *["generated tokens"] * len(token_kinds))
    table = table_html(Table("tokens and time by stage", groups, ("round", *stages, *token_kinds), tuple(rows)))
    charts = bar_chart("Minutes by stage", list(zip(labels, minutes, strict=True)), kinds=stages, unit="min")
    charts += bar_chart("Generated tokens", list(zip(labels, tokens, strict=True)), kinds=token_kinds, unit="tokens")
    return table + f"<div class=figures>{charts}</div>"


def settings(found: Results) -> str:
    """Every recorded setting, those that differ between rounds or stages first."""
    values: dict[str, dict[str, str]] = {}
    for number, stages in found.settings.items():
        for stage, sections in stages.items():
            for section, part in sections.items():
                for key, value in part.items() if isinstance(part, dict) else [("", part)]:
                    where = f"{section}.{key}".rstrip(".")
                    values.setdefault(where, {})[f"{number} {stage}"] = str(value)
    if not values:
        return ""
    rows = [(key, *_by_round(by)) for key, by in values.items()]
    rows.sort(key=lambda row: (row[1] == "all rounds", row[0]))
    body = "".join(
        f'<tr><th scope="row">{escape(k)}</th><td>{escape(where)}</td><td>{escape(v)}</td></tr>' for k, where, v in rows
    )
    return (
        f"<details><summary>{len(rows)} recorded settings</summary><div class=wide><table class=left><thead><tr>"
        f"<th>key</th><th>where</th><th>value</th></tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _by_round(by_stage: Mapping[str, str]) -> tuple[str, str]:
    if len(set(by_stage.values())) == 1:
        return "all rounds", next(iter(by_stage.values()))
    places: dict[str, list[str]] = {}
    for where, value in by_stage.items():
        places.setdefault(value, []).append(where)
    return "differs", "; ".join(f"{value} (round {', '.join(where)})" for value, where in places.items())
