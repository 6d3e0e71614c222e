"""Training Verifiers to Solve Math Word Problems (arXiv 2110.14168): best of n by an outcome verifier.

Round 0 fine-tunes the generator, and models for as many epochs as `eval.epochs` names: the fine-tuning baseline. Round
1 draws completions of the training problems, labels them by their final answer, trains a verifier, and ranks the
completions of the held-out problems with it. Each further round is a variant of round 1 on the same completions (its
overlay says in what: verifier.level, verifier.lm_weight, verifier.dropout, verifier.init, outcomes.*), so nothing is
generated again. What changes the completions themselves (generator's size or dropout, training problems) is another
run: `for n in 100 400; do rstar evolve CONFIG problems.limit=$n run.dir=runs/gsm8k_$n; done`.

Solutions are in words with calculator annotations (search.form: text), or in executed code steps (steps).

Deviations from the paper, each with its switch:

V1  answers are the same where their values are ("72.0" is 72); the paper compares strings. No switch.
V2  the calculator is a grammar of our own (no powers) and writes results as the data does, 24 instead of Python's 24.0.
    Plain calculations of reference solutions that carry no annotation get one.
V3  the end token belongs to a solution, and its value after the end token is the score. The paper says only that values
    follow every token. No sigmoid stands after gain and bias; a solution that is cut off or names no answer is no
    candidate, and no row of the verifier (it would be one labelled wrong).
V4  the reserved token's row starts near 0, the gain at 1, the bias at the share of correct completions; not reported.
V5  the 1:1 mix puts a problem's reference solution beside each of its completions, into the same optimizer batch;
    problems without a finished completion give none. The reserved token is left out of the language model's softmax.
V6  each point of the curves over epochs is a training of its own, its schedule ends at 0 there; the paper measures one
    run as it goes.
V7  dropout acts in fine-tuning only; the paper also continues pre-training under dropout first: sft.dropout,
    verifier.dropout (0 by default, as in the paper's main runs).
V8  a batch is counted in rows (the paper: 3.2e4 tokens), AdamW's betas are the trainer's 0.9, 0.999 (0.9, 0.95).
V9  a tied vote goes to the answer with the higher best score; not reported.
V10 with search.form=steps the solutions are the code steps of rStar-Math: the generator learns the calculations of the
    reference solutions as programs, problems without one are left out, and printed output is no target and not scored.
V11 the question carries no loss in fine-tuning either; the paper says so of the verifier only. No switch. The
    fine-tuning rate is Table 1's; the further 0.1 that it names for some runs is left out: sft.learning_rate.
V12 an optimizer step holds whole problems up to its size, so that their question is computed once; the paper shuffles
    examples: verifier.tree_rows=2 (a completion and its reference). In paper.yaml 8 of a problem stay together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rstar.config import (
    ClusterSection,
    EngineSection,
    ModelSection,
    ProblemsSection,
    RunSection,
    SandboxSection,
    SearchSection,
    TrainSection,
    VerifierSection,
    for_round,
    only,
)
from rstar.extract.outcomes import outcome_rows
from rstar.machine import check_peft
from rstar.problems import ProblemSet, load_problems
from rstar.recipes.base_model import absolute, base_model, check_base, checkpoint, start_model
from rstar.recipes.evaluation import problem_trees, search_passes, tree_counts, write_evaluation
from rstar.recipes.rows import reference_rows
from rstar.recipes.training import check_loads_checkpoints, fine_tune
from rstar.recipes.verification import curve, evaluated
from rstar.report.progress import TrainingProgress, say_dropped
from rstar.run import Artifact, Counts, Here, Recipe, Run
from rstar.search.worker import SearchJob, SearchTask
from rstar.store import shards, write_rows
from rstar.tokens import question_wrapper
from rstar.types import OutcomeRow, Problem, SftRow, UserError


@dataclass(frozen=True)
class OutcomesSection:
    """Which labelled completions the verifier is trained on."""

    problems: int = 0  # the first N training problems; 0: all
    completions: int = 0  # of each problem, drawn at random; 0: all


@dataclass(frozen=True)
class VerificationSection:
    """What is measured on the held-out problems."""

    problems: int = 0  # use the first N held-out problems; 0: all
    completions: int = 100  # ranked by the verifier, at search.temperature
    voters: list[int] = field(default_factory=lambda: [1, 3, 5, 10, 30, 100])  # best-scored ones; the 2nd is tabled
    sizes: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 25, 50])  # completions of the curve; all is there
    epochs: list[int] = field(default_factory=lambda: [20])  # fine-tuning alone: models of so many epochs, best last
    epoch_samples: int = 0  # completions of each of these models, for test@N; 0: greedy only


@dataclass(frozen=True)
class Config:
    """Everything a run of this recipe reads. `rounds` holds the variants: rounds.r2.verifier.level=solution."""

    recipe: str = "outcome_verifier"
    run: RunSection = field(default_factory=lambda: RunSection(rounds=1))
    cluster: ClusterSection = field(default_factory=ClusterSection)
    model: ModelSection = field(default_factory=lambda: ModelSection(template="{question}\n"))
    engine: EngineSection = field(default_factory=EngineSection)
    sandbox: SandboxSection = field(default_factory=SandboxSection)
    problems: ProblemsSection = field(default_factory=lambda: ProblemsSection(name="gsm8k"))
    search: SearchSection = field(
        default_factory=lambda: SearchSection(
            method="sample", rollouts=100, temperature=0.7, max_step_tokens=400, form="text", calculator=True
        )
    )
    sft: TrainSection = field(default_factory=lambda: TrainSection(weight_decay=0.0, learning_rate=1e-5))
    outcomes: OutcomesSection = field(default_factory=OutcomesSection)
    verifier: VerifierSection = field(default_factory=lambda: VerifierSection(weight_decay=0.0))
    eval: VerificationSection = field(default_factory=VerificationSection)
    rounds: dict[str, Any] = field(default_factory=dict)


def outcome_verifier(run: Run, config: Config) -> None:
    """Fine-tune generators; then label completions, train a verifier and rank candidates, once for each variant."""
    c = for_round(config, 0)
    start, where = run.round(0, c), (c.engine, c.sandbox, c.cluster)
    references = start.stage(write_references, c.model, c.problems, c.search.form, c.sandbox, c.run.seed, name="base")
    models: dict[float, Artifact] = {}
    for epochs in epochs_measured(c):
        name = "policy" if epochs == c.sft.epochs else f"epochs-{epochs:02g}"
        sft = replace(c.sft, epochs=epochs)
        models[epochs] = start.stage(train_generator, sft, references, c.model, c.run.seed, name=name)
    generator = models[c.sft.epochs]
    tested = (only(c.eval, "problems", "epochs", "epoch_samples"), sampling(c.search), c.problems, c.model)
    start.stage(evaluate_epochs, *tested, c.sft.epochs, tuple(models.values()), *where, name="eval")
    for rnd, c in run.rounds(config):
        where = (c.engine, c.sandbox, c.cluster)
        if rnd.number == 1:
            drawn = (c.search, c.problems, c.model, generator, *where)
            completions = rnd.stage(draw_completions, *drawn, name="search")
            drawn = (sampling(c.search), c.problems, c.model, generator, *where)
            candidates = rnd.stage(draw_candidates, only(c.eval, "problems", "completions"), *drawn, name="candidates")
        outcomes = rnd.stage(label_outcomes, c.outcomes, c.problems, completions, name="extract")
        init = {"generator": generator, "base": references}.get(c.verifier.init)
        verifier = rnd.stage(
            train_verifier, c.verifier, outcomes, references, init, c.model, c.run.seed, name="verifier"
        )
        ranked = (only(c.eval, "problems", "sizes", "voters"), c.problems, c.model)
        rnd.stage(rank_candidates, *ranked, verifier, candidates, generator, *where, name="eval")


def epochs_measured(config: Config) -> list[float]:
    """Every number of epochs that a model is fine-tuned for, the generator's among them."""
    return sorted({config.sft.epochs, *map(float, config.eval.epochs)})


def sampling(search: SearchSection) -> SearchSection:
    """What a measurement reads of the search settings: how a completion is drawn, not how many."""
    text = ("method", "form", "calculator", "temperature", "top_p", "max_depth", "max_step_tokens")
    return only(search, *text, "drop_failed_steps", "trees_in_flight")


# -- round 0: the generator, and fine-tuning alone -------------------------------------------------------------------


def write_references(
    here: Here, model: ModelSection, problems: ProblemsSection, search_form: str, sandbox: SandboxSection, run_seed: int
) -> Counts:
    """The rows of the reference solutions, and the base model where it is a new one."""
    file = here.output("sft.jsonl")
    base, pool = start_model(here, model, run_seed), load_problems(problems).train
    rows = reference_rows(pool, search_form, sandbox, question_wrapper(base, model), annotated=True)
    return {"base": base, "rows": write_rows(file, rows), "problems": len(pool)}


def base_of(references: Artifact, model: ModelSection) -> str:
    """The model that is fine-tuned: the base stage's copy with step delimiters, or what `model.base` names."""
    return str(references.folder / "start") if model.step_tokens else checkpoint(references, model)


def train_generator(here: Here, sft: TrainSection, references: Artifact, model: ModelSection, run_seed: int) -> Counts:
    """Fine-tune the base on the reference solutions for so many epochs (V6)."""
    output, title = here.output(here.stage), f"fine-tuning, {sft.epochs:g} epochs"
    return fine_tune(references.path, base_of(references, model), output, sft, run_seed, title)


def evaluate_epochs(
    here: Here,
    eval: VerificationSection,
    search: SearchSection,
    problems: ProblemsSection,
    model: ModelSection,
    sft_epochs: float,
    models: tuple[Artifact, ...],
    engine: EngineSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """test@1 at temperature 0 (and test@N) of fine-tuning alone, by epochs."""
    here.resume(here.round.eval)
    heldout = heldout_problems(problems, eval)
    methods: dict[str, Any] = {}
    series: dict[str, list[list[float]]] = {}
    shown: list[Path] = []
    for epochs, trained in zip(sorted({sft_epochs, *map(float, eval.epochs)}), models, strict=True):
        ways = {"greedy": replace(search, rollouts=1, temperature=0.0)}
        if eval.epoch_samples:
            ways["sample"] = replace(search, rollouts=eval.epoch_samples)
        folders = {name: here.round.eval / f"{epochs:02g}" / name for name in ways}
        passes = [SearchTask(folders[name].resolve(), one, test_time=True) for name, one in ways.items()]
        job = search_job(passes, model, trained.path, engine, sandbox)
        search_passes(job, [heldout] * len(passes), cluster, f"{epochs:g} epochs")
        for name, folder in folders.items():
            one = evaluated(folder, sandbox, oracle_only=True)
            (measure,) = one["measures"].values()
            label = "test@1 (greedy)" if name == "greedy" else f"test@{eval.epoch_samples}"
            series.setdefault(label, []).append([epochs, measure["mean"], measure["low"], measure["high"]])
            key = "accuracy" if name == "greedy" else label
            methods[f"{name}, {epochs:g} epochs"] = {**one, "measures": {key: measure}}
            shown.append(folder)
    best = f"greedy, {eval.epochs[-1]} epochs"  # the baseline of the tables
    methods["greedy"] = methods.pop(best)
    curves = [curve("Fine-tuning alone, % of held-out problems", "epochs", series)]
    return write_evaluation(here, methods, shown, curves=curves)


# -- round 1: completions --------------------------------------------------------------------------------------------


def draw_completions(
    here: Here,
    search: SearchSection,
    problems: ProblemsSection,
    model: ModelSection,
    generator: Artifact,
    engine: EngineSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """The generator's completions of the training problems, graded."""
    here.resume(here.round.trees)
    pool, folder = load_problems(problems).train, here.round.trees
    job = search_job([SearchTask(folder.resolve(), search)], model, generator.path, engine, sandbox)
    search_passes(job, [pool], cluster, "completions")
    here.outputs.extend(shards(folder))
    return tree_counts(pool, folder)


def draw_candidates(
    here: Here,
    eval: VerificationSection,
    search: SearchSection,
    problems: ProblemsSection,
    model: ModelSection,
    generator: Artifact,
    engine: EngineSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """The completions of the held-out problems that every round's verifier ranks."""
    folder = candidates_folder(here.round.path)
    here.resume(folder)
    one = replace(search, rollouts=eval.completions)
    heldout = heldout_problems(problems, eval)
    job = search_job([SearchTask(folder.resolve(), one, test_time=True)], model, generator.path, engine, sandbox)
    search_passes(job, [heldout], cluster, "candidates")
    here.outputs.extend(shards(folder))
    return tree_counts(heldout, folder)


def candidates_folder(round_folder: Path) -> Path:
    return round_folder / "eval" / "candidates"


def search_job(
    passes: Sequence[SearchTask],
    model: ModelSection,
    policy: Path,
    engine: EngineSection,
    sandbox: SandboxSection,
    *,
    verifier: str = "",
) -> SearchJob:
    return SearchJob(
        passes=tuple(passes), engine=engine, sandbox=sandbox, model=model, policy=absolute(str(policy)),
        ppm=absolute(verifier) if verifier else "", recipe="outcome_verifier",
    )  # fmt: skip


# -- a verifier ------------------------------------------------------------------------------------------------------


def label_outcomes(here: Here, outcomes: OutcomesSection, problems: ProblemsSection, completions: Artifact) -> Counts:
    """Rows of the completions with their labels: whether the final answer is right."""
    pool = load_problems(problems).train[: outcomes.problems or None]
    kept, counts = {problem.id for problem in pool}, {"rows": 0, "samples": 0.0, "correct": 0.0}

    def rows() -> Iterator[OutcomeRow]:
        for trees in problem_trees(completions.folder):
            for tree in trees:
                for row in outcome_rows(tree, samples=outcomes.completions) if tree.problem.id in kept else ():
                    counts["samples"] += row.weight
                    counts["correct"] += row.weight * row.label
                    yield row

    counts["rows"] = write_rows(here.output("outcomes.jsonl"), rows())
    if not 0 < counts["correct"] < counts["samples"]:
        raise UserError(
            f"{counts['correct']:g} of {counts['samples']:g} finished completions are correct",
            need="right and wrong ones", how="train the generator longer, draw more, or take easier problems",
        )  # fmt: skip
    return {**counts, "problems": len(pool)}


def train_verifier(
    here: Here,
    verifier: VerifierSection,
    outcomes: Artifact,
    references: Artifact,
    init: Artifact | None,
    model: ModelSection,
    run_seed: int,
) -> Counts:
    """Train the verifier, from the generator, the base, or the model that `verifier.init` names."""
    from rstar.training.data import read_rows
    from rstar.training.verifier import train_verifier

    if init is None:
        body = base_model(replace(model, base=verifier.init), here.round.root, seed=run_seed)
    else:
        body = base_of(references, model) if verifier.init == "base" else str(init.path)
    rows, solutions = read_rows(outcomes.path, OutcomeRow), read_rows(references.path, SftRow)
    with TrainingProgress(here.title) as progress:
        result = train_verifier(
            rows, solutions, body, here.output("verifier"), verifier, seed=run_seed, on_progress=progress
        )
    say_dropped(here.title, result.training.dropped, verifier.max_length)
    return {"rows": len(rows), **asdict(result)}


def rank_candidates(
    here: Here,
    eval: VerificationSection,
    problems: ProblemsSection,
    model: ModelSection,
    verifier: Artifact,
    candidates: Artifact,
    generator: Artifact,
    engine: EngineSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """Best of n by the verifier among the candidates, beside votes and the best possible choice."""
    folder = here.round.eval / "verifier"
    here.resume(folder)
    plain = SearchSection(method="sample")  # nothing is drawn
    found = SearchTask(folder.resolve(), plain, test_time=True, trees=candidates_folder(candidates.folder))
    job = search_job([found], model, generator.path, engine, sandbox, verifier=str(verifier.path))
    search_passes(job, [heldout_problems(problems, eval)], cluster, f"round {here.round.number} ranking")
    one = evaluated(folder, sandbox, voters=eval.voters, sizes=eval.sizes)
    curves = one.pop("curves")
    return write_evaluation(here, {"verifier": one}, [folder], curves=curves)


def heldout_problems(problems: ProblemsSection, eval: VerificationSection) -> tuple[Problem, ...]:
    return load_problems(problems).heldout[: eval.problems or None]


# -- what can be checked before ---------------------------------------------------------------------------------------


def check_settings(config: Config) -> None:
    """Find mistakes in the settings alone, without a file. Raises UserError."""
    check_loads_checkpoints(config.engine)
    if config.search.method != "sample" or config.search.form == "stated":
        raise UserError("search.method or search.form", need="sample; text or steps")
    if not config.eval.epochs or len(config.eval.voters) < 2:
        raise UserError("eval.epochs or eval.voters is too short", need="an epoch count and two numbers of voters")
    for number in range(1, config.run.rounds + 1):
        check_variant(config, number)


def check_variant(config: Config, number: int) -> None:
    """Refuse an overlay of round `number` with settings of what earlier rounds have made. Raises UserError."""
    read_before = {"sft", "eval.epochs", "eval.epoch_samples"}
    if number > 1:
        read_before |= {"model", "problems", "search", "eval.completions"}
    overlay = config.rounds.get(f"r{number}") or {}
    keys = {*overlay, *(f"eval.{key}" for key in overlay.get("eval") or {})}
    if unread := ", ".join(sorted(keys & read_before)):
        raise UserError(
            f"rounds.r{number} sets {unread}, which round {min(number - 1, 1)} has read",
            need="settings of the verifier, of its rows or of its ranking",
            how="other generators and completions are a run of their own: run.dir=PATH",
        )


def check(config: Config) -> ProblemSet:
    """Find every mistake that can be found before a model is loaded. Raises UserError; returns the problems."""
    check_settings(config)
    problems = load_problems(config.problems)
    if not problems.heldout:
        raise UserError("no held-out problems", need="problems.heldout or problems.heldout_path")
    check_base(config.model, config.run)
    sections = [for_round(config, number).verifier for number in range(1, config.run.rounds + 1)]
    if any(section.lora_rank for section in (config.sft, *sections)):
        check_peft()
    for init in {section.init for section in sections} - {"generator", "base"}:
        try:  # its prompts are made already
            check_base(replace(config.model, base=init, template="{question}"), config.run)
        except UserError as error:
            raise UserError(
                f"verifier.init={init}: {error.got}", need=error.need, how="generator, base or a model"
            ) from error
    return problems


RECIPE = Recipe(outcome_verifier, Config, check, check_settings)
