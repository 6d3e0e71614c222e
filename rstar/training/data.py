"""Row files -> rows -> token paths.

A row becomes one path of tokens (a solution) or two (chosen and rejected of a pair), tokenised segment by segment as
the engines do.

No row loses any of its question to `max_length`. A solution whose tokens are trained is cut at its right end, and has
no end token then: what is left of it is right to learn. A row that is scored at its last token (pairs, outcomes) is
dropped where it is too long, and so is one whose question leaves no room for anything to train.

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
    truncated: bool  # lost the end of its solution to max_length

    @property
    def tokens(self) -> int:
        return sum(len(path) for path in self.paths)

    @property
    def terms(self) -> int:
        """Terms of the loss."""
        return len(self.scored) or int(self.trained.sum())


def encode_sft(row: SftRow | OutcomeRow, encoder: SegmentEncoder, max_length: int) -> EncodedRow | None:
    """Path of a solution; targets are the tokens of the model's own segments and an end token after an own last one.

    What is over `max_length` is cut off at the right. None where the question leaves no room for a target.
    """
    prompt = row.prompt_segments or (row.prompt,)
    own = [False] * len(prompt) + [mine for _, mine in row.segments]
    name = _name(row.tree_id, row.node_ids)
    if not any(own):
        raise UserError(f"row {name} has nothing that the model wrote", need="at least one own segment")
    ids, ends = _path((*prompt, *(text for text, _ in row.segments)), encoder)
    trained = np.repeat(np.array(own), np.diff([0, *ends]))
    if own[-1]:
        ids, trained = np.append(ids, encoder.tokenizer.eos_token_id), np.append(trained, True)
    truncated = len(ids) > max_length
    ids, trained = ids[:max_length], trained[:max_length]
    trained[0] = False  # nothing comes before it that could predict it
    if truncated and not trained.any():
        return None
    return EncodedRow(name, row.tree_id, row.problem_id, (ids,), trained, _NOWHERE, _NO_LABEL, row.weight, truncated)


def encode_pair(row: PreferenceRow, encoder: SegmentEncoder, max_length: int) -> EncodedRow | None:
    """Paths of chosen and rejected, scored at their last tokens; None where one is over `max_length`."""
    prompt = row.prompt_segments or (row.prompt,)
    sides = (row.chosen_segments or (row.chosen,), row.rejected_segments or (row.rejected,))
    paths = tuple(_path((*prompt, *side), encoder)[0] for side in sides)
    if max(map(len, paths)) > max_length:
        return None
    last, margin = np.array([len(paths[0]) - 1]), np.array([row.q_margin])
    name = _name(row.tree_id, row.node_ids)
    return EncodedRow(name, row.tree_id, row.problem_id, paths, _NOT_TRAINED, last, margin, row.weight, False)


def encode_outcome(row: OutcomeRow, encoder: SegmentEncoder, max_length: int) -> EncodedRow | None:
    """Path of a labelled solution, scored at its last token; None where that is over `max_length`."""
    segments = (*(row.prompt_segments or (row.prompt,)), *(text for text, _ in row.segments))
    return _scored(row, segments, [len(segments)], [row.label], encoder, max_length)


def encode_q_values(row: QValueRow, encoder: SegmentEncoder, max_length: int) -> EncodedRow | None:
    """Path of a solution, scored at the last token of each step within `max_length`; None where there is none."""
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
) -> EncodedRow | None:
    """One path; its prefix of counts[i] segments is scored against labels[i], and it ends with the last one scored."""
    ids, ends = _path(segments, encoder)
    places, label, name = ends[np.asarray(counts) - 1] - 1, np.array(labels, float), _name(row.tree_id, row.node_ids)
    kept = places < max_length
    if not kept.any():
        return None
    ids = ids[:max_length] if kept.all() else ids[: places[kept][-1] + 1]
    return EncodedRow(
        name, row.tree_id, row.problem_id, (ids,), _NOT_TRAINED, places[kept], label[kept], 1.0, not kept.all()
    )


_NOT_TRAINED = np.zeros(0, dtype=np.bool_)
_NOWHERE = np.zeros(0, dtype=np.int64)
_NO_LABEL = np.zeros(0, dtype=np.float64)


def encode_rows(
    rows: Sequence[R],
    encode: Callable[[R, SegmentEncoder, int], EncodedRow | None],
    encoder: SegmentEncoder,
    max_length: int,
) -> list[EncodedRow]:
    """The rows that fit as token paths. Raises UserError where none does."""
    if max_length < 2:
        raise UserError(f"max_length {max_length}", need="at least 2 tokens")
    encoded = [path for row in rows if (path := encode(row, encoder, max_length)) is not None]
    if rows and not encoded:
        raise too_long(len(rows), max_length)
    return encoded


def too_long(rows: int, max_length: int, setting: str = "max_length") -> UserError:
    """The error for a set of rows none of which fits."""
    return UserError(
        f"all {rows} rows are longer than {setting}={max_length} tokens",
        need="room for a question and what follows it",
        how=f"raise {setting} to the engine's max_context",
    )


def _path(segments: tuple[str, ...], encoder: SegmentEncoder) -> tuple[Ids, Ids]:
    """Token ids of segments in a row, and where each ends."""
    encoded = encoder.encode_with_borders(segments)
    if not len(encoded.ids):
        raise UserError("a row without any token", need="non-empty prompt and completion")
    return np.array(encoded.ids, dtype=np.int64), np.array(encoded.ends, dtype=np.int64)


def _name(tree_id: str, node_ids: Sequence[int]) -> str:
    return f"{tree_id}/{'-'.join(map(str, node_ids[-2:]))}"


def nothing_to_train(what: str) -> UserError:
    """The error for an empty set of rows, raised before a model is loaded."""
    return UserError(
        f"no {what} to train on", need="at least one",
        how="search more problems, or lower extract.min_margin and extract.min_edit_distance",
    )  # fmt: skip
