"""The benchmarks by name: hub id, split and field map in one table.

`verified` entries are those whose id and fields were confirmed by public code or cards (the others are from their
authors' papers). The surest way to repeat the paper's evaluation are the {question, answer} JSON files in the
`eval_data` folder of the microsoft/rStar repository: pass one as `path`.
"""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rstar.problems.records import Fields, read_problems, to_problem
from rstar.problems.tasks import TASKS
from rstar.types import Problem, UserError


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lives and which column of the paper's tables it fills."""

    hub_id: str  # empty: no hub copy known, needs a path
    split: str  # the split that is evaluated
    fields: Fields
    size: int  # problems in the paper's evaluation
    configs: tuple[str, ...] = ("",)
    column: str = ""  # heading in the paper's tables
    verified: bool = False
    form: Callable[[Mapping[str, object]], Mapping[str, object]] = lambda record: record
    """A record of the hub's data set as one with the question and answer of `fields`."""


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark("openai/gsm8k", "test", Fields("question", "answer"), 1319, ("main",), "GSM8K"),
    "math": Benchmark(
        "EleutherAI/hendrycks_math",
        "test",
        Fields("problem", "solution"),
        5000,
        (
            "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
            "precalculus",
        ),
    ),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", Fields("problem", "answer"), 500, column="MATH"),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", Fields("problem", "answer"), 30, column="AIME24"),
    "aime25": Benchmark("math-ai/aime25", "test", Fields("problem", "answer", ("question",)), 30, verified=True),
    "amc23": Benchmark(
        "math-ai/amc23", "test", Fields("question", "answer", ("problem",)), 40, column="AMC23", verified=True
    ),
    "olympiadbench": Benchmark(
        "Hothan/OlympiadBench",
        "train",
        Fields("question", "final_answer", (), ("answer",)),
        675,
        ("OE_TO_maths_en_COMP",),
        "Olympiad",
        True,
    ),
    "collegemath": Benchmark("", "test", Fields("question", "answer"), 2818, column="College"),
    "gaokao2023en": Benchmark(
        "MARIO-Math-Reasoning/Gaokao2023-Math-En", "train", Fields("question", "answer"), 385, column="Gaokao"
    ),
    "omni-math": Benchmark(
        "KbsdJames/Omni-MATH", "test", Fields("problem", "answer", level="difficulty"), 4428, verified=True
    ),
} | {
    name: Benchmark(hub_id, split, Fields(), size, configs, form=form)
    for name, (hub_id, split, size, configs, form) in TASKS.items()
}  # fmt: skip


def nearest_benchmark(name: str, more: Iterable[str] = ()) -> str:
    """The known name that `name` resembles most."""
    return difflib.get_close_matches(name.lower(), [*BENCHMARKS, *more], n=1, cutoff=0.0)[0]


def load_benchmark(name: str, *, path: str = "", split: str = "", fields: Fields | None = None) -> tuple[Problem, ...]:
    """Every problem of a benchmark in its own order; nothing is dropped, so that counts match the published ones.

    Args:
        path: a local json/jsonl/csv/parquet instead of the hub; `fields` names its fields first.
        split: another split of the hub's data set than the evaluated one.

    Raises:
        UserError: unknown name, or no network and no path.
    """
    benchmark = BENCHMARKS.get(name)
    if benchmark is None:
        near = nearest_benchmark(name)
        raise UserError(f"unknown benchmark {name!r}", need=", ".join(BENCHMARKS), how=f"the nearest name is {near}")
    own = benchmark.fields
    if path:
        first = fields or own
        names = Fields(
            first.question,
            first.answer,
            (own.question, *own.more_questions, "question", "problem"),
            (own.answer, *own.more_answers, "answer"),
            own.level,
            category=first.category,
        )
        return tuple(read_problems(Path(path), names, name, benchmark.form))
    if not benchmark.hub_id:
        raise UserError(f"benchmark {name} has no copy on the hub", how=_ALTERNATIVE)
    return tuple(_from_hub(name, benchmark, split or benchmark.split))


_ALTERNATIVE = "use a local json/jsonl/csv/parquet with question and answer: problems.path=FILE"


def _without_network() -> bool:
    """Whether the hub's name cannot be resolved and no proxy would do that for us."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return False
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return True
    return False


def _from_hub(name: str, benchmark: Benchmark, split: str) -> list[Problem]:
    if _without_network():  # cached sets still load; the client's retries would take half a minute
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets  # heavy, and only for downloads

    problems: list[Problem] = []
    for config in benchmark.configs:
        try:
            rows = datasets.load_dataset(benchmark.hub_id, config or None, split=split)
        except Exception as error:  # the hub's client raises its own families of errors for "no network"
            reason = (str(error) or type(error).__name__).splitlines()[0][:120]
            got = f"{name} ({benchmark.hub_id}, {split}) could not be loaded: {reason}"
            raise UserError(got, how=_ALTERNATIVE) from error
        for record in rows:
            where = f"{benchmark.hub_id} record {len(problems)}"
            problems.append(to_problem(benchmark.form(record), benchmark.fields, name, len(problems), where))
    return problems
