"""`report.html`: one self-contained page of a run, made from its files alone, at any point of the run.

Tables and curves are written here; trees travel as JSON and are drawn by report.js, through textContent only. The page
loads nothing, and its content policy lets no script run but ours.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import orjson

from rstar.config import digest
from rstar.report.charts import Point, Series, bar_chart, line_chart
from rstar.report.results import (
    NONE,
    RoundResult,
    Results,
    Table,
    count,
    main_table,
    measure,
    results,
    share,
    training_table,
)
from rstar.report.sample import Sample, sample_trees
from rstar.rounds import RoundDir
from rstar.store import sync_folder

LOSS_POINTS = 120  # of a loss curve


def write_report(run: Path, *, trees: int = 12) -> Path:
    """Write `run`/report.html with about `trees` trees of each round; returns its path.

    Raises UserError where `run` is no run's folder. An unfinished run gives a page of what there is.
    """
    path = run / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(page(results(run), sample_trees(run, _search_rounds(run), per_round=trees)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(run)
    return path


def _search_rounds(run: Path) -> list[int]:
    return [one.number for one in results(run).rounds if one.number > 0]


def page(found: Results, sample: Sample) -> str:
    """The whole page as text."""
    script, style = _asset("report.js"), _asset("report.css")
    sha = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sections = [
        _section("results", "Results", _table(main_table(found)) + _curves(found)),
        _section("heldout", "Held-out set", _heldout(found)),
        _section("training", "Training", _training(found)),
        _section("search", "Search", _outcomes(found)),
        _section("cost", "Tokens and time", _cost(found)),
        _section("trees", "Search trees", _viewer(sample)),
        _section("settings", "Settings", _settings(found)),
    ]
    fields = {
        "POLICY": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{sha}'; base-uri 'none'; form-action 'none'",
        "TITLE": escape(f"{_name(found)} - rstar report"),
        "STYLE": style,
        "HEADER": _header(found),
        "BODY": "\n".join(section for section in sections if section),
        "DATA": _data(sample),
        "SCRIPT": script,
    }
    parts = _asset("report.html").split("{{")  # filled in one pass: no value can hold another field's place
    return parts[0] + "".join(fields[name] + rest for name, _, rest in (part.partition("}}") for part in parts[1:]))


def _asset(name: str) -> str:
    return resources.files("rstar.report").joinpath(name).read_text(encoding="utf-8")


def embedded(data: bytes) -> str:
    """JSON for the inside of a script element: no character is left that could end it."""
    text = data.decode("utf-8")
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _data(sample: Sample) -> str:
    blocks = [("data-entries", orjson.dumps(sample.entries)), *((f"data-{i}", tree) for i, tree in enumerate(sample.trees))]
    return "\n".join(f'<script type="application/json" id="{name}">{embedded(data)}</script>' for name, data in blocks)


# -- parts of the page -------------------------------------------------------------------------------------------------


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>\n{body}\n</section>' if body else ""


def _table(table: Table) -> str:
    spans: list[list[Any]] = []
    for group in table.groups:
        if spans and group and spans[-1][0] == group:
            spans[-1][1] += 1
        else:
            spans.append([group, 1])
    over = "".join(f'<th colspan="{columns}">{escape(group)}</th>' for group, columns in spans)
    rows = (
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    notes = "".join(f"<p class=note>{escape(note[0].upper() + note[1:])}.</p>" for note in table.notes)
    top = f"<tr class=groups>{over}</tr>" if any(table.groups) else ""
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in table.heads)
    return (
        f"<div class=wide><table><caption>{escape(table.title)}</caption><thead>{top}<tr>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _name(found: Results) -> str:
    return found.run.resolve().name


def _header(found: Results) -> str:
    last = found.rounds[-1]
    done = [one.number for one in found.rounds if one.number and "eval" in one.stages]
    state = f"{len(done)} finished round{'s' if len(done) != 1 else ''}"
    if "eval" not in last.stages:
        state += f", round {last.number} after its {last.stages[-1]} stage" if last.stages else f", round {last.number} begun"
    engine = found.setting("engine", "kind")
    facts = {
        "Base model": found.setting("model", "base"),
        "Engine": engine,
        "Training problems": _problems(found),
        "Settings digest": digest(found.settings),
        "Written by": f"rstar {found.version}" if found.version else None,
        "Files of": _newest(found),
    }
    said = _warmup(found)
    if engine == "simulated":
        said += " The engine is simulated: these figures exercise the system and say nothing about a model."
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items() if v)
    return (
        f"<h1>{escape(_name(found))}</h1><p class=lead>Self-evolution by tree search over executed steps: "
        f"{escape(state)}. {escape(said)}</p><dl class=facts>{items}</dl>"
    )


def _warmup(found: Results) -> str:
    base = found.setting("model", "base") or "the base model"
    if not found.warmup:
        return f"No warm-up: every round's policy is trained from {base} itself." if 0 in found.settings else ""
    rows, source = found.setting("warmup", "rows"), found.setting("warmup", "source")
    return (
        f"The warm-up is on: {base} was first fine-tuned on {rows} worked solutions ({source}), every round's policy is "
        "trained from that checkpoint, and row 0 measures it."
    )


def _problems(found: Results) -> str | None:
    pool = next((one.solved["all"][1] for one in found.rounds if "all" in one.solved), None)
    name = found.setting("problems", "name")
    return name if pool is None else f"{pool:,} of {name}" if name else f"{pool:,}"


def _newest(found: Results) -> str | None:
    manifests = [RoundDir(found.run, one.number).manifest for one in found.rounds]
    times = [path.stat().st_mtime for path in manifests if path.exists()]
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(max(times))) if times else None


def _curves(found: Results) -> str:
    def solved(level: str) -> Series:
        points = (Point(one.number, 100 * one.solved[level][0] / one.solved[level][1]) for one in found.rounds
                  if one.solved.get(level, (0, 0))[1])  # fmt: skip
        return Series("all" if level == "all" else f"level {level}", tuple(points), strong=level == "all")

    ticks = [(float(one.number), str(one.number) if one.number else "base") for one in found.rounds]
    heldout = {"greedy": ("greedy", "accuracy"), "PPM-guided": ("mcts", "accuracy")}
    if any(m.mean != one.guided.mean for one in found.rounds if one.guided for m in [one.measures["mcts"].get("majority")] if m):
        heldout["majority"] = ("mcts", "majority")
    return "<div class=figures>" + "".join([
        line_chart("Training problems solved by search, %", [solved(level) for level in found.levels],
                   [t for t in ticks if t[0] > 0], x_name="round"),
        line_chart("Held-out accuracy, %, with 95% intervals",
                   [Series(name, tuple(_measured(found.rounds, *key))) for name, key in heldout.items()],
                   ticks, x_name="round"),
    ]) + "</div>"  # fmt: skip


def _measured(rounds: Iterable[RoundResult], method: str, name: str) -> Iterable[Point]:
    for one in rounds:
        m = one.measures.get(method, {}).get(name)
        if m is not None and m.n:
            yield Point(one.number, 100 * m.mean, 100 * m.low, 100 * m.high)


def _heldout(found: Results) -> str:
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
    whole = _table(Table("all measures, %", groups, ("round", *(name for _, name in methods)), tuple(rows),
                         ("accuracy: the best-scored answer (greedy has one); majority and weighted: votes over "
                          "trajectories; pass: any answer is right; every problem counts, unanswered ones as wrong",)))  # fmt: skip
    levels = sorted({(m, level) for one in found.rounds for m, by in one.heldout_levels.items() for level in by})
    by_level = [
        (found.label(one.number), *(share(one.heldout_levels.get(m, {}).get(level)) for m, level in levels))
        for one in found.rounds
        if one.heldout_levels
    ]
    if len({level for _, level in levels}) < 2:
        return whole
    groups = ("", *(words.get(m, m) for m, _ in levels))
    return whole + _table(Table("accuracy by level, %", groups, ("round", *(level for _, level in levels)), tuple(by_level)))


def _training(found: Results) -> str:
    table = training_table(found)
    if not table.rows:
        return ""
    pairs = {
        "before training": [Point(one.number, 100 * one.pairs_before.accuracy) for one in found.rounds if one.pairs_before],
        "after": [Point(one.number, 100 * one.pairs_after.accuracy) for one in found.rounds if one.pairs_after],
    }
    rounds = [(float(one.number), str(one.number)) for one in found.rounds if one.number]
    charts = [
        line_chart(f"Policy loss over {'the warm-up and ' if found.warmup else ''}each round's training",
                   _losses(found, "policy"), _thirds(), x_name="share of the training", percent=False),
        line_chart("PPM loss over each round's training", _losses(found, "ppm"), _thirds(),
                   x_name="share of the training", percent=False),
        line_chart("Preference pairs that the PPM ranks rightly, %", [Series(n, tuple(p)) for n, p in pairs.items()],
                   rounds, x_name="round"),
    ]  # fmt: skip
    return _table(table) + "<div class=figures>" + "".join(charts) + "</div>"


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
        curves.append(Series(f"round {one.number}" if one.number else "warm-up", points, marks=len(points) <= 4))
    return curves


def _outcomes(found: Results) -> str:
    rounds = [one for one in found.rounds if one.outcomes]
    order = {"live": 0, "answer": 1, "code_error": 2, "malformed": 3, "max_depth": 4, "dead_end": 5}
    kinds = sorted({kind for one in rounds for kind in one.outcomes}, key=lambda kind: (order.get(kind, 9), kind))
    if not rounds:
        return ""
    bars = [(f"round {one.number}", {kind: float(one.outcomes.get(kind, 0)) for kind in kinds}) for one in rounds]
    rows = [
        (found.label(one.number), count(one.trees), count(one.rollouts), count(sum(one.outcomes.values())),
         *(f"{count(one.outcomes.get(kind, 0))} ({one.outcomes.get(kind, 0) / sum(one.outcomes.values()):.0%})" for kind in kinds))
        for one in rounds
    ]  # fmt: skip
    table = Table(
        "step outcomes", ("",) * (4 + len(kinds)), ("round", "trees", "rollouts", "steps", *kinds), tuple(rows),
        ("live: a step that can be continued; code_error and malformed steps are filtered and never backed up",),
    )  # fmt: skip
    return _table(table) + '<div class="figures">' + bar_chart("How steps ended", bars, unit="steps", whole=True) + "</div>"


def _cost(found: Results) -> str:
    def chart(title: str, unit: str, parts: Sequence[tuple[RoundResult, Mapping[str, float]]]) -> str:
        rows = [(f"round {one.number}" if one.number else "base", values) for one, values in parts]
        return bar_chart(title, rows, unit=unit)

    minutes = [(one, {name: seconds / 60 for name, seconds in one.seconds.items()}) for one in found.rounds]
    tokens = [(one, {name: float(n) for name, n in one.tokens.items()}) for one in found.rounds]
    stages = list(dict.fromkeys(name for one in found.rounds for name in one.seconds))
    kinds = list(dict.fromkeys(name for one in found.rounds for name in one.tokens))
    if not stages:
        return ""
    rows = [
        (found.label(one.number), *(f"{one.seconds[s] / 60:.1f}" if s in one.seconds else NONE for s in stages),
         *(count(one.tokens.get(kind)) for kind in kinds))
        for one in found.rounds
    ]  # fmt: skip
    groups = ("", *["minutes"] * len(stages), *["generated tokens"] * len(kinds))
    table = _table(Table("tokens and time by stage", groups, ("round", *stages, *kinds), tuple(rows)))
    charts = chart("Minutes by stage", "min", minutes) + chart("Generated tokens", "tokens", tokens)
    return table + f"<div class=figures>{charts}</div>"


def _viewer(sample: Sample) -> str:
    said = [f"Could not be read: {trouble}" for trouble in sample.problems]
    if sample.left_out:
        said.append(f"{sample.left_out} chosen trees are left out for the page's size; `rstar show RUN --problem ID` prints any.")
    notes = "".join(f"<p class=note>{escape(text)}</p>" for text in said)
    if not sample.entries:
        return notes
    rounds = sorted({int(str(entry["round"])) for entry in sample.entries})
    options = "".join(f'<option value="{number}">round {number}</option>' for number in rounds)
    return _asset("viewer.html").replace("<!--rounds-->", options) + notes


def _settings(found: Results) -> str:
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
    body = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(where)}</td><td>{escape(v)}</td></tr>' for k, where, v in rows)
    return (
        f"<details><summary>{len(rows)} recorded settings</summary><div class=wide><table class=left><thead><tr><th>key</th>"
        f"<th>where</th><th>value</th></tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _by_round(by_stage: Mapping[str, str]) -> tuple[str, str]:
    if len(set(by_stage.values())) == 1:
        return "all rounds", next(iter(by_stage.values()))
    places: dict[str, list[str]] = {}
    for where, value in by_stage.items():
        places.setdefault(value, []).append(where)
    return "differs", "; ".join(f"{value} (round {', '.join(where)})" for value, where in places.items())
