"""Row files -> rows -> token paths.

A row becomes one path of tokens (a solution) or two (chosen and rejected of a pair), tokenised segment by segment as
the engines do. Rows longer than the limit lose segments from the left: what is scored or trained last stays.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rstar.tokens import SegmentEncoder
from rstar.training.packing import Ids
from rstar.types import OutcomeRow, PreferenceRow, SftRow, UserError

R = TypeVar("R", SftRow, PreferenceRow, OutcomeRow)


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """Rows of a .jsonl file, one object a line with the fields of `kind`. Raises UserError naming the line."""
    if not path.is_file():
        raise UserError(f"no row file {path}", need="a .jsonl file of rows", how="run the extract stage first")
    fields = dataclasses.fields(kind)
    needed = {f.name for f in fields if f.default is dataclasses.MISSING}
    rows: list[R] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number} is not JSON: {error.msg}", need="one JSON object a line") from error
            missing = needed - set(found) if isinstance(found, dict) else needed
            if missing:
                raise UserError(
                    f"{path}:{number} has no {', '.join(sorted(missing))}", need=f"the fields of {kind.__name__}"
                )
            rows.append(kind(**{f.name: _tuples(found[f.name]) for f in fields if f.name in found}))
    return rows


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """A row as the trainer sees it."""

    name: str  # for messages: "tree_id/last node"
    tree_id: str  # rows of one tree share prefixes
    problem_id: str
    paths: tuple[Ids, ...]  # one, or (chosen, rejected)
    trained: npt.NDArray[np.bool_]  # of paths[0]: tokens that are targets; empty where the last token is scored instead
    weight: float
    label: float = 0.0  # of an OutcomeRow
    truncated: bool = False

    @property
    def tokens(self) -> int:
        return sum(len(path) for path in self.paths)


def encode_sft(row: SftRow, encoder: SegmentEncoder, max_length: int) -> EncodedRow:
    """Path of a solution; targets are the tokens of the model's own segments and an end token after an own last one."""
    prompt = row.prompt_segments or (row.prompt,)
    segments = (*prompt, *(text for text, _ in row.segments))
    own = [False] * len(prompt) + [mine for _, mine in row.segments]
    name = _name(row.tree_id, row.node_ids)
    if not any(own):
        raise UserError(f"row {name} has nothing that the model wrote", need="at least one own segment")
    end_token = encoder.tokenizer.eos_token_id if own[-1] else None
    room = max_length - (end_token is not None)
    (ids,), (ends,), dropped = _fit((segments,), encoder, room)
    trained = np.repeat(np.array(own[dropped:]), np.diff([0, *ends]))
    trained = trained[len(trained) - len(ids) :]  # a single segment longer than the room was cut inside
    if end_token is not None:
        ids, trained = np.append(ids, end_token), np.append(trained, True)
    trained[0] = False  # nothing comes before it that could predict it
    cut = dropped > 0 or len(ids) < ends[-1]
    return EncodedRow(name, row.tree_id, row.problem_id, (ids,), trained, row.weight, truncated=cut)


def encode_pair(row: PreferenceRow, encoder: SegmentEncoder, max_length: int) -> EncodedRow:
    """Paths of chosen and rejected; both lose the same segments where one is too long, so they still share a prefix."""
    prompt = row.prompt_segments or (row.prompt,)
    chosen = (*prompt, *(row.chosen_segments or (row.chosen,)))
    rejected = (*prompt, *(row.rejected_segments or (row.rejected,)))
    paths, ends, dropped = _fit((chosen, rejected), encoder, max_length)
    cut = dropped > 0 or any(len(path) < end[-1] for path, end in zip(paths, ends, strict=True))
    name = _name(row.tree_id, row.node_ids)
    return EncodedRow(name, row.tree_id, row.problem_id, paths, _NONE, row.weight, truncated=cut)


def encode_outcome(row: OutcomeRow, encoder: SegmentEncoder, max_length: int) -> EncodedRow:
    """Path of a labelled solution, scored at its last token."""
    segments = (*(row.prompt_segments or (row.prompt,)), *(text for text, _ in row.segments))
    paths, ends, dropped = _fit((segments,), encoder, max_length)
    cut = dropped > 0 or len(paths[0]) < ends[0][-1]
    name = _name(row.tree_id, row.node_ids)
    return EncodedRow(name, row.tree_id, row.problem_id, paths, _NONE, 1.0, row.label, truncated=cut)


_NONE = np.zeros(0, dtype=np.bool_)


def encode_rows(
    rows: Sequence[R], encode: Callable[[R, SegmentEncoder, int], EncodedRow], encoder: SegmentEncoder, max_length: int
) -> list[EncodedRow]:
    """All rows as token paths. Raises UserError where the limit is no length at all."""
    if max_length < 2:
        raise UserError(f"max_length {max_length}", need="at least 2 tokens")
    return [encode(row, encoder, max_length) for row in rows]


def _fit(
    candidates: Sequence[tuple[str, ...]], encoder: SegmentEncoder, room: int
) -> tuple[tuple[Ids, ...], tuple[tuple[int, ...], ...], int]:
    """Token paths of at most `room` tokens, the segments' end offsets, and how many leading segments were dropped.

    The same number of segments is dropped from all candidates. Where a last segment alone is too long, its end is kept.
    """
    dropped = 0
    while True:
        encoded = [encoder.encode_with_borders(segments[dropped:]) for segments in candidates]
        fits = all(len(e.ids) <= room for e in encoded)
        if fits or any(len(segments) - dropped == 1 for segments in candidates):
            break
        dropped += 1
    paths = tuple(np.array(e.ids[-room:], dtype=np.int64) for e in encoded)
    if not all(len(path) for path in paths):
        raise UserError("a row without any token", need="non-empty prompt and completion")
    return paths, tuple(e.ends for e in encoded), dropped


def _name(tree_id: str, node_ids: Sequence[int]) -> str:
    return f"{tree_id}/{'-'.join(map(str, node_ids[-2:]))}"


def nothing_to_train(what: str) -> UserError:
    """The error for an empty set of rows, raised before a model is loaded."""
    return UserError(
        f"no {what} to train on", need="at least one",
        how="search more problems, or lower extract.min_margin and extract.min_edit_distance",
    )  # fmt: skip
