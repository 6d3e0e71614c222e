"""The stream of Flow-DPO (arXiv 2410.22304, section 3): predict a problem, then learn from it, window by window.

A window of problems is searched at once with the same parameters (window 1 is the paper's order). Each problem's base
chain is its prediction and is recorded before anything is learned from it: progressive validation. Its pairs queue for
their adapters, and a full batch is an optimizer step. With `overlap` a window is searched while the one before it is
learned from.

On disk: trees in shards; `stream.jsonl`, a line per problem or step; checkpoints `step-*`; and the commit point
`stream.json`, replaced at once after each window, which says how far the others count. What lies beyond it was left by
a kill: such lines are cut off, steps are made again, and finished trees are used again (the parameters that wrote them
have not seen their problem). A commit point that counts what is missing or damaged is void, and the stream begins anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import orjson

from rstar.call import from_json
from rstar.config import DpoSection, EngineSection, ModelSection, ProblemsSection, SandboxSection, SearchSection
from rstar.extract.flow_pairs import flow_outcome, flow_pairs
from rstar.problems import load_problems
from rstar.recipes.base_model import checkpoint
from rstar.recipes.flow_dpo.passes import ROLES, search_job
from rstar.report.progress import Progress
from rstar.run import Artifact, Counts, Here
from rstar.search.worker import SearchTask, SearchWorker, WorkItem
from rstar.store import index, path_digest, read_json, shards, sync_path, write_json
from rstar.tree import Tree
from rstar.types import PreferenceRow, Problem


@dataclass(frozen=True)
class FlowSection:
    """The stream."""

    window: int = 1  # problems searched at once with the same parameters
    overlap: bool = False  # search a window while the one before it is learned from (more than one device)


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


def learn_stream(
    here: Here,
    base: Artifact,
    flow: FlowSection,
    dpo: DpoSection,
    search: SearchSection,
    problems: ProblemsSection,
    model: ModelSection,
    engine: EngineSection,
    sandbox: SandboxSection,
    run_seed: int,
) -> Counts:
    """Learn two adapters of the base along the training problems, from where an earlier attempt stands."""
    from rstar.training.dpo import AdapterTrainer

    folder = here.round.path
    here.resume(folder)
    already, pool = committed(folder), load_problems(problems).train
    trainer = AdapterTrainer(checkpoint(base, model), ROLES, dpo, seed=run_seed)
    job = search_job([SearchTask(folder.resolve(), search)], base, model, engine, sandbox)
    worker = SearchWorker(replace(job, lora_rank=dpo.lora_rank), "w0")
    progress, right = Progress(here.title, total=len(pool), already=already), 0

    async def tree_of(problem: Problem) -> Tree:
        (tree,) = await worker.trees(WorkItem(0, problem))
        return tree

    async def serve(adapters: Path) -> None:
        await worker.load_adapters({role: str((adapters / role).resolve()) for role in ROLES})

    def show(predictions: Sequence[Prediction], steps: int) -> None:
        nonlocal right
        right, done = right + sum(p.correct for p in predictions), predictions[-1].number + 1
        progress.update(done, right=right / (done - already), steps=steps)

    async def run_stream() -> Path:
        try:
            await worker.start()
            return await stream(
                pool, tree_of, trainer, serve, folder, window=flow.window, batch=dpo.batch_size, overlap=flow.overlap,
                on_window=show,
            )  # fmt: skip
        finally:
            await worker.close()

    with progress:
        last = asyncio.run(run_stream())
    here.outputs += [last, folder / RECORD, folder / COMMIT, *shards(folder)]
    predictions, steps = read_stream(folder)
    return {
        "problems": len(predictions),
        "correct": sum(p.correct for p in predictions),
        "steps": dict(trainer.steps),
        "pairs": {role: sum(getattr(p, f"{role}_pairs") for p in predictions) for role in ROLES},
        "staleness": mean_staleness(predictions),
        "tokens": sum(p.tokens for p in predictions),
        "losses": [step["loss"] for step in steps],
        "dropped": sum(step.get("dropped", 0) for step in steps),
    }


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
) -> Path:
    """Run the stream over `problems`, from its commit point in `folder` to its end; returns the last checkpoint.

    Args:
        problems: In their order.
        search: Grows a problem's tree with the served parameters, or returns the one that is stored.
        learner: Makes optimizer steps; loads and saves its checkpoints.
        serve: Lets `search` use the adapters of a checkpoint's folder from now on.
        folder: Of the record and the checkpoints.
        window: Problems searched at once.
        batch: Pairs of an optimizer step.
        overlap: Search while learning: parameters are older by a window.
        on_window: Called with each window's predictions and the number of steps made before it.
    """
    commit = _resumed(folder, learner)
    # a resumed search goes on with the parameters that it had, so that a kill changes nothing in the record
    served, learned = commit.before if overlap else (commit.checkpoint, commit.problems)
    learning: asyncio.Task[None] | None = None
    await serve(folder / served)

    async def catch_up() -> None:
        """Wait for the learning in progress; search with what it has made from now on."""
        nonlocal served, learned, learning
        if learning is not None:
            await learning
            learning = None
        if served != commit.checkpoint:
            await serve(folder / commit.checkpoint)
        served, learned = commit.checkpoint, commit.problems

    for start in range(commit.problems, len(problems), window):
        known = learned
        trees = await asyncio.gather(*map(search, problems[start : start + window]))
        await catch_up()
        predictions = []
        for number, tree in enumerate(trees, start):
            pairs = flow_pairs(tree)
            answer_pairs, stop_pairs = (sum(row.kind == role for row in pairs) for role in ROLES)
            predictions.append(
                Prediction(
                    number=number,
                    problem_id=tree.problem.id,
                    **asdict(flow_outcome(tree)),
                    answer_pairs=answer_pairs,
                    stop_pairs=stop_pairs,
                    learned=known,
                    tokens=tree.tokens,
                )
            )
            for row in pairs:
                commit.queues[row.kind].append(row)
        on_window(predictions, sum(learner.steps.values()))
        learning = asyncio.create_task(asyncio.to_thread(_learn, commit, learner, predictions, folder, batch))
        if not overlap:
            await catch_up()
    await catch_up()
    return folder / commit.checkpoint


def read_stream(folder: Path) -> tuple[list[Prediction], list[dict[str, Any]]]:
    """(predictions in stream order, figures of the optimizer steps) of a stream, as far as it counts."""
    commit = _read_commit(folder)
    found = [orjson.loads(line) for line in _lines(folder)[: commit.lines if commit else 0]]
    return [Prediction(**one) for one in found if "problem_id" in one], [one for one in found if "loss" in one]


def mean_staleness(predictions: Sequence[Prediction]) -> float:
    """Problems that came before a prediction and were not learned from yet, on average."""
    return sum(p.staleness for p in predictions) / max(1, len(predictions))


# -- the commit point ------------------------------------------------------------------------------------------------

RECORD, COMMIT = "stream.jsonl", "stream.json"


@dataclass
class Commit:
    """What stream.json holds: how far the record, the trees and the checkpoints count."""

    problems: int  # recorded, and their pairs queued or learned from
    lines: int  # of the record
    record: str  # digest of those lines
    checkpoint: str  # name of its folder
    weights: str  # digest of that folder
    before: tuple[str, int]  # (checkpoint, problems) of the commit before: what an overlapping search goes on with
    queues: dict[str, list[PreferenceRow]]


def committed(folder: Path) -> int:
    """Problems of a stream that count.

    Where the commit point is void, because something that it counts is missing or damaged, all that the stream has made
    is removed.
    """
    commit = _read_commit(folder)
    if commit is None:
        return 0
    lines = _lines(folder)[: commit.lines]
    whole = (len(lines), _digest("", lines)) == (commit.lines, commit.record)
    whole &= path_digest(folder / commit.checkpoint) == commit.weights and (folder / commit.before[0]).is_dir()
    if whole and sum(ref.complete for ref in index(folder).values()) >= commit.problems:
        return commit.problems
    for path in folder.glob("step-*"):
        shutil.rmtree(path)
    for path in (*shards(folder), folder / RECORD, folder / COMMIT):  # the void commit point last
        path.unlink(missing_ok=True)
    return 0


def _learn(commit: Commit, learner: Learner, predictions: Sequence[Prediction], folder: Path, batch: int) -> None:
    """Make the steps that the queues are long enough for, then write the commit point."""
    made: list[Any] = [*predictions]
    for adapter, queue in commit.queues.items():
        while len(queue) >= batch:
            made.append(learner.step(adapter, queue[:batch]))
            del queue[:batch]
    commit.before = (commit.checkpoint, commit.problems)
    if len(made) > len(predictions):
        commit.checkpoint = f"step-{sum(learner.steps.values()):06d}"
        learner.save(folder / commit.checkpoint)
        commit.weights = path_digest(folder / commit.checkpoint)
    lines = [orjson.dumps(one) for one in made]
    with (folder / RECORD).open("ab") as file:
        file.writelines(line + b"\n" for line in lines)
    for path in (folder / RECORD, *shards(folder)):  # what the commit point counts outlives a power failure too
        sync_path(path)
    commit.problems, commit.lines = predictions[-1].number + 1, commit.lines + len(lines)
    commit.record = _digest(commit.record, lines)
    write_json(folder / COMMIT, asdict(commit))
    for path in folder.glob("step-*"):
        if path.name not in (commit.before[0], commit.checkpoint):
            shutil.rmtree(path)


def _resumed(folder: Path, learner: Learner) -> Commit:
    """The commit point, with the learner set to it and the record cut to what counts; or that of a new stream."""
    folder.mkdir(parents=True, exist_ok=True)
    commit = _read_commit(folder)
    if commit is not None:
        learner.load(folder / commit.checkpoint)
    else:
        first = "step-000000"
        learner.save(folder / first)
        commit = Commit(0, 0, "", first, path_digest(folder / first), (first, 0), {role: [] for role in ROLES})
    with (folder / RECORD).open("ab") as file:
        file.truncate(sum(len(line) + 1 for line in _lines(folder)[: commit.lines]))
    sync_path(folder)
    return commit


def _read_commit(folder: Path) -> Commit | None:
    path = folder / COMMIT
    return from_json(Commit, read_json(path)) if path.exists() else None


def _lines(folder: Path) -> list[bytes]:
    path = folder / RECORD
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _digest(before: str, lines: Iterable[bytes]) -> str:
    """Digest of a record that has grown by `lines`; `before` is that of the lines before them."""
    for line in lines:
        before = hashlib.sha256(before.encode() + line).hexdigest()
    return before
