"""One look at each round's search trees, bounded in number: what a page counts in them, and what it chooses from.

A page of a large run must stay quick to write, so at most LOOKED_AT problems of a round are read, each tree once. Which
ones depends on the problems' ids alone: they are the same in every round of a pool.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rstar.manifest import RoundDir
from rstar.report.show import problem_of
from rstar.report.unsolved import Unsolved, Votes
from rstar.store import FrameRef, index, read_frame
from rstar.tree import Node, Tree
from rstar.types import TerminalReason, UserError

LOOKED_AT = 300  # problems per round that are read
BINS = 10  # of Q and of PPM scores, over [-1, 1]


@dataclass(frozen=True)
class Seen:
    """What a look at one tree found."""

    ref: FrameRef
    solved: bool
    mixed: bool  # right and wrong answers: what a reader learns most from
    disagreement: float  # the largest of its steps, see `disagreement`


@dataclass(frozen=True)
class Look:
    """What a look at one round found."""

    number: int
    problems: Mapping[str, Sequence[Seen]]  # problem's id -> its trees
    total: int  # problems of the round that have a tree, read or not
    newly: Mapping[str, str]  # id -> question of problems that no round before has solved; of the first round none
    unsolved: Sequence[Unsolved]
    q: Mapping[int, int]  # bin of Q -> visited steps
    n: Mapping[int, int]  # floor(log2 N) -> visited steps
    scored: Mapping[int, tuple[int, int]]  # bin of the PPM score -> (correct, all) answers below its steps

    @property
    def solved(self) -> list[str]:
        """Ids of the problems with a solved tree."""
        return [problem for problem, trees in self.problems.items() if any(tree.solved for tree in trees)]


def look(run: Path, numbers: Sequence[int]) -> tuple[list[Look], list[str]]:
    """Look at the rounds that have trees; and what could not be read, in words: a report must not stop a run."""
    looks: list[Look] = []
    trouble: list[str] = []
    solved_before: set[str] = set()
    for number in numbers:
        try:
            found = _look(RoundDir(run, number), solved_before if looks else None)
        except UserError as error:
            trouble.append(f"round {number}: {error}")
            continue
        if found.problems:
            looks.append(found)
            solved_before |= set(found.solved)
    return looks, trouble


def _look(folder: RoundDir, solved_before: set[str] | None) -> Look:
    by_problem: dict[str, list[FrameRef]] = {}
    for tree_id, ref in index(folder.trees).items():
        by_problem.setdefault(problem_of(tree_id), []).append(ref)
    votes, q, n = Votes(), Counter[int](), Counter[int]()
    right, answers = Counter[int](), Counter[int]()
    seen: dict[str, list[Seen]] = {}
    newly: dict[str, str] = {}
    for problem in sorted(by_problem, key=shuffled)[:LOOKED_AT]:
        for ref in by_problem[problem]:
            tree = read_frame(ref)
            if tree.complete:
                votes.add(tree)
            for node in tree.nodes[1:]:
                if node.visit_count:
                    q[bin_of(node.q_value)] += 1
                    n[node.visit_count.bit_length() - 1] += 1
            scored = scored_steps(tree)
            for node, correct, below in scored:
                place = bin_of(node.ppm_value or 0.0)
                right[place] += correct
                answers[place] += below
            rewards = {leaf.reward for leaf in tree.answers()}
            one = Seen(ref, tree.solved, {1.0, -1.0} <= rewards, disagreement(scored)[0])
            seen.setdefault(problem, []).append(one)
            if tree.solved and solved_before is not None and problem not in solved_before:
                newly[problem] = tree.problem.question
    outcomes = {k: (right[k], answers[k]) for k in sorted(answers)}
    return Look(folder.number, seen, len(by_problem), newly, votes.unsolved(), q, n, outcomes)


def shuffled(name: str) -> bytes:
    """A sort key that depends on the name alone and puts names into no order of meaning."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()


def bin_of(value: float) -> int:
    """The bin, from 0, of a value in [-1, 1]."""
    return min(BINS - 1, max(0, int((value + 1) / 2 * BINS)))


def scored_steps(tree: Tree) -> list[tuple[Node, int, int]]:
    """Steps with a PPM score and graded answers at or below them: (step, correct ones, all), counted in samples."""
    correct, graded = [0] * len(tree.nodes), [0] * len(tree.nodes)
    for node in reversed(tree.nodes[1:]):  # children come after their parents
        assert node.parent is not None
        if node.terminal is TerminalReason.ANSWER and node.reward is not None:
            graded[node.id] += node.multiplicity
            correct[node.id] += node.multiplicity * (node.reward > 0)
        correct[node.parent] += correct[node.id]
        graded[node.parent] += graded[node.id]
    both = (node for node in tree.nodes[1:] if node.ppm_value is not None and graded[node.id])
    return [(node, correct[node.id], graded[node.id]) for node in both]


def disagreement(scored: Sequence[tuple[Node, int, int]]) -> tuple[float, int]:
    """The largest |PPM score - mean reward of the answers below|, in [0, 2], and its step's id; (0, 0) without one."""
    return max(
        ((abs((node.ppm_value or 0.0) - (2 * correct / below - 1)), node.id) for node, correct, below in scored),
        default=(0.0, 0),
    )
