"""Preference pairs for the PPM (rStar-Math section 3.3; margins and edit distance from the official code)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rapidfuzz.distance import Levenshtein

from rstar.extract.trajectories import (
    Content,
    content,
    distinct,
    graded_answers,
    path_segments,
    provenance,
    ranked,
    trajectories,
    trajectory_content,
)
from rstar.prompts import clean_answer
from rstar.tree import Node, Tree
from rstar.types import PreferenceRow, Trajectory


def outcome_counts(tree: Tree) -> list[tuple[int, int]]:
    """Per node: (correct answers, wrong answers) in its subtree, itself included. Other terminals count as neither."""
    correct, wrong = [0] * len(tree.nodes), [0] * len(tree.nodes)
    for leaf in graded_answers(tree):
        correct[leaf.id] += leaf.reward == 1.0
        wrong[leaf.id] += leaf.reward == -1.0
    for node in reversed(tree.nodes):  # children were created after their parents
        if node.parent is not None:
            correct[node.parent] += correct[node.id]
            wrong[node.parent] += wrong[node.id]
    return list(zip(correct, wrong, strict=True))


def sibling_pairs(
    siblings: Sequence[Node],
    counts: Sequence[tuple[int, int]],
    *,
    positives: int = 2,
    negatives: int = 2,
    widen: bool = True,
) -> list[tuple[Node, Node]]:
    """(chosen, rejected) among siblings: highest Q that lead to a correct answer x lowest Q that lead to a wrong one.

    2 x 2; with `widen`, where one side has a single node the other may give twice as many (1 x 4, 4 x 1). Only pairs
    with a higher Q of the chosen one (G3).
    """
    good = sorted((n for n in siblings if counts[n.id][0] > 0), key=lambda n: -n.q_value)
    bad = sorted((n for n in siblings if counts[n.id][1] > 0), key=lambda n: n.q_value)
    n_good = positives * 2 if widen and len(bad) == 1 else positives
    n_bad = negatives * 2 if widen and len(good) == 1 else negatives
    return [(g, b) for g in good[:n_good] for b in bad[:n_bad] if g.q_value > b.q_value]


def preference_rows(
    tree: Tree,
    *,
    positives: int = 2,
    negatives: int = 2,
    widen: bool = True,
    min_margin: float = 0.5,
    min_edit_distance: int = 20,
    answer_pairs: bool = True,
) -> list[PreferenceRow]:
    """Pairs of one tree: at every prefix with both outcomes below it, then whole trajectories for the final answer.

    No pair has the same program on both sides, nor the same words where nothing is run (trajectories.content): it would
    teach comments. No chosen side ends in an answer step that is not clean, where a clean one is right as well.
    Weights are 1 / (pairs that survive the filters at a prefix).
    """
    counts = outcome_counts(tree)
    rows: list[PreferenceRow] = []
    taken: set[tuple[int, int]] = set()
    for node in tree.nodes:
        if not (counts[node.id][0] and counts[node.id][1]):
            continue
        pairs = [
            (chosen, rejected)
            for chosen, rejected in sibling_pairs(
                _cleanest(tree.children(node), counts), counts, positives=positives, negatives=negatives, widen=widen
            )
            if chosen.q_value - rejected.q_value >= min_margin
            and Levenshtein.distance(chosen.text, rejected.text) >= min_edit_distance
            and _content(chosen) != _content(rejected)
        ]
        prefix = tree.prompt + tuple(text for text, _ in path_segments(tree, node))
        skip = len(prefix) - len(tree.prompt)
        found = [
            _row(
                tree,
                prefix,
                _texts(tree, chosen)[skip:],
                _texts(tree, rejected)[skip:],
                margin=chosen.q_value - rejected.q_value,
                kind="step",
                ends=(chosen.id, rejected.id),
            )
            for chosen, rejected in pairs
        ]
        rows.extend(_weighted(found))
        taken.update((chosen.id, rejected.id) for chosen, rejected in pairs)
    if answer_pairs:
        rows.extend(_weighted(_answer_rows(tree, positives, negatives, taken)))
    return rows


def capped(trees: Sequence[Sequence[PreferenceRow]], most: int) -> list[PreferenceRow]:
    """Of the pairs of a problem's trees at most so many, those of the largest margin; 0: all.

    What is left of a prefix is weighted anew, so that its weights sum to 1 whatever the cap has taken.
    """
    rows = [(number, row) for number, pairs in enumerate(trees) for row in pairs]
    if 0 < most < len(rows):
        rows = sorted(rows, key=lambda one: -one[1].q_margin)[:most]
    prefixes = Counter((number, row.kind, row.prompt_segments) for number, row in rows)
    return [replace(row, weight=1 / prefixes[number, row.kind, row.prompt_segments]) for number, row in rows]


def _answer_rows(tree: Tree, positives: int, negatives: int, taken: set[tuple[int, int]]) -> list[PreferenceRow]:
    """Whole trajectories: highest mean Q among the correct x lowest among the wrong; the prefix need not be shared."""
    found = ranked(trajectories(tree))
    right = [t for t in found if t.reward == 1.0]
    good = distinct([t for t in right if t.clean] or right)[:positives]
    bad = distinct(t for t in reversed(found) if t.reward == -1.0)[:negatives]
    return [
        _row(
            tree,
            tree.prompt,
            _trajectory_texts(g),
            _trajectory_texts(b),
            margin=g.mean_q - b.mean_q,
            kind="answer",
            ends=(g.node_ids[-1], b.node_ids[-1]),
        )
        for g in good
        for b in bad
        if g.mean_q > b.mean_q
        and (g.node_ids[-1], b.node_ids[-1]) not in taken
        and trajectory_content(g) != trajectory_content(b)
    ]


def _cleanest(siblings: Sequence[Node], counts: Sequence[tuple[int, int]]) -> list[Node]:
    """The siblings without right answers that are not clean, where there are clean ones."""
    right = [n for n in siblings if n.answer is not None and counts[n.id][0]]
    unclean = {n.id for n in right if not clean_answer(n.text)}
    return [n for n in siblings if n.id not in unclean or len(unclean) == len(right)]


def _content(node: Node) -> Content:
    return content(() if node.code is None else (node.code,), node.text)


def _row(
    tree: Tree,
    prompt: tuple[str, ...],
    chosen: tuple[str, ...],
    rejected: tuple[str, ...],
    *,
    margin: float,
    kind: str,
    ends: tuple[int, int],
) -> PreferenceRow:
    source, node_ids = provenance(tree, ends)
    return PreferenceRow(
        prompt="".join(prompt),
        chosen="".join(chosen),
        rejected="".join(rejected),
        prompt_segments=prompt,
        chosen_segments=chosen,
        rejected_segments=rejected,
        q_margin=margin,
        weight=1.0,
        kind=kind,
        problem_id=tree.problem.id,
        tree_id=source,
        node_ids=node_ids,
    )


def _weighted(rows: list[PreferenceRow]) -> list[PreferenceRow]:
    return [replace(row, weight=1.0 / len(rows)) for row in rows]


def _texts(tree: Tree, node: Node) -> tuple[str, ...]:
    return tuple(text for text, _ in path_segments(tree, node))


def _trajectory_texts(trajectory: Trajectory) -> tuple[str, ...]:
    return tuple(text for text, _ in trajectory.segments)
