"""Worked code solutions for the supervised warm-up, made from what the training problems bring along.

Small base models cannot follow the step format at all, and the quickstart has no large bootstrap policy. Sources:

* `families`: fresh problems of the pool's own generated families (seeds of their own, nothing shared with the held-out
  set or the pool), solved by a template; word problems by the chain of calculations that their generator gives.
* `pool`: the same for the pool's own problems; toy models memorise them.
* `gsm8k`: GSM8K's own solutions, whose calculator annotations become code steps.

A solution is kept only if its program runs in the sandbox and prints the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rstar.config import ProblemsSection, SandboxSection, WarmupSection
from rstar.grading import is_equivalent_fast
from rstar.problems import ProblemSet
from rstar.problems.generated import fresh
from rstar.problems.worked import Worked, worked_solution
from rstar.prompts import END_OF_ANSWER, END_OF_CODE, END_OF_STEP, parse, render, step_prompt
from rstar.sandbox import Sandbox
from rstar.types import ExecutionStatus, Problem, SftRow, Step, UserError

SOURCES = ("families", "pool", "gsm8k")


def warmup_rows(
    section: WarmupSection,
    problems: ProblemsSection,
    pool: ProblemSet,
    sandbox: SandboxSection,
    wrap: Callable[[str], str],
) -> list[SftRow]:
    """Training rows in the step format, in the order of their source. Raises UserError where none could be made."""
    match section.source:
        case "families":
            found = fresh(problems, section.families, train=pool.train, heldout=pool.heldout)
        case "pool":
            found = list(pool.train)
        case "gsm8k":
            found = _gsm8k(section, problems, pool)
        case other:
            raise UserError(f"warmup.source={other}", need=f"one of {', '.join(SOURCES)}")
    solved = [(problem, worked) for problem in found if (worked := worked_solution(problem)) is not None]
    rows = asyncio.run(_checked(solved, sandbox, wrap, section.rows))
    if not rows:
        raise UserError(
            f"no worked solution of warmup.source={section.source} runs and prints its answer",
            need="problems with a calculation in `solution`, or of a family with a template",
            how="see rstar/problems/worked.py for the families with templates",
        )
    return rows


def _gsm8k(section: WarmupSection, problems: ProblemsSection, pool: ProblemSet) -> list[Problem]:
    from rstar.problems import load_problems
    from rstar.problems.overlap import Overlap

    if not section.path or not Path(section.path).is_file():
        raise UserError(f"warmup.path={section.path!r} is no file", need="GSM8K's train.jsonl for warmup.source=gsm8k")
    clean = ProblemsSection(name="gsm8k", path=section.path, heldout=0, decontaminate=problems.decontaminate)
    overlap = Overlap("heldout", pool.heldout)
    return [problem for problem in load_problems(clean).train if not overlap.touches(problem.question)]


async def _checked(
    solved: Iterable[tuple[Problem, Worked]], section: SandboxSection, wrap: Callable[[str], str], limit: int
) -> list[SftRow]:
    async with Sandbox(section) as sandbox:
        session = sandbox.session()

        async def row(problem: Problem, worked: Worked) -> SftRow | None:
            steps = step_texts(worked)
            state, printed = session.root, ""
            for text in steps:
                step = parse(text)
                if not isinstance(step, Step) or step.code is None:
                    return None
                state, execution = await session.run(state, step.code)
                if execution.status is not ExecutionStatus.OK:
                    return None
                printed += execution.stdout
            return _row(problem, steps, printed, wrap) if is_equivalent_fast(printed.strip(), problem.answer) else None

        rows: list[SftRow] = []
        batch = 64
        pending = list(solved)
        for start in range(0, len(pending), batch):
            made = await asyncio.gather(*(row(*pair) for pair in pending[start : start + batch]))
            rows.extend(found for found in made if found is not None)
            if limit and len(rows) >= limit:
                return rows[:limit]
        return rows


def step_texts(worked: Worked) -> list[str]:
    """The solution as steps of the step format, the printing step last."""
    steps = [f"# Step {k}: {thought}\n{code}\n{END_OF_STEP}" for k, (thought, code) in enumerate(worked.steps, 1)]
    return [*steps, f"# Now print the final answer\nprint({worked.result})\n{END_OF_CODE}"]


def _row(problem: Problem, steps: Sequence[str], printed: str, wrap: Callable[[str], str]) -> SftRow:
    shown = printed.strip().removesuffix(".0")
    answer = f"The answer is \\boxed{{{shown}}}.{END_OF_ANSWER}"
    path = [*((text, "") for text in steps[:-1]), (steps[-1], printed), (answer, "")]
    prompt, rendered = step_prompt(wrap(problem.question)), render(path)
    return SftRow(
        prompt=prompt.text,
        completion="".join(text for text, _ in rendered),
        segments=rendered,
        problem_id=problem.id,
        tree_id=f"warmup/{problem.id}",
        node_ids=(),
        prompt_segments=prompt.segments,
    )
