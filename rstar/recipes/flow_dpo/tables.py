"""What eval.json says of a flow: progressive accuracy, outputs and pairs, reward margins, the compile stage's arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rstar.evaluation import Measure, bootstrap
from rstar.extract.flow_pairs import flow_outcome, flow_pairs
from rstar.recipes.verification import Curve, curve
from rstar.report.results import measure, share
from rstar.tree import Tree

if TYPE_CHECKING:
    from rstar.training.dpo import Margins

POINTS = 12  # of a curve

Written = dict[str, Any]
"""A table as eval.json keeps it: {title, heads, rows, notes}, all text."""


def progressive_accuracy(outcomes: Sequence[bool]) -> list[float]:
    """Acc^N = (1/N) sum of the first N outcomes (Flow-DPO section 4), each predicted before it was learned from."""
    right, found = 0, []
    for n, outcome in enumerate(outcomes, 1):
        right += outcome
        found.append(right / n)
    return found


def progressive_curve(outcomes: Mapping[str, Sequence[bool]]) -> Curve:
    """Progressive accuracy over the stream, some points of each line with its interval."""
    length = max(map(len, outcomes.values()), default=0)
    places = sorted({max(1, round(length * k / POINTS)) for k in range(1, POINTS + 1)})
    series = {}
    for name, one in outcomes.items():
        accuracies = progressive_accuracy(one)
        intervals = [bootstrap([float(o) for o in one[:n]]) for n in places]
        series[name] = [[n, accuracies[n - 1], m.low, m.high] for n, m in zip(places, intervals, strict=True)]
    return curve("Progressive accuracy, %", "problems of the stream", series)


def flow_table(flows: Mapping[str, Sequence[Tree]]) -> Written:
    """Outputs and pairs per problem, and what the Stop model said of right and wrong solutions."""
    rows = []
    for name, trees in flows.items():
        outcomes, pairs = [flow_outcome(tree) for tree in trees], [row for tree in trees for row in flow_pairs(tree)]
        n = max(1, len(trees))
        right, wrong = ([o.stopped for o in outcomes if o.correct is kind] for kind in (True, False))
        per_problem = (sum(row.kind == role for row in pairs) / n for role in ("answer", "stop"))
        rows.append(
            [
                name, str(len(trees)), share((len(right), n)), f"{sum(o.chunks for o in outcomes) / n:.2f}",
                *(f"{value:.2f}" for value in per_problem),
                share((sum(right), len(right))), share((sum(wrong), len(wrong))),
            ]
        )  # fmt: skip
    heads = [
        "flow", "problems", "correct, %", "chunks", "answer pairs", "stop pairs", "Yes on right, %", "Yes on wrong, %",
    ]  # fmt: skip
    return {"title": "Flows", "heads": heads, "rows": rows, "notes": ["chunks and pairs are means per problem"]}


def margin_table(margins: Mapping[str, tuple[Margins, Margins]], steps: Mapping[str, int], staleness: float) -> Written:
    """Reward margins of held-out pairs, by adapter: (before, after) the stream."""
    rows = [
        [
            role, str(steps[role]), str(after.pairs), f"{before.margin:.3f}", f"{after.margin:.3f}",
            f"{100 * after.accuracy:.1f}", f"{before.loss:.4f}", f"{after.loss:.4f}",
        ]
        for role, (before, after) in margins.items()
    ]  # fmt: skip
    rows += [[role, str(steps[role]), "0", *["-"] * 5] for role in steps if role not in margins]
    heads = ["adapter", "steps", "pairs", "margin before", "after", "ranked rightly, %", "loss before", "after"]
    note = (
        f"held-out pairs of the untrained flow, margins in nats; mean staleness of the stream: {staleness:.1f} problems"
    )
    return {"title": "Reward margins", "heads": heads, "rows": rows, "notes": [note]}


def accuracy_table(title: str, methods: Mapping[str, Mapping[str, Any]], *notes: str) -> Written:
    """Held-out accuracy of methods of eval.json."""
    measures = {name: Measure(**one["measures"]["accuracy"]) for name, one in methods.items()}
    rows = [[name, str(one.n), measure(one)] for name, one in measures.items()]
    return {"title": title, "heads": ["", "problems", "held-out accuracy, %"], "rows": rows, "notes": list(notes)}
