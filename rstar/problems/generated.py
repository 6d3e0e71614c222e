"""Endless, exactly checkable problems from reasoning-gym, made deterministically from seeds.

A family at one difficulty is a level:

    families:
      sums-easy: {family: chain_sum, count: 40, heldout: 8, settings: {max_terms: 3, max_digits: 2}}
      words:     {family: gsm_symbolic, level: "3", count: 60, heldout: 8}

Without `level` the level is the family's label. Held-out problems come from other seeds and are made first; a training
problem never shares their text, nor the numbers of one of its family's. No problem's answer is a number that its
question shows, or a partial result (worked.partial_results): half a solution must not be right by luck.
"""

from __future__ import annotations

import difflib
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, zip_longest
from typing import Any

from rstar.config import ProblemsSection
from rstar.problems.overlap import numbers_key, skeleton_key, text_key
from rstar.problems.worked import partial_results
from rstar.types import Problem, UserError

DEFAULT_FAMILIES: dict[str, dict[str, Any]] = {
    "products": {"family": "products", "count": 40, "settings": {"max_digits": 2}},
    "chain_sum": {"family": "chain_sum", "count": 40, "settings": {"max_terms": 6, "max_digits": 3}},
    "basic_arithmetic": {"family": "basic_arithmetic", "count": 40, "settings": {"max_terms": 4, "max_digits": 2}},
    "lcm": {"family": "lcm", "count": 40},
    "gsm_symbolic": {"family": "gsm_symbolic", "count": 40},
}
_TRIES = 60  # draws per wanted problem before a family counts as too small
_CHUNK = 1024  # some families plan all their items ahead, so the stream comes in pieces


@dataclass(frozen=True)
class Family:
    """One line of `problems.families`."""

    label: str
    family: str
    level: str
    count: int
    heldout: int
    settings: Mapping[str, Any] = field(default_factory=dict)


def families(section: ProblemsSection) -> list[Family]:
    """The families a config asks for (DEFAULT_FAMILIES if it names none), checked."""
    given = section.families or DEFAULT_FAMILIES
    share, rest = divmod(0 if section.heldout_path else section.heldout, len(given))
    return [_family(label, spec, share + (n < rest)) for n, (label, spec) in enumerate(given.items())]


def _family(label: str, spec: Mapping[str, Any], share: int) -> Family:
    where = f"problems.families.{label}"
    for key in spec:
        if key not in ("family", "level", "count", "heldout", "settings"):
            near = difflib.get_close_matches(key, ("family", "level", "count", "heldout", "settings"), n=1, cutoff=0.0)
            raise UserError(f"unknown key {where}.{key}", how=f"the nearest key is {where}.{near[0]}")
    count, heldout, settings = spec.get("count", 40), spec.get("heldout", share), spec.get("settings") or {}
    if not (isinstance(count, int) and isinstance(heldout, int) and count >= 0 and heldout >= 0):
        raise UserError(f"{where}: count {count!r}, heldout {heldout!r}", need="whole numbers, 0 or more")
    if not isinstance(settings, Mapping):
        raise UserError(f"{where}.settings is {settings!r}", need="a mapping")
    return Family(label, str(spec.get("family", label)), str(spec.get("level", label)), count, heldout, dict(settings))


def generate(section: ProblemsSection, dropped: Counter[str]) -> tuple[list[Problem], list[Problem]]:
    """(training problems, held-out problems), each round-robin over the families: any prefix holds all of them."""
    train: list[list[Problem]] = []
    heldout: list[list[Problem]] = []
    wanted = families(section)
    held_texts: set[str] = set()
    held_numbers: dict[str, set[tuple[str, ...]]] = {}
    for family in wanted:  # all held-out sets first: two levels may draw from one family
        made = _distinct(family, section.seed, "heldout", family.heldout, Counter(), held_texts, set())
        held_numbers.setdefault(family.family, set()).update(numbers_key(problem.question) for problem in made)
        heldout.append(made)
    texts = set(held_texts)
    for family in wanted:
        taken = held_numbers[family.family]
        train.append(_distinct(family, section.seed, "train", family.count, dropped, texts, taken))
    return _round_robin(train), _round_robin(heldout)


def fresh(
    section: ProblemsSection, counts: Mapping[str, int], *, train: Sequence[Problem], heldout: Sequence[Problem]
) -> list[Problem]:
    """More problems of the section's families, from seeds of their own: `counts` per family label, round-robin.

    None repeats the text of a problem in `train` or `heldout`, nor the numbers of a held-out one of its family.
    """
    by_label = {family.label: family for family in families(section)}
    for label in counts:
        if label not in by_label:
            raise UserError(f"unknown family label {label!r}", need=f"one of {', '.join(by_label)}")
    texts = {text_key(problem.question) for problem in (*train, *heldout)}
    made = []
    for label, count in counts.items():
        family = by_label[label]
        taken = {numbers_key(p.question) for p in heldout if p.source == family.family}
        made.append(_distinct(family, section.seed, "warmup", count, Counter(), texts, taken))
    return _round_robin(made)


def items(family: str, settings: Mapping[str, Any], seed: int) -> Iterator[Mapping[str, Any]]:
    """reasoning-gym's endless stream of one family: question, answer, metadata.

    Raises UserError for an unknown family or setting.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of a package that it imports; nothing the user can mend
            import reasoning_gym  # an optional dependency
            from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError("reasoning-gym is not installed", how="pip install -e '.[quickstart]'") from error
    if family not in DATASETS:
        near = difflib.get_close_matches(family, DATASETS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown family {family!r}", need="a task of reasoning-gym", how=f"the nearest is {near}")
    while True:
        try:
            data = reasoning_gym.create_dataset(family, seed=seed, size=_CHUNK, **settings)
        except (TypeError, AssertionError, ValueError) as error:
            raise UserError(f"settings {dict(settings)} do not fit the family {family}: {error}") from error
        for number in range(_CHUNK):
            yield data[number]
        seed += _CHUNK


def seed_of(*parts: object) -> int:
    """A seed below 2^48 from names. Item i of reasoning-gym is seeded by seed + i: streams must start far apart."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:6], "big")


def _distinct(
    family: Family,
    seed: int,
    split: str,
    count: int,
    dropped: Counter[str],
    texts: set[str],
    taken_numbers: set[tuple[str, ...]],
) -> list[Problem]:
    """The first `count` problems of the stream that repeat nothing and that luck does not solve.

    Adds their texts to `texts`.
    """
    problems: list[Problem] = []
    skeletons: set[tuple[str, ...]] = set()
    if not count:
        return problems
    stream = items(family.family, family.settings, seed_of(seed, family.label, split))
    for _ in range(_TRIES * count + 200):
        item = next(stream)
        question, answer = str(item["question"]).strip(), str(item["answer"]).strip()
        text, skeleton = text_key(question), skeleton_key(question)
        cot = str(item["metadata"].get("answer_cot", ""))
        ident = f"{family.label}/{split}/{len(problems)}"
        problem = Problem(ident, question, answer, family.family, family.level, cot, family.label)
        if not _is_number(answer):
            dropped["unparsable"] += 1
        elif text in texts:
            dropped["duplicate"] += 1
        elif skeleton in skeletons or numbers_key(question) in taken_numbers:
            dropped["same-numbers"] += 1
        elif Fraction(answer) in partial_results(problem):
            dropped["partial-result"] += 1
        else:
            texts.add(text)
            skeletons.add(skeleton)
            problems.append(problem)
            if len(problems) == count:
                return problems
    raise UserError(
        f"problems.families.{family.label} gave {len(problems)} distinct {split} problems of {count}",
        need="a family and settings with more different problems and numeric answers",
        how="lower its count or heldout, or widen its settings (more terms or digits)",
    )


def _is_number(text: str) -> bool:
    try:
        Fraction(text)
    except (ValueError, ZeroDivisionError):
        return False
    return len(text) <= 64


def _round_robin(lists: list[list[Problem]]) -> list[Problem]:
    return [problem for problem in chain.from_iterable(zip_longest(*lists)) if problem is not None]
