"""Orca 2 (arXiv 2311.11045): teach a small model which way of reasoning suits a task, with the instruction erased.

Round 0 measures the base. Round 1 trains the first two progressive stages (targets of the data itself, then a weaker
teacher's explanations under general system messages), chooses a strategy for every sub-category (a problem's level) on
a development slice, lets the teacher answer with it, and trains and measures the last stage's model: the arm `erased`,
whose rows carry one cautious system message. Each further round is another arm on the same answers, the ablation that
the paper lacks: rounds.r2.orca.arm=visible (the instruction stays), rounds.r3.orca.arm=plain (a teacher without one).

Choices where the paper is silent, and deviations from it, each with its switch:

O1  a strategy is chosen by its accuracy on the first orca.development training problems of a sub-category, which are
    trained on as well: the teacher's, or with orca.student the mean of the teacher's and of the student's before the
    last stage. Ties go to the shorter instruction. The paper's instructions were written and assigned by hand.
O2  orca.only_correct=true keeps right answers only; the paper states no such filter (false).
O3  the arms hold the same problems: those for which both the strategies and the plain teacher gave a usable answer.
    The plain teacher is told the cautious message only.
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
O11 which strategy an answer shows is told by the patterns of the strategies file, and compared with the chosen one.
O12 teachers answer greedily; the paper does not say. No switch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rstar.config import ProblemsSection, for_round, to_dict
from rstar.extract.explanations import Explanation, ExplanationRow, explanation_row, few_shot_rows
from rstar.machine import check_peft
from rstar.manifest import RoundDir, RunDir, Stage, StageResult, input_digest, run_dir
from rstar.problems import ProblemSet, load_problems
from rstar.problems.overlap import text_key
from rstar.problems.worked import solution_text
from rstar.recipes.base_model import base_model, check_base
from rstar.recipes.measuring import tree_counts
from rstar.recipes.orca2_figures import by_strategy, finished, heldout_problems, measured
from rstar.recipes.orca2_parts import (
    ARMS,
    Config,
    TeacherSection,
    Told,
    answers,
    ask,
    by_task,
    shards_below,
    teacher_settings,
    tree_share,
)
from rstar.recipes.starting import seed_of
from rstar.recipes.strategies import Strategies, choose, load_strategies
from rstar.recipes.training import fine_tune
from rstar.store import read_json, write_json, write_rows
from rstar.tokens import load_tokenizer, wrap_question
from rstar.types import Problem, UserError

__all__ = ["Config", "check", "progression", "stages"]


def stages(config: Config, number: int) -> list[Stage]:
    """The stages of round `number` in order."""
    run, config = run_dir(config.run), for_round(config, number)
    if number == 0:
        return [_base_stage(config, run), _eval_stage(config, run, 0)]
    before: list[Stage] = []
    if number == 1:
        if config.flan.epochs:
            before += [_flan_stage(config, run), _train_stage(config, run, "flan")]
        if config.weaker.epochs:
            before += [_weaker_stage(config, run), _train_stage(config, run, "weaker")]
        before += [_select_stage(config, run), _answers_stage(config, run)]
    arm = [_extract_stage(config, run, number), _train_stage(config, run, "policy", number)]
    return [*before, *arm, _eval_stage(config, run, number)]


def check_settings(config: Config) -> None:
    """What `check` finds in the settings alone, without a file. Raises UserError."""
    for number in range(1, config.run.rounds + 1):
        if (arm := for_round(config, number).orca.arm) not in ARMS:
            raise UserError(f"orca.arm={arm}", need=", ".join(ARMS))
    if config.search.method != "sample" or config.search.seeds != [0] or config.search.form == "steps":
        raise UserError("search.method, search.form or search.seeds", need="sample, stated (or text), [0]")
    for name, one in (("teacher", config.teacher), ("weaker_teacher", config.weaker_teacher)):
        asked = name == "teacher" or config.weaker.epochs
        if asked and one.engine.kind == "openai" and not (one.engine.url and one.engine.model):
            raise UserError(
                f"{name}.engine.url={one.engine.url} {name}.engine.model={one.engine.model}",
                need="the address and the model of a server",
                how=f"set both, or {name}.engine=hf",
            )


def check(config: Config) -> ProblemSet:
    """Find every mistake that can be found before a model is loaded. Raises UserError; returns the problems."""
    check_settings(config)
    problems, strategies = load_problems(config.problems), load_strategies(config.orca.strategies)
    if not problems.heldout:
        raise UserError("no held-out problems", need="problems.heldout or problems.heldout_path")
    for task in {problem.level for problem in problems.train}:
        strategies.candidates(task)
    if config.weaker.epochs and not strategies.messages:
        raise UserError(f"{config.orca.strategies} has no messages", need="some, or weaker.epochs=0")
    heldout_problems(config.eval.benchmarks, problems, config.eval.problems)
    if config.sft.lora_rank:
        check_peft()
    check_base(config)
    return problems


def progression(config: Config) -> list[tuple[str, float]]:
    """The progressive stages that are trained, in order, with their epochs: the paper's are 1, 3 and 4."""
    steps = [("flan", config.flan.epochs), ("weaker", config.weaker.epochs), ("policy", config.sft.epochs)]
    return [(name, epochs) for name, epochs in steps if epochs]


# -- models ----------------------------------------------------------------------------------------------------------


def _base_stage(config: Config, run: RunDir) -> Stage:
    def work() -> StageResult:
        return StageResult((), {"base": base_model(config.model, run.path, seed=config.run.seed)})

    return Stage(run.round(0), "base", {"model": to_dict(config.model)}, dict, work)


def _model(config: Config, run: RunDir, name: str, number: int = 1) -> tuple[RoundDir, str, str]:
    """(round, stage, folder or hub id) of the model that the stage `name` makes, or of the base."""
    if name == "base":
        return run.round(0), "base", base_model(config.model, run.path, seed=config.run.seed)
    here = run.round(number)
    return here, name, str(here.path / name)


def _start(config: Config, run: RunDir, name: str) -> tuple[RoundDir, str, str]:
    """The model whose weights the stage `name` goes on from."""
    names = ["base", *(one for one, _ in progression(config))]
    return _model(config, run, names[names.index(name) - 1])


def _train_stage(config: Config, run: RunDir, name: str, number: int = 1) -> Stage:
    here, section = run.round(number), replace(config.sft, epochs=dict(progression(config))[name])
    start_round, start_stage, start = _start(config, run, name)
    rows_stage = "extract" if name == "policy" else f"{name}-rows"

    def work() -> StageResult:
        output, title = here.path / name, f"round {number} {name}, {section.epochs:g} epochs"
        result = fine_tune(_rows(here, name), start, output, section, config.run.seed, title)
        return StageResult((output,), {"start": start, "epochs": section.epochs, **result})

    def inputs() -> dict[str, str]:
        return {"rows": input_digest(here, rows_stage), "start": input_digest(start_round, start_stage)}

    return Stage(here, name, {"sft": to_dict(section), "run": seed_of(config.run)}, inputs, work)


def _rows(here: RoundDir, name: str) -> Path:
    return here.sft if name == "policy" else here.path / f"{name}.jsonl"


def _wrap(config: Config, run: RunDir) -> Callable[[str, str, Sequence[tuple[str, str]]], str]:
    tokenizer = load_tokenizer(base_model(config.model, run.path, seed=config.run.seed))
    return lambda system, question, turns: wrap_question(
        tokenizer, question, template=config.model.template, system=system, few_shot=turns
    )


# -- rows of the first stages ----------------------------------------------------------------------------------------


def pool(config: Config, section: ProblemsSection) -> list[Problem]:
    """A stage's training problems, without those of the held-out set."""
    held = {text_key(problem.question) for problem in load_problems(config.problems).heldout}
    return [problem for problem in load_problems(section).train if text_key(problem.question) not in held]


def _target(problem: Problem) -> str:
    """The data's own answer, with its worked solution where it brings one along."""
    return solution_text(problem) if problem.solution else f"#### {problem.answer}"


def _flan_stage(config: Config, run: RunDir) -> Stage:
    here, settings = run.round(1), {"model": to_dict(config.model), "flan": to_dict(config.flan.problems)}

    def work() -> StageResult:
        wrap = _wrap(config, run)
        found = (
            Explanation(p.level, "", p.question, _target(p), p.id, f"flan/{p.id}", 0)
            for p in pool(config, config.flan.problems)
        )
        count = write_rows(_rows(here, "flan"), (explanation_row(one, wrap, system="") for one in found))
        return StageResult((_rows(here, "flan"),), {"rows": count})

    return Stage(here, "flan-rows", settings, lambda: {"base": input_digest(run.round(0), "base")}, work)


def _weaker_stage(config: Config, run: RunDir) -> Stage:
    """Explanation tuning: every problem under each of the general system messages, which stay in the rows."""
    here, messages = run.round(1), load_strategies(config.orca.strategies).messages
    settings = teacher_settings(
        config, config.weaker_teacher, messages=dict(messages), only_correct=config.orca.only_correct
    )
    settings |= {"weaker": to_dict(config.weaker.problems), "model": to_dict(config.model)}

    def work() -> StageResult:
        problems, folder = pool(config, config.weaker.problems), here.path / "weaker-answers"
        told = [(folder / name, text, problems) for name, text in messages.items()]
        ask(config, config.weaker_teacher, "", told, "weaker teacher")
        wrap, found = _wrap(config, run), answers(config, here.path, folder.name)
        rows = (explanation_row(one, wrap, system=None) for one in found)
        count = write_rows(_rows(here, "weaker"), rows)
        return StageResult((_rows(here, "weaker"), *shards_below(folder)), {"rows": count, "problems": len(problems)})

    return Stage(
        here, "weaker-rows", settings, lambda: {"base": input_digest(run.round(0), "base")}, work, resumes=True,
        trees=(here.path / "weaker-answers",),
    )  # fmt: skip


# -- strategies ------------------------------------------------------------------------------------------------------


def _select_stage(config: Config, run: RunDir) -> Stage:
    here, strategies = run.round(1), load_strategies(config.orca.strategies)
    start_round, start_stage, start = _start(config, run, "policy")
    read = {"tasks": _plain(strategies), "student": config.orca.student, "development": config.orca.development}
    settings = teacher_settings(config, config.teacher, **read) | {"problems": to_dict(config.problems)}

    def work() -> StageResult:
        told: dict[str, list[Told]] = {"teacher": [], "student": []}
        for task, problems in by_task(load_problems(config.problems).train).items():
            for name, text in strategies.candidates(task).items():
                for who, one in told.items():
                    one.append((here.path / "select" / who / task / name, text, problems[: config.orca.development]))
        ask(config, config.teacher, "", told["teacher"], "choosing, teacher")
        asked = ["teacher"]
        if config.orca.student:
            student = TeacherSection(config.engine, config.model)
            ask(config, student, start, told["student"], "choosing, student")
            asked.append("student")
        chosen: dict[str, Any] = {}
        for task in by_task(load_problems(config.problems).train):
            texts = strategies.candidates(task)
            figures = {
                name: {who: tree_share(here.path / "select" / who / task / name) for who in asked} for name in texts
            }
            best = choose({name: sum(one.values()) / len(one) for name, one in figures.items()}, texts)
            chosen[task] = {"strategy": best, "instruction": texts[best], "figures": figures}
        write_json(_choice(run), chosen)
        counts = {task: {k: one[k] for k in ("strategy", "figures")} for task, one in chosen.items()}
        return StageResult((_choice(run), *shards_below(here.path / "select")), counts)

    def inputs() -> dict[str, str]:
        return {"student": input_digest(start_round, start_stage)} if config.orca.student else {}

    return Stage(here, "select", settings, inputs, work, resumes=True, trees=(here.path / "select",))


def _choice(run: RunDir) -> Path:
    return run.round(1).path / "choice.json"


def _plain(strategies: Strategies) -> dict[str, dict[str, str]]:
    return {task: dict(texts) for task, texts in strategies.tasks.items()}


def _answers_stage(config: Config, run: RunDir) -> Stage:
    here = run.round(1)
    settings = teacher_settings(config, config.teacher, cautious=config.orca.cautious)
    settings |= {"problems": to_dict(config.problems)}

    def work() -> StageResult:
        problems, chosen = load_problems(config.problems).train, read_json(_choice(run))
        folder = here.path / "answers"
        told = [
            (folder / "chosen" / task, str(chosen[task]["instruction"]), group)
            for task, group in by_task(problems).items()
        ]
        told.append((folder / "plain", config.orca.cautious, list(problems)))
        ask(config, config.teacher, "", told, "teacher")
        counts = {str(path.relative_to(folder)): tree_counts(group, path) for path, _, group in told}
        return StageResult(tuple(shards_below(here.path / "answers")), counts)

    return Stage(
        here, "answers", settings, lambda: {"choice": input_digest(here, "select")}, work, resumes=True,
        trees=(here.path / "answers",),
    )  # fmt: skip


def _extract_stage(config: Config, run: RunDir, number: int) -> Stage:
    here, orca, source = run.round(number), config.orca, run.round(1)
    settings = {"model": to_dict(config.model), "orca": {k: v for k, v in to_dict(orca).items() if k in _READ_BY_ROWS}}
    settings["run"] = seed_of(config.run)

    def work() -> StageResult:
        plain = {one.problem_id: one for one in answers(config, source.path, "answers/plain")}
        both = [one for one in answers(config, source.path, "answers/chosen") if one.problem_id in plain]
        found = [plain[one.problem_id] for one in both] if orca.arm == "plain" else both
        system, wrap = None if orca.arm == "visible" else orca.cautious, _wrap(config, run)
        rows: list[ExplanationRow] = [explanation_row(one, wrap, system=system) for one in found]
        shown = few_shot_rows(found, wrap, system=system, share=orca.few_shot, seed=config.run.seed)
        write_rows(here.sft, [*rows, *shown])
        shows = by_strategy(found, load_strategies(orca.strategies).evidence)
        counts = {"sft_rows": len(rows) + len(shown), "few_shot": len(shown), "answers": shows}
        return StageResult((here.sft,), counts)

    return Stage(here, "extract", settings, lambda: {"answers": input_digest(source, "answers")}, work)


_READ_BY_ROWS = ("arm", "cautious", "only_correct", "few_shot")


# -- measuring -------------------------------------------------------------------------------------------------------


def _eval_stage(config: Config, run: RunDir, number: int) -> Stage:
    here = run.round(number)
    round_dir, stage, model = _model(config, run, "policy" if number else "base", number)
    settings = {
        "eval": to_dict(config.eval), "problems": to_dict(config.problems), "model": to_dict(config.model),
        "search": to_dict(config.search), "orca": {"cautious": config.orca.cautious},
    }  # fmt: skip

    def work() -> StageResult:
        problems = heldout_problems(config.eval.benchmarks, load_problems(config.problems), config.eval.problems)
        greedy = replace(config, search=replace(config.search, temperature=0.0))
        told = [(here.eval / n, text, problems) for n, text in (("greedy", ""), ("cautious", config.orca.cautious))]
        student = TeacherSection(config.engine, config.model)
        ask(greedy, student, model, told, f"round {number} evaluation", graded=False)
        chosen = {task: one["strategy"] for task, one in read_json(_choice(run)).items()} if number else {}
        evidence = load_strategies(config.orca.strategies).evidence
        methods = {folder.name: measured(folder, config.sandbox, chosen, evidence) for folder, _, _ in told}
        first = run.round(1).eval_json if number > 1 else None
        name = f"{config.orca.arm} rows" if number else "the base"
        return finished(here, methods, first, name, shards_below(here.eval))

    return Stage(
        here, "eval", settings, lambda: {"model": input_digest(round_dir, stage)}, work, resumes=True,
        trees=(here.eval,),
    )  # fmt: skip
