"""Many rows as one sequence: shared prefixes are laid out once, and attention sees only a token's own path.

Paths (token sequences) of one tree are sorted; neighbours in that order share the longest prefixes, so writing down
only what is new of each path is the depth-first order of their token trie. A token carries its depth (its position in
every path through it) and the end of its subtree; token i may attend to token j iff j <= i < end[j]. Several tries lie
behind each other in one sequence of a micro-batch: no padding, and the rule keeps them apart.

Plain rows are tries of one path, so `tree_packing: false` is the same code without the sharing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch._dynamo
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from rstar.types import UserError

Ids = npt.NDArray[np.int64]

ATTENTION = "rstar_tree"
FLEX_BLOCK = 128  # flex attention's tile; sequences on CUDA are padded to a multiple, which also bounds recompilation
FLEX_VARIANTS = 32  # compiled kernels of one process; about nine are needed


def shared_prefix(a: Ids, b: Ids) -> int:
    """Number of leading tokens two paths have in common."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def depth_first(paths: Sequence[Ids]) -> list[int]:
    """Indices of `paths` in lexicographic order of their tokens: the depth-first order of the trie's leaves."""
    return sorted(range(len(paths)), key=lambda k: paths[k].astype(">u4").tobytes())  # big-endian bytes sort as numbers


def trie_tokens(paths: Sequence[Ids]) -> int:
    """Number of tokens of the paths' trie."""
    ordered = [paths[k] for k in depth_first(paths)]
    shared = sum(shared_prefix(a, b) for a, b in itertools.pairwise(ordered))
    return sum(len(path) for path in ordered) - shared


@dataclass(frozen=True)
class Packed:
    """Tries behind each other in one sequence of T tokens; every field is a (T,) array.

    `where[t][p]` gives, for path p of tree t, the places of its tokens in the sequence, in path order.
    """

    ids: Ids
    depth: Ids  # the token's position in its path
    end: Ids  # first place after the token's subtree
    blocks: tuple[tuple[int, int], ...]  # (start, stop) of each trie
    where: tuple[tuple[Ids, ...], ...]


def pack(trees: Sequence[Sequence[Ids]], *, multiple_of: int = 1) -> Packed:
    """Lay out the token tries of `trees` (each a list of non-empty paths) one behind another.

    The sequence is filled up to a multiple of `multiple_of` with tokens 0 that only see themselves.
    """
    ids: list[Ids] = []
    depth: list[Ids] = []
    end = np.zeros(sum(len(path) for paths in trees for path in paths) + multiple_of, dtype=np.int64)
    blocks: list[tuple[int, int]] = []
    where: list[tuple[Ids, ...]] = []
    length = 0
    for paths in trees:
        start = length
        places: dict[int, Ids] = {}
        stack = previous = np.empty(0, dtype=np.int64)  # places and ids of the path that is open
        for k in depth_first(paths):
            path = paths[k]
            shared = shared_prefix(previous, path)
            end[stack[shared:]] = length
            ids.append(path[shared:])
            depth.append(np.arange(shared, len(path)))
            stack = np.concatenate([stack[:shared], np.arange(length, length + len(path) - shared)])
            length += len(path) - shared
            places[k], previous = stack, path
        end[stack] = length
        blocks.append((start, length))
        where.append(tuple(places[k] for k in range(len(paths))))
    filling = -length % multiple_of
    if filling:
        ids.append(np.zeros(filling, dtype=np.int64))
        depth.append(np.zeros(filling, dtype=np.int64))
        end[length : length + filling] = np.arange(length + 1, length + filling + 1)
        blocks.append((length, length + filling))
        length += filling
    return Packed(np.concatenate(ids), np.concatenate(depth), end[:length], tuple(blocks), tuple(where))


@dataclass
class TreeAttention:
    """What attention needs to know of a packed sequence: (T,) depth and subtree end, and the tries' borders."""

    depth: Tensor
    end: Tensor
    blocks: tuple[tuple[int, int], ...]
    chains: tuple[bool, ...]  # whether a trie is a single path, where attention is plainly causal
    flex: bool  # flex attention (CUDA) instead of one masked SDPA per trie
    masks: dict[int, list[Tensor | None] | BlockMask] = field(default_factory=dict)  # by sliding window, 0: none

    @classmethod
    def of(cls, packed: Packed, device: torch.device) -> TreeAttention:
        chains = tuple(bool((packed.end[start:stop] == stop).all()) for start, stop in packed.blocks)
        depth, end = torch.from_numpy(packed.depth).to(device), torch.from_numpy(packed.end).to(device)
        return cls(depth, end, packed.blocks, chains, flex=device.type == "cuda")

    def block_masks(self, window: int) -> list[Tensor | None]:
        """One (n, n) boolean mask per trie of n tokens, True where visible; None where plain causal attention does."""
        if window not in self.masks:
            self.masks[window] = [self._block_mask(k, window) for k in range(len(self.blocks))]
        masks = self.masks[window]
        assert isinstance(masks, list)
        return masks

    def _block_mask(self, k: int, window: int) -> Tensor | None:
        start, stop = self.blocks[k]
        if self.chains[k] and (not window or stop - start <= window):
            return None
        place = torch.arange(start, stop, device=self.end.device)
        visible = (place[None, :] <= place[:, None]) & (place[:, None] < self.end[None, start:stop])
        if window:
            depth = self.depth[start:stop]
            visible &= depth[:, None] - depth[None, :] < window
        return visible

    def flex_mask(self, window: int) -> BlockMask:
        """The same rule as a block-sparse mask of the whole sequence; needs two or three integers a token."""
        if window not in self.masks:
            end, depth = self.end, self.depth
            before_window = depth - window  # a tensor: an int in the kernel would be a symbol, which not all compile

            def on_path(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (key <= query) & (query < end[key])

            def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (key <= query) & (query < end[key]) & (before_window[query] < depth[key])

            visible, length = in_window if window else on_path, len(end)
            self.masks[window] = create_block_mask(visible, None, None, length, length, device=str(end.device))
        mask = self.masks[window]
        assert isinstance(mask, BlockMask)
        return mask


_flex = torch.compile(flex_attention, dynamic=True)  # compiled at its first call, once for all lengths


def _compiled_flex(*args: Any, **kwargs: Any) -> Tensor:
    """Flex attention compiled for each dtype and window, with and without gradients.

    Over dynamo's limit of variants it would run uncompiled and hold every score. The limit is each thread's own:
    a checkpointed layer is recomputed in autograd's, a Ray worker trains in one that is not its first.
    """
    if torch._dynamo.config.recompile_limit < FLEX_VARIANTS:
        torch._dynamo.config.recompile_limit = FLEX_VARIANTS
    return _flex(*args, **kwargs)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed sequence, in the form that transformers calls: query (1, H, T, D) -> (1, T, H, D)."""
    tree: TreeAttention = kwargs["tree"]
    window = sliding_window or 0
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if tree.flex:
        if dropout:
            raise UserError("attention_dropout with flex attention", need="0", how="set it in the model's config.json")
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary leaves them in float32
        run: Any = _compiled_flex if query.is_cuda else flex_attention
        return run(query, key, value, block_mask=tree.flex_mask(window), scale=scaling).transpose(
            1, 2
        ).contiguous(), None
    parts = [
        functional.scaled_dot_product_attention(
            query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop],
            attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
        )
        for (start, stop), mask in zip(tree.blocks, tree.block_masks(window), strict=True)
    ]  # fmt: skip
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, tree_attention)
