"""Flow-DPO (arXiv 2410.22304): an Answer and a Stop model, LoRA adapters of one base, learn online from rollouts.

Round 0 measures the untrained flow and the single model, on the held-out problems and along the stream. Round 1 is the
stream: each problem is predicted, recorded, and learned from (flow_dpo.stream). Round 2, which run.rounds=1 leaves
out, is the compile stage: a fresh base is fine-tuned with LoRA on solutions of the same problems from three sources.

Choices where the paper is silent, and deviations from it, each with its switch:

F1  the Stop model's alternative at a node is the other word, and its pair the two words; the paper says only that both
    models take part. No switch. What is neither Yes nor No counts as No.
F2  a prediction is greedy, and it is the base chain itself; deviations are drawn at search.temperature=1, at most
    search.candidates tries until one differs: search.chain_temperature=1 samples the chain (and the prediction).
F3  after the last piece the Stop model is not asked: the answer so far counts. An empty piece ends the flow as well.
F4  the reference is the model without the adapter, as it was before the stream. No switch.
F5  a window of problems is searched with the same parameters, so that the engine is full: flow.window=1 is the paper's
    order. The record says how old the parameters of each prediction were. With flow.overlap they are older by a window.
F6  the learning rate is constant, the weight decay 0 (the paper names Adam and no schedule). Pairs that fill no batch
    at the end of the stream are not learned from.
F7  correct means the same value as the reference answer (rstar.grading), not the same text; no answer is wrong.
F8  with search.form=steps a piece is a code step, run when it is written; the answer step ends the flow, so the Stop
    model is asked before it only. text: pieces of words, search.max_step_tokens=160 each, search.max_depth=6 of them.
F9  with warmup.enabled (SmolLM2; off by default) the base is first fine-tuned on worked solutions, and on Yes after a
    whole one, No after a part of one: a 135M model can neither solve nor judge without.
F10 the three arms of the compile stage hold the problems for which each has a correct solution, the first
    compile.problems of them (fewer where there are no more: the stage says so); the self-generated ones are the first
    correct of compile.samples draws. The learning rate of the fine-tuning falls linearly: sft.schedule.
F11 Stop is asked one question, whether the solution is complete and right; the paper asks for both and quotes no words.
    No switch.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from rstar.config import (
    ClusterSection,
    DpoSection,
    EngineSection,
    ModelSection,
    ProblemsSection,
    RunSection,
    SandboxSection,
    SearchSection,
    TrainSection,
    WarmupSection,
    for_round,
)
from rstar.extract.flow_pairs import flow_pairs
from rstar.machine import check_peft
from rstar.problems import ProblemSet, load_problems
from rstar.problems.generated import fresh
from rstar.prompts import NO, STOP_SYSTEM, YES, split_stop_question, stop_asked
from rstar.recipes.base_model import check_base, checkpoint, start_model
from rstar.recipes.evaluation import search_passes, write_evaluation
from rstar.recipes.flow_dpo.compile import (
    ARMS,
    CompileSection,
    evaluate_arms,
    extract,
    train_policy,
    write_solutions,
)
from rstar.recipes.flow_dpo.passes import ROLES, flow_pass, measured_accuracy, search_job, single_pass, trees_of
from rstar.recipes.flow_dpo.stream import FlowSection, learn_stream, mean_staleness, read_stream
from rstar.recipes.flow_dpo.tables import accuracy_table, flow_table, margin_table, progressive_curve
from rstar.recipes.rows import reference_row, reference_rows
from rstar.recipes.training import fine_tune, warm_up_training
from rstar.run import Artifact, Counts, Here, Recipe, Run
from rstar.search.worker import SearchTask, check_search
from rstar.store import read_json, write_rows
from rstar.tokens import question_wrapper
from rstar.types import PreferenceRow, Problem, SftRow, UserError


@dataclass(frozen=True)
class Config:
    """Everything a run of this recipe reads."""

    recipe: str = "flow_dpo"
    run: RunSection = field(default_factory=lambda: RunSection(rounds=2))
    cluster: ClusterSection = field(default_factory=ClusterSection)
    model: ModelSection = field(default_factory=ModelSection)
    engine: EngineSection = field(default_factory=EngineSection)
    sandbox: SandboxSection = field(default_factory=SandboxSection)
    problems: ProblemsSection = field(default_factory=lambda: ProblemsSection(name="gsm8k"))
    warmup: WarmupSection = field(default_factory=WarmupSection)
    search: SearchSection = field(
        default_factory=lambda: SearchSection(
            method="flow", form="text", max_depth=6, max_step_tokens=160, candidates=4, temperature=1.0
        )
    )
    flow: FlowSection = field(default_factory=FlowSection)
    dpo: DpoSection = field(default_factory=DpoSection)
    compile: CompileSection = field(default_factory=CompileSection)
    sft: TrainSection = field(
        default_factory=lambda: TrainSection(
            epochs=3, learning_rate=2e-4, batch_size=16, warmup_ratio=0.1, weight_decay=0.0, lora_rank=16,
            lora_alpha=16, lora_dropout=0.05,
        )
    )  # fmt: skip
    rounds: dict[str, Any] = field(default_factory=dict)


def flow_dpo(run: Run, config: Config) -> None:
    """The untrained flow, the stream that it learns from, and models that are fine-tuned on what it has written."""
    c = for_round(config, 0)
    start = run.round(0, c)
    warm_up = replace(warm_up_training(c.sft, c.warmup), lora_rank=0, lora_alpha=0, lora_dropout=0.0)
    reads = (c.model, c.problems, c.warmup, warm_up, c.search.form, c.sandbox)
    base = start.stage(prepare_base, *reads, c.run.seed, name="base")
    untrained = start.stage(evaluate_untrained, base, *read_by_searches(c), c.cluster, name="eval")
    for rnd, c in run.rounds(config):
        searches = read_by_searches(c)
        if rnd.number == 1:
            adapters = rnd.stage(learn_stream, base, c.flow, c.dpo, *searches, c.run.seed, name="stream")
            rnd.stage(evaluate_trained, base, adapters, untrained, c.dpo, *searches, c.cluster, c.run.seed, name="eval")
        else:
            solutions = rnd.stage(
                write_solutions, base, adapters, c.compile.samples, *searches, c.cluster, name="solutions"
            )
            rows = rnd.stage(
                extract, solutions, base, c.compile.problems, c.problems, c.model, c.search.form, c.sandbox
            )
            policies = tuple(
                rnd.stage(train_policy, arm, c.sft, rows, base, c.model, c.run.seed, name=f"policy-{arm}")
                for arm in ARMS
            )
            judged = c.compile.judgement()
            rnd.stage(evaluate_arms, policies, rows, untrained, judged, *searches, c.cluster, name="eval")


def read_by_searches(c: Config) -> tuple[SearchSection, ProblemsSection, ModelSection, EngineSection, SandboxSection]:
    """The sections that every stage with a search reads. A flow has one rollout, whatever search.rollouts says."""
    return replace(c.search, rollouts=1), c.problems, c.model, c.engine, c.sandbox


# -- the stages of rounds 0 and 1; the others are in flow_dpo.stream and flow_dpo.compile ------------------------------


def prepare_base(
    here: Here,
    model: ModelSection,
    problems: ProblemsSection,
    warmup: WarmupSection,
    sft: TrainSection,
    search_form: str,
    sandbox: SandboxSection,
    run_seed: int,
) -> Counts:
    """The base of everything: the model as it is, or warmed up on worked solutions and on Yes and No (F9)."""
    if not warmup.enabled:
        return {"base": start_model(here, model, run_seed)}
    output, rows_file = here.output("policy"), here.round.path / "warmup.jsonl"
    start, pool = start_model(here, model, run_seed), load_problems(problems)
    asked = list(pool.train)
    if warmup.source == "families":
        asked = fresh(problems, warmup.families, train=pool.train, heldout=pool.heldout)
    asked = asked[: warmup.rows or None]
    rows = reference_rows(asked, search_form, sandbox, question_wrapper(start, model))
    by_id = {problem.id: problem for problem in asked}
    rows += [word for row in rows for word in stop_rows(start, model, row, by_id[row.problem_id])]
    write_rows(rows_file, rows)
    return {"base": start, **fine_tune(rows_file, start, output, sft, run_seed, "warm-up")}


def stop_rows(base: str, model: ModelSection, solution: SftRow, problem: Problem) -> list[SftRow]:
    """What a Stop model should say of the whole solution, and of a part of it."""
    wrap = question_wrapper(base, replace(model, system=STOP_SYSTEM, few_shot=""))
    borders, whole = split_stop_question(wrap, problem.question), [text for text, _ in solution.segments]
    draw = random.Random(problem.id)
    if len(whole) > 1:
        part = whole[: draw.randrange(1, len(whole))]
    else:
        part = [whole[0][: draw.randrange(1, max(2, len(whole[0]) - 1))]]
    return [reference_row(problem, stop_asked(borders, text), word) for text, word in ((whole, YES), (part, NO))]


def evaluate_untrained(
    here: Here,
    base: Artifact,
    search: SearchSection,
    problems: ProblemsSection,
    model: ModelSection,
    engine: EngineSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """The untrained flow and the single model, on the held-out problems and along the stream; and held-out pairs, by
    which the adapters are judged later."""
    here.resume(here.round.eval)
    pool, names = load_problems(problems), ("greedy", "flow", "stream-single", "stream-flow", "pairs")
    folders = {name: here.round.eval / name for name in names}
    passes = [
        single_pass(search, folders["greedy"]),
        flow_pass(search, folders["flow"]),
        single_pass(search, folders["stream-single"], graded=True),
        flow_pass(search, folders["stream-flow"], graded=True),
        SearchTask(folders["pairs"].resolve(), search),
    ]
    sets = [pool.train if name.startswith("stream") else pool.heldout for name in names]
    job = search_job(passes, base, model, engine, sandbox)
    search_passes(job, sets, cluster, "untrained flow and single model")
    flows = trees_of(folders["pairs"])
    methods = {name: measured_accuracy(folders[name], sandbox) for name in ("greedy", "flow")}
    counts = write_evaluation(here, methods, folders.values(), tables=[flow_table({"untrained flow": flows})])
    write_rows(here.output("pairs.jsonl"), (row for tree in flows for row in flow_pairs(tree)))
    return counts


def evaluate_trained(
    here: Here,
    base: Artifact,
    adapters: Artifact,
    untrained: Artifact,
    dpo: DpoSection,
    search: SearchSection,
    problems: ProblemsSection,
    model: ModelSection,
    engine: EngineSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
    run_seed: int,
) -> Counts:
    """The trained flow on the held-out problems, and what the stream has changed: accuracy along it, reward margins."""
    from rstar.training.data import read_rows
    from rstar.training.dpo import AdapterTrainer

    folder, before = here.round.eval / "flow", untrained.folder
    here.resume(here.round.eval)
    job = search_job([flow_pass(search, folder)], base, model, engine, sandbox, adapters)
    search_passes(job, [load_problems(problems).heldout], cluster, "trained flow")
    predictions, _ = read_stream(adapters.folder)
    outcomes = {"trained flow": [p.correct for p in predictions]}
    for name, trees in (("frozen flow", "stream-flow"), ("single model", "stream-single")):
        found = {tree.problem.id: tree.solved for tree in trees_of(before / "eval" / trees)}
        outcomes[name] = [found[p.problem_id] for p in predictions]
    trainer = AdapterTrainer(checkpoint(base, model), ROLES, dpo, seed=run_seed)
    pairs = read_rows(before / "pairs.jsonl", PreferenceRow)
    kinds = {role: rows for role in ROLES if (rows := [row for row in pairs if row.kind == role])}
    fresh_margins = {role: trainer.margins(role, rows) for role, rows in kinds.items()}
    trainer.load(adapters.path)
    margins = {role: (fresh_margins[role], trainer.margins(role, rows)) for role, rows in kinds.items()}
    measured, known = measured_accuracy(folder, sandbox), read_json(untrained.path)["methods"]
    accuracies = {"single model": known["greedy"], "untrained flow": known["flow"], "trained flow": measured}
    tables = [
        accuracy_table("Held-out problems", accuracies),
        flow_table({"untrained flow": trees_of(before / "eval" / "pairs"), "stream": trees_of(adapters.folder)}),
        margin_table(margins, trainer.steps, mean_staleness(predictions)),
    ]
    return write_evaluation(here, {"flow": measured}, [folder], curves=[progressive_curve(outcomes)], tables=tables)


# -- what can be checked before ----------------------------------------------------------------------------------------


def check_settings(config: Config) -> None:
    """What `check` finds in the settings alone, without a file. Raises UserError."""
    if config.run.rounds > 2:
        raise UserError(f"run.rounds={config.run.rounds}", need="1 or 2")
    if config.warmup.enabled and config.warmup.source not in ("families", "pool"):
        raise UserError(f"warmup.source={config.warmup.source}", need="families or pool")
    for number in range(config.run.rounds + 1):
        c = for_round(config, number)
        if c.search.method != "flow" or c.search.seeds != [0]:
            raise UserError(f"search.method={c.search.method}, seeds={c.search.seeds}", need="flow, seeds=[0]")
        check_search(c.search)
        if c.engine.kind not in ("hf", "vllm"):
            raise UserError(f"engine.kind={c.engine.kind}", need="hf or vllm, which load adapters as they are trained")
        if c.flow.window < 1:
            raise UserError(f"flow.window={c.flow.window}", need="1 or more")
        if c.compile.judged and c.compile.judge.kind == "openai" and not c.compile.judge.url:
            raise UserError("compile.judged without a judge", need="its server", how="set compile.judge.url and .model")


def check(config: Config) -> ProblemSet:
    """Find every mistake that can be found before a model is loaded. Raises UserError; returns the problems."""
    check_peft()
    check_settings(config)
    problems = load_problems(config.problems)
    if not problems.heldout or not problems.train:
        raise UserError("no training or no held-out problems", need="both", how="see problems.*")
    check_base(config.model, config.run)
    return problems


RECIPE = Recipe(flow_dpo, Config, check, check_settings)
