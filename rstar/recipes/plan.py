"""`rstar evolve CONFIG --dry-run`: what a run would do, what of it is done, what it may cost. Reads files only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rstar.config import ProblemsSection, SearchSection, TrainSection, for_round
from rstar.manifest import RunDir, run_dir
from rstar.problems import BENCHMARKS, load_problems
from rstar.recipes import rstar_math
from rstar.recipes.evaluation import eval_passes, problem_limit
from rstar.report.results import count
from rstar.run import Recipe, Stage
from rstar.types import UserError


@dataclass(frozen=True)
class Rates:
    """What a search is estimated from: the most its settings allow, or what an earlier round's search took."""

    expansions: float  # per rollout, each one engine call for all its candidates
    tokens: float  # generated tokens of one candidate
    unsolved: float  # share of problems without a correct answer, in [0, 1]
    source: str


@dataclass(frozen=True)
class Cost:
    """Estimated work of a search."""

    calls: float
    samples: float
    tokens: float


def plan(recipe: Recipe[Any], config: Any) -> str:
    """The plan of all rounds as text. Needs no GPU, model or network; writes nothing.

    Of recipes other than rStar-Math it lists the stages and their state, without costs. Raises UserError for settings
    that do not go together.
    """
    recipe.check_settings(config)
    run = run_dir(config.run)
    train, heldout, note = problem_counts(config.problems)
    lines = [f"{run.path}: {note}; {count(heldout)} held out"]
    total = 0.0
    rates: Rates | None = None
    for number in range(config.run.rounds + 1):
        settings = for_round(config, number)
        lines += ["", f"round {number}" if number else f"round 0: the base model, {settings.model.base}"]
        for stage in recipe.stages(config, number):
            texts = [""]
            if isinstance(settings, rstar_math.Config):
                known = rates if rates and rates.source != "at most" else at_most(settings.search)
                rates = measured(run, number) or known
                texts, tokens = _details(settings, stage, train, heldout, rates)
                total += tokens
            word, _, why = state(stage).partition(": ")
            first, *more = [why, *texts] if why else texts
            lines.append(f"  {stage.name:<10} {word:<7}  {first}".rstrip())
            lines += [f"  {'':<18}  {text}" for text in more]
    if rates is not None:
        lines += ["", f"generated in all: {count(round(total))} tokens", *assumptions(config)]
    return "\n".join(lines)


def state(stage: Stage) -> str:
    """done, to do, or why the stage's earlier output cannot stand."""
    try:
        return "done" if stage.finished() is not None else "to do"
    except UserError as error:
        return "to do" if stage.round.record(stage.name) is None else f"refused: {error.got}"


def assumptions(config: Any) -> Iterator[str]:
    """How the figures were estimated."""
    yield "  at most: every rollout makes search.max_depth expansions, every candidate has search.max_step_tokens"
    yield "    tokens, and no problem is solved before the last escalation and the second pass"
    yield "  as in round N: expansions, tokens and unsolved problems as that round's search has measured them"
    if config.problems.decontaminate:
        yield f"  counted before decontamination against {len(config.problems.decontaminate)} sets"


def problem_counts(section: ProblemsSection) -> tuple[int, int, str]:
    """(training problems, held-out problems, where the first number comes from); local files and generators are read,
    anything else counts as `problems.limit`, or as many as the benchmark publishes."""
    hub = section.name in BENCHMARKS and not section.path
    missing = [path for path in (section.path, section.heldout_path) if path and not Path(path).is_file()]
    if not hub and not missing:
        local = replace(section, decontaminate=[name for name in section.decontaminate if Path(name).is_file()])
        found = load_problems(local)
        return len(found.train), len(found.heldout), f"{count(len(found.train))} training problems"
    stem = Path(section.heldout_path).stem
    heldout = BENCHMARKS[stem].size if stem in BENCHMARKS else section.heldout
    why = f"{section.name} is read from the hub" if hub else f"{missing[0]} is not there"
    published = hub and section.split == BENCHMARKS[section.name].split  # its other splits' sizes are not known here
    size = section.limit or (BENCHMARKS[section.name].size if published else 0)
    if not size:
        return 0, heldout, f"an unknown number of training problems ({why}; set problems.limit)"
    named = "problems.limit" if section.limit else "the benchmark's published size"
    return size, heldout, f"{count(size)} training problems by {named} ({why})"


def at_most(search: SearchSection) -> Rates:
    """What the settings allow."""
    return Rates(search.max_depth, search.max_step_tokens, 1.0, "at most")


def measured(run: RunDir, number: int) -> Rates | None:
    """Averages of the search of the round before, or of round `number` itself where it is done."""
    for earlier in (number, number - 1):
        record = run.round(earlier).record("search") if earlier > 0 else None
        if record is None or not record.counts.get("calls"):
            continue
        counts: Mapping[str, Any] = record.counts
        solved, problems = counts["solved_by_level"]["all"]
        samples = counts["calls"] * record.settings["search"]["candidates"]
        return Rates(
            counts["calls"] / max(1, counts["rollouts"]),
            counts["tokens"] / samples,
            1 - solved / max(1, problems),
            f"as in round {earlier}",
        )
    return None


def search_cost(search: SearchSection, problems: int, rates: Rates) -> Cost:
    """The work of one pass over `problems`, its escalation and second pass included."""
    each = len(search.seeds) * (search.rollouts + rates.unsolved * max(search.escalate, default=0))
    rollouts = problems * (each + rates.unsolved * search.second_pass)
    samples = float(search.candidates)
    match search.method:
        case "sample":
            samples = 1.0
        case "beam" | "dvts":
            rollouts, samples = problems * len(search.seeds), float(search.beam_width * search.candidates)
    calls = rollouts * rates.expansions
    return Cost(calls, calls * samples, calls * samples * rates.tokens)


def _details(
    config: rstar_math.Config, stage: Stage, train: int, heldout: int, rates: Rates
) -> tuple[list[str], float]:
    """Lines about one stage, and the tokens it generates."""
    number, search, record = stage.round.number, config.search, stage.round.record(stage.name)
    match stage.name:
        case "base":
            warm = (
                f"warm-up: {config.warmup.epochs} epochs on worked solutions" if config.warmup.enabled else "as it is"
            )
            return [f"{warm}{', step delimiters as tokens' if config.model.step_tokens else ''}"], 0.0
        case "search":
            cost = search_cost(search, train, rates)
            if record is not None:
                cost = replace(cost, tokens=record.counts["tokens"], calls=record.counts["calls"])
            source = "measured" if record is not None else rates.source
            scored = f", {count(round(cost.samples))} PPM scores" if search.use_ppm and record is None else ""
            return [
                f"policy: {_writer(config, number)}",
                f"guided by {f'the PPM of round {number - 1}' if search.use_ppm else 'terminals only'}",
                f"{count(train)} problems x {len(search.seeds)} seed{'s' * (len(search.seeds) > 1)} "
                f"{search.seeds} x {search.rollouts} rollouts, {search.candidates} candidates, "
                f"T {search.temperature:g}, depth {search.max_depth}",
                *(
                    [f"unsolved: up to +{', then up to +'.join(map(str, search.escalate))} rollouts"]
                    if search.escalate
                    else []
                ),
                *([f"still unsolved: a second pass of {search.second_pass}"] if search.second_pass else []),
                f"{source}: {count(round(cost.tokens))} tokens in {count(round(cost.calls))} engine calls{scored}",
            ], cost.tokens
        case "extract":
            kept = f"top {config.extract.sft_top} solutions a problem"
            if record is not None:
                return [f"{count(record.counts['sft_rows'])} SFT rows, {count(record.counts['pairs'])} pairs"], 0.0
            return [f"{kept}, {config.extract.positives} x {config.extract.negatives} pairs a prefix"], 0.0
        case "policy":
            rows = round(config.extract.sft_top * train * (1.0 if rates.source == "at most" else 1 - rates.unsolved))
            steps = (
                f"{rates.source}: {count(rows)} rows, {count(round(config.sft.epochs * rows / config.sft.batch_size))}"
            )
            return [f"from {config.model.base}: {_training(config.sft)}", f"{steps} optimizer steps"], 0.0
        case "ppm":
            loss = {"pairwise": "pairwise ranking", "mse": "Q regression", "bce": "outcomes"}.get(config.ppm.loss, "")
            return [f"from this round's policy: {_training(config.ppm)}, {loss}"], 0.0
    passes = eval_passes(config.eval, search, stage.round.eval, with_ppm=number > 0)
    sizes = {m: min(heldout, problem_limit(m, config.eval) or heldout) for m in passes}
    costs = {m: search_cost(one.search, sizes[m], rates) for m, one in passes.items()}
    tokens = sum(cost.tokens for cost in costs.values())
    if record is not None:
        tokens = float(sum(record.counts[m]["tokens"] for m in costs if m in record.counts))
    source = "measured" if record is not None else rates.source
    texts = [f"{sizes[m]} problems by {m}{_how(one.search)}" for m, one in passes.items()]
    return [*texts, f"{source}: {count(round(tokens))} tokens"], tokens


def _writer(config: rstar_math.Config, number: int) -> str:
    if number == 1 and config.bootstrap.enabled:
        return f"{config.bootstrap.engine.model or config.bootstrap.model.base} ({config.bootstrap.engine.kind})"
    source = f"round {number - 1}" if number > 1 else "the base model"
    return f"{source} ({config.engine.kind})"


def _training(section: TrainSection) -> str:
    rank = f", LoRA {section.lora_rank}" if section.lora_rank else ""
    return (
        f"{section.epochs:g} epoch{'s' * (section.epochs != 1)}, batch {section.batch_size}, "
        f"lr {section.learning_rate:g} {section.schedule}, {section.max_length} tokens{rank}"
    )


def _how(search: SearchSection) -> str:
    if search.method == "sample":
        return f" ({search.rollouts} samples)" if search.rollouts > 1 else ""
    if search.method == "mcts":
        return f" ({len(search.seeds)} trajectories x {search.rollouts} rollouts, {search.candidates} candidates)"
    return f" (beam {search.beam_width}, {search.candidates} candidates)"
