"""Which rows make an optimizer step, and which tokens make a forward pass.

An optimizer batch is a group of trees, or of parts of them (`tree_rows`), whose number of rows is nearest to
`batch_size`; the loss is one mean over it, so weights are divided by the batch's sum here and a micro-batch's loss is a
plain sum. How a batch is cut into micro-batches or spread over processes therefore changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rstar.training.data import EncodedRow, Floats
from rstar.training.packing import FLEX_BLOCK, Ids, TreeAttention, depth_first, pack, trie_tokens


def optimizer_batches(
    trees: Sequence[str], batch_size: int, random: np.random.Generator, *, tree_rows: int = 0
) -> list[list[int]]:
    """One epoch of row indices, given every row's tree. Trees come in random order.

    A tree with more rows than `batch_size` is cut into parts of equal size; with `tree_rows` all are cut into parts of
    so many consecutive rows. A batch closes where one more part would take it further from `batch_size`.
    """
    members: dict[str, list[int]] = {}
    for index, tree in enumerate(trees):
        members.setdefault(tree, []).append(index)
    groups: list[list[int]] = []
    for rows in members.values():
        parts = -(-len(rows) // batch_size)
        cuts = range(tree_rows, len(rows), tree_rows) if 0 < tree_rows < batch_size else parts
        groups.extend(part.tolist() for part in np.array_split(np.array(rows), cuts))
    batches: list[list[int]] = []
    current: list[int] = []
    for g in random.permutation(len(groups)):
        group = groups[g]
        if current and abs(len(current) + len(group) - batch_size) > abs(len(current) - batch_size):
            batches.append(current)
            current = []
        current = current + group
        if len(current) >= batch_size:
            batches.append(current)
            current = []
    if current:
        batches.append(current)
    return batches


def by_tree(rows: Sequence[EncodedRow]) -> dict[str, list[EncodedRow]]:
    """Rows under their tree's id, in order of appearance."""
    trees: dict[str, list[EncodedRow]] = {}
    for row in rows:
        trees.setdefault(row.tree_id, []).append(row)
    return trees


@dataclass
class MicroBatch:
    """One forward pass: a packed sequence of T tokens and the N terms of the loss.

    Terms read `places` (P,), distinct places of the sequence. The first `token_terms` are a policy's: term i is
    target[i] after place which[i]. The others are of scores, in the order of `rows`: term i is the score at which[i],
    minus the one at other[i] for a pair. Only an outcome verifier's batch has both.
    """

    ids: Tensor  # (1, T)
    positions: Tensor  # (1, T)
    attention: TreeAttention
    places: Tensor  # (P,)
    which: Tensor  # (N,) into places
    other: Tensor  # (N,) target ids (policy), the rejected's index into places (pairs)
    weight: Tensor  # (N,) normalised over the optimizer batch
    label: Tensor  # (N,) outcomes, Q-values, or Q margins of pairs
    rows: tuple[str, ...]
    token_terms: int

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`; a sequence goes with the attention that device has."""
        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        attention = TreeAttention(
            self.attention.depth.to(device), self.attention.end.to(device), self.attention.blocks,
            self.attention.chains, flex=device.type == "cuda",
        )  # fmt: skip
        return MicroBatch(**moved, attention=attention, rows=self.rows, token_terms=self.token_terms)


def build(
    groups: Sequence[Sequence[EncodedRow]], totals: tuple[float, float], *, share: bool, multiple_of: int = 1
) -> MicroBatch:
    """Pack groups of rows; with `share`, the rows of a group share their prefixes.

    `totals` are the optimizer batch's normalisers, of token terms and of score terms.
    """
    rows = [row for group in groups for row in group]
    if share:
        packed = pack([[path for row in group for path in row.paths] for group in groups], multiple_of=multiple_of)
    else:
        packed = pack([[path] for row in rows for path in row.paths], multiple_of=multiple_of)
    found = (places for tree in packed.where for places in tree)  # in the order of the rows' paths
    where = [(row, [next(found) for _ in row.paths]) for row in rows]
    before, target, token_weight = _token_terms([pair for pair in where if len(pair[0].trained)], packed.ids)
    read, rejected, score_weight, label = _score_terms([pair for pair in where if not len(pair[0].trained)])
    terms = len(before) + len(read)
    places, index = np.unique(np.concatenate([before, read, rejected]), return_inverse=True)
    weight = np.concatenate([token_weight / totals[0], score_weight / totals[1]])
    return MicroBatch(
        ids=torch.from_numpy(packed.ids)[None],
        positions=torch.from_numpy(packed.depth)[None],
        attention=TreeAttention.of(packed, torch.device("cpu")),
        places=torch.from_numpy(places),
        which=torch.from_numpy(index[:terms]),
        other=torch.from_numpy(np.concatenate([target, index[terms:]])),
        weight=torch.from_numpy(weight).float(),
        label=torch.from_numpy(np.concatenate([np.zeros(len(before)), label])).float(),
        rows=tuple(row.name for row in rows),
        token_terms=len(before),
    )


Placed = Sequence[tuple[EncodedRow, Sequence[Ids]]]
"""Rows and where the tokens of their paths stand in the packed sequence."""


def _token_terms(where: Placed, ids: Ids) -> tuple[Ids, Ids, Floats]:
    """(place read, target id, weight): a token counts once for each row through it that trains on it."""
    weight = np.zeros(len(ids))
    before = np.zeros(len(ids), dtype=np.int64)
    for row, (places,) in where:
        before[places[1:]] = places[:-1]
        weight[places[row.trained]] += row.weight
    targets = np.flatnonzero(weight)
    return before[targets], ids[targets], weight[targets]


def _score_terms(where: Placed) -> tuple[Ids, Ids, Floats, Floats]:
    """(place of the scored, or chosen, path's token, the rejected's last, weight, label)."""
    if not where:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    counts = [row.terms for row, _ in where]
    return (
        np.concatenate([own[0][row.scored] for row, own in where]),
        np.repeat([own[-1][-1] for _, own in where], counts),
        np.repeat([row.weight for row, _ in where], counts),
        np.concatenate([row.labels for row, _ in where]),
    )


def normalisers(rows: Sequence[EncodedRow]) -> tuple[float, float]:
    """What an optimizer batch's weighted sums of losses are divided by: the weights of its token and score terms."""
    tokens = sum(row.weight * row.terms for row in rows if len(row.trained))
    return tokens or 1.0, sum(row.weight * row.terms for row in rows if not len(row.trained)) or 1.0


def micro_batches(
    rows: Sequence[EncodedRow],
    budget: int,
    *,
    tree_packing: bool,
    in_order: bool = False,
    processes: int = 1,
    multiple_of: int = 1,
) -> list[list[MicroBatch]]:
    """Cut one optimizer batch into micro-batches of at most `budget` tokens, as many for each of `processes`.

    A tree over the budget is cut where its paths diverge; only a row that is alone over the budget exceeds it. With
    `in_order` the micro-batches hold the rows in their order (next_fit), otherwise as few as first fit finds.
    """
    totals = normalisers(rows)
    tries: list[list[EncodedRow]] = []
    if tree_packing:
        for group in by_tree(rows).values():
            order = depth_first([row.paths[0] for row in group])
            tries.extend(_within([group[k] for k in order], budget))
    else:
        tries = [[row] for row in rows]
    sized = [(_tokens(part, tree_packing), part) for part in tries]
    if in_order:
        bins = [[tries[k] for k in one] for one in next_fit([size for size, _ in sized], budget)]
        filled = [bins[k::processes] for k in range(processes)]
    else:
        shares: list[list[tuple[int, list[EncodedRow]]]] = [[] for _ in range(processes)]
        for item in sorted(sized, key=lambda item: -item[0]):  # largest first to the process with the least
            min(shares, key=lambda share: sum(size for size, _ in share)).append(item)
        filled = [_bins(share, budget) for share in shares]
    packed = [
        [build(groups, totals, share=tree_packing, multiple_of=multiple_of) for groups in bins] for bins in filled
    ]
    most = max(len(share) for share in packed)
    for share in packed:  # collectives need as many passes everywhere: fill with a row of no weight
        none = (math.inf, math.inf)
        share.extend(build([[rows[0]]], none, share=True, multiple_of=multiple_of) for _ in range(most - len(share)))
    return packed


def next_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of consecutive lengths whose sum is at most `room`; one that is alone over it stands alone.

    Orca 2's packing: shuffled samples are concatenated in order as long as they fit (arXiv 2311.11045, section 4).
    """
    packs: list[list[int]] = []
    used = room + 1
    for k, length in enumerate(lengths):
        if used + length > room:
            packs.append([])
            used = 0
        packs[-1].append(k)
        used += length
    return packs


def _tokens(part: Sequence[EncodedRow], tree_packing: bool) -> int:
    return trie_tokens([p for row in part for p in row.paths]) if tree_packing else sum(row.tokens for row in part)


def _within(rows: list[EncodedRow], budget: int) -> list[list[EncodedRow]]:
    if len(rows) == 1 or _tokens(rows, True) <= budget:
        return [rows]
    middle = len(rows) // 2
    return _within(rows[:middle], budget) + _within(rows[middle:], budget)


def _bins(sized: Sequence[tuple[int, list[EncodedRow]]], budget: int) -> list[list[list[EncodedRow]]]:
    """First fit: tries (largest first) into as few sequences of `budget` tokens as come out."""
    bins: list[tuple[int, list[list[EncodedRow]]]] = []
    for size, part in sized:
        for k, (used, content) in enumerate(bins):
            if used + size <= budget:
                bins[k] = (used + size, [*content, part])
                break
        else:
            bins.append((size, [part]))
    return [content for _, content in bins]


class OptimizerSteps(Dataset[list[MicroBatch]]):
    """The whole run in order: item k is this process's micro-batches of optimizer step k.

    The order is a function of the seed alone, so a run resumes by skipping the steps it has made.
    """

    def __init__(
        self,
        rows: Sequence[EncodedRow],
        *,
        batch_size: int,
        epochs: float,
        seed: int,
        budget: int,
        tree_packing: bool,
        in_order: bool = False,
        tree_rows: int = 0,
        process: int = 0,
        processes: int = 1,
        flex: bool = False,
    ) -> None:
        self.rows, self.budget, self.tree_packing, self.in_order = rows, budget, tree_packing, in_order
        self.process, self.processes, self.multiple_of = process, processes, FLEX_BLOCK if flex else 1
        trees = [row.tree_id for row in rows]
        self.batches: list[list[int]] = []
        epoch = 0
        while epoch < epochs:
            batches = optimizer_batches(trees, batch_size, np.random.default_rng([seed, epoch]), tree_rows=tree_rows)
            share = min(1.0, epochs - epoch)
            self.batches.extend(batches[: max(1, round(share * len(batches)))])
            epoch += 1
        self.epochs = epochs

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        rows = [self.rows[k] for k in self.batches[step]]
        shares = micro_batches(
            rows,
            self.budget,
            tree_packing=self.tree_packing,
            in_order=self.in_order,
            processes=self.processes,
            multiple_of=self.multiple_of,
        )
        return shares[self.process]
