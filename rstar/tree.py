"""Node and Tree: structure, statistics, paths, and their flat rows on disk. The one thing that generation produces.

A Tree is read and written by every stage; no stage keeps another form. Its rows: the tree
first, then one row per node in creation order. A node is expanded when it has children, and exhausted when nothing
below it can still be selected; both follow from the rows, so a tree can be saved in the middle of its search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rstar.types import Problem, TerminalReason, UserError

SCHEMA = 1
ANSWER, STOP = "answer", "stop"  # roles of a flow's nodes: a piece of the solution, a word on whether it is final


@dataclass(slots=True)
class Node:
    """One step of a solution and what the search knows of it. The root has no text and stands for the question."""

    id: int  # index in Tree.nodes; creation order
    parent: int | None
    text: str = ""  # what the policy wrote, closing delimiter included
    code: str | None = None  # what was run
    stdout: str = ""  # what this step printed
    error: str = ""  # one line; empty when the run was fine
    status: str = ""  # ExecutionStatus value; empty where nothing was run
    cpu_ms: float = 0.0  # CPU time of this step's run
    visit_count: int = 0  # N: back-ups through this node (plus ppm_prior_visits)
    value_sum: float = 0.0  # sum of the returns backed up through this node
    ppm_value: float | None = None  # the PPM's squashed score of the path ending here, in [-1, 1], before search
    logprob: float | None = None  # sum of the step's token log-probabilities
    tokens: int = 0  # generated tokens of this step (one sample)
    multiplicity: int = 1  # how many samples had exactly this text
    terminal: TerminalReason | None = None
    answer: str | None = None  # extracted answer, where terminal is ANSWER
    reward: float | None = None  # +1/-1 by the grader (or by rule: max_depth, dead_end); never a PPM score
    role: str = ""  # who wrote it where several models write
    meta: dict[str, Any] = field(default_factory=dict)
    children: list[int] = field(default_factory=list)
    exhausted: bool = False  # nothing below can be selected any more
    virtual_losses: int = 0  # walks in flight through this node; never saved

    @property
    def q_value(self) -> float:
        """Q = value_sum / N, in [-1, 1]; 0 at N = 0."""
        return self.value_sum / self.visit_count if self.visit_count else 0.0

    @property
    def expanded(self) -> bool:
        """Whether its continuations were drawn; a dead end may have none."""
        return bool(self.children) or self.terminal is TerminalReason.DEAD_END


_FOLLOWING = ("children", "exhausted", "virtual_losses")  # fields that are not saved
_COLUMNS = {f.name: "n" if f.name == "visit_count" else f.name for f in fields(Node) if f.name not in _FOLLOWING}


@dataclass(slots=True)
class Tree:
    """A problem, everything that was sampled for it, and the statistics of the search."""

    tree_id: str
    problem: Problem
    prompt: tuple[str, ...]  # prompt segments before the first step
    recipe: str = ""
    searcher: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    policy: str = ""  # which checkpoint wrote it
    ppm: str = ""  # which checkpoint scored it; empty without one
    rollouts_done: int = 0
    tokens: int = 0  # generated tokens, all samples
    engine_calls: int = 0
    seconds: float = 0.0
    worker: str = ""  # host and process that grew it
    complete: bool = False
    revision: int = 0  # how often a finished tree was taken up again (continued, re-scored)
    nodes: list[Node] = field(default_factory=lambda: [Node(id=0, parent=None)])

    @property
    def root(self) -> Node:
        return self.nodes[0]

    def add_child(self, parent: Node, **fields: Any) -> Node:
        """Append a node under `parent`; ids are creation order."""
        node = Node(id=len(self.nodes), parent=parent.id, **fields)
        self.nodes.append(node)
        parent.children.append(node.id)
        return node

    def children(self, node: Node) -> list[Node]:
        """Children of `node` in creation order."""
        return [self.nodes[i] for i in node.children]

    def parent(self, node: Node) -> Node | None:
        return None if node.parent is None else self.nodes[node.parent]

    def path(self, node: Node) -> list[Node]:
        """Nodes from the first step to `node`; the root is left out, so the root's path is empty."""
        path: list[Node] = []
        current: Node | None = node
        while current is not None and current.parent is not None:
            path.append(current)
            current = self.nodes[current.parent]
        path.reverse()
        return path

    def solution(self, node: Node) -> list[Node]:
        """As `path`, without what a Stop model said on the way: the nodes whose text is the solution."""
        return [one for one in self.path(node) if one.role != STOP]

    def depth(self, node: Node) -> int:
        """Number of steps from the root; the root has depth 0."""
        depth, parent = 0, node.parent
        while parent is not None:
            depth, parent = depth + 1, self.nodes[parent].parent
        return depth

    def backpropagate(self, node: Node, value: float) -> None:
        """Add one visit with return `value` in [-1, 1] to `node` and all its ancestors (rStar-Math Eq. 2)."""
        current: Node | None = node
        while current is not None:
            current.visit_count += 1
            current.value_sum += value
            current = self.parent(current)

    def set_ppm_value(self, node: Node, value: float, prior_visits: int = 1) -> None:
        """Set the PPM's score of the path to `node`, or replace the score that it has.

        The score of a live node is its prior: it counts as `prior_visits` visits of the node (0: it is kept outside N).
        The score of an answer without a reward (test time) was backed up, so the difference is backed up too. A merged
        node counts its prior (or score) `meta["priors"]` times.
        """
        count = node.meta.get("priors", 1)
        difference = (value - (node.ppm_value or 0.0)) * count
        if node.terminal is TerminalReason.ANSWER:
            current: Node | None = node
            while current is not None:
                current.value_sum += difference
                current = self.parent(current)
        else:
            node.visit_count += prior_visits * count if node.ppm_value is None else 0
            node.value_sum += difference * max(1, prior_visits)
        node.ppm_value = value

    def selectable(self, node: Node) -> list[Node]:
        """Children that a walk may enter: live and not exhausted, in creation order."""
        return [child for child in self.children(node) if child.terminal is None and not child.exhausted]

    def update_exhausted(self, node: Node) -> None:
        """Mark `node` exhausted if nothing below it can be selected; likewise its ancestors."""
        current: Node | None = node
        while current is not None and current.expanded and not self.selectable(current):
            current.exhausted = True
            current = self.parent(current)

    def settle_exhausted(self) -> None:
        """Find out anew which nodes are exhausted; children come after their parents, so one backward pass will do."""
        for node in reversed(self.nodes):
            node.exhausted = node.expanded and not self.selectable(node)

    def answers(self) -> list[Node]:
        """Terminal answer nodes in creation order."""
        return [node for node in self.nodes if node.terminal is TerminalReason.ANSWER]

    @property
    def solved(self) -> bool:
        """Whether some answer was graded correct."""
        return any(node.reward == 1.0 for node in self.answers())

    def renumber(self) -> None:
        """Number the nodes depth first, first children first: rows that do not depend on what was ready first."""
        order, waiting = list[Node](), [self.root]
        while waiting:
            order.append(waiting.pop())
            waiting.extend(reversed(self.children(order[-1])))
        number = {node.id: new for new, node in enumerate(order)}
        for node in order:
            node.id, node.children = number[node.id], [number[child] for child in node.children]
            node.parent = None if node.parent is None else number[node.parent]
        self.nodes = order

    def to_rows(self) -> Iterator[dict[str, Any]]:
        """The tree, then its nodes in creation order."""
        head = {column.name: getattr(self, column.name) for column in fields(self) if column.name != "nodes"}
        head |= {"problem": asdict(self.problem), "prompt": list(self.prompt), "seconds": round(self.seconds, 3)}
        yield {"schema": SCHEMA, **head}
        for node in self.nodes:
            row = {column: getattr(node, name) for name, column in _COLUMNS.items()}
            yield row | {"cpu_ms": round(node.cpu_ms, 3), "terminal": node.terminal.value if node.terminal else None}

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]]) -> Tree:
        """Inverse of `to_rows`. Raises UserError on a schema this version does not know."""
        head = dict(rows[0])
        if head.get("schema") != SCHEMA:
            raise UserError(
                f"tree schema {head.get('schema')!r}",
                need=f"schema {SCHEMA}",
                how="read it with the version that wrote it",
            )
        del head["schema"]
        head["problem"] = Problem(**head["problem"])
        head["prompt"] = tuple(head["prompt"])
        tree = cls(**head, nodes=[])
        for row in rows[1:]:
            own = dict(row)
            terminal = own.pop("terminal")
            node = Node(visit_count=own.pop("n"), terminal=TerminalReason(terminal) if terminal else None, **own)
            tree.nodes.append(node)
            if node.parent is not None:
                tree.nodes[node.parent].children.append(node.id)
        tree.settle_exhausted()
        return tree
