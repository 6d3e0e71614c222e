"""What `rstar eval MODEL...` does: make the answers that are missing, read all of them, measure.

Answers are trees, made by the same search workers as everywhere and kept in a folder per model, benchmark and method
that is named after the settings that made it. So the same command resumes per problem, more problems or searches add to
what is there, and other settings start folders of their own where they could change an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rstar.comparison.methods import Line, Records, Row, equal_tokens, lines, rows
from rstar.config import (
    ClusterSection,
    EngineSection,
    EvalSection,
    ExtractSection,
    ModelSection,
    ProblemsSection,
    SandboxSection,
    SearchSection,
    digest,
    load,
    only,
    to_dict,
)
from rstar.evaluation import EvalRecord
from rstar.problems import BENCHMARKS, load_benchmark, needs_image, unreadable
from rstar.problems.records import Fields, read_problems
from rstar.recipes import load_config
from rstar.recipes.base_model import absolute, base_model
from rstar.recipes.evaluation import eval_records, eval_search, problem_trees, search_passes
from rstar.search.worker import SearchJob, SearchTask
from rstar.store import input_digest
from rstar.tree import Tree
from rstar.types import Problem, UserError
from rstar.workers import ray_session

METHODS = ("greedy", "sample", "maj", "bon", "beam", "dvts", "mcts")
DEFAULT_METHODS = ("greedy", "sample", "maj", "bon", "beam", "mcts")
DEFAULT_TRAJECTORIES = "1,4,16,64"


@dataclass(frozen=True)
class Settings:
    """What the command reads of a config; `model.base` is each model in turn."""

    model: ModelSection = field(default_factory=ModelSection)
    engine: EngineSection = field(default_factory=EngineSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    sandbox: SandboxSection = field(default_factory=SandboxSection)
    problems: ProblemsSection = field(default_factory=ProblemsSection)  # question, answer: the fields of local files
    search: SearchSection = field(default_factory=SearchSection)
    eval: EvalSection = field(default_factory=EvalSection)
    extract: ExtractSection = field(default_factory=ExtractSection)  # which pairs a PPM is measured on by itself


@dataclass(frozen=True)
class Contender:
    """One model and the verifiers that judge its answers (empty: none)."""

    name: str
    policy: str
    ppm: str = ""
    orm: str = ""

    @property
    def verifiers(self) -> dict[str, str]:
        return {who: path for who, path in (("PPM", self.ppm), ("ORM", self.orm)) if path}


@dataclass(frozen=True)
class Questions:
    """A benchmark, or a file of one's own."""

    name: str
    problems: tuple[Problem, ...]
    column: str  # heading in the paper's tables where this is that benchmark, all of it; else empty
    identity: str  # of the whole file, whatever part of it is used


@dataclass(frozen=True)
class Found:
    """Everything measured."""

    contenders: tuple[Contender, ...]
    questions: tuple[Questions, ...]
    rows: tuple[Row, ...]
    lines: dict[tuple[str, str], list[Line]]  # (model, benchmark) -> methods
    budgets: dict[tuple[str, str], list[float]]  # tokens a problem at which methods are compared
    equal_tokens: dict[tuple[str, str], dict[str, list[tuple[int, float] | None]]]
    records: dict[tuple[str, str], dict[str, Records]]


# -- what is to be done ------------------------------------------------------------------------------------------------


def read_settings(model: str, config: str, overrides: Sequence[str]) -> Settings:
    """Settings from defaults, or from a recipe's config file, with overrides on top."""
    if not config:
        return load(Settings, None, [f"model.base={model}", *overrides])
    whole, usual = load_config(config, list(overrides))[1], Settings()
    found: dict[str, Any] = {f.name: getattr(whole, f.name, None) for f in fields(Settings)}
    for name, section in found.items():
        if not isinstance(section, type(getattr(usual, name))):  # other recipes extract and measure in another way
            found[name] = getattr(usual, name)
    return Settings(**found)


def contenders(
    models: Sequence[str], ppms: Sequence[str], orms: Sequence[str], settings: Settings, out: Path
) -> tuple[Contender, ...]:
    """Models with their verifiers: none, one for all, or one for each."""
    for option, given in (("--ppm", ppms), ("--orm", orms)):
        if len(given) not in (0, 1, len(models)):
            raise UserError(f"{len(given)} times {option} for {len(models)} models", need="one, or one for each model")

    if settings.engine.kind == "openai" and len(models) > 1:
        raise UserError("engine.kind=openai, whose server has one model", need="one model, or engine=hf or vllm")

    def checkpoint(name: str) -> str:
        section = replace(settings.model, base=name)
        return name if settings.engine.kind == "simulated" else absolute(base_model(section, out))

    def verifier(given: Sequence[str], i: int) -> str:
        return checkpoint(given[i if len(given) > 1 else 0]) if given else ""

    names = _short_names(models)
    return tuple(
        Contender(name, checkpoint(model), verifier(ppms, i), verifier(orms, i))
        for i, (name, model) in enumerate(zip(names, models, strict=True))
    )


def _short_names(models: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [Path(model).parts for model in models]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names) and not set(names) <= {"policy", "ppm"}:
            return names
    if len(set(models)) < len(models):
        raise UserError("a model is named twice", need="different models")
    return list(models)


def load_questions(text: str, section: ProblemsSection, limit: int) -> tuple[Questions, ...]:
    """Benchmarks by name (`gsm8k`), from a local copy (`gsm8k=FILE`), or files of one's own (`FILE.jsonl`)."""
    found = []
    for item in filter(None, text.split(",")):
        name, _, path = item.partition("=")
        if name in BENCHMARKS:
            own = Fields(section.question, section.answer) if path else None
            try:
                problems = load_benchmark(name, path=path, fields=own)
            except UserError as error:
                how = error.how if path else f"give a local copy with question and answer: --benchmarks {name}=FILE"
                raise UserError(error.got, need=error.need, how=how) from error
        elif path or Path(item).suffix:
            name = name if path else Path(item).stem
            file = Path(path or item)
            problems = tuple(read_problems(file, Fields(section.question, section.answer), name))
        else:
            problems = load_benchmark(name)  # says which name is nearest
        if len({p.id for p in problems}) < len(problems):
            raise UserError(f"{item} has two problems with one id", need="one id per problem")
        if lost := unreadable(problems):
            print(f"{item}: no answer can equal {len(lost)} of {len(problems)} references, the first is {lost[0]}")
        identity = digest([(p.id, p.question, p.answer) for p in problems])
        whole = name in BENCHMARKS and len(problems) == BENCHMARKS[name].size and not 0 < limit < len(problems)
        column = BENCHMARKS[name].column if whole else ""
        found.append(Questions(name, tuple(problems[: limit or None]), column, identity))
    if not found or len({q.name for q in found}) < len(found):
        raise UserError(f"--benchmarks {text}", need="one or more different benchmarks or files")
    return tuple(found)


def usable(methods: Sequence[str], some: Sequence[Contender], *, asked: bool) -> list[str]:
    """The methods that these models can be measured by. Raises UserError where one that was asked for is none."""
    left = []
    for method in methods:
        if method not in METHODS:
            raise UserError(f"method {method!r}", need=f"of {', '.join(METHODS)}")
        need = {"bon": "--ppm or --orm", "beam": "--ppm", "dvts": "--ppm", "mcts": "--ppm"}.get(method, "")
        if all(c.ppm or (method == "bon" and c.orm) or not need for c in some):
            left.append(method)
        elif asked:
            raise UserError(f"method {method} without a verifier", need=need)
    if not left:
        raise UserError("no methods", need=f"of {', '.join(METHODS)}")
    return left


# -- making the answers ------------------------------------------------------------------------------------------------

_SOLVED = (
    "method",
    "form",
    "temperature",
    "max_depth",
    "max_step_tokens",
    "calculator",
    "drop_failed_steps",
    "use_ppm",
)
_SEARCHED = (*_SOLVED, "top_p", "candidates", "answer_candidates")
_READ = {  # of the search section, by each way of making answers; the seeds are counted off
    "greedy": (*_SOLVED, "rollouts"),
    "sample": (*_SOLVED, "rollouts", "top_p"),
    "beam": (*_SEARCHED, "beam_width"),
    "dvts": (*_SEARCHED, "beam_width"),
    "mcts": (
        *_SEARCHED, "rollouts", "c", "selection", "unvisited_first", "rollouts_in_flight", "ppm_prior_visits",
    ),
}  # fmt: skip
_LIMITS = ("cpu_seconds", "wall_seconds", "memory_mib", "output_kib")  # of the sandbox, for one step


def compare(
    some: Sequence[Contender],
    sets: Sequence[Questions],
    methods: Sequence[str],
    trajectories: Sequence[int],
    settings: Settings,
    out: Path,
) -> Found:
    """Make what is missing of every model's answers under `out`/trees, then measure all. Prints progress."""
    trajectories = sorted(set(trajectories))
    if not trajectories or trajectories[0] < 1:
        raise UserError(f"--trajectories {','.join(map(str, trajectories))}", need="numbers from 1")
    if trajectories == [1] and {"maj", "bon"}.issuperset(methods):
        raise UserError(f"--trajectories 1 with {', '.join(methods)}", need="more: one sample leaves nothing to choose")
    section = replace(settings.eval, samples=trajectories[-1], trajectories=trajectories[-1])
    ways = list(dict.fromkeys("sample" if m in ("sample", "maj", "bon") else m for m in methods))
    records: dict[tuple[str, str], dict[str, Records]] = {}
    with ray_session(settings.cluster):
        for contender in some:
            made = {(way, q.name): _pass(contender, q, way, section, settings, out) for q in sets for way in ways}
            searched = [(q, made[way, q.name]) for way in ways for q in sets]
            ppm = contender.ppm if any(one.search.use_ppm for one in made.values()) else ""
            _search(contender, "answers", searched, settings, ppm)
            for who, verifier in contender.verifiers.items() if "sample" in ways else ():
                scored = {
                    (f"sample {who}", q.name): _scored(made["sample", q.name], verifier, settings.engine) for q in sets
                }
                again = [(q, scored[f"sample {who}", q.name]) for q in sets]
                _search(contender, f"scores by {who}", again, settings, verifier)
                made |= scored
            by_name = {q.name: q for q in sets}
            wanted = [(by_name[name], one, _counts(one)) for (_, name), one in made.items()]
            for ((way, name), one), found in zip(made.items(), read_records(wanted, settings), strict=True):
                if way.startswith("sample"):
                    plain = records.get((contender.name, name), {}).get("sample", found)
                    found = {one.search.rollouts: _with_costs(found[1], next(iter(plain.values())))}
                records.setdefault((contender.name, name), {})[way] = found
    return measured(some, sets, methods, trajectories, records, top_k=section.top_k)


def _pass(
    contender: Contender, q: Questions, way: str, section: EvalSection, settings: Settings, out: Path
) -> SearchTask:
    search, engine = eval_search(way, section, settings.search, with_scorer=False), settings.engine
    served = engine.kind == "openai"  # by a server that has limits of its own; a verifier beside it is loaded here
    made_by = {
        "search": _chosen(only(search, *_READ[way])),
        "model": _chosen(replace(settings.model, base="", few_shot=""))
        | {"few_shot": _identity(settings.model.few_shot)},
        "engine": (engine.kind, engine.model, engine.url if served else ""),
        "loaded": _loaded(engine) if search.use_ppm or not served else {},
        "sandbox": {key: getattr(settings.sandbox, key) for key in _LIMITS},
        "policy": _identity(contender.policy),
        "scorer": _identity(contender.ppm) if search.use_ppm else "",
        "problems": q.identity,
    }
    made = Path(q.name) / f"{way}-{digest(made_by)}"
    # A model's name here depends on which others are named beside it; what its answers were made by does not.
    known = sorted(folder / made for folder in (out / "trees").glob("*") if (folder / made).is_dir())
    folder = known[0] if known else out / "trees" / contender.name.replace("/", "_") / made
    return SearchTask(folder.resolve(), search, test_time=True)


def _chosen(section: SearchSection | ModelSection) -> dict[str, Any]:
    """The settings that differ from their defaults: a key that a later version adds disowns no answers."""
    usual = to_dict(type(section)())
    return {key: value for key, value in to_dict(section).items() if value != usual[key]}


def _loaded(engine: EngineSection) -> dict[str, Any]:
    """What of the engine's settings can change what a model that it loads writes or scores."""
    return {"max_context": engine.max_context, "dtype": engine.dtype}


def _scored(samples: SearchTask, verifier: str, engine: EngineSection) -> SearchTask:
    """The same samples with the scores of a verifier, in a folder of their own."""
    scored_by = {"scorer": _identity(verifier), "loaded": _loaded(engine)}
    folder = samples.folder.with_name(f"{samples.folder.name}-{digest(scored_by)}")
    return SearchTask(folder, replace(samples.search, use_ppm=True), test_time=True, trees=samples.folder)


def _identity(path_or_id: str) -> str:
    """What a model or file is: its contents, or a hub id as it stands."""
    path = Path(path_or_id).expanduser()
    return input_digest(path) if path_or_id and path.exists() else path_or_id


def _search(
    contender: Contender, title: str, passes: Sequence[tuple[Questions, SearchTask]], settings: Settings, scorer: str
) -> None:
    job = SearchJob(
        passes=tuple(one for _, one in passes),
        engine=settings.engine,
        sandbox=settings.sandbox,
        model=settings.model,
        policy=contender.policy,
        ppm=scorer,
    )
    search_passes(job, [q.problems for q, _ in passes], settings.cluster, f"{contender.name}, {title}")


def read_records(passes: Sequence[tuple[Questions, SearchTask, Sequence[int]]], settings: Settings) -> list[Records]:
    """For every pass and k the records of the first k trees of each problem, in the order of the problems.

    One call for all passes, because a grader that needs algebra starts a sandbox.
    """

    def prefixes(q: Questions, made: SearchTask, ks: Sequence[int]) -> Iterator[list[Tree]]:
        wanted = {problem.id for problem in q.problems}
        for trees in problem_trees(made.folder):
            if trees[0].problem.id in wanted:
                in_order = sorted(trees, key=lambda tree: tree.seed)
                yield from (in_order[:k] for k in ks)

    every = chain.from_iterable(prefixes(*one) for one in passes)
    found = iter(asyncio.run(eval_records(every, settings.sandbox)))
    read: list[Records] = []
    for q, _, ks in passes:
        by_id = {records[0].problem_id: records for records in ([next(found) for _ in ks] for _ in q.problems)}
        read.append({k: [by_id[problem.id][n] for problem in q.problems] for n, k in enumerate(ks)})
    return read


def _counts(made: SearchTask) -> list[int]:
    """How many trees of a problem stand for it: all samples are in one, searches are counted off."""
    return [1] if made.search.method == "sample" else [seed + 1 for seed in made.search.seeds]


def _with_costs(scored: Sequence[EvalRecord], samples: Sequence[EvalRecord]) -> list[EvalRecord]:
    """Scored samples cost what the samples did, and the time of scoring."""
    return [
        s if s is r else replace(s, tokens=r.tokens, engine_calls=r.engine_calls, seconds=r.seconds + s.seconds)
        for s, r in zip(scored, samples, strict=True)
    ]


# -- measuring ---------------------------------------------------------------------------------------------------------


def measured(
    some: Sequence[Contender],
    sets: Sequence[Questions],
    methods: Sequence[str],
    trajectories: Sequence[int],
    records: dict[tuple[str, str], dict[str, Records]],
    *,
    top_k: int,
) -> Found:
    """Rows, paired tests and the comparison at equal tokens, from records alone."""
    found: list[Row] = []
    made: dict[tuple[str, str], list[Line]] = {}
    budgets: dict[tuple[str, str], list[float]] = {}
    for q in sets:
        first: list[float] | None = None
        for contender in some:
            key = contender.name, q.name
            made[key] = lines(records[key], methods, top_k=top_k)
            new, first = rows(*key, made[key], trajectories, first)
            found += new
            costs = {round(row.tokens): row.tokens for row in new if row.choice or row.trajectories == 1}
            budgets[key] = sorted(costs.values())
    table = {key: equal_tokens(made[key], budgets[key]) for key in made}
    return Found(tuple(some), tuple(sets), tuple(found), made, budgets, table, records)


def flagged(q: Questions) -> list[str]:
    """Ids of problems that need a picture which is not in their text. They are asked and counted, and listed."""
    return [problem.id for problem in q.problems if needs_image(problem.question)]
