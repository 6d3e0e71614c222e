"""The compile stage of Flow-DPO: a fresh base is fine-tuned on solutions of the same problems from three sources.

A judge model may compare the flow's solutions with the reference ones (section 4 of the paper).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rstar.config import (
    ClusterSection,
    EngineSection,
    ModelSection,
    ProblemsSection,
    SandboxSection,
    SearchSection,
    TrainSection,
)
from rstar.engines.base import Policy
from rstar.extract.sft import sft_rows
from rstar.problems import load_problems
from rstar.recipes.base_model import checkpoint
from rstar.recipes.evaluation import problem_trees, search_passes, write_evaluation
from rstar.recipes.flow_dpo.passes import flow_pass, measured_accuracy, search_job, single_pass
from rstar.recipes.flow_dpo.tables import accuracy_table
from rstar.recipes.rows import reference_rows
from rstar.recipes.training import fine_tune
from rstar.run import Artifact, Counts, Here
from rstar.store import read_json, read_lines, shards, write_rows
from rstar.tokens import question_wrapper
from rstar.types import PromptText, SamplingParams, SftRow, UserError

ARMS = ("reference", "self", "flow")
"""Where the solutions come from: the problems' own, the single model, the flow."""


@dataclass(frozen=True)
class CompileSection:
    """The comparison of training solutions."""

    problems: int = 1500  # of each arm
    samples: int = 8  # draws of the single model for the self-generated arm
    judge: EngineSection = field(default_factory=lambda: EngineSection(kind="openai"))
    judged: int = 0  # problems whose flow and reference solutions a judge compares; 0: no judge

    def judgement(self) -> CompileSection:
        """What the evaluation reads of the section; the other settings are at their defaults."""
        return CompileSection(judged=self.judged, judge=self.judge) if self.judged else CompileSection()


def write_solutions(
    here: Here,
    base: Artifact,
    adapters: Artifact,
    compile_samples: int,
    search: SearchSection,
    problems: ProblemsSection,
    model: ModelSection,
    engine: EngineSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """The single model's own solutions of the training problems, and the trained flow's."""
    folders = {name: here.round.path / name for name in ("self", "flow")}
    here.resume(*folders.values())
    pool = load_problems(problems).train
    mine = single_pass(search, folders["self"], graded=True, samples=compile_samples)
    job = search_job([mine], base, model, engine, sandbox)
    search_passes(job, [pool], cluster, "self-generated solutions")
    job = search_job([flow_pass(search, folders["flow"], graded=True)], base, model, engine, sandbox, adapters)
    search_passes(job, [pool], cluster, "the flow's solutions")
    solved = {}
    for name, folder in folders.items():
        here.outputs.extend(shards(folder))
        solved[name] = sum(any(tree.solved for tree in trees) for trees in problem_trees(folder))
    return {"problems": len(pool), "solved": solved}


def extract(
    here: Here,
    solutions: Artifact,
    base: Artifact,
    compile_problems: int,
    problems: ProblemsSection,
    model: ModelSection,
    search_form: str,
    sandbox: SandboxSection,
) -> Counts:
    """The rows of every arm: the same problems, a correct solution each (F10)."""
    pool, wrap = load_problems(problems).train, question_wrapper(checkpoint(base, model), model)
    rows = {"reference": reference_rows(pool, search_form, sandbox, wrap)}
    for arm in ("self", "flow"):
        rows[arm] = [row for trees in problem_trees(solutions.folder / arm) for row in sft_rows(trees, top=1)]
        if search_form == "text":  # the model that is fine-tuned writes a solution in one go, without borders
            rows[arm] = [replace(row, segments=((row.completion, True),)) for row in rows[arm]]
    arms = {arm: {row.problem_id: row for row in rows[arm]} for arm in ARMS}
    shared = [p.id for p in pool if all(p.id in one for one in arms.values())][:compile_problems]
    if not shared:
        raise UserError("no problem has a correct solution of every arm", need="one", how="more problems or samples")
    if len(shared) < compile_problems:
        few = f"{len(shared)} of the {compile_problems} problems that compile.problems asks for"
        print(f"compile: {few} have a correct solution of every arm", flush=True)
    for arm, one in arms.items():
        write_rows(here.output(f"{arm}.jsonl"), [one[key] for key in shared])
    return {"rows": len(shared), "solutions": {arm: len(one) for arm, one in arms.items()}}


def train_policy(
    here: Here, arm: str, sft: TrainSection, rows: Artifact, base: Artifact, model: ModelSection, run_seed: int
) -> Counts:
    """A fresh base fine-tuned on one arm's rows, LoRA merged."""
    file, output = rows.folder / f"{arm}.jsonl", here.output(f"policy-{arm}")
    return fine_tune(file, checkpoint(base, model), output, sft, run_seed, f"fine-tuning on {arm} solutions")


def evaluate_arms(
    here: Here,
    policies: tuple[Artifact, ...],
    rows: Artifact,
    untrained: Artifact,
    compile: CompileSection,
    search: SearchSection,
    problems: ProblemsSection,
    model: ModelSection,
    engine: EngineSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """The models of the arms (in the order of ARMS) on the held-out problems, beside the base without fine-tuning; a
    judge's opinion of the flow's solutions where one is asked for."""
    here.resume(here.round.eval)
    heldout, methods = load_problems(problems).heldout, dict[str, Any]()
    folders = [here.round.eval / arm for arm in ARMS]
    for arm, policy, folder in zip(ARMS, policies, folders, strict=True):
        job = search_job([single_pass(search, folder)], policy, model, engine, sandbox)
        search_passes(job, [heldout], cluster, f"fine-tuned on {arm} solutions")
        methods[f"SFT on {arm}"] = measured_accuracy(folder, sandbox)
    before = read_json(untrained.path)["methods"]["greedy"]
    n = len(read_lines(rows.path))
    note = f"one greedy solution of the single model, fine-tuned on {n} solutions of the same problems"
    tables = [accuracy_table("Compiled models", {"no fine-tuning": before, **methods}, note)]
    if compile.judged:
        verdicts = asyncio.run(_judged(compile, rows.folder, problems))
        heads = ["flow solutions against reference solutions", *verdicts]
        row = ["problems", *map(str, verdicts.values())]
        tables.append({"title": "Judge, both orders", "heads": heads, "rows": [row]})
    return write_evaluation(here, methods, folders, tables=tables)


# -- the judge ---------------------------------------------------------------------------------------------------------

JUDGE_PROMPT = """Two students solved the same mathematical problem.

Problem:
{question}

Solution A:
{first}

Solution B:
{second}

Which solution is better: correct, clearly explained, every step justified? Compare them briefly, then close with a line
"Verdict: A" or "Verdict: B", or "Verdict: tie" where neither is better.
"""
_VERDICT = re.compile(r"verdict:?[\s*]*(a|b|tie)\b", re.IGNORECASE)


async def _judged(section: CompileSection, folder: Path, problems: ProblemsSection) -> dict[str, int]:
    """Won, lost and tied comparisons of the flow's solutions with the reference ones, of rows in a folder."""
    from rstar.engines.build import build_policy
    from rstar.training.data import read_rows

    questions = {problem.id: problem.question for problem in load_problems(problems).train}
    ours, theirs = (read_rows(folder / f"{arm}.jsonl", SftRow)[: section.judged] for arm in ("flow", "reference"))
    duels = [(questions[a.problem_id], a.completion, b.completion) for a, b in zip(ours, theirs, strict=True)]
    policy = build_policy(section.judge, "")
    try:
        return await judge(policy, duels)
    finally:
        await policy.close()


async def judge(policy: Policy, duels: Sequence[tuple[str, str, str]]) -> dict[str, int]:
    """Judge each (question, ours, theirs) in both orders: how often ours won, lost, and tied.

    A win counts where both orders agree: a judge that prefers what comes first, or gives no verdict, gives a tie.
    """
    params = SamplingParams(temperature=0.0, max_tokens=512)

    async def better(question: str, first: str, second: str) -> str:
        text = JUDGE_PROMPT.format(question=question, first=first, second=second)
        (said,) = await policy.generate(PromptText((text,)), params)
        verdicts = _VERDICT.findall(said.text)
        return verdicts[-1].lower() if verdicts else "tie"

    async def duel(question: str, ours: str, theirs: str) -> str:
        verdicts = await asyncio.gather(better(question, ours, theirs), better(question, theirs, ours))
        return {("a", "b"): "won", ("b", "a"): "lost"}.get((verdicts[0], verdicts[1]), "tied")

    found = await asyncio.gather(*(duel(*one) for one in duels))
    return {word: found.count(word) for word in ("won", "lost", "tied")}
