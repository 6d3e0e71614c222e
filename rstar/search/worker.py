"""Many problems at once: a SearchWorker is engines + scorer + sandbox + event loop on one node.

It takes problems and appends trees to its own shard; what comes back is a small summary. A coroutine per tree submits
and awaits, the engine batches.
"""

from __future__ import annotations

import inspect
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rstar.config import EngineSection, ModelSection, SandboxSection, SearchSection
from rstar.engines.base import Policy, Scorer
from rstar.engines.build import build_policy, build_scorer
from rstar.grading import Grader
from rstar.prompts import STOP_SYSTEM, split_stop_question, step_prompt
from rstar.sandbox import Sandbox
from rstar.search.beam import beam_search, dvts
from rstar.search.expand import Expander, Tools
from rstar.search.flow import flow
from rstar.search.gather import gather
from rstar.search.mcts import Mcts
from rstar.search.merge import rescore
from rstar.search.sample import sample, score_answers
from rstar.search.utilisation import Utilisation, WatchedPolicy, WatchedScorer
from rstar.store import FrameRef, TreeWriter, index, read_frame, scan
from rstar.tokens import question_wrapper
from rstar.tree import ANSWER, Tree
from rstar.types import Problem, UserError


@dataclass(frozen=True)
class SearchTask:
    """One way of searching, and where its trees go."""

    folder: Path
    search: SearchSection
    test_time: bool = False  # the ground truth does not guide the search; answers are scored by the PPM
    trees: Path | None = None  # nothing is generated: the answers of this folder's trees are scored
    revision: int = 0  # finished trees of lower revisions are taken up again
    rescore: bool = False  # and get the PPM values of the job's PPM first
    system: str | None = None  # system message of this pass's prompts; None: model.system


@dataclass(frozen=True)
class SearchJob:
    """Everything a worker needs to know, small enough to travel. Several passes share its engines."""

    passes: tuple[SearchTask, ...]
    engine: EngineSection
    sandbox: SandboxSection
    model: ModelSection
    policy: str  # checkpoint folder
    ppm: str = ""  # checkpoint folder of the scorer; empty: none
    recipe: str = "rstar_math"
    adapters: Mapping[str, str] = field(default_factory=dict)  # LoRA adapters by name: their folders
    lora_rank: int = 0  # of adapters that may be loaded; 0: none
    bootstrap: bool = False  # `policy` is another model than the one that is trained, with a prompt of its own


def check_search(section: SearchSection) -> None:
    """Raise UserError for a method with settings that it cannot be grown with."""
    takes = {"steps": (section.method,), "text": ("sample", "flow"), "stated": ("sample",)}
    if section.method not in takes.get(section.form, ()):
        raise UserError(
            f"search.form={section.form} with search.method={section.method}",
            need="steps, text with method sample or flow, or stated with method sample",
        )
    if section.method == "dvts" and section.beam_width % section.candidates:
        raise UserError(
            f"dvts with search.beam_width={section.beam_width} and candidates={section.candidates}",
            need="a beam_width that is a multiple of candidates: each subtree of dvts has that many",
        )


@dataclass(frozen=True)
class WorkItem:
    """One problem to search in one pass of a job."""

    pass_index: int
    problem: Problem


@dataclass(frozen=True)
class ProblemSummary:
    """Counts of a finished problem, which its worker sends to the driver."""

    pass_index: int
    problem_id: str
    level: str
    solved: bool  # at test time: an answer was found
    test_time: bool
    trees: int
    rollouts: int
    tokens: int
    engine_calls: int
    seconds: float
    outcomes: dict[str, int] = field(default_factory=dict)  # terminal reason -> nodes
    executions: dict[str, int] = field(default_factory=dict)  # ExecutionStatus value -> steps that were run
    restarted: int = 0  # evaluations that the worker's sandbox has failed under since its summary before
    worker: str = ""
    up: float = 0.0  # seconds since the worker was ready
    busy: float = 0.0  # share of them in which its engines had work, in [0, 1]


def tree_id(problem: Problem, seed: int) -> str:
    """Identity of a tree in its stage: the problem and the seed."""
    return f"{problem.id}#{seed}"


def unfinished(problems: Iterable[Problem], job: SearchJob, pass_index: int) -> list[WorkItem]:
    """Problems without a complete tree for every seed of the pass: what a restarted stage still has to do."""
    one = job.passes[pass_index]
    done = {tid for tid, ref in index(one.folder).items() if ref.complete and ref.revision >= one.revision}
    return [WorkItem(pass_index, p) for p in problems if any(tree_id(p, seed) not in done for seed in one.search.seeds)]


def summarise(item: WorkItem, trees: Sequence[Tree], *, test_time: bool) -> ProblemSummary:
    """Count what the trees of one problem hold."""
    problem = item.problem
    outcomes = Counter(node.terminal.value if node.terminal else "live" for tree in trees for node in tree.nodes[1:])
    return ProblemSummary(
        pass_index=item.pass_index,
        problem_id=problem.id,
        level=problem.level,
        solved=any(tree.answers() for tree in trees) if test_time else any(tree.solved for tree in trees),
        test_time=test_time,
        trees=len(trees),
        rollouts=sum(tree.rollouts_done for tree in trees),
        tokens=sum(tree.tokens for tree in trees),
        engine_calls=sum(tree.engine_calls for tree in trees),
        seconds=sum(tree.seconds for tree in trees),
        outcomes=dict(outcomes),
        executions=dict(Counter(node.status for tree in trees for node in tree.nodes if node.status)),
        worker=trees[0].worker if trees else "",
    )


def finished_by(worker: str, items: Iterable[WorkItem], job: SearchJob) -> list[ProblemSummary]:
    """Summaries of the `items` whose trees are complete in the shards of a `worker` that was lost unreported."""
    complete: list[dict[str, FrameRef]] = []
    for one in job.passes:
        path = _shard(one, worker)
        frames = scan(path).frames if path.exists() else ()
        complete.append({ref.tree_id: ref for ref in frames if ref.complete and ref.revision >= one.revision})
    found = []
    for item in items:
        one = job.passes[item.pass_index]
        refs = [complete[item.pass_index].get(tree_id(item.problem, seed)) for seed in one.search.seeds]
        trees = [read_frame(ref) for ref in refs if ref is not None]
        if len(trees) == len(refs):
            found.append(summarise(item, trees, test_time=one.test_time or one.trees is not None))
    return found


def _shard(one: SearchTask, worker: str) -> Path:
    return one.folder / f"trees-{worker}.jsonl.zst"


class SearchWorker:
    """Grows the trees of problems, one shard of its own per pass. `start` before use, `close` after."""

    def __init__(self, job: SearchJob, name: str) -> None:
        self.job, self.name = job, name
        self.identity = f"{socket.gethostname()}:{os.getpid()}:{name}"
        self.sandbox = Sandbox(job.sandbox)
        self._utilisation = Utilisation()
        self._known_failures = 0  # of the sandbox
        self._grader: Grader | None = None
        self._policy: Policy | None = None
        self._scorer: Scorer | None = None
        self._writers: list[TreeWriter] = []
        self._earlier: list[dict[str, FrameRef]] = []
        self._sources: list[dict[str, FrameRef]] = []
        self._wrap: dict[str | None, Callable[[str], str]] = {}  # by the pass's system message
        self._wrap_stop: Callable[[str], str] | None = None
        self.adapters: dict[str, str] = {}

    async def start(self) -> None:
        """Load the engines, start the sandbox, open the shards (cutting torn tails)."""
        job = self.job
        await self.sandbox.start()
        self._grader = Grader(self.sandbox)
        for system in {one.system for one in job.passes}:
            model = job.model if system is None else replace(job.model, system=system)
            self._wrap[system] = question_wrapper(job.policy, model)
        if any(one.search.method == "flow" for one in job.passes):
            self._wrap_stop = question_wrapper(job.policy, replace(job.model, system=STOP_SYSTEM, few_shot=""))
        if any(one.trees is None for one in job.passes):
            self._policy = build_policy(job.engine, job.policy, lora_rank=job.lora_rank)
            await self.load_adapters(job.adapters)
        self._scorer = build_scorer(job.engine, job.ppm) if job.ppm else None
        self._earlier = [index(one.folder) for one in job.passes]
        self._sources = [index(one.trees) if one.trees is not None else {} for one in job.passes]
        self._writers = [TreeWriter(_shard(one, self.name)) for one in job.passes]
        for writer in self._writers:
            if writer.torn_bytes:
                print(
                    f"{writer.path}: {writer.torn_bytes} bytes of a tree that a crash cut off are dropped", flush=True
                )
        self._utilisation = Utilisation()  # its time begins when everything is loaded

    async def close(self) -> None:
        for writer in self._writers:
            writer.close()
        try:
            for engine in (self._policy, self._scorer):
                if engine is not None:
                    await engine.close()
        finally:
            await self.sandbox.close()

    async def load_adapters(self, folders: Mapping[str, str]) -> None:
        """Serve these LoRA adapters from now on, in place of those of the same names; while nothing is searched."""
        for name, folder in folders.items():
            load = getattr(self._policy, "load_adapter", None)
            if load is None:
                raise UserError(f"engine.kind={self.job.engine.kind} with LoRA adapters", need="hf or vllm")
            loading = load(name, folder)
            if inspect.isawaitable(loading):
                await loading
        self.adapters |= folders

    async def search_problem(self, item: WorkItem) -> ProblemSummary:
        """Grow one tree per seed, escalate while the problem has no correct answer, and store what is finished."""
        one = self.job.passes[item.pass_index]
        scored_again = one.trees is not None
        trees = await (self._score_again(item) if scored_again else self.trees(item))
        summary = summarise(item, trees, test_time=one.test_time or scored_again)
        failed, known = self.sandbox.counts.infrastructure_failures, self._known_failures
        self._known_failures = failed
        return replace(summary, up=self._utilisation.seconds, busy=self._utilisation.share, restarted=failed - known)

    async def trees(self, item: WorkItem) -> list[Tree]:
        """As search_problem, but the trees themselves.

        Whether an escalation was due is read from all trees, finished ones too: one that has more rollouts than a
        target shows that the problem was unsolved there, or that a search that is continued had gone beyond it. So a
        search that was killed at any write takes the decisions of one that was not.
        """
        one = self.job.passes[item.pass_index]
        section = one.search
        trees = [await self._tree(item, seed) for seed in section.seeds]
        tools = self._tools(one)
        adapter = ANSWER if ANSWER in self.adapters else None
        growing = [Expander(tree, tools, section, adapter=adapter) for tree in trees if not tree.complete]
        for target in [section.rollouts, *(section.rollouts + more for more in section.escalate)]:
            await gather(*(self._grow(expander, item, target) for expander in growing))
            further = any(tree.rollouts_done > target for tree in trees)
            if one.test_time or (any(tree.solved for tree in trees) and not further):
                break
        for expander in growing:
            expander.tree.complete = True
            self._writers[item.pass_index].append(expander.tree)
        return trees

    async def _score_again(self, item: WorkItem) -> list[Tree]:
        """Copy the problem's trees of the pass's `trees` with their answers scored; it generates nothing."""
        assert self._scorer is not None
        scorer, trees = WatchedScorer(self._scorer, self._utilisation), []
        for seed in self.job.passes[item.pass_index].search.seeds:
            source = self._sources[item.pass_index].get(tree_id(item.problem, seed))
            if source is None or not source.complete:
                raise UserError(
                    f"no finished tree {tree_id(item.problem, seed)} to score", how="run the earlier stages"
                )
            tree = read_frame(source)
            tree.ppm, tree.tokens, tree.engine_calls, tree.seconds = self.job.ppm, 0, 0, 0.0
            begun = time.monotonic()
            await score_answers(tree, scorer)
            tree.seconds = time.monotonic() - begun
            self._writers[item.pass_index].append(tree)
            trees.append(tree)
        return trees

    async def _grow(self, expander: Expander, item: WorkItem, target: int) -> None:
        section = self.job.passes[item.pass_index].search
        check_search(section)
        match section.method:
            case "mcts":
                unvisited = math.inf if section.unvisited_first else 0.0
                mcts = Mcts(expander, c=section.c, selection=section.selection, unvisited=unvisited)
                await self._walk(mcts, item, target)
            case "sample" | "beam" | "dvts" | "flow" if expander.tree.root.expanded:
                pass  # nothing to add to a descent that has been made
            case "sample":
                await sample(expander, target)
            case "flow":
                await flow(expander, chain_temperature=section.chain_temperature, deviations=section.deviations)
            case "beam" | "dvts" if expander.tools.scorer is None:
                raise UserError(f"search.method={section.method} without a PPM", need="search.use_ppm=true")
            case "beam":
                await beam_search(expander, section.beam_width)
            case "dvts":
                await dvts(expander, section.beam_width // section.candidates)
            case other:
                raise UserError(f"search.method={other}", need="mcts, beam, dvts, sample or flow")

    async def _walk(self, mcts: Mcts, item: WorkItem, target: int) -> None:
        """Grow a tree to `target` rollouts and save it on the way, where no walk is in flight: what a resumed search
        goes on from is what the search itself went on from."""
        section, tree = self.job.passes[item.pass_index].search, mcts.tree
        every = section.checkpoint_rollouts or target
        while tree.rollouts_done < target and not tree.root.exhausted:
            stop = min(target, (tree.rollouts_done // every + 1) * every)
            await mcts.search(stop, in_flight=section.rollouts_in_flight)
            if section.checkpoint_rollouts and tree.rollouts_done % every == 0:
                self._writers[item.pass_index].append(tree)

    async def _tree(self, item: WorkItem, seed: int) -> Tree:
        one = self.job.passes[item.pass_index]
        problem, section = item.problem, one.search
        earlier = self._earlier[item.pass_index].get(tree_id(problem, seed))
        settings = {**asdict(section), "sandbox": self.sandbox.level}
        if self._wrap_stop is not None:
            settings |= {"stop_borders": split_stop_question(self._wrap_stop, problem.question)}
        if one.system is not None:
            settings |= {"system": one.system}
        if self.adapters:
            settings |= {"adapters": self.adapters}
        if self.job.bootstrap:
            settings |= {"bootstrap": True}
        if earlier is not None:
            tree = read_frame(earlier)
            if tree.revision >= one.revision:
                return tree
            if one.rescore and self._scorer is not None:
                tree = await rescore(tree, self._scorer, ppm=self.job.ppm)
            return replace(tree, revision=one.revision, complete=False, settings=settings)
        return Tree(
            tree_id=tree_id(problem, seed),
            problem=problem,
            prompt=step_prompt(self._wrap[one.system](problem.question), section.form).segments,
            recipe=self.job.recipe,
            searcher=section.method,
            settings=settings,
            seed=seed,
            policy=self.job.policy,
            ppm=self.job.ppm if section.use_ppm else "",
            worker=self.identity,
            revision=one.revision,
        )

    def _tools(self, one: SearchTask) -> Tools:
        assert self._policy is not None and self._grader is not None
        grader = self._grader

        async def grade(answer: str, problem: Problem) -> bool:
            return await grader.is_equivalent(answer, problem.answer)

        policy = WatchedPolicy(self._policy, self._utilisation)
        scorer = (
            WatchedScorer(self._scorer, self._utilisation) if one.search.use_ppm and self._scorer is not None else None
        )
        return Tools(policy, scorer, self.sandbox.session, None if one.test_time else grade)
