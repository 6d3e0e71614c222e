"""What eval.json says of an Orca 2 student: accuracies, macro mean, format-OK rate, strategies, and arm against arm."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rstar.config import SandboxSection
from rstar.evaluation import Measure, bootstrap, measures, paired
from rstar.extract.explanations import sub_category
from rstar.problems import ProblemSet, load_benchmark
from rstar.recipes.evaluation import costs, eval_records, problem_trees
from rstar.recipes.orca2.strategies import strategy_of
from rstar.report.results import measure
from rstar.types import Problem


def heldout_problems(benchmarks: Mapping[str, str], pool: ProblemSet, limit: int) -> list[Problem]:
    """The first `limit` held-out problems (0: all), then every problem of the benchmarks, each a sub-category."""
    named = [
        replace(problem, category=name, id=f"{name}/{problem.id}")
        for name, path in benchmarks.items()
        for problem in load_benchmark(name, path=path)
    ]
    return [*pool.heldout[: limit or None], *named]


def macro_mean(values: Sequence[float], tasks: Sequence[str]) -> Measure:
    """Mean over tasks of the mean over their problems, each value in [0, 1], with its bootstrap interval."""
    sizes = Counter(tasks)
    return bootstrap([v * len(tasks) / (len(sizes) * sizes[t]) for v, t in zip(values, tasks, strict=True)])


def measured(
    folder: Path, sandbox: SandboxSection, chosen: Mapping[str, str], evidence: Mapping[str, re.Pattern[str]]
) -> dict[str, Any]:
    """Greedy answers of a folder as a method of eval.json.

    `chosen`: sub-category -> its strategy; the share of answers that show it counts problems of these sub-categories.
    """
    groups = list(problem_trees(folder))
    records = asyncio.run(eval_records(groups, sandbox))
    tasks, right = [sub_category(tree.problem) for (tree,) in groups], [float(r.passed) for r in records]
    shown = [strategy_of(tree.nodes[1].text if len(tree.nodes) > 1 else "", evidence) for (tree,) in groups]
    fits = [float(shows == chosen[task]) for task, shows in zip(tasks, shown, strict=True) if task in chosen]
    all_measures = {
        **measures("greedy", records),
        "macro mean": macro_mean(right, tasks),
        "format-OK": bootstrap([float(bool(r.candidates)) for r in records]),
        **({"strategy": bootstrap(fits)} if fits else {}),
    }
    per_task = {
        task: {
            "accuracy": asdict(bootstrap([v for v, t in zip(right, tasks, strict=True) if t == task])),
            "strategies": count_strategies(s for s, t in zip(shown, tasks, strict=True) if t == task),
            "chosen": chosen.get(task, ""),
        }
        for task in sorted(set(tasks))
    }
    return {
        "measures": {name: asdict(one) for name, one in all_measures.items()},
        "tasks": per_task,
        **costs(records),
    }


def count_strategies(shown: Iterable[str]) -> dict[str, int]:
    """How often each strategy is shown, the most frequent first; "none" stands for answers that show none."""
    return dict(Counter(name or "none" for name in shown).most_common())


def task_table(method: str, one: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The figures of a method by sub-category; `model` names the model that was measured."""
    rows = [
        [
            task,
            measure(Measure(**figures["accuracy"])),
            figures["chosen"] or "-",
            ", ".join(f"{shows} {count}" for shows, count in figures["strategies"].items()),
        ]
        for task, figures in one["tasks"].items()
    ]
    message = "empty system message" if method == "greedy" else "cautious system message"
    heads = ["sub-category", "accuracy, %", "chosen strategy", "strategies shown"]
    return {"title": f"{model}, {message}", "heads": heads, "rows": rows}


def comparison_table(methods: Mapping[str, Any], first: Mapping[str, Any], model: str) -> dict[str, Any]:
    """`model` against the first arm's, problem by problem; both as the methods of their eval.json."""
    rows = []
    for method, one in methods.items():
        mine, other = _correct(one), _correct(first[method])
        ids = sorted(mine.keys() & other.keys())
        test = paired([mine[i] for i in ids], [other[i] for i in ids])
        p = "-" if test.p_value is None else f"{test.p_value:.3g}"
        rows.append([method, str(len(ids)), measure(test.difference), str(test.wins), str(test.losses), p])
    heads = ["system message", "problems", "difference, points", "better", "worse", "McNemar p"]
    return {"title": f"{model} against the first arm", "heads": heads, "rows": rows}


def _correct(method: Mapping[str, Any]) -> dict[str, float]:
    records: Iterable[Mapping[str, Any]] = method["records"]
    return {r["problem_id"]: float(any(c["correct"] for c in r["candidates"])) for r in records}
