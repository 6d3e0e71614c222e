"""The stream of Flow-DPO (arXiv 2410.22304, section 3): predict a problem, then learn from it, window by window.

A window of problems is searched at once with the same parameters (window 1 is the paper's order). Each problem's base
chain is its prediction and is recorded before anything is learned from it: progressive validation. Its pairs queue for
their adapters, and a full batch is an optimizer step. With `overlap` a window is searched while the one before it is
learned from.

On disk: trees in shards; `stream.jsonl`, a line per problem or step; checkpoints `step-*`; and `stream.json`, replaced
at once after each window, which says how far the others count. What lies beyond that was left by a kill: such lines are
cut off, finished trees are used again (the parameters that wrote them have not seen their problem).
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from rstar.extract.flow_pairs import flow_outcome, flow_pairs
from rstar.store import read_json, sync_path, write_json
from rstar.tree import Tree
from rstar.types import PreferenceRow, Problem

ROLES = ("answer", "stop")


class Learner(Protocol):
    """What is trained: training.dpo.AdapterTrainer."""

    steps: dict[str, int]

    def step(self, adapter: str, rows: Sequence[PreferenceRow]) -> Any: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Prediction:
    """A problem of the stream, as it was predicted before anything was learned from it."""

    number: int  # place in the stream, from 0
    problem_id: str
    correct: bool
    stopped: bool  # by the Stop model's Yes
    chunks: int
    answer_pairs: int
    stop_pairs: int
    learned: int  # the first so many problems had been learned from (or their pairs queued); at most `number`
    tokens: int

    @property
    def staleness(self) -> int:
        """Problems that came before and were not learned from yet; 0 in the paper's order."""
        return self.number - self.learned


async def stream(
    problems: Sequence[Problem],
    search: Callable[[Problem], Awaitable[Tree]],
    learner: Learner,
    serve: Callable[[Path], Awaitable[None]],
    folder: Path,
    *,
    window: int,
    batch: int,
    overlap: bool = False,
    on_window: Callable[[Sequence[Prediction], int], None] = lambda predictions, steps: None,
) -> None:
    """Run the stream over `problems`, from where it stands in `folder` to its end.

    Args:
        problems: In their order.
        search: Grows a problem's tree with the served parameters, or returns the one that is stored.
        learner: Makes optimizer steps; loads and saves its checkpoints.
        serve: Lets `search` use the adapters of a checkpoint's folder from now on.
        folder: Of the record and the checkpoints.
        window: Problems searched at once.
        batch: Pairs of an optimizer step.
        overlap: Search while learning: parameters are older by a window.
        on_window: Hears of each window's predictions and of the steps made so far.
    """
    state = _resumed(folder, learner)
    await serve(folder / state.checkpoint)
    served, learning = state.problems, None

    async def finished(task: asyncio.Task[bool]) -> int:
        if await task:
            await serve(folder / state.checkpoint)
        return state.problems

    for start in range(state.problems, len(problems), window):
        learned = served
        trees = await asyncio.gather(*map(search, problems[start : start + window]))
        if learning is not None:
            served = await finished(learning)
        predictions = []
        for number, tree in enumerate(trees, start):
            outcome, pairs = flow_outcome(tree), flow_pairs(tree)
            count = {role: sum(row.kind == role for row in pairs) for role in ROLES}
            predictions.append(
                Prediction(
                    number=number,
                    problem_id=tree.problem.id,
                    **asdict(outcome),
                    answer_pairs=count["answer"],
                    stop_pairs=count["stop"],
                    learned=learned,
                    tokens=tree.tokens,
                )
            )
            for row in pairs:
                state.queues[row.kind].append(row)
        on_window(predictions, sum(learner.steps.values()))
        learning = asyncio.create_task(asyncio.to_thread(_learn, state, learner, predictions, folder, batch))
        if not overlap:
            served, learning = await finished(learning), None
    if learning is not None:
        await finished(learning)


def read_stream(folder: Path) -> tuple[list[Prediction], list[dict[str, Any]]]:
    """(predictions in stream order, figures of the optimizer steps) of a stream, as far as it counts."""
    lines = _lines(folder)[: read_json(folder / "stream.json")["lines"]]
    found = [orjson.loads(line) for line in lines]
    return [Prediction(**one) for one in found if "problem_id" in one], [one for one in found if "loss" in one]


@dataclass
class _State:
    """What stream.json holds: the commit point."""

    problems: int  # recorded, and their pairs queued or learned from
    lines: int  # of stream.jsonl
    checkpoint: str
    queues: dict[str, list[PreferenceRow]]


def _learn(state: _State, learner: Learner, predictions: Sequence[Prediction], folder: Path, batch: int) -> bool:
    """Make the steps that the queues are long enough for, then commit; returns whether there were any."""
    lines: list[Any] = [*predictions]
    for adapter, queue in state.queues.items():
        while len(queue) >= batch:
            lines.append(learner.step(adapter, queue[:batch]))
            del queue[:batch]
    before, stepped = state.checkpoint, len(lines) > len(predictions)
    if stepped:
        state.checkpoint = f"step-{sum(learner.steps.values()):06d}"
        learner.save(folder / state.checkpoint)
    with (folder / "stream.jsonl").open("ab") as file:
        file.writelines(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)
        file.flush()
        os.fsync(file.fileno())
    state.problems, state.lines = predictions[-1].number + 1, state.lines + len(lines)
    write_json(folder / "stream.json", asdict(state))
    for path in folder.glob("step-*"):
        if path.name not in (before, state.checkpoint):
            shutil.rmtree(path)
    return stepped


def _resumed(folder: Path, learner: Learner) -> _State:
    """The committed state, with the learner set to it and the record cut to what counts; or a fresh stream."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "stream.json").exists():
        found = read_json(folder / "stream.json")
        queues = {role: [_row(row) for row in rows] for role, rows in found.pop("queues").items()}
        state = _State(**found, queues=queues)
        learner.load(folder / state.checkpoint)
    else:
        state = _State(0, 0, "step-000000", {role: [] for role in ROLES})
        learner.save(folder / state.checkpoint)
    with (folder / "stream.jsonl").open("ab") as file:
        file.truncate(sum(len(line) + 1 for line in _lines(folder)[: state.lines]))
    sync_path(folder)
    return state


def _lines(folder: Path) -> list[bytes]:
    path = folder / "stream.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _row(fields: dict[str, Any]) -> PreferenceRow:
    read: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    return PreferenceRow(**read)
