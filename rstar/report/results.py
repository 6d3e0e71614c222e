"""The figures of a run, a row per round, read from its manifests and eval.json files alone, and their text tables.

Round N's search uses the models of round N-1, its held-out accuracy those that round N trained. Row 0 is the base (or
its warm-up): it is measured on the held-out set and searches nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rstar.evaluation import Measure
from rstar.manifest import RoundDir, StageRecord
from rstar.store import read_json
from rstar.types import UserError

NONE = "-"  # a figure that does not exist (yet)
STAGES = ("base", "search", "candidates", "extract", "policy", "ppm", "verifier", "eval")


@dataclass(frozen=True)
class PairFigures:
    """How the PPM ranks preference pairs; accuracy and calibration error in [0, 1], loss in nats."""

    pairs: int
    accuracy: float
    loss: float
    calibration_error: float | None


@dataclass(frozen=True)
class TrainFigures:
    """One training run: losses of optimizer batches (mean: over the last epoch), tokens computed."""

    rows: int
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    mean_loss: float


@dataclass(frozen=True)
class RoundResult:
    """One round. None, or an empty mapping, stands for a stage that is not finished or does not exist."""

    number: int
    stages: tuple[str, ...]  # finished ones, in the order they run
    solved: Mapping[str, tuple[int, int]]  # training pool: level -> (solved, all), "all" last
    trees: int | None
    rollouts: int | None
    outcomes: Mapping[str, int]  # terminal reason, or "live" -> nodes of the search
    measures: Mapping[str, Mapping[str, Measure]]  # held-out set: method -> measure's name -> value
    heldout_levels: Mapping[str, Mapping[str, tuple[int, int]]]  # method -> level -> (correct, all) of its accuracy
    tokens: Mapping[str, int]  # generated: "search", "eval greedy", ...
    seconds: Mapping[str, float]  # wall-clock, by stage
    sft_rows: int | None
    pairs: int | None
    policy: TrainFigures | None  # of the base's row: the warm-up
    ppm: TrainFigures | None
    pairs_before: PairFigures | None  # PPM on held-out pairs (on its training pairs where none are held out)
    pairs_after: PairFigures | None
    pairs_heldout: bool
    tables: tuple[Table, ...] = ()  # that the recipe has put into eval.json

    @property
    def greedy(self) -> Measure | None:
        """Held-out accuracy of one greedy solution."""
        return self.measures.get("greedy", {}).get("accuracy")

    @property
    def guided(self) -> Measure | None:
        """Held-out accuracy of the best-scored answer of a PPM-guided search, or among a verifier's completions."""
        return self.measures.get("mcts", self.measures.get("verifier", {})).get("accuracy")

    @property
    def total_tokens(self) -> int | None:
        return sum(self.tokens.values()) if self.tokens else None

    @property
    def total_seconds(self) -> float | None:
        return sum(self.seconds.values()) if self.seconds else None


@dataclass(frozen=True)
class Results:
    """A run's figures and what it was."""

    run: Path
    rounds: tuple[RoundResult, ...]  # by number; a round whose folder has no finished stage is there too
    warmup: bool
    settings: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # round -> stage -> the settings it read
    version: str = ""
    machines: tuple[str, ...] = ()  # on which stages ran, by first use

    @property
    def verified(self) -> bool:
        """Whether completions were ranked by an outcome verifier."""
        return any("verifier" in one.stages for one in self.rounds)

    @property
    def levels(self) -> list[str]:
        """Levels of the training pool, "all" last."""
        found = {level for one in self.rounds for level in one.solved}
        return sorted(found, key=lambda level: (level == "all", level))

    def setting(self, section: str, key: str) -> Any:
        """The first recorded value of `section.key`, whatever stage read it; None where none did."""
        for stages in self.settings.values():
            for sections in stages.values():
                value = sections.get(section)
                if isinstance(value, Mapping) and key in value:
                    return value[key]
        return None

    def label(self, number: int) -> str:
        """A row's name: the round's number; row 0 says what it is."""
        return str(number) if number else "0 base (warm-up)" if self.warmup else "0 base"


def round_numbers(run: Path) -> list[int]:
    """Numbers of the round folders of a run. Raises UserError where the path is no run."""
    found = sorted(
        int(path.name.removeprefix("round_"))
        for path in run.glob("round_*")
        if path.is_dir() and path.name.removeprefix("round_").isdigit()
    )
    if not found:
        raise UserError(
            f"{run} holds no rounds",
            need="the folder of a run",
            how="give run.dir of a run, for example runs/quickstart",
        )
    return found


def results(run: Path) -> Results:
    """Read the figures of a run, finished or not. Raises UserError where the path is no run."""
    rounds: list[RoundResult] = []
    settings: dict[int, dict[str, Any]] = {}
    warmup, version, machines = False, "", dict[str, None]()
    for number in round_numbers(run):
        folder = RoundDir(run, number)
        records = folder.records()
        rounds.append(_round_result(folder, records))
        settings[number] = {name: record.settings for name, record in _ordered(records)}
        version = next((r.version for r in records.values() if r.version), version)
        machines |= dict.fromkeys(record.machine for _, record in _ordered(records) if record.machine)
        if "base" in records:
            warmup = bool(records["base"].settings.get("warmup", {}).get("enabled", False))
    return Results(run, tuple(rounds), warmup, settings, version, tuple(machines))


def _ordered(records: Mapping[str, StageRecord]) -> list[tuple[str, StageRecord]]:
    return sorted(records.items(), key=lambda item: in_order(item[0]))


def in_order(stage: str) -> tuple[int, str]:
    """Sorts stages as they run, unknown ones last."""
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)


def _round_result(folder: RoundDir, records: Mapping[str, StageRecord]) -> RoundResult:
    def counts(stage: str) -> Mapping[str, Any]:
        return records[stage].counts if stage in records else {}

    search, extract, ppm = counts("search"), counts("extract"), counts("ppm") or counts("verifier")
    found = read_json(folder.eval_json) if "eval" in records and folder.eval_json.exists() else {"methods": {}}
    evaluated = found["methods"]
    tokens = {
        name: int(counts(name)["tokens"]) for name in ("search", "candidates", "stream") if "tokens" in counts(name)
    }
    if answered := [
        one["tokens"] for one in counts("answers").values() if isinstance(one, Mapping) and "tokens" in one
    ]:
        tokens["answers"] = int(sum(answered))
    tokens |= {f"eval {method}": int(one["tokens"]) for method, one in evaluated.items()}
    heldout = bool(ppm.get("heldout_after"))
    side = "heldout" if heldout else "train"
    return RoundResult(
        number=folder.number,
        stages=tuple(name for name, _ in _ordered(records)),
        solved={level: (int(n[0]), int(n[1])) for level, n in search.get("solved_by_level", {}).items()},
        trees=search.get("trees"),
        rollouts=search.get("rollouts"),
        outcomes=search.get("outcomes", {}),
        measures={m: {name: Measure(**v) for name, v in one["measures"].items()} for m, one in evaluated.items()},
        heldout_levels={
            m: _levels(one.get("records", [])) for m, one in evaluated.items() if "accuracy" in one["measures"]
        },
        tokens=tokens,
        seconds={name: record.seconds for name, record in _ordered(records)},
        sft_rows=extract.get("sft_rows"),
        pairs=extract.get("pairs"),
        policy=_train_figures(counts("policy") or counts("base")),
        ppm=_train_figures(ppm.get("training", ppm)),
        pairs_before=_pair_figures(ppm.get(f"{side}_before")),
        pairs_after=_pair_figures(ppm.get(f"{side}_after")),
        pairs_heldout=heldout,
        tables=tuple(_recorded_table(folder.number, one) for one in found.get("tables", ())),
    )


def _recorded_table(number: int, table: Mapping[str, Any]) -> Table:
    rows, notes = (tuple(tuple(row) for row in table["rows"]), tuple(table.get("notes", ())))
    return Table(f"round {number}: {table['title']}", ("",) * len(table["heads"]), tuple(table["heads"]), rows, notes)


def _levels(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """(correct, all) per level, judged by the best-scored candidate as the measure "accuracy" is, ties to the first."""
    counts: dict[str, list[int]] = {}
    for record in records:
        best = max(
            record["candidates"],
            key=lambda c: c["score"] if c["score"] is not None else -2.0,
            default={"correct": False},
        )
        one = counts.setdefault(record["level"] or NONE, [0, 0])
        one[0] += bool(best["correct"])
        one[1] += 1
    return {level: (n[0], n[1]) for level, n in sorted(counts.items())}


def _train_figures(counts: Mapping[str, Any]) -> TrainFigures | None:
    if "mean_loss" not in counts:
        return None
    return TrainFigures(**{name: counts[name] for name in TrainFigures.__dataclass_fields__})


def _pair_figures(counts: Mapping[str, Any] | None) -> PairFigures | None:
    if not counts:
        return None
    return PairFigures(
        counts["pairs"], counts["accuracy"], counts.get("loss", float("nan")), counts.get("calibration_error")
    )


# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table as text: heads of columns, a group above each head, rows of equal length. Title and groups may be ""."""

    title: str
    groups: tuple[str, ...]
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def spans(self) -> list[tuple[str, int]]:
        """(group, columns it stands above); columns without a group stand alone."""
        found: list[tuple[str, int]] = []
        for group in self.groups:
            if group and found and found[-1][0] == group:
                found[-1] = (group, found[-1][1] + 1)
            else:
                found.append((group, 1))
        return found


def main_table(results: Results) -> Table:
    """Solved by level, held-out accuracy, trees, tokens and minutes of every round."""
    levels = results.levels or ["all"]
    rows = [
        (
            results.label(one.number),
            *(share(one.solved.get(level)) for level in levels),
            measure(one.greedy),
            measure(one.guided),
            count(one.trees),
            count(one.total_tokens),
            NONE if one.total_seconds is None else f"{one.total_seconds / 60:.1f}",
        )
        for one in results.rounds
    ]
    pool = next((one.solved["all"][1] for one in results.rounds if "all" in one.solved), None)
    heldout = sorted({m.n for one in results.rounds for m in (one.greedy, one.guided) if m})
    notes = [
        f"solved: % of the {'' if pool is None else f'{pool:,} '}training problems for which the round's search found "
        "a correct answer, with the models of the round before",
        f"held-out: % of {' or '.join(f'{n:,}' for n in heldout) or 'the held-out'} problems with this round's models, "
        "[95% bootstrap interval]",
    ]
    return Table(
        "",
        ("", *["solved, %"] * len(levels), *["held-out accuracy, %"] * 2, "", "", ""),
        ("round", *levels, "greedy", "verifier" if results.verified else "PPM-guided", "trees", "tokens", "min"),
        tuple(rows),
        tuple(notes),
    )


def training_table(results: Results) -> Table:
    """Rows, pairs, losses and pair accuracy of every round that trained something."""

    def figures(one: RoundResult) -> tuple[str, ...]:
        pair = one.pairs_after
        return (
            results.label(one.number),
            count(one.policy.rows if one.sft_rows is None and one.policy else one.sft_rows),
            NONE if one.policy is None else f"{one.policy.first_loss:.3f} → {one.policy.mean_loss:.3f}",
            count(one.pairs),
            NONE if one.ppm is None else f"{one.ppm.first_loss:.3f} → {one.ppm.mean_loss:.3f}",
            NONE if pair is None else f"{100 * pair.accuracy:.1f}",
            NONE if pair is None or pair.calibration_error is None else f"{100 * pair.calibration_error:.1f}",
            NONE if pair is None else count(pair.pairs) + ("" if one.pairs_heldout else " (training)"),
        )

    scorer = "verifier" if results.verified else "PPM"
    rows = [figures(one) for one in results.rounds if one.sft_rows is not None or one.policy or one.ppm]
    pairs = (
        f"right, ECE, number: held-out pairs that the {scorer} ranks rightly, expected calibration error of its "
        "confidence, and how many they are; (training): none were held out"
    )
    groups = ("", "policy", "policy", scorer, scorer, "held-out pairs", "held-out pairs", "held-out pairs")
    heads = ("round", "SFT rows", "loss", "pairs", "loss", "right, %", "ECE, %", "number")
    kept = [i for i in range(len(heads)) if i < 3 or any(row[i] != NONE for row in rows)]
    return Table(
        "",
        tuple(groups[i] for i in kept),
        tuple(heads[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in rows),
        ("loss: first step → mean of the last epoch", *([pairs] if len(heads) - 1 in kept else [])),
    )


def verifier_table(results: Results) -> Table:
    """Fine-tuning alone beside what a verifier, a vote and an oracle choose; no rows where nothing was verified."""
    rows = [
        (results.label(one.number), method, name, measure(value))
        for one in results.rounds
        if results.verified
        for method, by in one.measures.items()
        for name, value in by.items()
    ]
    return Table("", ("",) * 4, ("round", "solutions", "chosen", "held-out accuracy, %"), tuple(rows))


def results_table(results: Results) -> str:
    """The results and the training figures for a terminal: plain text, right-aligned columns."""
    recorded = [table for one in results.rounds for table in one.tables]
    tables = [main_table(results), verifier_table(results), training_table(results), *recorded]
    return "\n\n".join(_plain(table) for table in tables if table.rows)


def _plain(table: Table) -> str:
    widths = [max(len(row[i]) for row in (table.heads, *table.rows)) for i in range(len(table.heads))]
    column = 0
    over: list[str] = []
    for group, columns in table.spans:  # a group's name may be wider than its columns together: the last one grows
        last = column + columns - 1
        widths[last] += max(0, len(group) - sum(widths[column : last + 1]) - 2 * (columns - 1))
        over.append(group.center(sum(widths[column : last + 1]) + 2 * (columns - 1), "-" if group else " "))
        column += columns
    align: list[Callable[[str, int], str]] = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    lines = [
        "  ".join(f(cell, w) for f, cell, w in zip(align, row, widths, strict=True))
        for row in (table.heads, *table.rows)
    ]
    rule = "  ".join("-" * w for w in widths)
    head = [table.title] if table.title else []
    body = [*head, *(["  ".join(over)] if any(table.groups) else []), lines[0], rule, *lines[1:]]
    notes = (textwrap.fill(note, 100, initial_indent="  ", subsequent_indent="    ") for note in table.notes)
    return "\n".join([*(line.rstrip() for line in body), *notes])


def share(solved: tuple[int, int] | None) -> str:
    """(solved, all) as a percentage."""
    return NONE if not solved or not solved[1] else f"{100 * solved[0] / solved[1]:.1f}"


def measure(value: Measure | None) -> str:
    """A measure as a percentage with its interval."""
    if value is None or not value.n:
        return NONE
    return f"{100 * value.mean:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def count(number: int | None) -> str:
    """A count, short from a million on."""
    if number is None:
        return NONE
    return (
        f"{number:,}"
        if number < 1_000_000
        else f"{number / 1e6:.2f}M"
        if number < 1_000_000_000
        else f"{number / 1e9:.2f}G"
        if number < 1_000_000_000_000
        else f"{number / 1e12:,.2f}T"
    )
