"""Row files -> rows -> token paths.

A row becomes one path of tokens (a solution) or two (chosen and rejected of a pair), tokenised segment by segment as
the engines do. Rows longer than the limit lose segments from the left: what is scored or trained last stays.

A path's tokens are trained on (a policy's rows), or the scores at some of its places are (all others).
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
from rstar.types import OutcomeRow, PreferenceRow, QValueRow, SftRow, UserError

R = TypeVar("R", SftRow, PreferenceRow, QValueRow, OutcomeRow)
Floats = npt.NDArray[np.float64]


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """Rows of a .jsonl file, one object a line with the fields of `kind`. Raises UserError naming the line."""
    if not path.is_file():
        raise UserError(f"no row file {path}", need="a .jsonl file of rows", how="run the extract stage first")
    fields = dataclasses.fields(kind)
    needed = {f.name for f in fields if f.default is dataclasses.MISSING}
    rows: list[R] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:  # not UTF-8, too
                raise UserError(f"{path}:{number} is not JSON: {error}", need="one JSON object a line") from error
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
    trained: npt.NDArray[np.bool_]  # of paths[0]: tokens that are targets; empty where scores are trained
    scored: Ids  # places of paths[0] whose scores are terms of the loss; empty where tokens are trained
    labels: Floats  # one per scored place: outcome, Q-value, or a pair's Q margin
    weight: float  # of each term
    truncated: bool

    @property
    def tokens(self) -> int:
        return sum(len(path) for path in self.paths)

    @property
    def terms(self) -> int:
        """Terms of the loss."""
        return len(self.scored) or int(self.trained.sum())


def encode_sft(row: SftRow | OutcomeRow, encoder: SegmentEncoder, max_length: int) -> EncodedRow:
    """Path of a solution; targets are the tokens of the model's own segments and an end token after an own last one."""
    prompt = row.prompt_segments or (row.prompt,)
    segments = (*prompt, *(text for text, _ in row.segments))
    own = [False] * len(prompt) + [mine for _, mine in row.segments]
    name = _name(row.tree_id, row.node_ids)
    if not any(own):
        raise UserError(f"row {name} has nothing that the model wrote", need="at least one own segment")
    end_token = encoder.tokenizer.eos_token_id if own[-1] else None
    (ids,), (ends,), truncated = _fit((segments,), encoder, max_length - (end_token is not None))
    trained = np.repeat(np.array(own), np.diff(np.maximum([0, *ends], 0)))
    if end_token is not None:
        ids, trained = np.append(ids, end_token), np.append(trained, True)
    trained[0] = False  # nothing comes before it that could predict it
    return EncodedRow(name, row.tree_id, row.problem_id, (ids,), trained, _NOWHERE, _NO_LABEL, row.weight, truncated)


def encode_pair(row: PreferenceRow, encoder: SegmentEncoder, max_length: int) -> EncodedRow:
    """Paths of chosen and rejected; both lose the same segments where one is too long, so they still share a prefix."""
    prompt = row.prompt_segments or (row.prompt,)
    chosen = (*prompt, *(row.chosen_segments or (row.chosen,)))
    rejected = (*prompt, *(row.rejected_segments or (row.rejected,)))
    paths, _, truncated = _fit((chosen, rejected), encoder, max_length)
    last, margin = np.array([len(paths[0]) - 1]), np.array([row.q_margin])
    name = _name(row.tree_id, row.node_ids)
    return EncodedRow(name, row.tree_id, row.problem_id, paths, _NOT_TRAINED, last, margin, row.weight, truncated)


def encode_outcome(row: OutcomeRow, encoder: SegmentEncoder, max_length: int) -> EncodedRow:
    """Path of a labelled solution, scored at its last token."""
    segments = (*(row.prompt_segments or (row.prompt,)), *(text for text, _ in row.segments))
    return _scored(row, segments, [len(segments)], [row.label], encoder, max_length)


def encode_q_values(row: QValueRow, encoder: SegmentEncoder, max_length: int) -> EncodedRow:
    """Path of a solution, scored at the last token of each step; steps that are cut off leave no term behind."""
    if len(row.q_values) != len(row.steps) or not row.steps:
        raise UserError(
            f"row {_name(row.tree_id, row.node_ids)} has {len(row.steps)} steps and {len(row.q_values)} Q-values",
            need="one for each step",
        )
    prompt = row.prompt_segments or (row.prompt,)
    segments = (*prompt, *(text for step in row.steps for text in step))
    ends = np.cumsum([len(step) for step in row.steps]) + len(prompt)
    return _scored(row, segments, ends, row.q_values, encoder, max_length)


def _scored(
    row: OutcomeRow | QValueRow,
    segments: tuple[str, ...],
    counts: Sequence[int] | Ids,
    labels: Sequence[float],
    encoder: SegmentEncoder,
    max_length: int,
) -> EncodedRow:
    """One path; its prefix of counts[i] segments is scored against labels[i]."""
    (ids,), (ends,), truncated = _fit((segments,), encoder, max_length)
    places, label, name = ends[np.asarray(counts) - 1] - 1, np.array(labels, float), _name(row.tree_id, row.node_ids)
    kept = places >= 0
    return EncodedRow(
        name, row.tree_id, row.problem_id, (ids,), _NOT_TRAINED, places[kept], label[kept], 1.0, truncated
    )


_NOT_TRAINED = np.zeros(0, dtype=np.bool_)
_NOWHERE = np.zeros(0, dtype=np.int64)
_NO_LABEL = np.zeros(0, dtype=np.float64)


def encode_rows(
    rows: Sequence[R], encode: Callable[[R, SegmentEncoder, int], EncodedRow], encoder: SegmentEncoder, max_length: int
) -> list[EncodedRow]:
    """All rows as token paths. Raises UserError where the limit is no length at all."""
    if max_length < 2:
        raise UserError(f"max_length {max_length}", need="at least 2 tokens")
    return [encode(row, encoder, max_length) for row in rows]


def _fit(
    candidates: Sequence[tuple[str, ...]], encoder: SegmentEncoder, room: int
) -> tuple[tuple[Ids, ...], tuple[Ids, ...], bool]:
    """Token paths of at most `room` tokens, where each segment ends in its path (<= 0: dropped), whether any was cut.

    The same number of leading segments is dropped from all candidates. Where a last segment alone is too long, its end
    is kept.
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
    ends = tuple(
        np.array([*[0] * dropped, *e.ends]) - (len(e.ids) - len(path)) for e, path in zip(encoded, paths, strict=True)
    )
    return paths, ends, dropped > 0 or not fits


def _name(tree_id: str, node_ids: Sequence[int]) -> str:
    return f"{tree_id}/{'-'.join(map(str, node_ids[-2:]))}"


def nothing_to_train(what: str) -> UserError:
    """The error for an empty set of rows, raised before a model is loaded."""
    return UserError(
        f"no {what} to train on", need="at least one",
        how="search more problems, or lower extract.min_margin and extract.min_edit_distance",
    )  # fmt: skip
