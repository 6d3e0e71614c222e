"""Keys and values of prefixes that were computed before: a radix tree over token ids, bounded in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

SHARED_WORTH_WAITING = 16  # tokens; a prompt waits a tick for another one with which it shares more uncomputed ones


@dataclass(eq=False)
class _Edge:
    """A run of tokens below its parent, with their keys and values (layers, 2, heads, tokens, head size)."""

    ids: tuple[int, ...]
    kv: torch.Tensor
    parent: _Edge | None
    used: int = 0
    children: dict[int, _Edge] = field(default_factory=dict)  # by first token


@dataclass(frozen=True)
class Match:
    """The longest kept prefix: its length in tokens, and tensors (layers, 2, heads, tokens, head size) in order."""

    length: int
    pieces: tuple[torch.Tensor, ...]


class PrefixCache:
    """Longest-prefix look-up of keys and values by token ids; the least recently used ends of paths go first.

    Args:
        limit_bytes: Bytes of keys and values kept; 0 keeps nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._clock = 0
        self._roots: dict[int, _Edge] = {}

    def match(self, ids: Sequence[int]) -> Match:
        """The longest kept prefix of `ids`."""
        path, length = self._walk(tuple(ids))
        pieces = []
        for edge, shared in path:
            edge.used = self._clock
            pieces.append(edge.kv if shared == len(edge.ids) else edge.kv[:, :, :, :shared])
        return Match(length, tuple(pieces))

    def insert(self, ids: Sequence[int], read: Callable[[int, int], torch.Tensor]) -> None:
        """Keep the prefix `ids`. `read(start, end)` copies keys and values; it is asked for the missing end only."""
        if self.limit_bytes <= 0:
            return
        ids = tuple(ids)
        path, length = self._walk(ids)
        if length == len(ids):
            return
        below: _Edge | None = None
        if path:
            below, shared = path[-1]
            if shared < len(below.ids):
                below = self._split(below, shared)
        edge = _Edge(ids[length:], read(length, len(ids)), below, used=self._clock)
        (below.children if below else self._roots)[edge.ids[0]] = edge
        self.bytes += _size(edge.kv)
        if self.bytes > self.limit_bytes:
            self._evict()

    def clear(self) -> None:
        """Forget everything."""
        self._roots.clear()
        self.bytes = 0

    def _walk(self, ids: tuple[int, ...]) -> tuple[list[tuple[_Edge, int]], int]:
        self._clock += 1
        path: list[tuple[_Edge, int]] = []
        children, length = self._roots, 0
        while length < len(ids) and (edge := children.get(ids[length])) is not None:
            shared = common_prefix(edge.ids, ids[length : length + len(edge.ids)])
            path.append((edge, shared))
            length += shared
            if shared < len(edge.ids):
                break
            children = edge.children
        return path, length

    def _split(self, edge: _Edge, at: int) -> _Edge:
        """Cut `edge` after `at` tokens and return the upper part. Both get memory of their own, so either can go."""
        upper = _Edge(edge.ids[:at], edge.kv[:, :, :, :at].clone(), edge.parent, used=edge.used)
        (edge.parent.children if edge.parent else self._roots)[upper.ids[0]] = upper
        edge.ids, edge.kv, edge.parent = edge.ids[at:], edge.kv[:, :, :, at:].clone(), upper
        upper.children[edge.ids[0]] = edge
        return upper

    def _evict(self) -> None:
        """Drop ends of paths, oldest first, down to nine tenths of the limit (so that it is not done at every step)."""
        while self.bytes > 0.9 * self.limit_bytes:
            leaves = sorted((edge for edge in self._edges() if not edge.children), key=lambda edge: edge.used)
            for leaf in leaves:
                del (leaf.parent.children if leaf.parent else self._roots)[leaf.ids[0]]
                self.bytes -= _size(leaf.kv)
                if self.bytes <= 0.9 * self.limit_bytes:
                    return

    def _edges(self) -> Iterator[_Edge]:
        stack = list(self._roots.values())
        while stack:
            edge = stack.pop()
            yield edge
            stack.extend(edge.children.values())


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix; compares slices, so that the work is done in C."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
