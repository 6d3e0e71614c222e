"""A second implementation of the tree search, written from the formulas and rules of rStar-Math and from nothing else.

Plain and slow: it serves as the reference in test_reference_search.py. What the policy would write is a table of draws
by the label of the node that they continue, and expansions in flight end in an order that the caller chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Draw:
    """A sampled continuation. Draws of one expansion with the same label are the same text."""

    label: str
    kind: str  # step, answer, error, malformed
    reward: float = 0.0  # of an answer: +1 or -1
    ppm: float = 0.0  # the PPM's score, in [-1, 1]
    logprob: float = 0.0
    tokens: int = 1


@dataclass(frozen=True)
class Settings:
    """How to search."""

    rollouts: int
    in_flight: int = 1
    guidance: str = "terminal"  # terminal: rewards alone; ppm: and priors; test: the PPM scores answers too, no rewards
    prior_visits: int = 1
    c: float = 2.0
    selection: str = "uct"
    unvisited_first: bool = True
    max_depth: int = 16


@dataclass(eq=False)
class Node:
    """A node with its statistics; `walks` are in flight through it."""

    draw: Draw
    parent: Node | None
    depth: int
    count: int = 1
    kind: str = "live"
    visits: int = 0
    total: float = 0.0
    walks: int = 0
    children: list[Node] | None = None
    closed: bool = field(default=False, repr=False)

    def is_open(self) -> bool:
        """Whether a walk can still bring something from here."""
        if not self.closed:
            expanded = self.children is not None
            self.closed = self.kind != "live" or (
                expanded and not any(child.is_open() for child in self.children or ())
            )
        return not self.closed

    def back_up(self, value: float) -> None:
        node: Node | None = self
        while node is not None:
            node.visits, node.total, node = node.visits + 1, node.total + value, node.parent


class Search:
    """`run` grows `nodes`, in order of creation, from the root."""

    def __init__(self, script: Callable[[str], Sequence[Draw]], settings: Settings) -> None:
        self.script, self.settings = script, settings
        self.nodes = [Node(Draw("", "step"), None, 0)]
        self.started = 0
        self.expanding: dict[Node, list[Generator[Node]]] = {}  # node -> the walks that wait for it, its own first

    def run(self, choose: Callable[[int], int]) -> list[Node]:
        """`choose(n)` says which of n expansions in flight, in the order in which they began, ends next."""
        ready = [self.walker() for _ in range(min(self.settings.in_flight, self.settings.rollouts))]
        while True:
            for walker in ready:
                node = next(walker, None)
                if node is not None:
                    self.expanding.setdefault(node, []).append(walker)
            if not self.expanding:
                return self.nodes
            ended = list(self.expanding)[choose(len(self.expanding))]
            self.expand(ended)
            ready = self.expanding.pop(ended)

    def walker(self) -> Generator[Node]:
        while self.started < self.settings.rollouts and self.nodes[0].is_open():
            self.started += 1
            yield from self.walk()

    def walk(self) -> Generator[Node]:
        """One rollout; yields each node whose expansion it waits for."""
        node, path = self.nodes[0], [self.nodes[0]]
        node.walks += 1
        while node.is_open():
            if node.children is None:
                mine = node not in self.expanding
                yield node
                if not node.is_open():
                    break
                if not mine:
                    continue
                if any(child.kind == "answer" for child in node.children or ()):
                    break
            node = self.select(node)
            path.append(node)
            node.walks += 1
        for node in path:
            node.walks -= 1

    def select(self, parent: Node) -> Node:
        children = [child for child in parent.children or () if child.is_open()]
        n_parent = max(1, parent.visits + parent.walks - 1)  # the walk that selects is one of parent.walks
        weights = [child.count * math.exp(child.draw.logprob / child.draw.tokens) for child in children]
        best, best_key = children[0], (-math.inf, -math.inf)
        for child, weight in zip(children, weights, strict=True):
            n, total = child.visits + child.walks, child.total - child.walks
            if self.settings.selection == "puct":
                q = total / n if n else 0.0
                score = q + self.settings.c * (weight / sum(weights)) * math.sqrt(n_parent) / (1 + n)
            elif n == 0:
                score = math.inf if self.settings.unvisited_first else 0.0
            else:
                score = total / n + self.settings.c * math.sqrt(math.log(n_parent) / n)
            key = (score, child.draw.ppm if self.settings.guidance != "terminal" else 0.0)
            if key > best_key:
                best, best_key = child, key
        return best

    def expand(self, node: Node) -> None:
        settings, node.children = self.settings, []
        for draw in self.script(node.draw.label):
            twin = next((child for child in node.children if child.draw.label == draw.label), None)
            if twin is not None:
                twin.count += 1
                continue
            node.children.append(Node(draw, node, node.depth + 1))
        for child in node.children:
            self.nodes.append(child)
            if child.draw.kind != "step":
                child.kind = child.draw.kind
            elif child.depth >= settings.max_depth:
                child.kind = "max_depth"
            if child.kind == "answer":
                child.back_up(child.draw.ppm if settings.guidance == "test" else child.draw.reward)
            elif child.kind == "max_depth":
                child.back_up(-1.0)
            elif child.kind == "live" and settings.guidance != "terminal":
                child.visits, child.total = settings.prior_visits, child.draw.ppm
        if not any(child.kind in ("live", "answer", "max_depth") for child in node.children):
            node.kind = "dead_end"
            node.back_up(-1.0)
