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

from collections.abc import Iterator
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
    to_dict,
)
from rstar.extract.outcomes import outcome_rows
from rstar.machine import check_peft
from rstar.problems import ProblemSet, load_problems
from rstar.recipes.base_model import absolute, check_base, start_checkpoint, start_of
from rstar.recipes.measuring import finished_eval, problem_trees, search_passes, tree_counts
from rstar.recipes.rows import reference_rows
from rstar.recipes.starting import files_read, seed_of, serves_checkpoints
from rstar.recipes.training import fine_tune
from rstar.recipes.verification import curve, evaluated
from rstar.report.progress import TrainingProgress, say_dropped
from rstar.rounds import RoundDir, RunDir, Stage, StageResult, input_digest, run_dir
from rstar.search.collect import SearchJob, SearchPass
from rstar.store import shards, write_rows
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


def stages(config: Config, number: int) -> list[Stage]:
    """The stages of round `number` in order."""
    run = run_dir(config.run)
    config = for_round(config, number)
    if number == 0:
        trained = [_fine_tuning_stage(config, run, epochs) for epochs in _epochs(config)]
        return [_base_stage(config, run), *trained, _baseline_stage(config, run)]
    drawn = [_search_stage(config, run), _candidates_stage(config, run)] if number == 1 else []
    return [*drawn, *(make(config, run, number) for make in (_extract_stage, _verifier_stage, _eval_stage))]


def check_settings(config: Config) -> None:
    """What `check` finds in the settings alone, without a file. Raises UserError."""
    serves_checkpoints(config.engine)
    if config.search.method != "sample" or config.search.form == "stated":
        raise UserError("search.method or search.form", need="sample; text or steps")
    if not config.eval.epochs or len(config.eval.voters) < 2:
        raise UserError("eval.epochs or eval.voters is too short", need="an epoch count and two numbers of voters")


def check(config: Config) -> ProblemSet:
    """Find every mistake that can be found before a model is loaded. Raises UserError; returns the problems."""
    check_settings(config)
    problems = load_problems(config.problems)
    if not problems.heldout:
        raise UserError("no held-out problems", need="problems.heldout or problems.heldout_path")
    if config.sft.lora_rank or config.verifier.lora_rank:
        check_peft()
    check_base(config)
    return problems


# -- round 0: the generator, and fine-tuning alone -------------------------------------------------------------------


def _base_stage(config: Config, run: RunDir) -> Stage:
    here = run.round(0)
    settings = {"model": to_dict(config.model), "problems": to_dict(config.problems)}
    settings["search"] = {"form": config.search.form}

    def work() -> StageResult:
        (base, outputs), problems = start_of(config, run), load_problems(config.problems).train
        count = write_rows(here.sft, reference_rows(config, base, problems, annotated=True))
        return StageResult((here.sft, *outputs), {"base": base, "rows": count, "problems": len(problems)})

    return Stage(here, "base", settings, lambda: files_read(config.problems, config.model), work)


def _epochs(config: Config) -> list[float]:
    """Every number of epochs that a model is fine-tuned for, the generator's among them."""
    return sorted({config.sft.epochs, *map(float, config.eval.epochs)})


def _model(config: Config, run: RunDir, epochs: float) -> tuple[str, Path]:
    """Stage and folder of the model that was fine-tuned so long; the generator is the round's policy."""
    here = run.round(0)
    if epochs == config.sft.epochs:
        return "policy", here.policy
    return f"epochs-{epochs:02g}", here.path / f"epochs-{epochs:02g}"


def _fine_tuning_stage(config: Config, run: RunDir, epochs: float) -> Stage:
    here, section = run.round(0), replace(config.sft, epochs=epochs)
    name, output = _model(config, run, epochs)

    def work() -> StageResult:
        start, title = start_checkpoint(config, run), f"fine-tuning, {section.epochs:g} epochs"
        result = fine_tune(here.sft, start, output, section, config.run.seed, title)
        return StageResult((output,), result)

    settings = {"sft": to_dict(section), "run": seed_of(config.run)}
    return Stage(here, name, settings, lambda: {"base": input_digest(here, "base")}, work)


def _baseline_stage(config: Config, run: RunDir) -> Stage:
    """test@1 at temperature 0 (and test@N) of fine-tuning alone, by epochs."""
    here, section = run.round(0), config.eval

    def work() -> StageResult:
        methods: dict[str, Any] = {}
        series: dict[str, list[list[float]]] = {}
        shown: list[Path] = []
        for epochs in _epochs(config):
            passes = {"greedy": replace(config.search, rollouts=1, temperature=0.0)}
            if section.epoch_samples:
                passes["sample"] = replace(config.search, rollouts=section.epoch_samples)
            folders = {name: here.eval / f"{epochs:02g}" / name for name in passes}
            found = [SearchPass(folders[name].resolve(), one, test_time=True) for name, one in passes.items()]
            _search(config, str(_model(config, run, epochs)[1]), found, _heldout(config), f"{epochs:g} epochs")
            for name, folder in folders.items():
                one = evaluated(folder, config.sandbox, oracle_only=True)
                (measure,) = one["measures"].values()
                label = "test@1 (greedy)" if name == "greedy" else f"test@{section.epoch_samples}"
                series.setdefault(label, []).append([epochs, measure["mean"], measure["low"], measure["high"]])
                key = "accuracy" if name == "greedy" else label
                methods[f"{name}, {epochs:g} epochs"] = {**one, "measures": {key: measure}}
                shown += shards(folder)
        best = f"greedy, {section.epochs[-1]} epochs"  # the baseline of the tables
        methods["greedy"] = methods.pop(best)
        curves = [curve("Fine-tuning alone, % of held-out problems", "epochs", series)]
        return finished_eval(here, methods, shown, curves=curves)

    def inputs() -> dict[str, str]:
        return {name: input_digest(here, name) for name, _ in (_model(config, run, e) for e in _epochs(config))}

    settings = _eval_settings(config, "problems", "epochs", "epoch_samples")
    return Stage(here, "eval", settings, inputs, work, resumes=True, trees=(here.eval,))


# -- round 1: completions --------------------------------------------------------------------------------------------


def _search_stage(config: Config, run: RunDir) -> Stage:
    here = run.round(1)
    settings = {name: to_dict(getattr(config, name)) for name in ("search", "problems", "model")}
    settings["engine"] = {"kind": config.engine.kind}

    def work() -> StageResult:
        pool = load_problems(config.problems).train
        _search(config, str(run.round(0).policy), [SearchPass(here.path.resolve(), config.search)], pool, "completions")
        return StageResult(tuple(shards(here.path)), tree_counts(pool, here.path))

    return Stage(here, "search", settings, lambda: {"policy": input_digest(run.round(0), "policy")}, work, resumes=True)


def _candidates_stage(config: Config, run: RunDir) -> Stage:
    """The completions of the held-out problems that every round's verifier ranks."""
    here = run.round(1)
    folder = here.eval / "candidates"

    def work() -> StageResult:
        one = replace(config.search, rollouts=config.eval.completions, escalate=[], seeds=[0])
        heldout = _heldout(config)
        _search(
            config, str(run.round(0).policy), [SearchPass(folder.resolve(), one, test_time=True)], heldout, "candidates"
        )
        return StageResult(tuple(shards(folder)), tree_counts(heldout, folder))

    settings = _eval_settings(config, "problems", "completions")
    return Stage(
        here, "candidates", settings, lambda: {"policy": input_digest(run.round(0), "policy")}, work, resumes=True,
        trees=(folder,),
    )  # fmt: skip


def _search(
    config: Config, policy: str, passes: list[SearchPass], problems: Any, name: str, *, verifier: str = ""
) -> None:
    job = SearchJob(
        passes=tuple(passes),
        engine=config.engine,
        sandbox=config.sandbox,
        model=config.model,
        policy=absolute(policy),
        ppm=absolute(verifier) if verifier else "",
        recipe=config.recipe,
    )
    search_passes(job, [problems] * len(passes), config.cluster, name)


# -- a verifier ------------------------------------------------------------------------------------------------------


def _outcomes(here: RoundDir) -> Path:
    return here.path / "outcomes.jsonl"


def _extract_stage(config: Config, run: RunDir, number: int) -> Stage:
    here, section = run.round(number), config.outcomes

    def work() -> StageResult:
        pool = load_problems(config.problems).train[: section.problems or None]
        kept, counts = {problem.id for problem in pool}, {"rows": 0, "samples": 0.0, "correct": 0.0}

        def rows() -> Iterator[OutcomeRow]:
            for trees in problem_trees(run.round(1).trees):
                for tree in trees:
                    for row in outcome_rows(tree, samples=section.completions) if tree.problem.id in kept else ():
                        counts["samples"] += row.weight
                        counts["correct"] += row.weight * row.label
                        yield row

        counts["rows"] = write_rows(_outcomes(here), rows())
        if not 0 < counts["correct"] < counts["samples"]:
            raise UserError(
                f"{counts['correct']:g} of {counts['samples']:g} finished completions are correct",
                need="right and wrong ones", how="train the generator longer, draw more, or take easier problems",
            )  # fmt: skip
        return StageResult((_outcomes(here),), {**counts, "problems": len(pool)})

    settings = {"outcomes": to_dict(section)}
    return Stage(here, "extract", settings, lambda: {"trees": input_digest(run.round(1), "search")}, work)


def _verifier_stage(config: Config, run: RunDir, number: int) -> Stage:
    here, section = run.round(number), config.verifier
    start = {"generator": "policy", "base": "base"}.get(section.init)

    def inputs() -> dict[str, str]:
        read = {"rows": input_digest(here, "extract"), "references": input_digest(run.round(0), "base")}
        return read | ({"init": input_digest(run.round(0), start)} if start else {})

    def work() -> StageResult:
        from rstar.training.data import read_rows
        from rstar.training.verifier import train_verifier

        bodies = {"generator": str(run.round(0).policy), "base": start_checkpoint(config, run)}
        body = bodies.get(section.init, section.init)
        rows, references = read_rows(_outcomes(here), OutcomeRow), read_rows(run.round(0).sft, SftRow)
        with TrainingProgress(f"round {number} verifier") as progress:
            result = train_verifier(
                rows, references, body, here.path / "verifier", section, seed=config.run.seed, on_progress=progress
            )
        say_dropped(f"round {number} verifier", result.training.dropped, section.max_length)
        return StageResult((here.path / "verifier",), {"rows": len(rows), **asdict(result)})

    return Stage(here, "verifier", {"verifier": to_dict(section), "run": seed_of(config.run)}, inputs, work)


def _eval_stage(config: Config, run: RunDir, number: int) -> Stage:
    here, section = run.round(number), config.eval
    folder = here.eval / "verifier"

    def work() -> StageResult:
        candidates = (run.round(1).eval / "candidates").resolve()
        found = [SearchPass(folder.resolve(), config.search, test_time=True, trees=candidates)]
        verifier = str(here.path / "verifier")
        _search(config, str(run.round(0).policy), found, _heldout(config), f"round {number} ranking", verifier=verifier)
        one = evaluated(folder, config.sandbox, voters=section.voters, sizes=section.sizes)
        return finished_eval(here, {"verifier": one}, shards(folder), curves=one.pop("curves"))

    def inputs() -> dict[str, str]:
        return {"verifier": input_digest(here, "verifier"), "candidates": input_digest(run.round(1), "candidates")}

    settings = _eval_settings(config, "problems", "sizes", "voters")
    return Stage(here, "eval", settings, inputs, work, resumes=True, trees=(folder,))


def _eval_settings(config: Config, *keys: str) -> dict[str, Any]:
    read = to_dict(config.eval)
    return {
        "eval": {key: read[key] for key in keys},
        "problems": to_dict(config.problems),
        "model": to_dict(config.model),
        "search": {k: getattr(config.search, k) for k in ("form", "calculator", "temperature", "max_step_tokens")},
    }


def _heldout(config: Config) -> tuple[Problem, ...]:
    return load_problems(config.problems).heldout[: config.eval.problems or None]
