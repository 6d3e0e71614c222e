"""Which trees a report shows, and their compact form for the viewer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from rstar.manifest import RoundDir
from rstar.report.look import Look, Seen, disagreement, scored_steps, shuffled
from rstar.report.show import best_path, common_answer, find_refs, problem_of, shown_text
from rstar.store import FrameRef, read_frame
from rstar.tree import Node, Tree
from rstar.types import JsonValue

MAX_TEXT = 4_000  # characters of a step's text, output or error
MAX_BYTES = 24 << 20  # of all trees in a page


@dataclass(frozen=True)
class Shown:
    """A tree chosen for the page."""

    round: int
    newly_solved: bool  # no earlier round's tree of this problem was solved
    ref: FrameRef
    asked: bool = False  # by its id


@dataclass(frozen=True)
class Sample:
    """The trees of a page, packed, and what could not be shown."""

    entries: tuple[Mapping[str, JsonValue], ...]  # one per tree, for the list
    trees: tuple[bytes, ...]  # JSON, in the same order
    left_out: int  # chosen trees that the page has no room for


def sample_trees(
    run: Path, looks: Sequence[Look], *, per_round: int, ids: Sequence[str] = (), max_bytes: int = MAX_BYTES
) -> Sample:
    """Choose about `per_round` trees of each round, a third newly solved, a third unsolved, and pack them.

    The choice depends on what is in the trees and on the ids. It prefers what a later round has newly solved, then what
    it shows, so that one problem can be followed from round to round. The trees of all rounds that `ids` name, by their
    problem or their own, come first. Raises UserError for an unknown one.
    """
    newly = {(found.number, problem) for found in looks for problem in found.newly}
    asked = [
        Shown(number, (number, problem_of(ref.tree_id)) in newly, ref, asked=True)
        for name in ids
        for number, ref in find_refs(run, name)
    ]
    picked: dict[str, int] = {}  # problem -> 2 where a later round has newly solved it, 1 where one shows it
    chosen: list[list[Shown]] = []
    for found in reversed(looks):
        shown = _choose(found, per_round, picked)
        picked |= {problem: 2 if problem in found.newly else max(1, picked.get(problem, 1)) for problem in shown}
        chosen.append(
            [Shown(found.number, problem in found.newly, _telling(found.problems[problem])) for problem in shown]
        )
    wanted: dict[tuple[int, str], Shown] = {}
    for one in [*asked, *_in_turns(chosen)]:
        wanted.setdefault((one.round, one.ref.tree_id), one)
    pairs = {
        number: _pairs(run, number, [tree_id for other, tree_id in wanted if other == number])
        for number in {number for number, _ in wanted}
    }
    entries: list[Mapping[str, JsonValue]] = []
    trees: list[bytes] = []
    size = left_out = 0
    for one in wanted.values():
        if size > max_bytes:
            left_out += 1
            continue
        tree = read_frame(one.ref)
        packed = pack(tree, pairs[one.round][tree.tree_id])
        size += len(packed)
        trees.append(packed)
        entries.append(_entry(one, tree))
    order = sorted(range(len(entries)), key=lambda i: (str(entries[i]["problem"]), entries[i]["round"]))
    return Sample(tuple(entries[i] for i in order), tuple(trees[i] for i in order), left_out)


def _choose(found: Look, n: int, picked: Mapping[str, int]) -> list[str]:
    def liked(problem: str) -> tuple[int, bool, bytes]:
        return -picked.get(problem, 0), not any(tree.mixed for tree in found.problems[problem]), shuffled(problem)

    def odd(problem: str) -> float:
        return max(tree.disagreement for tree in found.problems[problem])

    third = max(1, n // 3)
    groups: list[Iterable[str]] = [
        sorted(found.newly, key=liked)[:third],
        sorted((row.problem_id for row in found.unsolved), key=liked)[:third],
        sorted(found.problems, key=odd, reverse=True)[: third // 2],
        sorted(found.solved, key=liked),
        sorted(found.problems, key=liked),
    ]
    return list(dict.fromkeys(problem for group in groups for problem in group))[:n]


def _telling(trees: Sequence[Seen]) -> FrameRef:
    """The one tree of a problem that is shown: solved, with both outcomes, where the PPM was most wrong."""
    return max(trees, key=lambda tree: (tree.solved, tree.mixed, tree.disagreement)).ref


def _in_turns(rounds: Sequence[Sequence[Shown]]) -> list[Shown]:
    """One of each round, then the next of each: what the size limit cuts is cut from all rounds."""
    longest = max((len(one) for one in rounds), default=0)
    return [one[i] for i in range(longest) for one in rounds if i < len(one)]


def _pairs(run: Path, number: int, tree_ids: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Tree id -> (chosen, rejected) node ids of its preference pairs, read from the round's pairs.jsonl."""
    found: dict[str, list[tuple[int, int]]] = {tree_id: [] for tree_id in tree_ids}
    path = RoundDir(run, number).pairs
    if not path.exists() or not tree_ids:
        return found
    wanted = re.compile(b"|".join(re.escape(orjson.dumps(tree_id)) for tree_id in tree_ids))
    with path.open("rb") as file:
        for line in file:
            if wanted.search(line):  # a cheap look before the line is parsed
                row = orjson.loads(line)
                if row["tree_id"] in found:
                    found[row["tree_id"]].append((row["node_ids"][0], row["node_ids"][1]))
    return found


# -- packing -----------------------------------------------------------------------------------------------------------


def _entry(one: Shown, tree: Tree) -> dict[str, JsonValue]:
    off, at = disagreement(scored_steps(tree))
    return {
        "id": tree.tree_id,
        "problem": tree.problem.id,
        "question": tree.problem.question,
        "round": one.round,
        "level": tree.problem.level,
        "solved": tree.solved,
        "new": one.newly_solved,
        "complete": tree.complete,
        "nodes": len(tree.nodes) - 1,
        "off": round(off, 2),
        "at": at,
        "asked": one.asked,
    }


def pack(tree: Tree, pairs: Sequence[tuple[int, int]] = ()) -> bytes:
    """JSON of a tree for the viewer: short keys, no defaults, long texts cut."""
    common = common_answer(tree)
    return orjson.dumps(
        {
            "answer": tree.problem.answer,
            "common": common and [common[0], common[1], sum(leaf.multiplicity for leaf in tree.answers())],
            "rollouts": tree.rollouts_done,
            "tokens": tree.tokens,
            "seconds": round(tree.seconds, 1),
            "seed": tree.seed,
            "searcher": tree.searcher,
            "best": best_path(tree),
            "pairs": pairs,
            "nodes": [_packed(node) for node in tree.nodes],
        },
        option=orjson.OPT_NON_STR_KEYS,
    )


def _packed(node: Node) -> dict[str, Any]:
    body = shown_text(node)
    row = {
        "p": node.parent,
        "t": _cut(body),
        "c": node.code is not None or None,  # the text is code
        "o": _cut(node.stdout),
        "e": _cut(node.error),
        "n": node.visit_count,
        "q": round(node.q_value, 4) if node.visit_count else None,
        "v": None if node.ppm_value is None else round(node.ppm_value, 4),
        "x": node.terminal.value if node.terminal else None,
        "a": _cut(node.answer or ""),
        "r": node.reward,
        "m": node.multiplicity if node.multiplicity > 1 else None,
        "k": node.tokens or None,
        "w": node.role,
    }
    return {key: value for key, value in row.items() if value not in (None, "")}


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}\n... ({len(text) - MAX_TEXT:,} more characters)"
