"""From evaluation records to rows: every method at every number of trajectories, its accuracy, cost, and paired test.

A method is a Line: something whose number of trajectories k can be chosen. Samples of a problem are interchangeable, so
k < n of them stand for k samples (evaluation.chosen_share); searches are counted off in the order of their seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

from rstar.evaluation import (
    EvalRecord,
    Measure,
    Paired,
    Pick,
    bootstrap,
    chosen_share,
    paired,
    pass_at_k,
    top_score,
    vote,
)

Records = Mapping[int, Sequence[EvalRecord]]
"""k -> a record per problem, in the order of the problems. Samples have one entry, for all of them."""


@dataclass(frozen=True)
class Line:
    """A method on one benchmark."""

    name: str
    records: Records
    value: Callable[[EvalRecord, int], float]  # (record, k) -> in [0, 1]
    choice: bool = True  # False: counts any correct answer, which nobody could choose without the reference

    known: dict[int, list[float]] = field(default_factory=dict, repr=False)

    @property
    def limit(self) -> int:
        """The largest k."""
        return max(self.records)

    def at(self, k: int) -> Sequence[EvalRecord]:
        """The records that hold k trajectories."""
        return self.records[min((n for n in self.records if n >= k), default=self.limit)]

    def values(self, k: int) -> list[float]:
        """One value per problem with k trajectories."""
        if k not in self.known:
            self.known[k] = [self.value(record, k) for record in self.at(k)]
        return self.known[k]

    def cost(self, k: int, what: str) -> float:
        """Mean tokens, engine_calls or seconds per problem. A part of the samples has that part of their cost."""
        return fmean(getattr(record, what) * min(1.0, k / record.samples) for record in self.at(k))


@dataclass(frozen=True)
class Row:
    """One method at one number of trajectories on one benchmark. Costs are means per problem."""

    model: str
    benchmark: str
    method: str
    trajectories: int
    choice: bool
    accuracy: Measure
    tokens: float
    engine_calls: float
    seconds: float
    against_first: Paired | None  # None in the first row itself

    @property
    def label(self) -> str:
        return self.method if self.method == "greedy" else f"{self.method} @{self.trajectories}"


def lines(found: Mapping[str, Records], methods: Sequence[str], *, top_k: int) -> list[Line]:
    """The methods that `methods` names, in their order, from the records of each way of making answers.

    Args:
        found: "greedy", "sample", "beam", "dvts", "mcts" -> records; "sample PPM", "sample ORM" are the samples with
            that verifier's scores.
        methods: Of METHODS in rstar.comparison.run.
        top_k: Voters among several searches, by PPM score.
    """

    def line(name: str, source: str, pick: Pick) -> Line:
        return Line(name, found[source], lambda record, k: chosen_share(record, k, pick))

    scored = [(name.removeprefix("sample "), name) for name in found if name.startswith("sample ")]
    weighted: Pick = partial(vote, weighted=True)
    made: list[Line] = []
    for method in methods:
        match method:
            case "sample":
                made.append(Line("pass", found["sample"], _any_correct, choice=False))
            case "maj":
                made.append(line("majority", "sample", vote))
                made += [line(f"weighted majority {who}", source, weighted) for who, source in scored]
            case "bon":
                made += [line(f"best-of-n {who}", source, top_score) for who, source in scored]
            case "mcts":
                made.append(line("mcts top score", "mcts", top_score))
                made.append(line(f"mcts majority of top {top_k}", "mcts", partial(vote, top_k=top_k)))
                made.append(line("mcts weighted", "mcts", partial(vote, top_k=top_k, weighted=True)))
            case _:  # greedy, beam, dvts
                made.append(line(method, method, top_score))
    return made


def _any_correct(record: EvalRecord, k: int) -> float:
    correct = sum(c.count for c in record.candidates if c.correct)
    return pass_at_k(record.samples, correct, min(k, record.samples))


def rows(
    model: str, benchmark: str, made: Sequence[Line], trajectories: Sequence[int], first: list[float] | None
) -> tuple[list[Row], list[float]]:
    """A row per method and number of trajectories; also the values of the first row, which all are compared with.

    `first`: those values where an earlier model has the first row of this benchmark.
    """
    found: list[Row] = []
    for line in made:
        for k in [k for k in trajectories if k <= line.limit] or [line.limit]:
            if k == 1 and line.name.startswith(("majority", "weighted", "best-of-n", "mcts majority", "mcts weighted")):
                continue  # one trajectory leaves nothing to choose: that is the row of pass @1, or of the top score
            values = line.values(k)
            against = paired(values, first) if first is not None else None
            first = first if first is not None else values
            cost = {what: line.cost(k, what) for what in ("tokens", "engine_calls", "seconds")}
            found.append(
                Row(model, benchmark, line.name, k, line.choice, bootstrap(values), against_first=against, **cost)
            )
    assert first is not None
    return found, first


def equal_tokens(made: Sequence[Line], budgets: Sequence[float]) -> dict[str, list[tuple[int, float] | None]]:
    """(k, accuracy) that each choosing method has for at most so many tokens a problem; None where k = 1 costs more."""
    table: dict[str, list[tuple[int, float] | None]] = {}
    for line in (line for line in made if line.choice):
        costs = {k: line.cost(k, "tokens") for k in range(1, line.limit + 1)}
        affordable = [max((k for k, cost in costs.items() if cost <= b * (1 + 1e-9)), default=0) for b in budgets]
        table[line.name] = [(k, fmean(line.values(k))) if k else None for k in affordable]
    return table
