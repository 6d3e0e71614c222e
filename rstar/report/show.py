"""Search trees of a run by problem, and one tree as text for a terminal."""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len, chop_cells

from rstar.manifest import RoundDir
from rstar.prompts import DELIMITERS
from rstar.report.results import round_numbers
from rstar.store import FrameRef, index, read_frame
from rstar.tree import Node, Tree
from rstar.types import TerminalReason, UserError

WHOLE_TREE_NODES = 60  # larger trees are folded beside their best path
MAX_LINES = 12  # of a step's text, output or error
BEST = "*"
FAILED = (TerminalReason.CODE_ERROR, TerminalReason.MALFORMED)


# -- finding -----------------------------------------------------------------------------------------------------------


def problem_of(tree_id: str) -> str:
    """The problem's id in a tree's id `<problem>#<seed>`."""
    return tree_id.rpartition("#")[0] or tree_id


def problem_ids(run: Path) -> list[str]:
    """Ids of all problems that have a tree in the run, sorted. Raises UserError where the path is no run."""
    return sorted(
        {problem_of(tree_id) for number in round_numbers(run) for tree_id in index(RoundDir(run, number).trees)}
    )


def find_trees(run: Path, problem_id: str, round: int | None = None) -> list[Tree]:
    """The search trees of a problem (all seeds), by round; of one round where `round` is given.

    A tree's own id (`<problem>#<seed>`) finds that tree alone. Raises UserError that names near ids for an unknown one.
    """
    return [read_frame(ref) for _, ref in find_refs(run, problem_id, round)]


def find_refs(run: Path, problem_id: str, round: int | None = None) -> list[tuple[int, FrameRef]]:
    """As `find_trees`: the trees' rounds and where their frames lie."""
    numbers = [number for number in round_numbers(run) if round in (None, number)]
    found: list[tuple[int, FrameRef]] = []
    known: set[str] = set()
    for number in numbers:
        refs = index(RoundDir(run, number).trees)
        known.update(map(problem_of, refs))
        found += [(number, ref) for tree_id, ref in refs.items() if problem_id in (tree_id, problem_of(tree_id))]
    if found:
        return found
    where = f"{run}" if round is None else f"round {round} of {run}"
    if not known:
        raise UserError(f"{where} holds no trees", need="a round whose search has begun")
    raise UserError(
        f"{where} has no tree of problem {problem_id!r}",
        need="a problem's id",
        how=f"near ones: {', '.join(near(problem_id, known))}",
    )


def near(name: str, known: Iterable[str], n: int = 5) -> list[str]:
    """The `n` names of `known` that are most like `name`, those that contain it first."""
    names = sorted(known)
    containing = [other for other in names if name and name in other]
    close = difflib.get_close_matches(name, names, n=n, cutoff=0.0)
    return list(dict.fromkeys([*containing, *close]))[:n]


# -- what matters in a tree --------------------------------------------------------------------------------------------


def best_path(tree: Tree) -> list[int]:
    """Node ids, root excluded, of the path a reader wants first.

    The correct answer of the highest mean Q (as the extractors rank); without one the answer of the highest score, PPM
    before mean Q; without any answer the most visited way down.
    """

    def rank(leaf: Node) -> tuple[bool, float, float]:
        path = tree.path(leaf)
        mean_q = sum(node.q_value for node in path) / len(path)
        return (
            leaf.reward == 1.0,
            mean_q if leaf.reward is not None or leaf.ppm_value is None else leaf.ppm_value,
            mean_q,
        )

    leaf = max(tree.answers(), key=rank, default=None)
    if leaf is None:
        leaf = tree.root
        while leaf.children:
            leaf = max(tree.children(leaf), key=lambda node: node.visit_count)
    return [node.id for node in tree.path(leaf)]


def common_answer(tree: Tree) -> tuple[str, int] | None:
    """The answer that most samples gave, and how many; None without one. Answers are the same when their text is."""
    votes: Counter[str] = Counter()
    for leaf in tree.answers():
        votes[leaf.answer or ""] += leaf.multiplicity
    return votes.most_common(1)[0] if votes else None


def below(tree: Tree, node: Node) -> Iterator[Node]:
    """All nodes under `node`, itself excluded."""
    waiting = list(node.children)
    while waiting:
        child = tree.nodes[waiting.pop()]
        yield child
        waiting.extend(child.children)


# -- as text -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    tree: Tree
    width: int
    best: frozenset[int]
    depth: int  # steps shown below the root off the best path; 0: all


def show_tree(tree: Tree, *, width: int = 100, depth: int | None = None) -> str:
    """The tree as text of at most `width` columns (60 at least).

    The most visited children come first, the best path is marked with *. Off it, nodes deeper than `depth` steps are
    folded into one line (0: nothing is folded; None: by the tree's size); the best path is always whole.
    """
    best = best_path(tree)
    if depth is None:
        depth = 0 if len(tree.nodes) <= WHOLE_TREE_NODES else 1
    view = _View(tree, max(60, width), frozenset(best), depth)
    lines = [*_head(view), "", *_node_lines(view)]
    return "\n".join(lines) + "\n"


def _head(view: _View) -> list[str]:
    tree, problem = view.tree, view.tree.problem
    graded = any(leaf.reward is not None for leaf in tree.answers())
    verdict = "solved" if tree.solved else "not solved" if graded or not tree.answers() else "not graded"
    facts = [
        clean(tree.tree_id),
        f"level {clean(problem.level)}" if problem.level else "",
        verdict if tree.complete else f"{verdict} so far (unfinished)",
        f"{tree.rollouts_done} rollouts",
        f"{len(tree.nodes) - 1} nodes",
        f"{tree.tokens:,} tokens",
        f"{tree.seconds:.1f} s",
    ]
    lines = _wrapped(" | ".join(fact for fact in facts if fact), view.width)
    models = [f"policy {clean(tree.policy)}" if tree.policy else "", f"PPM {clean(tree.ppm)}" if tree.ppm else ""]
    lines += _wrapped(" | ".join(m for m in models if m), view.width)
    lines += ["", *_block(problem.question, view.width), ""]
    answer = common_answer(tree)
    given = (
        f"; most given: {clean(answer[0])} ({answer[1]} of {sum(n.multiplicity for n in tree.answers())})"
        if answer
        else ""
    )
    return [*lines, *_wrapped(f"reference answer: {clean(problem.answer)}{given}", view.width)]


def _node_lines(view: _View) -> Iterator[str]:
    """Depth first without recursion: a chain may be deeper than Python's stack."""
    tree = view.tree
    yield f"root  {_figures(tree.root)}"
    waiting = _waiting(tree, tree.root, "", 1)
    while waiting:
        node, rail, last, depth = waiting.pop()
        best = node.id in view.best
        yield from _wrapped(
            f"{rail}{'└' if last else '├'}─{BEST if best else '─'} #{node.id}  {_figures(node)}", view.width
        )
        inner = _short(rail + ("  " if last else "│ "), view.width // 2)
        folded = bool(node.children) and not best and 0 < view.depth <= depth
        yield from _body(node, inner + ("│ " if node.children and not folded else "  "), view.width)
        if folded:
            yield f"{inner}└ {_folded(list(below(tree, node)))}"
        else:
            waiting.extend(_waiting(tree, node, inner, depth + 1))


def _short(rail: str, width: int) -> str:
    """A rail that leaves room for text: of a very deep one, its inner end."""
    return rail if len(rail) <= width else "…" + rail[3 - width :]


def _waiting(tree: Tree, node: Node, rail: str, depth: int) -> list[tuple[Node, str, bool, int]]:
    """The children of `node`, last first, for a stack: (child, what is drawn before it, whether it is last, depth)."""
    children = _ordered(tree, node)
    return [(child, rail, child is children[-1], depth) for child in reversed(children)]


def _ordered(tree: Tree, node: Node) -> list[Node]:
    """Children with the most visits first, failed steps last."""
    return sorted(tree.children(node), key=lambda child: (child.terminal in FAILED, -child.visit_count, child.id))


def _figures(node: Node) -> str:
    parts = [f"N {node.visit_count}"]
    if node.visit_count:
        parts.append(f"Q {node.q_value:+.2f}")
    if node.ppm_value is not None:
        parts.append(f"PPM {node.ppm_value:+.2f}")
    if node.terminal is TerminalReason.ANSWER:
        verdict = "" if node.reward is None else f"{'correct' if node.reward == 1.0 else 'wrong'} ({node.reward:+g}) "
        parts.append(f"{verdict}answer {clean(node.answer or '')}")
    elif node.terminal is not None:
        parts.append(node.terminal.value + ("" if node.reward is None else f" ({node.reward:+g})"))
    if node.multiplicity > 1:
        parts.append(f"x{node.multiplicity}")
    return "  ".join(parts)


def _body(node: Node, indent: str, width: int) -> Iterator[str]:
    room = width - cell_len(indent) - 2
    for text, mark in ((shown_text(node), "  "), (node.stdout, "> "), (node.error, "! ")):
        for line in _block(text.strip("\n"), room):
            yield f"{indent}{mark}{line}"


def shown_text(node: Node) -> str:
    """A step's text without its closing delimiter."""
    text = node.text.rstrip()
    return next((text[: -len(d)].rstrip() for d in DELIMITERS if text.endswith(d)), text)


def _folded(hidden: list[Node]) -> str:
    kinds = Counter(node.terminal.value for node in hidden if node.terminal is not None)
    correct = sum(node.reward == 1.0 for node in hidden if node.terminal is TerminalReason.ANSWER)
    parts = [f"{n} {kind}" + (f" ({correct} correct)" if kind == "answer" else "") for kind, n in kinds.items()]
    return f"... {len(hidden)} more below" + (f": {', '.join(parts)}" if parts else "")


def _block(text: str, width: int) -> list[str]:
    """Lines of a text, long ones wrapped, at most MAX_LINES."""
    lines = [part for line in clean(text).split("\n") for part in _wrapped(line, width)] if text else []
    if len(lines) > MAX_LINES:
        return [*lines[: MAX_LINES - 1], f"... {len(lines) - MAX_LINES + 1} more lines"]
    return lines


def _wrapped(line: str, width: int) -> list[str]:
    if cell_len(line) <= width:
        return [line] if line else []
    return chop_cells(line, max(8, width))


def clean(text: str) -> str:
    """`text` with control characters made visible: a model's text must not steer the reader's terminal."""
    return "".join(
        c if c == "\n" or unicodedata.category(c)[0] != "C" else "    " if c == "\t" else f"\\x{ord(c):02x}"
        for c in text
    )
