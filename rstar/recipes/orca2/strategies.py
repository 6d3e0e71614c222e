"""Strategies of reasoning: which a task may be answered by, which is chosen for it, which an answer shows (Orca 2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rstar.config import read_yaml
from rstar.types import UserError

Texts = Mapping[str, str]


@dataclass(frozen=True)
class Strategies:
    """A strategies file."""

    tasks: Mapping[str, Texts]  # sub-category of problems -> strategy -> instruction for the teacher
    evidence: Mapping[str, re.Pattern[str]]  # strategy -> what shows it in an answer; the first that is found counts
    messages: Texts  # general system messages of explanation tuning, by name

    def candidates(self, task: str) -> Texts:
        """Strategies of a sub-category, the task "other" standing for all that are not named. Raises UserError."""
        found = self.tasks.get(task) or self.tasks.get("other")
        if not found:
            raise UserError(f"no strategies for the sub-category {task!r}", need=f"one of {', '.join(self.tasks)}")
        return found


def load_strategies(path: str | Path) -> Strategies:
    """Read a YAML file with `tasks`, `evidence` and `messages`. Raises UserError for what is no such file."""
    if not Path(path).is_file():
        raise UserError(f"no strategies file {path}", need="YAML with tasks, evidence, messages", how="orca.strategies")
    try:
        read = read_yaml(Path(path))
        tasks = {str(task): _texts(given) for task, given in read["tasks"].items()}
        evidence = {name: re.compile(text, re.MULTILINE) for name, text in _texts(read["evidence"]).items()}
        found = Strategies(tasks, evidence, _texts(read.get("messages") or {}))
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:  # of a wrong shape, or of a pattern
        raise UserError(
            f"{path} is no strategies file: {str(error)[:120]}", need="tasks: {TASK: {STRATEGY: text}}, evidence"
        ) from error
    unknown = {name for given in tasks.values() for name in given} - set(evidence)
    if unknown:
        raise UserError(f"{path} has strategies without evidence: {', '.join(sorted(unknown))}", need="a pattern each")
    return found


def _texts(given: object) -> dict[str, str]:
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise ValueError(f"{given!r} is no mapping of names to texts")
    return {str(name): " ".join(text.split()) for name, text in given.items()}


def choose(figures: Mapping[str, float], instructions: Texts) -> str:
    """The strategy with the best figure; ties to the shorter instruction, then to the first named."""
    return max(figures, key=lambda name: (figures[name], -len(instructions[name])))


def strategy_of(answer: str, evidence: Mapping[str, re.Pattern[str]]) -> str:
    """The strategy that an answer shows; "" where it shows none."""
    return next((name for name, pattern in evidence.items() if pattern.search(answer)), "")
