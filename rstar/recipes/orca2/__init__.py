"""Orca 2 (arXiv 2311.11045): teach a small model which way of reasoning suits a task, with the instruction erased.

Round 0 measures the base. Round 1 trains the first two progressive stages (targets of the data itself, then a weaker
teacher's explanations under general system messages), chooses a strategy for every sub-category (a problem's category;
its level where the data has none) on a development slice, lets the teacher answer with it, and trains and measures the
last stage's model: the arm `erased`, whose rows carry one cautious system message. Each further round is another arm on
the same answers, the ablation that the paper lacks: rounds.r2.orca.arm=visible (the instruction stays),
rounds.r3.orca.arm=plain (a teacher without one).

Choices where the paper is silent, and deviations from it, each with its switch:

O1  a strategy is chosen by its accuracy on the first orca.development training problems of a sub-category, which are
    trained on as well: the teacher's, or with orca.student the mean of the teacher's and of the student's before the
    last stage. Ties go to the shorter instruction. The paper's instructions were written and assigned by hand.
O2  orca.only_correct=true keeps right answers only; the paper states no such filter (false).
O3  the arms hold the same problems: those for which both the strategies and the plain teacher gave a usable answer.
    The plain teacher gets the cautious message only.
O4  the cautious message is our own text (orca.cautious). Where a chat template puts in a message of its own for an
    empty one (SmolLM2's does), that is what "empty" means in training and evaluation.
O5  few-shot rows are earlier turns of the chat, all under the same system message; orca.few_shot of them per answer.
O6  the loss is on the teacher's tokens and the end token after them. No switch.
O7  packing in the order of the shuffled rows (sft.in_order) up to sft.micro_batch_tokens, without padding, and
    attention stays within a row; the paper pads and does not say what attention sees. A batch is counted in rows.
O8  each progressive stage starts a fresh optimizer and schedule from the weights of the one before. Rates, batch and
    schedule are those of sft; the paper reports none. Base vocabulary and chat template stay (no ChatML is added).
O9  the stages' data are one pool each (flan, weaker, problems); the 4-epoch stage has no second teacher's million.
    Targets of flan are the data's answers as "#### ANSWER", after its solution where it has one. Training problems of
    the first two stages with the text of a held-out one are left out.
O10 answers are read by rstar.grading.extract_answer (boxed, ####, "answer is") and compared by value, the same for all
    models; the format-OK rate is the share that states one. The macro mean weighs every sub-category the same.
O11 which strategy an answer shows is decided by the patterns of the strategies file, and compared with the chosen one.
O12 teachers answer greedily; the paper does not say: search.temperature. The student is always measured greedily.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from rstar.config import (
    INPUT,
    ClusterSection,
    EngineSection,
    ModelSection,
    ProblemsSection,
    RunSection,
    SandboxSection,
    SearchSection,
    TrainSection,
    for_round,
)
from rstar.extract.explanations import Explanation, Wrap, explanation_row, few_shot_rows, sub_category
from rstar.machine import check_peft
from rstar.problems import ProblemSet, load_problems
from rstar.problems.overlap import text_key
from rstar.problems.worked import solution_text
from rstar.recipes.base_model import base_model, check_base, checkpoint
from rstar.recipes.evaluation import tree_counts, write_evaluation
from rstar.recipes.orca2.evaluation import comparison_table, count_strategies, heldout_problems, measured, task_table
from rstar.recipes.orca2.strategies import choose, load_strategies, strategy_of
from rstar.recipes.orca2.teacher import AnswerSet, TeacherSection, ask, explanations, shards_below, share_solved
from rstar.recipes.training import check_loads_checkpoints, fine_tune
from rstar.run import Artifact, Counts, Here, Recipe, Run
from rstar.store import read_json, write_json, write_rows
from rstar.tokens import load_tokenizer, wrap_question
from rstar.types import Problem, UserError

ARMS = ("erased", "visible", "plain")
CAUTIOUS = "You are a careful assistant. Think about which way of working suits the question, then answer it."


@dataclass(frozen=True)
class ProgressSection:
    """A progressive stage before the last one."""

    epochs: float = 1.0  # 0 leaves the stage out
    problems: ProblemsSection = field(default_factory=ProblemsSection)


@dataclass(frozen=True)
class OrcaSection:
    """Strategies, and which rows are made of the teacher's answers."""

    strategies: str = field(default="configs/orca2/strategies.yaml", metadata=INPUT)
    cautious: str = CAUTIOUS  # the system message of every erased row
    arm: str = "erased"  # erased, visible, plain
    development: int = 16  # training problems of a sub-category that strategies are chosen on
    student: bool = True  # the choice counts the student's accuracy as well
    only_correct: bool = True
    few_shot: float = 0.1  # few-shot rows per answer

    def only(self, *names: str) -> OrcaSection:
        """The section for a stage that reads these settings; the others are at their defaults, and name no file."""
        return replace(OrcaSection(strategies=""), **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class MeasureSection:
    """What is measured beside the held-out problems."""

    problems: int = 0  # use the first N held-out problems; 0: all
    benchmarks: dict[str, str] = field(default_factory=dict, metadata=INPUT)  # name -> local file, or "" for the hub


@dataclass(frozen=True)
class Config:
    """Everything a run of this recipe reads. `rounds` holds the arms."""

    recipe: str = "orca2"
    run: RunSection = field(default_factory=lambda: RunSection(rounds=3))
    cluster: ClusterSection = field(default_factory=ClusterSection)
    model: ModelSection = field(default_factory=ModelSection)
    engine: EngineSection = field(default_factory=EngineSection)
    sandbox: SandboxSection = field(default_factory=SandboxSection)
    problems: ProblemsSection = field(default_factory=ProblemsSection)
    flan: ProgressSection = field(default_factory=lambda: ProgressSection(1.0, ProblemsSection(name="flan", heldout=0)))
    weaker: ProgressSection = field(default_factory=lambda: ProgressSection(3.0))
    weaker_teacher: TeacherSection = field(default_factory=TeacherSection)
    teacher: TeacherSection = field(default_factory=TeacherSection)
    search: SearchSection = field(
        default_factory=lambda: SearchSection(
            method="sample", form="stated", rollouts=1, temperature=0.0, max_step_tokens=1024
        )
    )
    orca: OrcaSection = field(default_factory=OrcaSection)
    sft: TrainSection = field(default_factory=lambda: TrainSection(epochs=4, in_order=True, tree_packing=False))
    eval: MeasureSection = field(default_factory=MeasureSection)
    rounds: dict[str, Any] = field(
        default_factory=lambda: {"r2": {"orca": {"arm": "visible"}}, "r3": {"orca": {"arm": "plain"}}}
    )


def orca2(run: Run, config: Config) -> None:
    """Two progressive stages and the teacher's answers, made once; then the last stage, a round for every arm."""
    c = for_round(config, 0)
    start = run.round(0, c)
    base = start.stage(prepare_base, c.model, c.run.seed, name="base")
    read, where = c.orca.only("strategies", "cautious"), (c.sandbox, c.cluster)
    start.stage(
        evaluate, base, None, None, c.eval, read, greedy(c.search), c.problems, c.model, c.engine, *where, name="eval"
    )
    student, first = base, None
    for rnd, c in run.rounds(config):
        orca, where = c.orca, (c.sandbox, c.cluster)
        if rnd.number == 1:
            search, sft = answering(c.search), replace(c.sft, epochs=0)  # these stages have epochs of their own
            if c.flan.epochs:
                data = ProgressSection(problems=c.flan.problems)
                rows = rnd.stage(flan_rows, data, c.problems, c.model, base, name="flan-rows")
                trained = (sft, c.flan.epochs, rows, student, c.model, c.run.seed)
                student = rnd.stage(train_flan, *trained, name="flan")
            if c.weaker.epochs:
                data, read = ProgressSection(problems=c.weaker.problems), orca.only("strategies", "only_correct")
                rows = rnd.stage(
                    weaker_rows, data, c.problems, read, c.weaker_teacher, search, c.model, base, *where,
                    name="weaker-rows",
                )  # fmt: skip
                trained = (sft, c.weaker.epochs, rows, student, c.model, c.run.seed)
                student = rnd.stage(train_weaker, *trained, name="weaker")
            judged = (student, c.model, c.engine) if orca.student else (None, ModelSection(), EngineSection())
            read = orca.only("strategies", "development", "student")
            choice = rnd.stage(select, read, c.teacher, search, c.problems, *judged, *where)
            answered = rnd.stage(answers, orca.only("cautious"), choice, c.teacher, search, c.problems, *where)
        read = orca.only("strategies", "cautious", "arm", "only_correct", "few_shot")
        rows = rnd.stage(extract, read, answered, c.model, base, c.run.seed)
        policy = rnd.stage(train, c.sft, rows, student, c.model, c.run.seed, name="policy")
        read = orca.only("strategies", "cautious", "arm")
        result = rnd.stage(
            evaluate, policy, choice, first, c.eval, read, greedy(c.search), c.problems, c.model, c.engine, *where,
            name="eval",
        )  # fmt: skip
        first = first or result


def answering(search: SearchSection) -> SearchSection:
    """How a question is answered once. Settings that plain sampling does not read are at their defaults."""
    names = ("form", "temperature", "top_p", "max_depth", "max_step_tokens", "calculator", "trees_in_flight")
    return SearchSection(method="sample", rollouts=1, **{name: getattr(search, name) for name in names})


def greedy(search: SearchSection) -> SearchSection:
    """How a student's question is answered in an evaluation."""
    return replace(answering(search), temperature=0.0)


# -- models ------------------------------------------------------------------------------------------------------------


def prepare_base(here: Here, model: ModelSection, run_seed: int) -> Counts:
    """The model that the first progressive stage starts from, as it is."""
    return {"base": base_model(model, here.round.root, seed=run_seed)}


def train(here: Here, sft: TrainSection, rows: Artifact, start: Artifact, model: ModelSection, run_seed: int) -> Counts:
    """A progressive stage: go on from the weights of `start` with an optimizer and a schedule of its own (O8)."""
    weights, title = checkpoint(start, model), f"{here.title}, {sft.epochs:g} epochs"
    result = fine_tune(rows.path, weights, here.output(here.stage), sft, run_seed, title)
    return {"start": weights, "epochs": sft.epochs, **result}


def train_flan(
    here: Here, sft: TrainSection, flan_epochs: float, rows: Artifact, start: Artifact, model: ModelSection,
    run_seed: int,
) -> Counts:  # fmt: skip
    """The first progressive stage, on targets of the data itself."""
    return train(here, replace(sft, epochs=flan_epochs), rows, start, model, run_seed)


def train_weaker(
    here: Here, sft: TrainSection, weaker_epochs: float, rows: Artifact, start: Artifact, model: ModelSection,
    run_seed: int,
) -> Counts:  # fmt: skip
    """The second progressive stage, on a weaker teacher's explanations."""
    return train(here, replace(sft, epochs=weaker_epochs), rows, start, model, run_seed)


# -- rows of the first stages ------------------------------------------------------------------------------------------


def flan_rows(
    here: Here, flan: ProgressSection, problems: ProblemsSection, model: ModelSection, base: Artifact
) -> Counts:
    """Rows whose targets are the data's own answers, without a system message."""
    prompt = prompt_builder(base, model)
    targets = (
        Explanation(sub_category(p), "", p.question, _target(p), p.id, f"flan/{p.id}", 0)
        for p in pool(flan.problems, problems)
    )
    return {"rows": write_rows(here.output("flan.jsonl"), (explanation_row(one, prompt, system="") for one in targets))}


def _target(problem: Problem) -> str:
    """The data's own answer, with its worked solution where it has one (O9)."""
    return solution_text(problem) if problem.solution else f"#### {problem.answer}"


def weaker_rows(
    here: Here,
    weaker: ProgressSection,
    problems: ProblemsSection,
    orca: OrcaSection,
    weaker_teacher: TeacherSection,
    search: SearchSection,
    model: ModelSection,
    base: Artifact,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """Explanation tuning: every problem under each of the general system messages, which stay in the rows."""
    output, folder = here.output("weaker.jsonl"), here.round.path / "weaker-answers"
    here.resume(folder)
    train, prompt = pool(weaker.problems, problems), prompt_builder(base, model)
    messages = load_strategies(orca.strategies).messages
    sets = [AnswerSet(folder / name, text, train) for name, text in messages.items()]
    ask(here, weaker_teacher, sets, search, sandbox, cluster, "weaker teacher")
    answered = explanations(here.round.path, folder.name, only_correct=orca.only_correct)
    count = write_rows(output, (explanation_row(one, prompt, system=None) for one in answered))
    here.outputs.extend(shards_below(folder))
    return {"rows": count, "problems": len(train)}


def pool(section: ProblemsSection, problems: ProblemsSection) -> list[Problem]:
    """The training problems of `section`, without those of the held-out set of `problems` (O9)."""
    heldout = {text_key(problem.question) for problem in load_problems(problems).heldout}
    return [problem for problem in load_problems(section).train if text_key(problem.question) not in heldout]


def prompt_builder(base: Artifact, model: ModelSection) -> Wrap:
    """How the student's prompts are worded: by the base model's chat template, or as model.template says."""
    tokenizer = load_tokenizer(checkpoint(base, model))
    return lambda system, question, turns: wrap_question(
        tokenizer, question, template=model.template, system=system, few_shot=turns
    )


# -- strategies and the teacher's answers ------------------------------------------------------------------------------


def select(
    here: Here,
    orca: OrcaSection,
    teacher: TeacherSection,
    search: SearchSection,
    problems: ProblemsSection,
    student: Artifact | None,
    model: ModelSection,
    engine: EngineSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """Choose a strategy for every sub-category by accuracy on its first training problems (O1).

    Without a `student`, `model` and `engine` are not read.
    """
    output, folder = here.output("choice.json"), here.round.path / "select"
    here.resume(folder)
    strategies, tasks = load_strategies(orca.strategies), by_task(load_problems(problems).train)
    candidates = {task: strategies.candidates(task) for task in tasks}
    asked = {"teacher": (teacher, "")}
    if student is not None:
        asked["student"] = (TeacherSection(engine, model), checkpoint(student, model))
    for who, (section, weights) in asked.items():
        sets = [
            AnswerSet(folder / who / folder_name(task) / name, text, tasks[task][: orca.development])
            for task, texts in candidates.items()
            for name, text in texts.items()
        ]
        ask(here, section, sets, search, sandbox, cluster, f"choosing, {who}", checkpoint=weights)
    choice: dict[str, dict[str, Any]] = {}
    for task, texts in candidates.items():
        figures = {
            name: {who: share_solved(folder / who / folder_name(task) / name) for who in asked} for name in texts
        }
        best = choose({name: fmean(shares.values()) for name, shares in figures.items()}, texts)
        choice[task] = {"strategy": best, "instruction": texts[best], "figures": figures}
    write_json(output, choice)
    here.outputs.extend(shards_below(folder))
    return {task: {key: one[key] for key in ("strategy", "figures")} for task, one in choice.items()}


def answers(
    here: Here,
    orca: OrcaSection,
    choice: Artifact,
    teacher: TeacherSection,
    search: SearchSection,
    problems: ProblemsSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """The teacher answers every training problem twice: with its sub-category's strategy, and without any (O3)."""
    folder = here.round.path / "answers"
    here.resume(folder)
    train, chosen = load_problems(problems).train, read_json(choice.path)
    sets = [
        AnswerSet(folder / "chosen" / folder_name(task), str(chosen[task]["instruction"]), group)
        for task, group in by_task(train).items()
    ]
    sets.append(AnswerSet(folder / "plain", orca.cautious, train))
    ask(here, teacher, sets, search, sandbox, cluster, "teacher")
    here.outputs.extend(shards_below(folder))
    return {str(one.folder.relative_to(folder)): tree_counts(one.problems, one.folder) for one in sets}


def by_task(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    """The problems of each sub-category, in order."""
    tasks: dict[str, list[Problem]] = {}
    for problem in problems:
        tasks.setdefault(sub_category(problem), []).append(problem)
    return tasks


def folder_name(task: str) -> str:
    """A sub-category as the name of one folder: the data may call it "algebra/linear" or ".."."""
    return re.sub(r"[%/\0]|^\.", lambda match: f"%{ord(match[0]):02X}", task)


def extract(
    here: Here, orca: OrcaSection, answers: Artifact, model: ModelSection, base: Artifact, run_seed: int
) -> Counts:
    """The rows of an arm, from the teacher's answers of round 1."""

    def usable(name: str) -> list[Explanation]:
        return list(explanations(answers.folder, f"answers/{name}", only_correct=orca.only_correct))

    plain = {one.problem_id: one for one in usable("plain")}
    chosen = [one for one in usable("chosen") if one.problem_id in plain]
    used = [plain[one.problem_id] for one in chosen] if orca.arm == "plain" else chosen
    system, prompt = None if orca.arm == "visible" else orca.cautious, prompt_builder(base, model)
    rows = [explanation_row(one, prompt, system=system) for one in used]
    shown = few_shot_rows(used, prompt, system=system, share=orca.few_shot, seed=run_seed)
    count = write_rows(here.output("sft.jsonl"), [*rows, *shown])
    evidence, shows = load_strategies(orca.strategies).evidence, dict[str, list[str]]()
    for one in used:
        shows.setdefault(one.task, []).append(strategy_of(one.answer, evidence))
    by_strategy = {task: count_strategies(names) for task, names in shows.items()}
    return {"sft_rows": count, "few_shot": len(shown), "answers": by_strategy}


# -- measuring ---------------------------------------------------------------------------------------------------------


def evaluate(
    here: Here,
    policy: Artifact,
    choice: Artifact | None,
    first: Artifact | None,
    eval: MeasureSection,
    orca: OrcaSection,
    search: SearchSection,
    problems: ProblemsSection,
    model: ModelSection,
    engine: EngineSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """Measure a student under the empty and the cautious system message, without the reference answers.

    Strategies are compared with the `choice`, answers with the evaluation of the `first` arm, where these are given.
    """
    folder, number = here.round.eval, here.round.number
    here.resume(folder)
    heldout = heldout_problems(eval.benchmarks, load_problems(problems), eval.problems)
    sets = [AnswerSet(folder / name, text, heldout) for name, text in (("greedy", ""), ("cautious", orca.cautious))]
    student, weights, title = TeacherSection(engine, model), checkpoint(policy, model), f"round {number} evaluation"
    ask(here, student, sets, search, sandbox, cluster, title, checkpoint=weights, graded=False)
    chosen = {task: one["strategy"] for task, one in read_json(choice.path).items()} if choice is not None else {}
    evidence = load_strategies(orca.strategies).evidence
    methods = {one.folder.name: measured(one.folder, sandbox, chosen, evidence) for one in sets}
    name = f"{orca.arm} rows" if number else "the base"
    tables = [task_table(method, one, name) for method, one in methods.items()]
    if first is not None:
        tables.append(comparison_table(methods, read_json(first.path)["methods"], name))
    return write_evaluation(here, methods, sorted(one.folder for one in sets), tables=tables)


# -- what can be checked before ----------------------------------------------------------------------------------------


def check_settings(config: Config) -> None:
    """What `check` finds in the settings alone, without a file. Raises UserError."""
    check_loads_checkpoints(config.engine)
    for number in range(1, config.run.rounds + 1):
        if (arm := for_round(config, number).orca.arm) not in ARMS:
            raise UserError(f"orca.arm={arm}", need=", ".join(ARMS))
    if config.search.method != "sample" or config.search.seeds != [0] or config.search.form == "steps":
        raise UserError("search.method, search.form or search.seeds", need="sample, stated (or text), [0]")
    for name, one in (("teacher", config.teacher), ("weaker_teacher", config.weaker_teacher)):
        if one.engine.kind == "openai" and (name == "teacher" or config.weaker.epochs):
            from rstar.engines.openai import check_server  # loads aiohttp, which only these teachers need

            check_server(one.engine, f"{name}.engine")


def check(config: Config) -> ProblemSet:
    """Find every mistake that can be found before a model is loaded. Raises UserError; returns the problems."""
    check_settings(config)
    problems, strategies = load_problems(config.problems), load_strategies(config.orca.strategies)
    if not problems.heldout:
        raise UserError("no held-out problems", need="problems.heldout or problems.heldout_path")
    for task in by_task(problems.train):
        strategies.candidates(task)
    if config.weaker.epochs and not strategies.messages:
        raise UserError(f"{config.orca.strategies} has no messages", need="some, or weaker.epochs=0")
    heldout_problems(config.eval.benchmarks, problems, config.eval.problems)
    if config.sft.lora_rank:
        check_peft()
    check_base(config.model, config.run)
    return problems


RECIPE = Recipe(orca2, Config, check, check_settings)
