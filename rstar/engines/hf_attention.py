"""What makes the embedded engines fast: attention over ragged rows, and keys and values that are computed once.

Rows: the new tokens of all sequences go through the model as one sequence of batch size one, so the matrix products see
real tokens only. Keys and values live in one buffer, a row per sequence, left-aligned; attention is computed for groups
of neighbouring rows with a similar number of new tokens. Query heads that share a key head are treated as further
queries of it, so keys and values are never repeated.

Prefixes: keys and values of prefixes that were computed before are kept in a radix tree over token ids, bounded in
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache

from rstar.types import UserError

ATTENTION = "rstar_rows"  # the name under which transformers finds attend()
_TOKEN_STEP = 64  # the buffer grows by so many tokens
_PADDING_SHARE = 2.0  # a group's padded queries at most, as a multiple of its real ones


@dataclass(frozen=True)
class Group:
    """Neighbouring rows of one attention call; `longest` is the largest number of new tokens among them."""

    rows: slice
    tokens: slice  # of the packed sequence
    longest: int
    row: torch.Tensor  # (tokens,) row of each token, counted from rows.start
    step: torch.Tensor  # (tokens,) which new token of its row it is
    span: int  # keys looked at
    mask: torch.Tensor  # (rows, 1, query heads of a key head * longest, or 1 for all if longest is 1; span), additive


@dataclass(frozen=True)
class Plan:
    """One forward pass."""

    groups: tuple[Group, ...]
    row: torch.Tensor  # (tokens,)
    position: torch.Tensor  # (tokens,)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    rows_plan: Plan | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. Without a plan: plain causal attention, which only the probe needs.

    Args:
        module: The attention layer, not read.
        query: (1, query heads, tokens, head size), packed.
        key: (rows, key heads, capacity, head size), as RowBuffer.update returns it.
        value: As key.
        attention_mask: Not read; each group has its own.
        scaling: Of the scores.
        rows_plan: Which tokens belong to which rows.

    Returns:
        (1, tokens, query heads, head size).
    """
    if rows_plan is None:
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    heads, key_heads, size = query.shape[1], key.shape[1], query.shape[3]
    shared = heads // key_heads
    packed = query[0].transpose(0, 1).reshape(-1, key_heads, shared, size)
    parts = []
    for group in rows_plan.groups:
        own = packed[group.tokens]
        count = group.rows.stop - group.rows.start
        if group.longest == 1:
            queries = own
        else:
            padded = own.new_zeros(count, group.longest, key_heads, shared, size)
            padded[group.row, group.step] = own
            queries = padded.permute(0, 2, 3, 1, 4).reshape(count, key_heads, shared * group.longest, size)
        out = functional.scaled_dot_product_attention(
            queries,
            key[group.rows, :, : group.span],
            value[group.rows, :, : group.span],
            attn_mask=group.mask,
            scale=scaling,
        )
        if group.longest > 1:
            unpadded = out.view(count, key_heads, shared, group.longest, size).permute(0, 3, 1, 2, 4)
            out = unpadded[group.row, group.step]
        parts.append(out.reshape(-1, heads, size))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


AttentionInterface.register(ATTENTION, attend)


class RowBuffer:
    """Keys and values of the rows of a batch, and transformers' cache for one forward pass at a time.

    `lengths[row]` tokens of a row are filled. Rows are numbered without gaps: remove() moves the last row into the gap.
    """

    def __init__(self, model: Any, limit_bytes: int) -> None:
        self.layers, self.key_heads, self.head_size = _probe(model)
        self.shared = model.config.num_attention_heads // self.key_heads
        parameter = next(model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        self.token_bytes = self.layers * 2 * self.key_heads * self.head_size * parameter.element_size()
        self.limit_bytes = limit_bytes
        self.lengths: list[int] = []
        self._kv = self._allocate(0, 0)
        self._plan: Plan | None = None

    def fits(self, rows: int, tokens: int) -> bool:
        """Whether so many rows of so many tokens stay within the memory limit. One row always does."""
        return rows <= 1 or rows * tokens * self.token_bytes <= self.limit_bytes

    def add(self, pieces: Sequence[torch.Tensor]) -> int:
        """A new row that begins with these keys and values (layers, 2, key heads, tokens, head size); its number."""
        row, length = len(self.lengths), sum(piece.shape[3] for piece in pieces)
        self._reserve(row + 1, length)
        start = 0
        for piece in pieces:
            end = start + piece.shape[3]
            self._kv[:, :, row, :, start:end] = piece
            start = end
        self.lengths.append(length)
        return row

    def copy(self, row: int) -> int:
        """A new row equal to `row`; its number."""
        new, length = len(self.lengths), self.lengths[row]
        self._reserve(new + 1, length)
        self._kv[:, :, new, :, :length] = self._kv[:, :, row, :, :length]
        self.lengths.append(length)
        return new

    def remove(self, row: int) -> None:
        """Forget `row`; the last row takes its number."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            self._kv[:, :, row, :, :length] = self._kv[:, :, last, :, :length]
            self.lengths[row] = length
        self.lengths.pop()

    def clear(self) -> None:
        """Forget all rows."""
        self.lengths.clear()

    def read(self, row: int, start: int, end: int) -> torch.Tensor:
        """A copy of the keys and values of tokens start..end of a row (layers, 2, key heads, tokens, head size)."""
        return self._kv[:, :, row, :, start:end].clone()

    def forward(self, model: Any, new_tokens: Sequence[Sequence[int]], **arguments: Any) -> tuple[Any, torch.Tensor]:
        """Run `model` over new tokens of all rows (at least one each) and keep their keys and values.

        Rows should stand in rising order of their number of new tokens, so that attention pads little.

        Returns:
            What the model returned, for one packed sequence; and the index of each row's last token in it (rows,).
        """
        counts = [len(tokens) for tokens in new_tokens]
        ends = [start + count for start, count in zip(self.lengths, counts, strict=True)]
        self._reserve(len(counts), max(ends))
        plan = self._make_plan(counts, ends)
        last = torch.tensor(counts, device=self.device).cumsum(0) - 1
        ids = torch.tensor([[token for tokens in new_tokens for token in tokens]], device=self.device)
        if "logits_to_keep" in arguments:
            arguments["logits_to_keep"] = last
        self._plan = plan
        output = model(
            input_ids=ids,
            position_ids=plan.position[None],
            attention_mask=ids.new_zeros(1, 1, 1, 1),  # four dimensions: transformers makes no mask of its own
            past_key_values=self,
            use_cache=True,
            rows_plan=plan,
            **arguments,
        )
        self.lengths = ends
        return output, last

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' cache interface: store (1, key heads, tokens, head size), return all rows of the layer."""
        assert self._plan is not None, "update outside forward"
        keys, values = self._kv[layer, 0], self._kv[layer, 1]
        keys[self._plan.row, :, self._plan.position] = key[0].transpose(0, 1)
        values[self._plan.row, :, self._plan.position] = value[0].transpose(0, 1)
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        """transformers' cache interface; positions are given, so nothing depends on it."""
        return 0

    def _make_plan(self, counts: list[int], ends: list[int]) -> Plan:
        step = torch.cat([torch.arange(count) for count in counts])
        row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        position = step + torch.tensor(self.lengths)[row]
        groups, start = [], 0
        for rows in _group(counts):
            own_counts, span = counts[rows], max(ends[rows])
            longest, tokens = max(own_counts), slice(start, start + sum(own_counts))
            first = torch.tensor(self.lengths[rows])
            queries = first[:, None] + torch.arange(longest)  # (rows, longest) position of each query
            hidden = torch.arange(span) > queries[:, None, :, None]  # (rows, 1, longest, span)
            mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)
            if longest > 1:
                mask = mask.repeat(1, 1, self.shared, 1)
            groups.append(
                Group(
                    rows=rows,
                    tokens=tokens,
                    longest=longest,
                    row=(row[tokens] - rows.start).to(self.device),
                    step=step[tokens].to(self.device),
                    span=span,
                    mask=mask.to(self.device),
                )
            )
            start = tokens.stop
        return Plan(tuple(groups), row.to(self.device), position.to(self.device))

    def _reserve(self, rows: int, tokens: int) -> None:
        had_rows, had_tokens = self._kv.shape[2], self._kv.shape[4]
        if rows <= had_rows and tokens <= had_tokens:
            return
        rows = had_rows if rows <= had_rows else max(rows, 2 * had_rows)
        tokens = had_tokens if tokens <= had_tokens else -(-tokens // _TOKEN_STEP) * _TOKEN_STEP
        grown = self._allocate(rows, tokens)
        grown[:, :, :had_rows, :, :had_tokens] = self._kv
        self._kv = grown

    def _allocate(self, rows: int, tokens: int) -> torch.Tensor:
        # zeros, not empty: masked positions are multiplied by 0, and 0 * nan would be nan
        shape = (self.layers, 2, rows, self.key_heads, tokens, self.head_size)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def _group(counts: list[int]) -> list[slice]:
    """Cut rows into runs whose padding stays small. Rows with one new token stand alone: they need none at all."""
    groups: list[slice] = []
    start, total, longest = 0, 0, 0
    for row, count in enumerate(counts):
        padded = max(longest, count) * (row - start + 1)
        if row > start and (padded > _PADDING_SHARE * (total + count) or longest == 1 < count):
            groups.append(slice(start, row))
            start, total, longest = row, 0, 0
        total, longest = total + count, max(longest, count)
    groups.append(slice(start, len(counts)))
    return groups


def _probe(model: Any) -> tuple[int, int, int]:
    """(layers, key heads, head size), read off a forward pass of one token.

    Raises UserError for a model whose state rows cannot hold.
    """
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model.base_model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache)
    shapes = {tuple(tensor.shape) for layer in cache.layers for tensor in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise UserError(
            f"{model.config.model_type} has layers of {len(shapes)} shapes",
            need="a transformer with equal attention layers",
            how="use engine.kind=vllm",
        )
    (_, key_heads, _, head_size) = shapes.pop()
    return len(cache.layers), key_heads, head_size


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
