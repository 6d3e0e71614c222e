"""Datasets -> Problem: the training pool and held-out set of a run, benchmarks by name, repeats and leaks removed.

    pool = load_problems(section)          # ProblemSet(train, heldout, dropped, contaminated)
    gsm8k = load_benchmark("gsm8k")        # every problem, in file order, nothing dropped

Everything wrong with the input is a UserError, raised before any model is loaded. What is left out is counted by
reason. The held-out set never shares a text or (generated families) the numbers of a question with the pool, and does
not depend on how many training problems are asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rstar.config import ProblemsSection
from rstar.grading import why_unreadable
from rstar.problems.benchmarks import BENCHMARKS, Benchmark, load_benchmark, nearest_benchmark
from rstar.problems.generated import generate
from rstar.problems.overlap import Overlap, needs_image, text_key
from rstar.problems.records import Fields, read_problems
from rstar.types import Problem, UserError

__all__ = ["BENCHMARKS", "Benchmark", "ProblemSet", "load_benchmark", "load_problems", "needs_image", "unreadable"]

MAX_QUESTION_CHARS = 20_000  # longer than any problem's statement; a longer one is counted as too-long


@dataclass(frozen=True)
class ProblemSet:
    """What a run learns from and what it is measured by."""

    train: tuple[Problem, ...]
    heldout: tuple[Problem, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Left out, by reason: duplicate, same-numbers, partial-result, disagreement, contaminated, unreadable answer,
    image, too-long, level, limit."""
    contaminated: tuple[tuple[str, str], ...] = ()
    """(id of a removed training problem, name of the set it overlaps with), for the manifest."""
    examples: Mapping[str, str] = field(default_factory=dict)
    """The first problem left out of a file for each reason found in it: its id, and what is wrong with its answer."""

    def left_out(self) -> list[str]:
        """A line for each reason, with its example."""
        return [
            f"left out: {count} {reason}"
            + (f", the first is {self.examples[reason]}" if reason in self.examples else "")
            for reason, count in self.dropped.items()
        ]


def load_problems(section: ProblemsSection) -> ProblemSet:
    """The pool and the held-out set that a config's `problems` section describes.

    Raises UserError: unknown source, unreadable or empty file, a record without question or answer, one id with two
    texts, a family that cannot give as many distinct problems, or nothing left to train on.
    """
    if section.heldout < 0 or section.limit < 0:
        raise UserError("problems.heldout or problems.limit is negative", need="0 or more")
    dropped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    if section.name == "reasoning_gym":
        pool, heldout = generate(section, dropped)
        templated = True
    else:
        records = _records(section)
        pool, templated = _clean(records, dropped, examples), False
        heldout = []
    if section.heldout_path:
        heldout = _clean(_read_file(section.heldout_path, section, "heldout"), dropped, examples, "held-out ")
    elif not templated:
        pool, heldout = _split(pool, section)
    kept, contaminated = _decontaminate(pool, heldout, section, templated)
    dropped["contaminated"] += len(contaminated)
    if section.levels:
        kept, of_levels = _at_levels(kept, heldout, section.levels, dropped)
        heldout = heldout if section.heldout_path else of_levels  # a benchmark's levels are its own
    if section.limit and len(kept) > section.limit:
        dropped["limit"] += len(kept) - section.limit
        kept = kept[: section.limit]
    if not kept:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "the source is empty"
        why += "".join(f"; {reason}: {example}" for reason, example in examples.items() if "unreadable" in reason)
        raise UserError(f"no training problems left ({why})", need="at least one", how="see the `problems` section")
    counts = {reason: count for reason, count in sorted(dropped.items()) if count}
    return ProblemSet(tuple(kept), tuple(heldout), counts, tuple(contaminated), examples)


def _records(section: ProblemsSection) -> list[Problem]:
    if section.name == "file":
        if not section.path:
            raise UserError("problems.name=file without a file", need="problems.path=FILE")
        return _read_file(section.path, section, Path(section.path).stem)
    if section.name not in BENCHMARKS:
        raise UserError(
            f"unknown problem source {section.name!r}",
            need="reasoning_gym, file, or a benchmark",
            how=f"the nearest name is {nearest_benchmark(section.name, ('reasoning_gym', 'file'))}",
        )
    fields = _fields(section) if section.path else None
    return list(load_benchmark(section.name, path=section.path, split=section.split, fields=fields))


def _read_file(path: str, section: ProblemsSection, source: str) -> list[Problem]:
    return read_problems(Path(path), _fields(section), source)


def _fields(section: ProblemsSection) -> Fields:
    return Fields(
        section.question,
        section.answer,
        level=section.level,
        category=section.category,
        answers=section.answers,
        min_agreement=section.min_agreement,
    )


def unreadable(problems: Iterable[Problem]) -> list[str]:
    """The problems whose reference no answer can equal: id, reason and how the reference begins."""
    return [
        f"{problem.id}: {why} ({problem.answer[:60]!r})"
        for problem in problems
        if (why := why_unreadable(problem.answer))
    ]


def _clean(problems: Iterable[Problem], dropped: Counter[str], examples: dict[str, str], of: str = "") -> list[Problem]:
    """Problems without repeats, in order; ids are unique afterwards. Reasons are counted with `of` before them."""
    by_id: dict[str, str] = {}
    texts: set[str] = set()
    kept: list[Problem] = []
    for problem in problems:
        key = text_key(problem.question)
        if by_id.get(problem.id, key) != key:
            raise UserError(f"two different problems have the id {problem.id!r}", need="one id per problem")
        by_id[problem.id] = key
        reason = _flaw(problem) if key not in texts else "duplicate"
        texts.add(key)
        if not reason:
            kept.append(problem)
            continue
        dropped[of + reason] += 1
        examples.setdefault(of + reason, next(iter(unreadable([problem])), problem.id))
    return kept


def _flaw(problem: Problem) -> str:
    if len(problem.question) > MAX_QUESTION_CHARS:
        return "too-long"
    if needs_image(problem.question):
        return "image"
    if not problem.answer:  # only synthetic problems come without: readers refuse the others
        return "disagreement"
    return "unreadable answer" if why_unreadable(problem.answer) else ""


def _split(pool: list[Problem], section: ProblemsSection) -> tuple[list[Problem], list[Problem]]:
    if section.heldout >= len(pool) and section.heldout:
        raise UserError(
            f"{len(pool)} problems cannot give {section.heldout} held-out ones",
            need="problems.heldout below their number",
            how=f"for example problems.heldout={len(pool) // 5}",
        )
    cut = len(pool) - section.heldout
    return pool[:cut], pool[cut:]


def _decontaminate(
    pool: Sequence[Problem], heldout: Sequence[Problem], section: ProblemsSection, templated: bool
) -> tuple[list[Problem], list[tuple[str, str]]]:
    sets = []
    if heldout and not (templated and not section.heldout_path):  # generated sets were kept apart when they were made
        sets.append(Overlap("heldout", heldout))
    for name in section.decontaminate:
        if name in BENCHMARKS:
            sets.append(Overlap(name, load_benchmark(name)))
        elif Path(name).is_file():
            sets.append(Overlap(name, _read_file(name, section, Path(name).stem)))
        else:
            raise UserError(
                f"problems.decontaminate names {name!r}",
                need="a benchmark or a file",
                how=f"the nearest benchmark is {nearest_benchmark(name)}",
            )
    kept: list[Problem] = []
    removed: list[tuple[str, str]] = []
    for problem in pool:
        found = next((overlap.name for overlap in sets if overlap.touches(problem.question)), None)
        if found is None:
            kept.append(problem)
        else:
            removed.append((problem.id, found))
    return kept, removed


def _at_levels(
    pool: Sequence[Problem], heldout: Sequence[Problem], levels: Sequence[str], dropped: Counter[str]
) -> tuple[list[Problem], list[Problem]]:
    wanted = set(levels)
    missing = wanted - {problem.level for problem in pool}
    if missing:
        have = ", ".join(sorted({problem.level for problem in pool if problem.level})) or "none"
        raise UserError(f"problems.levels names {', '.join(sorted(missing))}", need=f"levels of the pool: {have}")
    kept = [problem for problem in pool if problem.level in wanted]
    dropped["level"] += len(pool) - len(kept)
    return kept, [problem for problem in heldout if problem.level in wanted or not problem.level]
