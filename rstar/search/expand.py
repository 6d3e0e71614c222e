"""One expansion: n candidates -> dedupe -> run -> classify -> grade terminals -> PPM on the live ones.

Shared by every searcher, so a candidate means the same everywhere.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rstar.config import SearchSection
from rstar.engines.base import ContextOverflow, EngineError, Policy, Scorer
from rstar.grading import extract_answer
from rstar.prompts import Malformed, imitates, kind_of, parse, parse_solution, render, segments, stops
from rstar.search.gather import gather
from rstar.tree import Node, Tree
from rstar.types import (
    Execution,
    ExecutionStatus,
    Generation,
    Problem,
    PromptText,
    SamplingParams,
    Step,
    StepKind,
    TerminalReason,
)

if TYPE_CHECKING:
    from rstar.sandbox import Session

Grade = Callable[[str, Problem], Awaitable[bool]]
"""(answer, problem) -> whether it is correct. None at test time: the ground truth must not guide a search."""


@dataclass(frozen=True)
class Tools:
    """What a search is given."""

    policy: Policy
    scorer: Scorer | None
    open_session: Callable[[int], Session]  # seed -> a sandbox session
    grade: Grade | None


@dataclass
class Candidate:
    """A distinct sampled text on its way to a node."""

    generation: Generation
    multiplicity: int = 1
    step: Step | None = None
    execution: Execution | None = None
    terminal: TerminalReason | None = None
    error: str = ""
    reward: float | None = None
    ppm_value: float | None = None


def stated_answer(text: str) -> Step | Malformed:
    """Read words of any form by the answer that they state, where grading.extract_answer finds one."""
    answer = extract_answer(text)
    return Malformed("states no answer") if answer is None else Step(StepKind.ANSWER, text, answer=answer)


_READ = {"text": parse_solution, "stated": stated_answer}


def session_seed(problem: Problem, seed: int) -> int:
    """Seed of the untrusted programs' random numbers: depends on the problem and the tree's seed only."""
    return int.from_bytes(hashlib.sha256(f"{problem.id}\0{seed}".encode()).digest()[:4], "big")


def path_prompt(tree: Tree, node: Node) -> PromptText:
    """The prompt for a continuation of `node`: the tree's prompt, then each step as the step format renders it."""
    steps = render([(n.text, n.stdout) for n in tree.solution(node)])
    return PromptText(tree.prompt + tuple(text for text, _ in steps))


def completion(tree: Tree, node: Node) -> list[str]:
    """The segments that `node` adds to the prompt of its parent: what a scorer reads of it."""
    printed = "".join(n.stdout for n in tree.path(node))
    return [text for text, _ in segments(node.text, printed)]


async def scores(
    scorer: Scorer, prompt: PromptText, completions: Sequence[Sequence[str]]
) -> list[float | ContextOverflow]:
    """As Scorer.score, but a completion that is too long for the scorer's context has its error, not all of them."""
    try:
        found: list[float | ContextOverflow] = list(await scorer.score(prompt, completions))
        if len(found) != len(completions):
            raise EngineError(f"the scorer gave {len(found)} scores for {len(completions)} completions")
        return found
    except ContextOverflow as error:
        if len(completions) == 1:
            return [error]
    return [value for texts in completions for value in await scores(scorer, prompt, [texts])]


class Expander:
    """Expands nodes of one tree. Holds the tree's sandbox session; everything else is in the tree."""

    def __init__(self, tree: Tree, tools: Tools, sampling: SearchSection, *, adapter: str | None = None) -> None:
        """`adapter`: the LoRA adapter that writes."""
        self.tree, self.tools, self.sampling, self.adapter = tree, tools, sampling, adapter
        self.in_pieces = (sampling.method, sampling.form) == ("flow", "text")  # pieces of a solution in words
        self._session = tools.open_session(session_seed(tree.problem, tree.seed))

    async def expand(self, node: Node, n: int = 0) -> list[Node]:
        """Sample `n` (0: as configured) continuations of `node`, add them as children and back up what is terminal.

        Returns the new children. A node whose expansion yields no live child, no answer and no max_depth becomes a
        dead end: -1, backed up once from the node itself.
        """
        return self._attach(node, await self.draw(node, n))

    async def expand_all(self, nodes: Sequence[Node], counts: Sequence[int] = ()) -> list[Node]:
        """Expand several nodes at once (`counts`: samples of each); returns the new children.

        They are created in the order of `nodes`, whichever is ready first, so that the tree does not depend on timing.
        """
        wanted = counts or [0] * len(nodes)
        ready = await gather(*map(self.draw, nodes, wanted))
        return [
            child for node, candidates in zip(nodes, ready, strict=True) for child in self._attach(node, candidates)
        ]

    async def draw(self, node: Node, n: int = 0) -> list[Candidate]:
        """Draw `n` texts after `node`, count what they cost, and find out what each of them is."""
        sampling, path = self.sampling, self.tree.solution(node)
        after = kind_of(path[-1].text) if path else None
        if not n and after is StepKind.CODE:
            n = sampling.answer_candidates
        params = SamplingParams(
            n=n or sampling.candidates,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_step_tokens,
            stop=stops(after) if sampling.form == "steps" else (),
            calculator=sampling.calculator,
            seed=self.tree.seed,
            adapter=self.adapter,
        )
        try:
            generations = await self.tools.policy.generate(path_prompt(self.tree, node), params)
        except ContextOverflow as error:  # a long printed output is enough; the node becomes a dead end
            node.error = f"no room to go on: {error.got}"
            return []
        self.tree.engine_calls += 1
        self.tree.tokens += sum(g.tokens for g in generations)
        return await self._classify(node, generations)

    def _attach(self, node: Node, candidates: Sequence[Candidate]) -> list[Node]:
        children = [self.add(node, candidate) for candidate in candidates]
        useful = {None, TerminalReason.ANSWER, TerminalReason.MAX_DEPTH}
        if not any(child.terminal in useful for child in children):
            node.terminal, node.reward = TerminalReason.DEAD_END, -1.0
            self.tree.backpropagate(node, -1.0)
        return children

    async def _classify(self, node: Node, generations: Sequence[Generation]) -> list[Candidate]:
        distinct: dict[str, Candidate] = {}
        for generation in generations:
            if generation.text in distinct:
                distinct[generation.text].multiplicity += 1
            else:
                distinct[generation.text] = Candidate(generation)
        candidates = list(distinct.values())
        path = self.tree.solution(node)
        after = kind_of(path[-1].text) if path else None
        for candidate in candidates if not self.in_pieces else ():
            text = candidate.generation.text
            if candidate.generation.cut_off:
                parsed: Step | Malformed = Malformed("cut off")
            else:
                parsed = _READ[self.sampling.form](text) if self.sampling.form != "steps" else parse(text, after=after)
            if isinstance(parsed, Malformed):
                candidate.terminal, candidate.error = TerminalReason.MALFORMED, parsed.reason
            else:
                candidate.step = parsed
        await asyncio.gather(
            *(self._run(path, c) for c in candidates if c.step is not None and c.step.code is not None)
        )
        await asyncio.gather(
            *(self._grade(c) for c in candidates if c.step is not None and c.step.kind is StepKind.ANSWER)
        )
        for candidate in candidates:
            if candidate.terminal is None and len(path) + 1 >= self.sampling.max_depth:
                candidate.terminal, candidate.reward = TerminalReason.MAX_DEPTH, -1.0
        await self._score(node, candidates)
        return candidates

    async def _run(self, path: Sequence[Node], candidate: Candidate) -> None:
        assert candidate.step is not None and candidate.step.code is not None
        state = self._session.state([n.code for n in path if n.code is not None])
        _, execution = await self._session.run(state, candidate.step.code)
        candidate.execution = execution
        if execution.status is not ExecutionStatus.OK:
            candidate.error = execution.error or execution.status.value
            if self.sampling.drop_failed_steps:
                candidate.terminal = TerminalReason.CODE_ERROR
            else:
                candidate.execution, candidate.step = replace(execution, stdout=""), replace(candidate.step, code=None)
        elif candidate.step.kind is StepKind.CODE and imitates("".join(n.stdout for n in path) + execution.stdout):
            candidate.terminal, candidate.error = TerminalReason.MALFORMED, "printed text imitates a delimiter"

    async def _grade(self, candidate: Candidate) -> None:
        assert candidate.step is not None and candidate.step.answer is not None
        candidate.terminal = TerminalReason.ANSWER
        if self.tools.grade is not None:
            correct = await self.tools.grade(candidate.step.answer, self.tree.problem)
            candidate.reward = 1.0 if correct else -1.0

    async def _score(self, node: Node, candidates: Sequence[Candidate]) -> None:
        """PPM on the live candidates; at test time (no grader) on the answers too, whose score is their return."""
        if self.tools.scorer is None:
            return
        wanted = [
            c
            for c in candidates
            if c.terminal is None or (c.terminal is TerminalReason.ANSWER and self.tools.grade is None)
        ]
        if not wanted:
            return
        printed = "".join(n.stdout for n in self.tree.path(node))
        completions = [
            [text for text, _ in segments(c.generation.text, printed + (c.execution.stdout if c.execution else ""))]
            for c in wanted
        ]
        found = await scores(self.tools.scorer, path_prompt(self.tree, node), completions)
        for candidate, value in zip(wanted, found, strict=True):
            if isinstance(value, ContextOverflow):
                candidate.terminal, candidate.error = TerminalReason.MALFORMED, f"too long: {value.got}"
            else:
                candidate.ppm_value = value

    def add(self, node: Node, candidate: Candidate) -> Node:
        """Add a drawn text as a child of `node`; what it is worth already is backed up."""
        execution = candidate.execution
        child = self.tree.add_child(
            node,
            text=candidate.generation.text,
            code=candidate.step.code if candidate.step else None,
            stdout=execution.stdout if execution else "",
            error=candidate.error,
            status=execution.status.value if execution else "",
            cpu_ms=execution.cpu_ms if execution else 0.0,
            logprob=None
            if candidate.generation.logprob != candidate.generation.logprob
            else candidate.generation.logprob,
            tokens=candidate.generation.tokens,
            multiplicity=candidate.multiplicity,
            terminal=candidate.terminal,
            answer=candidate.step.answer if candidate.step else None,
            reward=candidate.reward,
        )
        if child.reward is not None:
            self.tree.backpropagate(child, child.reward)
        elif child.terminal is TerminalReason.ANSWER:  # test time: its return is its PPM score
            self.tree.backpropagate(child, 0.0)
        if candidate.ppm_value is not None:
            self.tree.set_ppm_value(child, candidate.ppm_value, self.sampling.ppm_prior_visits)
        return child
