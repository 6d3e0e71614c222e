"""`report.html`: one self-contained page of a run, made from its files alone, at any point of the run.

Tables and curves are written here; trees travel as JSON and are drawn by report.js, through textContent only. The page
loads nothing, and its content policy lets no script run but ours.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

import orjson

from rstar.config import digest
from rstar.manifest import RoundDir
from rstar.report import searched, sections
from rstar.report.look import Look, look
from rstar.report.results import Results, main_table, results
from rstar.report.sample import Sample, sample_trees
from rstar.store import replacing


def write_report(run: Path, *, trees: int = 12, ids: Sequence[str] = ()) -> Path:
    """Write `run`/report.html with about `trees` trees of each round, and those that `ids` name; returns its path.

    An unfinished run gives a page of what there is. Raises UserError where `run` is no run's folder, and for an unknown
    problem or tree in `ids`.
    """
    found = results(run)
    looks, trouble = look(run, [one.number for one in found.rounds if one.number > 0])
    sample = sample_trees(run, looks, per_round=trees, ids=ids)
    path = run / "report.html"
    text = page(found, looks, sample, trouble).encode("utf-8", "backslashreplace")
    with replacing(path) as file:
        file.write(text)
    return path


def page(found: Results, looks: Sequence[Look], sample: Sample, trouble: Sequence[str] = ()) -> str:
    """The whole page as text; `trouble` is what could not be read."""
    script, style = _asset("report.js"), _asset("report.css")
    sha = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    body = [
        (
            "results",
            "Results",
            sections.table_html(main_table(found)) + sections.curves(found) + sections.recorded(found),
        ),
        ("heldout", "Held-out set", sections.heldout(found)),
        ("problems", "Problems", searched.problems(found, looks, sample)),
        ("trees", "Search trees", _viewer(sample, trouble)),
        ("search", "Search", searched.search(found, looks)),
        ("training", "Training", sections.training(found)),
        ("cost", "Tokens and time", sections.cost(found)),
        ("settings", "Settings", sections.settings(found)),
    ]
    body = [part for part in body if part[2]]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in body)
    fields = {
        "POLICY": f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{sha}'",
        "TITLE": escape(f"{_name(found)} - rstar report"),
        "STYLE": style,
        "HEADER": f"{_header(found)}<nav>{links}</nav>",
        "BODY": "\n".join(
            f'<section id="{name}"><h2>{escape(title)}</h2>\n{text}\n</section>' for name, title, text in body
        ),
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
    blocks = [
        ("data-entries", orjson.dumps(sample.entries)),
        *((f"data-{i}", tree) for i, tree in enumerate(sample.trees)),
    ]
    return "\n".join(f'<script type="application/json" id="{name}">{embedded(data)}</script>' for name, data in blocks)


# -- parts of the page -------------------------------------------------------------------------------------------------


def _name(found: Results) -> str:
    return found.run.resolve().name


def _header(found: Results) -> str:
    last = found.rounds[-1]
    done = [one.number for one in found.rounds if one.number and "eval" in one.stages]
    state = f"{len(done) or 'No'} finished round{'s' if len(done) != 1 else ''}"
    if "eval" not in last.stages:
        state += (
            f", round {last.number} after its {last.stages[-1]} stage"
            if last.stages
            else f", round {last.number} begun"
        )
    engine = found.setting("engine", "kind")
    facts = {
        "Base model": found.setting("model", "base"),
        "Engine": engine,
        "Training problems": _problems(found),
        "Machine": "; ".join(found.machines),
        "Settings digest": digest(found.settings),
        "Written by": found.version or None,
        "Files of": _newest(found),
    }
    said = _warmup(found)
    if engine == "simulated":
        said += " The engine is simulated: these figures exercise the system and say nothing about a model."
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items() if v)
    return (
        f"<h1>{escape(_name(found))}</h1><p class=lead>{escape(state)}. {escape(said)}</p><dl class=facts>{items}</dl>"
    )


def _warmup(found: Results) -> str:
    base = found.setting("model", "base") or "the base model"
    if not found.warmup:
        return f"No warm-up: every round's policy is trained from {base} itself." if 0 in found.settings else ""
    trained, source = found.rounds[0].policy, found.setting("warmup", "source")
    rows = f"{trained.rows:,} worked solutions" if trained else "worked solutions"
    return (
        f"The warm-up is on: {base} was first fine-tuned on {rows} ({source}), every round's policy "
        "is trained from that checkpoint, and row 0 measures it."
    )


def _problems(found: Results) -> str | None:
    pool = next((one.solved["all"][1] for one in found.rounds if "all" in one.solved), None)
    name = found.setting("problems", "name")
    return name if pool is None else f"{pool:,} of {name}" if name else f"{pool:,}"


def _newest(found: Results) -> str | None:
    manifests = [RoundDir(found.run, one.number).manifest for one in found.rounds]
    times = [path.stat().st_mtime for path in manifests if path.exists()]
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(max(times))) if times else None


def _viewer(sample: Sample, trouble: Sequence[str]) -> str:
    said = [f"Could not be read: {text}" for text in trouble]
    if sample.left_out:
        said.append(
            f"{sample.left_out} trees are left out for the page's size; `rstar report RUN --trees ID` shows any tree."
        )
    notes = "".join(f"<p class=note>{escape(text)}</p>" for text in said)
    if not sample.entries:
        return notes
    rounds = sorted({int(str(entry["round"])) for entry in sample.entries})
    options = "".join(f'<option value="{number}">round {number}</option>' for number in rounds)
    return _asset("viewer.html").replace("<!--rounds-->", options) + notes
