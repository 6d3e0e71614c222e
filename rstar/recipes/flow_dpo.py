"""Flow-DPO (arXiv 2410.22304): an Answer and a Stop model, LoRA adapters of one base, learn online from rollouts.

Round 0 measures the untrained flow and the single model, on the held-out problems and along the stream. Round 1 is the
stream: each problem is predicted, recorded, and learned from (recipes.online_dpo). Round 2, which run.rounds=1 leaves
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

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rstar.config import (
    for_round,
    to_dict,
)
from rstar.extract.flow_pairs import flow_pairs
from rstar.machine import check_peft
from rstar.problems import ProblemSet, load_problems
from rstar.problems.generated import fresh
from rstar.recipes.base_model import base_checkpoint, check_base, start_of
from rstar.recipes.flow_compile import compile_stages
from rstar.recipes.flow_figures import accuracy_table, flow_table, margin_table, progressive_curve
from rstar.recipes.flow_parts import (
    Config,
    adapters_of,
    flow_pass,
    measured_accuracy,
    search_job,
    settings_of,
    single_pass,
    stop_rows,
    trees_of,
)
from rstar.recipes.measuring import finished_eval, problem_trees, search_passes
from rstar.recipes.online_dpo import Prediction, read_stream, stream
from rstar.recipes.rows import reference_rows
from rstar.recipes.starting import files_read, seed_of
from rstar.recipes.training import fine_tune
from rstar.report.progress import Progress, say_dropped
from rstar.rounds import RunDir, Stage, StageResult, input_digest, run_dir
from rstar.search.collect import SearchPass, SearchWorker, WorkItem
from rstar.store import read_json, shards, write_rows
from rstar.tree import Tree
from rstar.types import Problem, UserError


def stages(config: Config, number: int) -> list[Stage]:
    """The stages of round `number` in order."""
    run, config = run_dir(config.run), for_round(config, number)
    if number == 0:
        return [_base_stage(config, run), _frozen_stage(config, run)]
    if number == 1:
        return [_stream_stage(config, run), _trained_stage(config, run)]
    return compile_stages(config, run, number)


def check_settings(config: Config) -> None:
    """What `check` finds in the settings alone, without a file. Raises UserError."""
    if config.search.method != "flow" or config.search.seeds != [0]:
        raise UserError(f"search.method={config.search.method}, seeds={config.search.seeds}", need="flow, seeds=[0]")
    if config.engine.kind not in ("hf", "vllm"):
        raise UserError(f"engine.kind={config.engine.kind}", need="hf or vllm, which load adapters as they are trained")
    if config.run.rounds > 2 or config.flow.window < 1:
        raise UserError(f"run.rounds={config.run.rounds}, flow.window={config.flow.window}", need="1 or 2; 1 or more")
    if config.compile.judged and config.compile.judge.kind == "openai" and not config.compile.judge.url:
        raise UserError("compile.judged without a judge", need="its server", how="set compile.judge.url and .model")


def check(config: Config) -> ProblemSet:
    """Find every mistake that can be found before a model is loaded. Raises UserError; returns the problems."""
    check_peft()
    check_settings(config)
    problems = load_problems(config.problems)
    if not problems.heldout or not problems.train:
        raise UserError("no training or no held-out problems", need="both", how="see problems.*")
    check_base(config)
    return problems


# -- round 0 ---------------------------------------------------------------------------------------------------------


def _base_stage(config: Config, run: RunDir) -> Stage:
    here = run.round(0)
    settings = {name: to_dict(getattr(config, name)) for name in ("model", "warmup", "problems")}
    settings |= {"search": {"form": config.search.form}, "run": seed_of(config.run)}

    def work() -> StageResult:
        base, outputs = start_of(config, run)
        if not config.warmup.enabled:
            return StageResult(tuple(outputs), {"base": base})
        pool, own = load_problems(config.problems), config.warmup
        problems = pool.train
        if own.source == "families":
            problems = tuple(fresh(config.problems, own.families, train=pool.train, heldout=pool.heldout))
        rows = reference_rows(config, base, problems[: own.rows or None])
        asked = {problem.id: problem for problem in problems}
        rows += [said for row in rows for said in stop_rows(config, base, row, asked[row.problem_id])]
        section = replace(
            config.sft, epochs=own.epochs, learning_rate=own.learning_rate, batch_size=own.batch_size, lora_rank=0
        )
        result = fine_tune(rows, base, here.policy, section, config.run.seed, "warm-up")
        return StageResult((*outputs, here.policy), {"base": base, **result})

    return Stage(here, "base", settings, lambda: files_read(config.problems, config.model), work)


def _frozen_stage(config: Config, run: RunDir) -> Stage:
    """The untrained flow and the single model; and held-out pairs, by which the adapters are judged later."""
    here = run.round(0)

    def work() -> StageResult:
        pool = load_problems(config.problems)
        folders = {name: here.eval / name for name in ("greedy", "flow", "stream-single", "stream-flow", "pairs")}
        passes = [
            (single_pass if name in ("greedy", "stream-single") else flow_pass)(
                config, folder, graded=name not in ("greedy", "flow")
            )
            for name, folder in folders.items()
        ]
        passes[-1] = replace(passes[-1], search=replace(config.search, rollouts=1))
        sets = [pool.train if name.startswith("stream") else pool.heldout for name in folders]
        job = search_job(config, base_checkpoint(config, run), passes)
        search_passes(job, sets, config.cluster, "untrained flow and single model")
        pairs = [row for (tree,) in problem_trees(folders["pairs"]) for row in flow_pairs(tree)]
        write_rows(here.pairs, pairs)
        methods = {name: measured_accuracy(config, folders[name]) for name in ("greedy", "flow")}
        tables = [flow_table({"untrained flow": trees_of(folders["pairs"])})]
        trees = [shard for folder in folders.values() for shard in shards(folder)]
        return finished_eval(here, methods, [here.pairs, *trees], tables=tables)

    return Stage(
        here, "eval", settings_of(config), lambda: {"base": input_digest(here, "base")}, work, resumes=True,
        trees=(here.eval,),
    )  # fmt: skip


# -- round 1: the stream ---------------------------------------------------------------------------------------------


def _stream_stage(config: Config, run: RunDir) -> Stage:
    here = run.round(1)

    def work() -> StageResult:
        from rstar.training.dpo import AdapterTrainer

        problems = load_problems(config.problems).train
        base = base_checkpoint(config, run)
        trainer = AdapterTrainer(base, ["answer", "stop"], config.dpo, seed=config.run.seed)
        one = SearchPass(here.path.resolve(), replace(config.search, rollouts=1))
        worker = SearchWorker(replace(search_job(config, base, [one]), lora_rank=config.dpo.lora_rank), "w0")
        progress, seen, right = Progress("round 1 stream", total=len(problems)), [0], [0]

        async def tree_of(problem: Problem) -> Tree:
            (tree,) = await worker.trees(WorkItem(0, problem))
            return tree

        async def serve(folder: Path) -> None:
            await worker.load_adapters({role: str((folder / role).resolve()) for role in trainer.steps})

        def show(predictions: Sequence[Prediction], steps: int) -> None:
            seen[0], right[0] = seen[0] + len(predictions), right[0] + sum(p.correct for p in predictions)
            done = predictions[-1].number + 1
            progress.already = done - seen[0]
            progress.update(done, right=right[0] / seen[0], steps=steps)

        async def run_stream() -> None:
            try:
                await worker.start()
                await stream(
                    problems, tree_of, trainer, serve, here.path, window=config.flow.window,
                    batch=config.dpo.batch_size, overlap=config.flow.overlap, on_window=show,
                )  # fmt: skip
            finally:
                await worker.close()

        with progress:
            asyncio.run(run_stream())
        predictions, steps = read_stream(here.path)
        state = here.path / read_json(here.path / "stream.json")["checkpoint"]
        counts = {
            "problems": len(predictions), "correct": sum(p.correct for p in predictions), "steps": dict(trainer.steps),
            "pairs": {role: sum(getattr(p, f"{role}_pairs") for p in predictions) for role in trainer.steps},
            "staleness": sum(p.staleness for p in predictions) / max(1, len(predictions)),
            "tokens": sum(p.tokens for p in predictions), "losses": [step["loss"] for step in steps],
            "dropped": sum(step.get("dropped", 0) for step in steps),
        }  # fmt: skip
        say_dropped("stream", counts["dropped"], config.dpo.max_length)
        return StageResult((here.path / "stream.jsonl", state, *shards(here.path)), counts)

    settings = settings_of(config, "flow", "dpo") | {"run": seed_of(config.run)}
    return Stage(here, "stream", settings, lambda: {"base": input_digest(run.round(0), "base")}, work, resumes=True)


def _trained_stage(config: Config, run: RunDir) -> Stage:
    here, before = run.round(1), run.round(0)

    def work() -> StageResult:
        from rstar.training.data import read_rows
        from rstar.training.dpo import AdapterTrainer
        from rstar.types import PreferenceRow

        folder, heldout = here.eval / "flow", load_problems(config.problems).heldout
        job = search_job(config, base_checkpoint(config, run), [flow_pass(config, folder)], adapters_of(run))
        search_passes(job, [heldout], config.cluster, "trained flow")
        predictions, _ = read_stream(here.path)
        outcomes = {"trained flow": [p.correct for p in predictions]}
        for name, trees in (("frozen flow", "stream-flow"), ("single model", "stream-single")):
            found = {tree.problem.id: tree.solved for tree in trees_of(before.eval / trees)}
            outcomes[name] = [found[p.problem_id] for p in predictions]
        trainer = AdapterTrainer(base_checkpoint(config, run), ["answer", "stop"], config.dpo, seed=config.run.seed)
        pairs = read_rows(before.pairs, PreferenceRow)
        kinds = {role: [row for row in pairs if row.kind == role] for role in trainer.steps}
        fresh_margins = {role: trainer.margins(role, rows) for role, rows in kinds.items() if rows}
        trainer.load(adapters_of(run))
        margins = {role: (one, trainer.margins(role, kinds[role])) for role, one in fresh_margins.items()}
        stale = sum(p.staleness for p in predictions) / max(1, len(predictions))
        measured, untrained = measured_accuracy(config, folder), read_json(before.eval_json)["methods"]
        accuracies = {
            "single model": untrained["greedy"],
            "untrained flow": untrained["flow"],
            "trained flow": measured,
        }
        tables = [
            accuracy_table("Held-out problems", accuracies),
            flow_table({"untrained flow": trees_of(before.eval / "pairs"), "stream": trees_of(here.path)}),
            margin_table(margins, dict(trainer.steps), stale),
        ]
        curves = [progressive_curve(outcomes)]
        return finished_eval(here, {"flow": measured}, shards(folder), curves=curves, tables=tables)

    def inputs() -> dict[str, str]:
        return {"stream": input_digest(here, "stream"), "frozen": input_digest(before, "eval")}

    return Stage(here, "eval", settings_of(config), inputs, work, resumes=True, trees=(here.eval,))
