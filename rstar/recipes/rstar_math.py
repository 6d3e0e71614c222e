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
    C leaves such a -1 on the node. No switch: search would go there again and again.
D4  reaching max_depth without an answer is backed up as -1; C gives the node -1 and its ancestors nothing.
    No switch: as D3.
D5  all distinct answer siblings are kept; C keeps the first finished candidate of an expansion and drops the rest.
    No switch: the others are paid for, and their outcomes count.
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
D26 a pair that is longer than ppm.max_length is dropped, not cut, and the paper's configs give the PPM as many tokens
    as a search may write (4096); C has 2048 and cuts: ppm.max_length=2048.
D27 the solutions kept of a problem are different programs (comments and spacing apart), ties go by multiplicity, then
    log-probability, and one whose answer step goes on after the answer is kept only where there is no other; P and C
    compare texts. No switch: the same program twice teaches nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
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
)
from rstar.machine import check_peft
from rstar.manifest import run_dir
from rstar.problems import ProblemSet, load_problems
from rstar.prompts import step_prompt
from rstar.recipes.base_model import absolute, base_model, checkpoint, own_folder_paths, prepare_base
from rstar.recipes.evaluation import (
    check_searches,
    eval_search_settings,
    evaluate,
    problem_trees,
    search_passes,
    tree_counts,
    unsolved,
)
from rstar.recipes.rows import policy_rows, scorer_rows
from rstar.recipes.training import (
    check_bootstrap,
    check_loads_checkpoints,
    fine_tune,
    scorer_training,
    warm_up_training,
)
from rstar.run import Artifact, Counts, Here, Recipe, Run
from rstar.search.worker import SearchJob, SearchTask
from rstar.store import index, shards, write_rows
from rstar.tokens import check_tokenizer, load_tokenizer, question_wrapper
from rstar.tree import Tree
from rstar.types import Problem, UserError


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


def rstar_math(run: Run, config: Config) -> None:
    """Four rounds, each of which searches with the policy and the PPM of the round before."""
    c = for_round(config, 0)
    start = run.round(0, c)
    sft = warm_up_training(c.sft, c.warmup)
    base = start.stage(prepare_base, c.model, c.problems, c.warmup, sft, c.sandbox, c.run.seed, name="base")
    tested = (c.eval.without_search(), eval_search_settings(c.search, guided=False))
    start.stage(evaluate, base, None, *tested, c.problems, c.model, c.engine, c.sandbox, c.cluster, name="eval")
    policy: Artifact = base
    ppm: Artifact | None = None
    for rnd, c in run.rounds(config):
        bootstrapped = rnd.number == 1 and c.bootstrap.enabled
        writer = c.bootstrap if bootstrapped else c
        trees = rnd.stage(
            search, c.search, c.problems, writer.model, None if bootstrapped else policy,
            ppm if c.search.use_ppm and not c.search.ppm else None, writer.engine, c.sandbox, c.cluster,
        )  # fmt: skip
        prompt = (c.model, base) if bootstrapped else (None, None)
        rows = rnd.stage(extract, c.extract, c.ppm.loss, trees, *prompt)
        policy = rnd.stage(train_policy, c.sft, rows, base, c.model, c.run.seed, name="policy")
        ppm = rnd.stage(train_ppm, c.ppm, rows, policy, c.run.seed, name="ppm") if c.ppm.epochs else None
        tested = (c.eval, eval_search_settings(c.search))
        rnd.stage(evaluate, policy, ppm, *tested, c.problems, c.model, c.engine, c.sandbox, c.cluster, name="eval")


# -- the stages --------------------------------------------------------------------------------------------------------


def search(
    here: Here,
    search: SearchSection,
    problems: ProblemsSection,
    model: ModelSection,
    policy: Artifact | None,
    ppm: Artifact | None,
    engine: EngineSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """Grow the trees of all training problems. Without a `policy` the bootstrap model, `model`, writes the steps."""
    here.resume(here.round.trees)
    notes = here.notes
    unsolved_only = notes.pop("unsolved", False)  # of trees that are continued
    pool, folder = load_problems(problems).train, here.round.trees
    scorer = search.ppm or (str(ppm.path) if ppm is not None else "")
    job = SearchJob(
        passes=(SearchTask(folder.resolve(), search, **notes),),
        engine=engine,
        sandbox=sandbox,
        model=own_folder_paths(model),
        policy=checkpoint(policy, model) if policy is not None else model.base and absolute(model.base),
        ppm=absolute(scorer) if search.use_ppm else "",
        bootstrap=policy is None,
    )

    def grow(job: SearchJob, some: Sequence[Problem], name: str) -> None:
        before = here.round.root / f"round_{here.round.number - 1:02d}"
        search_passes(job, [some], cluster, f"round {here.round.number} {name}", before=before)

    revision = job.passes[0].revision
    grow(job, unsolved(pool, folder, revision) if unsolved_only else pool, "search")
    if again := second_pass(search):
        had = {name.rpartition("#")[0] for name in index(folder) if name.endswith(f"#{again.seeds[0]}")}
        had |= {problem.id for problem in unsolved(pool, folder)}
        if left := [problem for problem in pool if problem.id in had]:
            grow(replace(job, passes=(replace(job.passes[0], search=again),)), left, "second pass")
    here.outputs.extend(shards(here.round.path))
    return tree_counts(pool, folder)


def second_pass(search: SearchSection) -> SearchSection | None:
    """A fresh tree with the next seed for every problem that is unsolved (D15); None where it is off."""
    if not search.second_pass:
        return None
    return replace(search, rollouts=search.second_pass, escalate=[], seeds=[max(search.seeds) + 1])


def extract(
    here: Here,
    extract: ExtractSection,
    ppm_loss: str,
    trees: Artifact,
    model: ModelSection | None,
    base: Artifact | None,
) -> Counts:
    """SFT rows and the PPM's rows of a round's trees. With `model` and `base` the trees are a bootstrap model's, and
    their rows get the prompt that is trained (D16)."""

    def searched() -> Iterator[list[Tree]]:
        wrap = question_wrapper(checkpoint(base, model), model) if model is not None and base is not None else None
        for found in problem_trees(trees.folder):
            if wrap is not None:
                found = [replace(tree, prompt=step_prompt(wrap(tree.problem.question)).segments) for tree in found]
            yield found

    counts = dict[str, int]()
    counts["sft_rows"] = write_rows(
        here.output("sft.jsonl"), (row for found in searched() for row in policy_rows(found, extract))
    )
    if not counts["sft_rows"]:
        raise UserError(
            f"round {here.round.number} found no correct trajectory", need="at least one solved problem",
            how="more rollouts, easier problems, or a stronger policy",
        )  # fmt: skip
    for loss in dict.fromkeys(("pairwise", ppm_loss)):  # pairs are written for any loss
        path = here.output(PPM_ROWS[loss])
        rows = (row for found in searched() for row in scorer_rows(found, extract, loss))
        counts[path.stem] = write_rows(path, rows)
    return counts


PPM_ROWS = {"pairwise": "pairs.jsonl", "mse": "pqm.jsonl", "bce": "orm.jsonl"}
"""ppm.loss -> the file of rows that it is trained on: pairs (PPM), Q-values (PQM) or outcomes (ORM)."""


def train_policy(
    here: Here, sft: TrainSection, rows: Artifact, base: Artifact, model: ModelSection, run_seed: int
) -> Counts:
    """Fine-tune the base on the round's solutions."""
    return fine_tune(rows.path, checkpoint(base, model), here.output("policy"), sft, run_seed, here.title)


def train_ppm(here: Here, ppm: PpmSection, rows: Artifact, policy: Artifact, run_seed: int) -> Counts:
    """Train the PPM, from the round's policy."""
    file = rows.folder / PPM_ROWS[ppm.loss]
    return scorer_training(file, str(policy.path), here.output("ppm"), ppm, run_seed, f"round {here.round.number} PPM")


# -- what can be checked before ---------------------------------------------------------------------------------------


def check_settings(config: Config) -> None:
    """Find mistakes in the settings alone, without a file. Raises UserError."""
    check_loads_checkpoints(config.engine)
    check_bootstrap(config.bootstrap)
    for number in range(1, config.run.rounds + 1):
        own = for_round(config, number)
        check_searches(own.search, own.eval)
        trained = number > 1 and for_round(config, number - 1).ppm.epochs
        if own.search.use_ppm and not own.search.ppm and not trained:
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


RECIPE = Recipe(rstar_math, Config, check, check_settings)
