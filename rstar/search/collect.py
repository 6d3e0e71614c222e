"""Many problems at once: a SearchWorker is engines + scorer + sandbox + event loop on one node (DESIGN section 7).

It takes problems and appends trees to its own shard; what comes back is a small summary. A coroutine per tree submits
and awaits, the engine batches.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rstar.config import EngineSection, ModelSection, SandboxSection, SearchSection
from rstar.engines.base import Policy, Scorer
from rstar.engines.build import build_policy, build_scorer
from rstar.grading import Grader
from rstar.prompts import step_prompt
from rstar.sandbox import Sandbox
from rstar.search.expand import Expander, Sampling, Tools
from rstar.search.mcts import Mcts
from rstar.search.sample import sample
from rstar.store import FrameRef, TreeWriter, index, read_frame
from rstar.tree import Tree
from rstar.types import Problem, TerminalReason, UserError


@dataclass(frozen=True)
class SearchJob:
    """Everything a worker needs to know, small enough to travel."""

    folder: Path  # where the shards go
    search: SearchSection
    engine: EngineSection
    sandbox: SandboxSection
    model: ModelSection
    policy: str  # checkpoint folder
    ppm: str = ""  # checkpoint folder of the scorer; empty: none
    test_time: bool = False  # the ground truth does not guide the search; answers are scored by the PPM
    recipe: str = "rstar_math"


@dataclass(frozen=True)
class ProblemSummary:
    """What the driver hears of a finished problem."""

    problem_id: str
    level: str
    solved: bool  # at test time: an answer was found
    trees: int
    rollouts: int
    tokens: int
    engine_calls: int
    seconds: float
    outcomes: dict[str, int] = field(default_factory=dict)  # terminal reason -> nodes
    worker: str = ""


def tree_id(problem: Problem, seed: int) -> str:
    """Identity of a tree in its stage: the problem and the seed."""
    return f"{problem.id}#{seed}"


def unfinished(problems: Iterable[Problem], search: SearchSection, folder: Path) -> list[Problem]:
    """Problems without a complete tree for every seed in `folder`: what a restarted stage still has to do."""
    done = {tid for tid, ref in index(folder).items() if ref.complete} if folder.exists() else set()
    return [p for p in problems if any(tree_id(p, seed) not in done for seed in search.seeds)]


def summarise(problem: Problem, trees: Sequence[Tree], *, test_time: bool) -> ProblemSummary:
    """Count what the trees of one problem hold."""
    outcomes = Counter(node.terminal.value if node.terminal else "live" for tree in trees for node in tree.nodes[1:])
    return ProblemSummary(
        problem_id=problem.id,
        level=problem.level,
        solved=any(tree.answers() for tree in trees) if test_time else any(tree.solved for tree in trees),
        trees=len(trees),
        rollouts=sum(tree.rollouts_done for tree in trees),
        tokens=sum(tree.tokens for tree in trees),
        engine_calls=sum(tree.engine_calls for tree in trees),
        seconds=sum(tree.seconds for tree in trees),
        outcomes=dict(outcomes),
        worker=trees[0].worker if trees else "",
    )


class SearchWorker:
    """Grows the trees of problems, one shard of its own. `start` before use, `close` after."""

    def __init__(self, job: SearchJob, name: str) -> None:
        self.job, self.name = job, name
        self.identity = f"{socket.gethostname()}:{os.getpid()}:{name}"
        self.sandbox = Sandbox(job.sandbox)
        self._grader: Grader | None = None
        self._policy: Policy | None = None
        self._scorer: Scorer | None = None
        self._writer: TreeWriter | None = None
        self._earlier: dict[str, FrameRef] = {}
        self._wrap: Callable[[str], str] | None = None

    async def start(self) -> None:
        """Load the engines, start the sandbox, open the shard (cutting a torn tail)."""
        from rstar.tokens import question_wrapper

        job = self.job
        await self.sandbox.start()
        self._grader = Grader(self.sandbox)
        self._wrap = question_wrapper(job.policy, job.model)
        self._policy = build_policy(job.engine, job.policy)
        self._scorer = build_scorer(job.engine, job.ppm) if job.ppm else None
        self._earlier = index(job.folder) if job.folder.exists() else {}
        self._writer = TreeWriter(job.folder / f"trees-{self.name}.jsonl.zst")

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for engine in (self._policy, self._scorer):
            if engine is not None:
                await engine.close()
        await self.sandbox.close()

    async def search_problem(self, problem: Problem) -> ProblemSummary:
        """Grow one tree per seed, escalate while the problem has no correct answer, and store what is finished."""
        section = self.job.search
        trees = [self._tree(problem, seed) for seed in section.seeds]
        targets = [section.rollouts, *(section.rollouts + more for more in section.escalate)]
        expanders = [Expander(tree, self._tools(), self._sampling()) for tree in trees if not tree.complete]
        for target in targets:
            await asyncio.gather(*(self._grow(expander, target) for expander in expanders))
            if self.job.test_time or any(tree.solved for tree in trees):
                break
        for expander in expanders:
            expander.tree.complete = True
            self._append(expander.tree)
        return summarise(problem, trees, test_time=self.job.test_time)

    async def _grow(self, expander: Expander, target: int) -> None:
        section = self.job.search
        match section.method:
            case "mcts":
                mcts = Mcts(expander, c=section.c, selection=section.selection)
                await mcts.search(target, in_flight=section.rollouts_in_flight, on_rollout=self._checkpoint)
            case "sample":
                if not expander.tree.root.expanded:
                    await sample(expander, target)
            case other:
                raise UserError(f"search.method={other}", need="mcts or sample")

    def _checkpoint(self, tree: Tree) -> None:
        every = self.job.search.checkpoint_rollouts
        if every and tree.rollouts_done % every == 0:
            self._append(tree)

    def _append(self, tree: Tree) -> None:
        assert self._writer is not None
        self._writer.append(tree)

    def _tree(self, problem: Problem, seed: int) -> Tree:
        assert self._wrap is not None
        earlier = self._earlier.get(tree_id(problem, seed))
        if earlier is not None:
            return read_frame(earlier)
        return Tree(
            tree_id=tree_id(problem, seed),
            problem=problem,
            prompt=step_prompt(self._wrap(problem.question)).segments,
            recipe=self.job.recipe,
            searcher=self.job.search.method,
            settings=asdict(self.job.search),
            seed=seed,
            policy=self.job.policy,
            ppm=self.job.ppm,
            worker=self.identity,
        )

    def _sampling(self) -> Sampling:
        section = self.job.search
        return Sampling(
            candidates=section.candidates,
            temperature=section.temperature,
            top_p=section.top_p,
            max_step_tokens=section.max_step_tokens,
            max_depth=section.max_depth,
            ppm_prior_visits=section.ppm_prior_visits,
        )

    def _tools(self) -> Tools:
        assert self._policy is not None and self._grader is not None
        grader = self._grader

        async def grade(answer: str, problem: Problem) -> bool:
            return await grader.is_equivalent(answer, problem.answer)

        return Tools(self._policy, self._scorer, self.sandbox.session, None if self.job.test_time else grade)


async def collect(
    problems: Sequence[Problem],
    search_problem: Callable[[Problem], Awaitable[ProblemSummary]],
    *,
    in_flight: int,
    on_done: Callable[[ProblemSummary], None],
) -> None:
    """Push `problems` through `search_problem`, at most `in_flight` at once, in order of the list."""
    queue = iter(problems)

    async def puller() -> None:
        for problem in queue:
            on_done(await search_problem(problem))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(in_flight, len(problems))):
            group.create_task(puller())
