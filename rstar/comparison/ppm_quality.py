"""How good a PPM is by itself, before any search uses it.

On graded trees that it was not trained on: the share of preference pairs it ranks right, and calibration, its scores
against how often what it scored came out right. On step-labelled solutions (the form of ProcessBench, arXiv
2412.06559): where it sees the first error.

The pairs are those that a PPM is trained on: taken by the same function, as `extract` says. What is longer than the
PPM's context is left out and counted.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rstar.comparison.run import Settings
from rstar.config import ExtractSection, to_dict
from rstar.engines.base import ContextOverflow, Scorer
from rstar.engines.build import build_scorer
from rstar.evaluation import Measure, bootstrap
from rstar.extract.preferences import outcome_counts
from rstar.problems.records import read_records
from rstar.prompts import DELIMITERS, END_OF_STEP, render, step_prompt
from rstar.recipes.base_model import absolute, base_model
from rstar.recipes.evaluation import problem_trees
from rstar.recipes.rows import own_prompt, scorer_rows
from rstar.report.results import measure
from rstar.search.expand import scores
from rstar.store import index, write_json
from rstar.tokens import question_wrapper
from rstar.tree import Tree
from rstar.types import PreferenceRow, PromptText, TerminalReason, UserError

BINS = 10
THRESHOLD = 0.0  # a step scored below it is called wrong: scores are in [-1, 1], and training puts 0 between the two


@dataclass(frozen=True)
class Bin:
    """Nodes whose score lies in one tenth of [-1, 1]."""

    low: float
    high: float
    count: int
    score: float  # mean, as a probability (1 + score) / 2
    right: float  # mean share of correct answers among those below the nodes


@dataclass(frozen=True)
class Calibration:
    """Scores against outcomes. `error` is the mean |score - right| over bins, weighted by their nodes, in [0, 1]."""

    bins: tuple[Bin, ...]
    error: float


@dataclass(frozen=True)
class FirstErrors:
    """ProcessBench's figures, in [0, 1]: F1 is the harmonic mean of the two accuracies."""

    threshold: float
    on_wrong: float  # share of solutions with an error whose first wrong step was named exactly
    on_right: float  # share of solutions without one that were passed as such
    f1: float
    wrong: int  # solutions of either kind
    right: int


def calibration(scored: Iterable[tuple[float, float]]) -> Calibration:
    """From (score in [-1, 1], outcome in [0, 1]) pairs; empty bins are left out."""
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for score, outcome in scored:
        bins[min(BINS - 1, int((score + 1) / 2 * BINS))].append(((score + 1) / 2, outcome))
    made = tuple(
        Bin(
            2 * b / BINS - 1, 2 * (b + 1) / BINS - 1, len(found),
            sum(s for s, _ in found) / len(found), sum(o for _, o in found) / len(found),
        )
        for b, found in sorted(bins.items())
    )  # fmt: skip
    total = sum(one.count for one in made)
    return Calibration(made, sum(one.count * abs(one.score - one.right) for one in made) / max(1, total))


def first_errors(scores: Sequence[Sequence[float]], labels: Sequence[int], threshold: float) -> FirstErrors:
    """Compare the first step below `threshold` with the label: index of the first wrong step, -1 if all are right."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for values, label in zip(scores, labels, strict=True):
        named = next((i for i, value in enumerate(values) if value < threshold), -1)
        hits[label < 0].append(named == label)
    right, wrong = hits[True], hits[False]
    a, b = sum(wrong) / max(1, len(wrong)), sum(right) / max(1, len(right))
    return FirstErrors(threshold, a, b, 2 * a * b / (a + b) if a + b else 0.0, len(wrong), len(right))


def best_threshold(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> FirstErrors:
    """The figures at the threshold with the highest F1 on these very solutions: a bound, not a measurement."""
    candidates = sorted({value for values in scores for value in values})
    return max((first_errors(scores, labels, t) for t in [*candidates, 1.1]), key=lambda found: found.f1)


# -- trees -------------------------------------------------------------------------------------------------------------


async def on_trees(problems: Iterable[Sequence[Tree]], scorer: Scorer, section: ExtractSection) -> dict[str, Any]:
    """Pair accuracy (mean over pairs, intervals over problems; a tie is half right) and calibration.

    `problems`: the trees of each problem, all seeds together.
    """
    right: dict[str, dict[str, list[float]]] = {"step": {}, "answer": {}, "all": {}}
    nodes: dict[str, list[tuple[float, float]]] = {"steps": [], "answers": []}
    too_long, graded = Counter({"pairs": 0, "steps": 0, "answers": 0}), False
    for trees in problems:
        pairs: list[PreferenceRow] = scorer_rows(trees, section, "pairwise")
        for pair, (chosen, rejected) in zip(pairs, await _pair_scores(pairs, scorer), strict=True):
            if isinstance(chosen, ContextOverflow) or isinstance(rejected, ContextOverflow):
                too_long["pairs"] += 1
                continue
            for kind in (pair.kind, "all"):
                right[kind].setdefault(pair.problem_id, []).append((chosen > rejected) + 0.5 * (chosen == rejected))
        for tree in trees:
            counts = outcome_counts(tree)
            judged = [node for node in tree.nodes[1:] if sum(counts[node.id])]
            graded = graded or bool(judged)
            paths = [[text for text, _ in render([(n.text, n.stdout) for n in tree.path(node)])] for node in judged]
            values = await scores(scorer, PromptText(tree.prompt), paths) if paths else []
            for node, value in zip(judged, values, strict=True):
                kind = "answers" if node.terminal is TerminalReason.ANSWER else "steps"
                if isinstance(value, ContextOverflow):
                    too_long[kind] += 1
                else:
                    nodes[kind].append((value, counts[node.id][0] / sum(counts[node.id])))
    if not graded:
        raise UserError(
            "the trees hold no graded answers", need="trees of `rstar search`", how="searches at test time do not grade"
        )
    accuracy = {
        kind: bootstrap([sum(v) for v in found.values()], [len(v) for v in found.values()])
        for kind, found in right.items()
        if found
    }
    return {
        "pair_accuracy": {kind: asdict(value) for kind, value in accuracy.items()},
        "pairs": {kind: sum(map(len, found.values())) for kind, found in right.items()},
        "calibration": {kind: asdict(calibration(found)) for kind, found in nodes.items() if found},
        "too_long": dict(too_long),
    }


async def _pair_scores(
    pairs: Sequence[PreferenceRow], scorer: Scorer
) -> list[tuple[float | ContextOverflow, float | ContextOverflow]]:
    """(chosen, rejected) of each pair; pairs of one prefix are scored together, each continuation once."""
    wanted: dict[tuple[str, ...], dict[tuple[str, ...], float | ContextOverflow]] = defaultdict(dict)
    for pair in pairs:
        wanted[pair.prompt_segments] |= {pair.chosen_segments: 0.0, pair.rejected_segments: 0.0}
    for prompt, found in wanted.items():
        found.update(zip(list(found), await scores(scorer, PromptText(prompt), list(found)), strict=True))
    return [
        (wanted[p.prompt_segments][p.chosen_segments], wanted[p.prompt_segments][p.rejected_segments]) for p in pairs
    ]


# -- step-labelled solutions -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """A solution whose first wrong step is known."""

    question: str
    steps: tuple[str, ...]
    label: int  # index of the first wrong step; -1: all are right
    outputs: tuple[str, ...] = ()  # what each step printed, where the steps are programs


def read_labelled(path: Path) -> list[Labelled]:
    """Read records of {problem, steps, label} (and `outputs`) from json or jsonl. UserError names the place."""
    found = []
    for where, record in read_records(path):
        question, steps, label = record.get("problem"), record.get("steps"), record.get("label")
        if not (isinstance(question, str) and isinstance(steps, list) and steps and isinstance(label, int)):
            raise UserError(f"{where} is no step-labelled solution", need="problem, steps (a list), label (a number)")
        if not -1 <= label < len(steps):
            raise UserError(f"{where} has label {label}", need=f"-1, or the index of one of its {len(steps)} steps")
        outputs = record.get("outputs") or [""] * len(steps)
        if not isinstance(outputs, list) or len(outputs) != len(steps):
            raise UserError(f"{where} has outputs that do not fit its steps", need="one text per step")
        found.append(Labelled(question, tuple(map(str, steps)), label, tuple(map(str, outputs))))
    return found


async def on_labelled(solutions: Sequence[Labelled], scorer: Scorer, wrap: Callable[[str], str]) -> dict[str, Any]:
    """First-error localisation: every prefix of every solution is scored at its last step.

    A solution that is too long is left out whole: an error among its steps without a score could not be named. It has
    no entry (None) in the list of scores.
    """
    found: list[list[float] | None] = []
    for one in solutions:
        steps = [s if s.endswith(DELIMITERS) else f"{s.rstrip()}\n{END_OF_STEP}" for s in one.steps]
        ends = [
            [text for text, _ in render(list(zip(steps, one.outputs, strict=True))[: i + 1])] for i in range(len(steps))
        ]
        values = await scores(scorer, step_prompt(wrap(one.question)), ends)
        fitting = [value for value in values if not isinstance(value, ContextOverflow)]
        found.append(fitting if len(fitting) == len(values) else None)
    measured = [values for values in found if values is not None]
    labels = [one.label for one, values in zip(solutions, found, strict=True) if values is not None]
    return {
        "solutions": len(solutions),
        "first_errors": asdict(first_errors(measured, labels, THRESHOLD)),
        "first_errors_best_threshold": asdict(best_threshold(measured, labels)),
        "too_long": {"solutions": len(found) - len(measured)},
        "scores": found,
    }


# -- the command -------------------------------------------------------------------------------------------------------


def ppm_quality(ppm: str, path: Path, settings: Settings, out: Path, *, limit: int = 0) -> str:
    """Measure the PPM at `ppm` on a folder of graded trees or a file of step-labelled solutions.

    `limit`: only the trees of the first so many problems, or the first so many solutions; 0: all.

    Writes `out`/ppm_quality.json and returns the figures as text.
    """
    folder = (
        ppm if settings.engine.kind == "simulated" else absolute(base_model(replace(settings.model, base=ppm), out))
    )
    trees = path.is_dir()
    if trees and not index(path):
        raise UserError(f"{path} holds no trees", need="a folder with trees-*.jsonl.zst", how="e.g. runs/mine/round_01")
    solutions = [] if trees else read_labelled(path)[: limit or None]

    async def work() -> dict[str, Any]:
        scorer = build_scorer(settings.engine, folder)
        try:
            if trees:
                figures = await on_trees(
                    map(own_prompt, islice(problem_trees(path), limit or None)), scorer, settings.extract
                )
                return figures | {"extract": to_dict(settings.extract)}
            return await on_labelled(solutions, scorer, question_wrapper(folder, settings.model))
        finally:
            await scorer.close()

    figures = {"ppm": folder, "data": str(path)} | asyncio.run(work())
    write_json(out / "ppm_quality.json", figures)
    return "\n".join(_said(figures))


def _said(figures: Mapping[str, Any]) -> Iterator[str]:
    if left_out := [f"{count} of the {kind}" for kind, count in figures["too_long"].items() if count]:
        yield f"too long for the PPM or engine.max_context, and left out: {', '.join(left_out)}"
    for kind, value in figures.get("pair_accuracy", {}).items():
        yield f"pairs ranked right, {kind}: {measure(Measure(**value))}% of {figures['pairs'][kind]}"
    for kind, value in figures.get("calibration", {}).items():
        yield f"calibration error, {kind}: {value['error']:.3f} (score as probability | share right | nodes)"
        yield from (f"  {one['score']:.2f} | {one['right']:.2f} | {one['count']}" for one in value["bins"])
    for name, how in (("first_errors", "scores below"), ("first_errors_best_threshold", "best on this file: below")):
        if one := figures.get(name):
            yield (
                f"first errors ({how} {one['threshold']:.2f}): F1 {100 * one['f1']:.1f}, "
                f"{100 * one['on_wrong']:.1f}% of {one['wrong']} wrong, "
                f"{100 * one['on_right']:.1f}% of {one['right']} right"
            )
