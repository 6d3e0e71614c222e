"""rStar-Math (arXiv 2501.04519): four rounds of tree search, policy SFT and process preference model.

A round: search -> extract -> train policy -> train PPM -> evaluate. Every policy is trained from the base model, every
PPM from that round's policy; the next round searches with both.

Stop rule: another round is worth its price while the unsolved problems are real ones. The paper stops after round 4,
when 19 of 20 sampled unsolved problems had a wrong reference answer; `rstar report RUN` lists the unsolved problems of
the last search with their most frequent answer and its share, so that a person can judge.

Deviations from the paper (P) or the official code (C), and choices where P is silent, each with its switch:

D1  unvisited children come first (UCT is infinite at N = 0); C scores them 0 and visits 1.5 of 12 root branches of a
    toy tree: search.unvisited_first=false. Equal scores go by PPM value, then creation order; C takes the first.
D2  a child's PPM value counts as its first visit, as in C; P's Eq. 3 does not count it: search.ppm_prior_visits=0.
D3  an expansion without a live child, an answer or a max_depth child makes its node a dead end: -1, backed up once.
    C leaves such a -1 on the node: search.back_up_dead_ends=false.
D4  reaching max_depth without an answer is backed up as -1; C gives the node -1 and its ancestors nothing:
    search.back_up_max_depth=false.
D5  all distinct answer siblings are kept; C keeps the first finished candidate of an expansion and drops the rest:
    search.first_answer_only=true.
D6  PPM scores are tanh(raw / 5) and the loss is on raw scores, as in C; P has tanh in the head: ppm.tanh_in_loss=true,
    ppm.score_scale=1.
D7  one PPM epoch as in P; C's README says two: ppm.epochs=2.
D8  step pairs need a Q margin of 0.5 and an edit distance of 20 characters, as in C; P names neither:
    extract.min_margin=0, extract.min_edit_distance=0. C's comparison of greedy continuations is left out.
D9  final-answer pairs across trajectories as in P, whose chosen answer has the higher mean Q; C has no path for them:
    extract.answer_pairs=false.
D10 the answer of several trajectories is reported by top score (P), by majority of the top eval.top_k (C) and
    score-weighted, all three (a vote weighs (1 + score) / 2, so that none counts against its answer); a tied vote goes
    to the answer with the higher best score, C breaks ties at random. A searched answer takes 12 rollouts (C), P has 4.
D11 interpreter output and `<output>`, `<answer>` tags are written by us and carry no loss; C trains on them. No switch:
    a policy that learns to write results stops running its code.
D12 escalation (search.escalate) adds rollouts to the same tree; P does not say whether it starts again: escalate=[] and
    search.second_pass, which starts again, is the other reading.
D13 the answer step may get fewer samples than the others (off by default; the quickstart saves a third of its tokens):
    search.answer_candidates=2.
D14 with warmup.enabled (the quickstart; off by default and in the paper's configs) the base of all rounds is a small
    supervised start on worked code solutions of training problems, because a 135M model has no 236B bootstrap model.
D15 P's second pass for problems without a correct trajectory is a fresh tree with the next seed: search.second_pass=0.
D16 rows of solutions that bootstrap.model wrote carry the prompt of the model that is trained, without worked examples,
    as C does. No switch: the policy would never see that prompt again.
D17 SFT rows that share a prefix count in full, a shared step once per row that holds it, as in P and C (the prefix is
    computed once: sft.tree_packing=false computes it for each row and gives the same loss).
D18 synthetic answers agree when they are the same number or the same text but for spacing, case and the marks of
    LaTeX; P does not say how it compares the 10 solutions: problems.min_agreement=0 keeps the most frequent answer
    whatever its votes, unless it is tied.
D19 extraction reads the trees of several seeds as one, merged by prefix, so that siblings of all seeds face each other;
    P does not say: extract.merge_seeds=false.
D20 P keeps a step only where its code runs; search.drop_failed_steps=false keeps it, without output, for comparison.
D21 where one side of a prefix has a single step the other gives up to four, as in C; P has 2 x 2:
    extract.widen_pairs=false. The pairs left at a prefix weigh 1 together and a batch's loss is their mean; P divides
    by 2 x 2, C sums. A step that reached max_depth is neither right nor wrong; in C it is wrong.
D22 an answer is what stands in \\boxed{} after <end_of_code>, printed numbers stay as they are; C reads answers
    wherever "boxed" occurs, rounds to 4 decimals and cuts output at 1,024 characters. A step has sandbox.cpu_seconds=30
    in the paper's configs, as in C, and 5 elsewhere.
D23 a greedy solution ends at its first failing step, as a search would; C's greedy mode runs the whole program and goes
    on after errors. No switch: the policy is measured by what it may do in a search.
D24 an optimizer step holds whole trees, so that shared prefixes are computed once; P and C shuffle rows:
    sft.tree_rows=1, ppm.tree_rows=1. The paper's configs keep 16 pairs of a tree together.
D25 the PPM's head starts at N(0, 0.001) without bias and dropout, and the last weights are kept; C has N(5e-7, 1e-6), a
    bias, dropout 0.1 and keeps the best on held-out pairs. No switch: both call every pair a draw at the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rstar.config import (
    BootstrapSection,
    ClusterSection,
    EngineSection,
    EvalSection,
    ExtractSection,
    ModelSection,
    PpmSection,
    ProblemsSection,
    RunSection,
    SandboxSection,
    SearchSection,
    TrainSection,
    WarmupSection,
    for_round,
    to_dict,
)
from rstar.machine import check_peft
from rstar.problems import ProblemSet, load_problems
from rstar.prompts import step_prompt
from rstar.recipes.base_model import absolute, base_checkpoint, base_model, start_of
from rstar.recipes.measuring import (
    check_searches,
    eval_passes,
    evaluate,
    finished_eval,
    problem_limit,
    problem_trees,
    search_passes,
    tree_counts,
    unsolved,
)
from rstar.recipes.rows import policy_rows, scorer_rows
from rstar.recipes.starting import check_bootstrap, files_read, seed_of, serves_checkpoints, travelling
from rstar.recipes.training import fine_tune
from rstar.report.progress import TrainingProgress, say_dropped
from rstar.rounds import RoundDir, RunDir, Stage, StageResult, input_digest, run_dir
from rstar.search.collect import SearchJob, SearchPass
from rstar.store import index, path_digest, shards, write_rows
from rstar.tokens import check_tokenizer, load_tokenizer, question_wrapper
from rstar.tree import Tree
from rstar.types import OutcomeRow, PreferenceRow, Problem, QValueRow, UserError


@dataclass(frozen=True)
class Config:
    """Everything a run of this recipe reads. `rounds` holds overlays: rounds.r2.search.rollouts=16."""

    recipe: str = "rstar_math"
    run: RunSection = field(default_factory=RunSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    model: ModelSection = field(default_factory=ModelSection)
    engine: EngineSection = field(default_factory=EngineSection)
    bootstrap: BootstrapSection = field(default_factory=BootstrapSection)
    sandbox: SandboxSection = field(default_factory=SandboxSection)
    problems: ProblemsSection = field(default_factory=ProblemsSection)
    warmup: WarmupSection = field(default_factory=WarmupSection)
    search: SearchSection = field(default_factory=SearchSection)
    extract: ExtractSection = field(default_factory=ExtractSection)
    sft: TrainSection = field(default_factory=TrainSection)
    ppm: PpmSection = field(default_factory=PpmSection)
    eval: EvalSection = field(default_factory=EvalSection)
    rounds: dict[str, Any] = field(default_factory=dict)


def stages(config: Config, number: int) -> list[Stage]:
    """The stages of round `number` in order; round 0 is the base model and its evaluation."""
    run = run_dir(config.run)
    config = for_round(config, number)
    if number == 0:
        return [_base_stage(config, run), _eval_stage(config, run, 0)]
    made = [_search_stage(config, run, number), _extract_stage(config, run, number), _policy_stage(config, run, number)]
    made += [_ppm_stage(config, run, number)] if config.ppm.epochs else []
    return [*made, _eval_stage(config, run, number)]


def check_settings(config: Config) -> None:
    """What `check` finds in the settings alone, without a file. Raises UserError."""
    serves_checkpoints(config.engine)
    check_bootstrap(config.bootstrap)
    for number in range(1, config.run.rounds + 1):
        own = for_round(config, number)
        search = own.search
        check_searches(search, own.eval)
        trained = number > 1 and for_round(config, number - 1).ppm.epochs
        if search.use_ppm and not search.ppm and not trained:
            why = " (ppm.epochs=0)" if number > 1 else ""
            said = f"round {number} searches with a PPM, round {number - 1} trains none{why}"
            raise UserError(said, need=f"a PPM, or rounds.r{number}.search.use_ppm=false")


def check(config: Config) -> ProblemSet:
    """Find every mistake that can be found before a model is loaded. Raises UserError; returns the problems."""
    check_settings(config)
    problems = load_problems(config.problems)
    if not problems.train:
        raise UserError("no training problems are left", need="at least one", how="see problems.* in `rstar config`")
    if not problems.heldout and (config.problems.heldout_path or config.problems.heldout):
        raise UserError("no held-out problems are left", need="some, or problems.heldout=0 without a heldout_path")
    for number in range(config.run.rounds + 1):
        own = for_round(config, number).problems
        if own != config.problems and load_problems(own).heldout != problems.heldout:
            raise UserError(
                f"rounds.r{number}.problems changes the held-out problems",
                need="the same ones in all rounds, or their figures can't be compared",
                how="give them a file of their own: problems.heldout_path",
            )
    if config.sft.lora_rank or config.ppm.lora_rank:
        check_peft()
    if config.bootstrap.enabled:
        question_wrapper(config.bootstrap.model.base, config.bootstrap.model, key="bootstrap.model")
    base = base_model(config.model, run_dir(config.run).path, seed=config.run.seed)
    if config.engine.kind != "simulated":
        check_tokenizer(load_tokenizer(base), template=config.model.template, name=base)
    return problems


# -- round 0 ---------------------------------------------------------------------------------------------------------


def _base_stage(config: Config, run: RunDir) -> Stage:
    here = run.round(0)
    settings = {"model": to_dict(config.model), "warmup": to_dict(config.warmup), "problems": to_dict(config.problems)}
    settings["run"] = seed_of(config.run)
    if config.warmup.enabled:
        own = ("epochs", "learning_rate", "batch_size")  # which the warm-up has itself
        settings["sft"] = {key: value for key, value in _shaping(config.sft).items() if key not in own}

    def work() -> StageResult:
        (start, outputs), pool = start_of(config, run), load_problems(config.problems)
        found = {"train": len(pool.train), "heldout": len(pool.heldout), "dropped": dict(pool.dropped)}
        base = base_model(config.model, run.path, seed=config.run.seed)
        counts = {"base": base, "problems": found | {"contaminated": pool.contaminated}}
        if not config.warmup.enabled:
            return StageResult(tuple(outputs), counts)
        from rstar.warmup import warmup_rows

        rows = warmup_rows(config.warmup, config.problems, pool, config.sandbox, question_wrapper(start, config.model))
        section = replace(
            config.sft,
            epochs=config.warmup.epochs,
            learning_rate=config.warmup.learning_rate,
            batch_size=config.warmup.batch_size,
        )
        result = fine_tune(rows, start, here.policy, section, config.run.seed, "warm-up")
        return StageResult((*outputs, here.policy), counts | result)

    return Stage(here, "base", settings, lambda: files_read(config.problems, config.model), work)


# -- search ----------------------------------------------------------------------------------------------------------


def bootstrapped(config: Config, number: int) -> bool:
    """Whether a bootstrap policy, and not a model of this run, searches round `number`."""
    return number == 1 and config.bootstrap.enabled


def _search_stage(config: Config, run: RunDir, number: int) -> Stage:
    here, before = run.round(number), run.round(number - 1)
    writer = config.bootstrap if bootstrapped(config, number) else config
    settings = {
        "search": _shaping(config.search),
        "problems": to_dict(config.problems),
        "model": to_dict(writer.model),
        "engine": {"kind": writer.engine.kind, "model": writer.engine.model},
    }

    def inputs() -> dict[str, str]:
        start = "base" if number == 1 else "policy"
        found = {"policy": input_digest(before, start), **files_read(config.problems, writer.model)}
        if config.search.use_ppm:
            found["ppm"] = path_digest(Path(config.search.ppm)) if config.search.ppm else input_digest(before, "ppm")
        return found

    def policy() -> str:
        if bootstrapped(config, number):
            return config.bootstrap.model.base and absolute(config.bootstrap.model.base)
        return absolute(base_checkpoint(config, run) if number == 1 else str(before.policy))

    def work() -> StageResult:
        pool, notes = load_problems(config.problems).train, here.started("search").get("notes", {})
        unsolved_only = notes.pop("unsolved", False)  # of trees that are taken up again
        job = SearchJob(
            passes=(SearchPass(here.path.resolve(), config.search, **notes),),
            engine=writer.engine,
            sandbox=config.sandbox,
            model=travelling(writer.model),
            policy=policy(),
            ppm=absolute(config.search.ppm or str(before.ppm)) if config.search.use_ppm else "",
            bootstrap=bootstrapped(config, number),
        )

        def search(job: SearchJob, problems: Sequence[Problem], name: str) -> None:
            search_passes(job, [problems], config.cluster, f"round {number} {name}", before=before.trees)

        revision = job.passes[0].revision
        search(job, unsolved(pool, here.trees, revision) if unsolved_only else pool, "search")
        if again := second_pass(config.search):
            had = {name.rpartition("#")[0] for name in index(here.trees) if name.endswith(f"#{again.seeds[0]}")}
            had |= {problem.id for problem in unsolved(pool, here.trees)}
            left = [problem for problem in pool if problem.id in had]
            if left:
                search(replace(job, passes=(replace(job.passes[0], search=again),)), left, "second pass")
        return StageResult(tuple(shards(here.path)), tree_counts(pool, here.path))

    return Stage(here, "search", settings, inputs, work, resumes=True)


def second_pass(search: SearchSection) -> SearchSection | None:
    """A fresh tree with the next seed for every problem that is unsolved (D15); None where it is off."""
    if not search.second_pass:
        return None
    return replace(search, rollouts=search.second_pass, escalate=[], seeds=[max(search.seeds) + 1])


_UNREAD = ("trees_in_flight", "checkpoint_rollouts", "processes", "report_to", "save_steps", "gradient_checkpointing")
"""How a stage is run, not what it makes: free to change between and within rounds."""


def _shaping(section: SearchSection | TrainSection) -> dict[str, Any]:
    return {key: value for key, value in to_dict(section).items() if key not in _UNREAD}


# -- extract ---------------------------------------------------------------------------------------------------------


def _extract_stage(config: Config, run: RunDir, number: int) -> Stage:
    here, section, loss = run.round(number), config.extract, config.ppm.loss
    settings: dict[str, Any] = {"extract": to_dict(section), "ppm": {"loss": loss}}
    settings |= {"model": to_dict(config.model)} if bootstrapped(config, number) else {}

    def searched() -> Iterator[list[Tree]]:
        """The trees of each problem, with the prompt that is trained (D16)."""
        wrap = question_wrapper(base_checkpoint(config, run), config.model) if bootstrapped(config, number) else None
        for trees in problem_trees(here.trees):
            if wrap is not None:
                trees = [replace(tree, prompt=step_prompt(wrap(tree.problem.question)).segments) for tree in trees]
            yield trees

    def work() -> StageResult:
        outputs, counts = [here.sft], dict[str, int]()
        counts["sft_rows"] = write_rows(here.sft, (r for trees in searched() for r in policy_rows(trees, section)))
        if not counts["sft_rows"]:
            raise UserError(
                f"round {number} found no correct trajectory", need="at least one solved problem",
                how="more rollouts, easier problems, or a stronger policy",
            )  # fmt: skip
        for kind in dict.fromkeys(("pairwise", loss)):  # pairs are written for any loss
            path = ppm_rows(here, kind)[0]
            outputs.append(path)
            counts[path.stem] = write_rows(path, (r for trees in searched() for r in scorer_rows(trees, section, kind)))
        return StageResult(tuple(outputs), counts)

    return Stage(here, "extract", settings, lambda: {"trees": input_digest(here, "search")}, work)


def ppm_rows(here: RoundDir, loss: str) -> tuple[Path, type[PreferenceRow] | type[QValueRow] | type[OutcomeRow]]:
    """The file and kind of row that a loss is trained on: pairs (PPM), Q-values (PQM) or outcomes (ORM)."""
    return {"mse": (here.pqm, QValueRow), "bce": (here.orm, OutcomeRow)}.get(loss, (here.pairs, PreferenceRow))


# -- training --------------------------------------------------------------------------------------------------------


def _policy_stage(config: Config, run: RunDir, number: int) -> Stage:
    here = run.round(number)

    def inputs() -> dict[str, str]:
        return {"rows": input_digest(here, "extract"), "base": input_digest(run.round(0), "base")}

    def work() -> StageResult:
        base, title = base_checkpoint(config, run), f"round {number} policy"
        result = fine_tune(here.sft, base, here.policy, config.sft, config.run.seed, title)
        return StageResult((here.policy,), result)

    return Stage(here, "policy", {"sft": _shaping(config.sft), "run": seed_of(config.run)}, inputs, work)


def _ppm_stage(config: Config, run: RunDir, number: int) -> Stage:
    here = run.round(number)

    def inputs() -> dict[str, str]:
        return {"rows": input_digest(here, "extract"), "policy": input_digest(here, "policy")}

    def work() -> StageResult:
        from rstar.training.data import read_rows
        from rstar.training.ppm import train_ppm

        rows: Any = read_rows(*ppm_rows(here, config.ppm.loss))
        with TrainingProgress(f"round {number} PPM") as progress:
            result = train_ppm(rows, str(here.policy), here.ppm, config.ppm, seed=config.run.seed, on_progress=progress)
        say_dropped(f"round {number} PPM", result.training.dropped, config.ppm.max_length)
        return StageResult((here.ppm,), {"rows": len(rows), **asdict(result)})

    return Stage(here, "ppm", {"ppm": _shaping(config.ppm), "run": seed_of(config.run)}, inputs, work)


# -- evaluation ------------------------------------------------------------------------------------------------------


_GUIDED = ("rollouts", "candidates", "trajectories", "top_k", "search_problems")  # round 0 has no PPM to search with
_NOT_EVALUATED = (  # keys of the search section that an evaluation has itself, or has no use for
    "method", "rollouts", "candidates", "temperature", "seeds", "use_ppm", "ppm", "escalate", "second_pass",
    "trees_in_flight", "checkpoint_rollouts",
)  # fmt: skip
_NOT_SAMPLED = (  # nor has a single sampled solution
    *_NOT_EVALUATED, "c", "selection", "unvisited_first", "ppm_prior_visits", "beam_width", "back_up_max_depth",
    "back_up_dead_ends", "first_answer_only", "answer_candidates", "rollouts_in_flight",
)  # fmt: skip


def _eval_stage(config: Config, run: RunDir, number: int) -> Stage:
    here, with_ppm = run.round(number), number > 0 and config.ppm.epochs > 0
    unread = _NOT_EVALUATED if number else _NOT_SAMPLED
    settings = {
        "eval": {key: value for key, value in to_dict(config.eval).items() if number or key not in _GUIDED},
        "problems": to_dict(config.problems),
        "model": to_dict(config.model),
        "search": {key: value for key, value in to_dict(config.search).items() if key not in unread},
    }

    def inputs() -> dict[str, str]:
        files = files_read(config.problems, config.model)
        if number == 0:
            return {"policy": input_digest(here, "base"), **files}
        return {name: input_digest(here, name) for name in ("policy", "ppm") if name == "policy" or with_ppm} | files

    def work() -> StageResult:
        heldout = load_problems(config.problems).heldout
        passes = eval_passes(config.eval, config.search, here.eval, with_ppm=with_ppm)
        job = SearchJob(
            passes=tuple(passes.values()),
            engine=config.engine,
            sandbox=config.sandbox,
            model=config.model,
            policy=absolute(base_checkpoint(config, run) if number == 0 else str(here.policy)),
            ppm=absolute(str(here.ppm)) if with_ppm else "",
        )
        sets = [heldout[: problem_limit(m, config.eval)] for m in passes]
        search_passes(job, sets, config.cluster, f"round {number} evaluation")
        results = {m: evaluate(m, passes[m].folder, config.eval, config.sandbox) for m in passes}
        return finished_eval(here, results, (shard for one in passes.values() for shard in shards(one.folder)))

    return Stage(here, "eval", settings, inputs, work, resumes=True, trees=(here.eval,))
