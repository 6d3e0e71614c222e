"""Stand-ins for the search's tools: scripted text, and a session that prints literals and fails on request."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from rstar.config import SearchSection
from rstar.engines.simulated import SimulatedPolicy, SimulatedScorer
from rstar.manifest import RunDir, run_dir
from rstar.prompts import step_prompt
from rstar.run import Artifact, Recipe, Run, Stage
from rstar.search.expand import Expander, Tools
from rstar.tree import Tree
from rstar.types import Execution, ExecutionStatus, Problem


class LiteralSession:
    """Runs nothing: `print('x')` prints x, a step that holds `boom` fails. Counts what it was asked."""

    def __init__(self) -> None:
        self.runs: list[tuple[tuple[str, ...], str]] = []
        self.root: tuple[str, ...] = ()

    def state(self, codes: Sequence[str]) -> tuple[str, ...]:
        return tuple(codes)

    async def run(self, parent: tuple[str, ...], code: str) -> tuple[tuple[str, ...], Execution]:
        self.runs.append((parent, code))
        if "boom" in code:
            return parent, Execution(ExecutionStatus.ERROR, error="NameError: boom")
        printed = "".join(text + "\n" for text in re.findall(r"print\('([^']*)'\)", code))
        return (*parent, code), Execution(ExecutionStatus.OK, stdout=printed, cpu_ms=1.0)


async def exact_grade(answer: str, problem: Problem) -> bool:
    return answer == problem.answer


def problem(answer: str = "1", id: str = "p") -> Problem:
    return Problem(id=id, question="q", answer=answer, level="1")


def grow(
    script: Callable[[str, int, int], str],
    *,
    candidates: int = 2,
    answer: str = "1",
    score: Callable[[str], float] | None = None,
    test_time: bool = False,
    max_depth: int = 16,
    prior_visits: int = 1,
    seed: int = 0,
) -> Expander:
    """An expander of a fresh tree over scripted parts."""
    tools = Tools(
        policy=SimulatedPolicy(script),
        scorer=SimulatedScorer(score) if score else None,
        open_session=lambda seed: LiteralSession(),  # type: ignore[arg-type,return-value]
        grade=None if test_time else exact_grade,
    )
    tree = Tree(tree_id=f"p#{seed}", problem=problem(answer), prompt=step_prompt("Q: q\n").segments, seed=seed)
    sampling = SearchSection(
        candidates=candidates,
        temperature=1.0,
        max_depth=max_depth,
        ppm_prior_visits=prior_visits,
        max_step_tokens=10_000,
    )
    return Expander(tree, tools, sampling)


def step(k: int, body: str) -> str:
    return f"# Step {k}: s\n{body}\n<end_of_step>"


def finish(value: str) -> str:
    return f"# Now print the final answer\nprint('{value}')\n<end_of_code>"


def answer(value: str) -> str:
    return f"The answer is \\boxed{{{value}}}.<end_of_answer>"


def depth_of(prompt: str) -> int:
    """Steps on the path that a prompt ends with."""
    return prompt.count("<end_of_step>") + prompt.count("<end_of_code>")


def choices(prompt: str) -> list[int]:
    """The choices that a path of `branching` has made."""
    return [int(i) for i in re.findall(r"^x\d+ = (\d+)$", prompt, flags=re.MULTILINE)]


def branching(depth: int, right: Callable[[list[int]], bool]) -> Callable[[str, int, int], str]:
    """A full tree: `depth` steps of which sample i makes choice i, then one code end and one answer (1 if `right`)."""

    def script(prompt: str, seed: int, index: int) -> str:
        made = choices(prompt)
        if "<end_of_code>" in prompt:
            return answer("1" if right(made) else "0")
        if len(made) == depth:
            return finish("v")
        return step(len(made) + 1, f"x{len(made) + 1} = {index}")

    return script


def execute_stages(recipe: Recipe[Any], config: Any, only: Callable[[Stage], bool] = lambda stage: True) -> RunDir:
    """Run a recipe's stages in this process."""

    def act(stage: Stage) -> Artifact:
        if only(stage):
            stage.execute()
        return stage.artifact()

    run = run_dir(config.run)
    recipe.function(Run(run.path, act), config)
    return run
