"""The `rstar` command. A user's mistake is printed in one line without a traceback, exit code 2."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rstar.types import UserError

EXAMPLES = """examples:
  rstar evolve configs/rstar_math/quickstart.yaml            run all rounds; the same command resumes
  rstar evolve configs/rstar_math/quickstart.yaml run.dir=runs/mine rounds.r3.search.rollouts=8
  rstar round 2 configs/rstar_math/quickstart.yaml           run one round
  rstar show runs/quickstart --problem chain_sum-0003        print a search tree
  rstar config configs/rstar_math/quickstart.yaml            print the resolved settings
"""

SEARCH_EXAMPLES = """rstar search configs/rstar_math/quickstart.yaml --round 1
  rstar search configs/rstar_math/quickstart.yaml --round 4 --continue 64 --unsolved
  rstar search configs/rstar_math/quickstart.yaml --round 2 --seeds 1,2
  rstar search configs/rstar_math/quickstart.yaml --round 2 --rescore other/round_03/ppm"""
TRAIN_EXAMPLES = """rstar train ppm configs/rstar_math/tiny.yaml --round 2
  rstar train policy runs/mine/round_01/sft.jsonl --model smollm2 --out runs/policy sft.epochs=1 sft.batch_size=8
  rstar train ppm runs/mine/round_01 --model runs/policy --out runs/ppm --config configs/rstar_math/quickstart.yaml"""

EVAL_EXAMPLES = """rstar eval configs/rstar_math/quickstart.yaml --round 1
  rstar eval runs/mine/round_04/policy --ppm runs/mine/round_04/ppm --benchmarks gsm8k,math500,mine.jsonl \\
      --trajectories 1,4,16 --config configs/rstar_math/quickstart.yaml --out runs/eval
  rstar eval runs/mine/round_04/ppm --ppm-quality runs/mine/round_03"""


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments))
    unknown = [text for text in rest if text.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    if not hasattr(options, "act"):
        parser.print_help()
        return 0
    try:
        return int(options.act(options) or 0)
    except UserError as error:
        return _complain(error)
    except ExceptionGroup as group:
        mistakes, _ = group.split(UserError)
        if mistakes is None:
            raise
        return _complain(_first(mistakes))
    except KeyboardInterrupt as stop:
        if options.act is not _one_stage:  # its driver says it
            by = f" by {stop}" if stop.args else ""
            print(f"\nstopped{by}; the same command resumes: {shlex.join(['rstar', *arguments])}", file=sys.stderr)
        return _stop_code(stop)


def _stop_code(stop: KeyboardInterrupt) -> int:
    from rstar.stopping import REQUEUE

    return REQUEUE if stop.args else 130


def _complain(error: BaseException) -> int:
    print(f"rstar: {error}", file=sys.stderr)
    return 2


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="rstar",
        description="Self-evolving math reasoning: tree search, executed steps, Q-values, SFT, preference model.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def with_config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", help="a YAML file, see configs/")
        text = "key=value settings laid over the file"
        sub.add_argument("overrides", nargs="*", default=[], help=text, metavar="key=value")

    def command(name: str, act: Any, text: str, example: str, *, config: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=raw,
        )
        sub.set_defaults(act=act)
        if config:
            with_config(sub)
        return sub

    evolve = command(
        "evolve", _evolve, "run all rounds, or what is left of them", "rstar evolve configs/rstar_math/quickstart.yaml"
    )
    evolve.add_argument("--dry-run", action="store_true", help="print the plan of all rounds and what it may cost")
    evolve.add_argument("--fresh", action="store_true", help="remove the run's folder first and start over")
    one = command(
        "round", _round, "run one round", "rstar round 2 configs/rstar_math/quickstart.yaml search.c=1", config=False
    )
    one.add_argument("number", type=int, help="round number, 0 for the base")
    with_config(one)
    for name, act, text, example in (
        ("search", _search, "grow one round's trees, or take the finished ones up again", SEARCH_EXAMPLES),
        ("extract", _stage, "take one round's training rows from its trees", "rstar extract CONFIG.yaml --round 1"),
    ):
        sub = command(name, act, text, example)
        sub.add_argument("--round", type=int, default=1, dest="number", help="round number (default 1)")
        sub.set_defaults(stages=(name,))
        if name == "search":
            sub.add_argument("--continue", type=int, default=0, dest="rollouts", metavar="ROLLOUTS",
                             help="grow the finished trees to so many rollouts")  # fmt: skip
            sub.add_argument("--unsolved", action="store_true", help="only those of problems without a correct answer")
            sub.add_argument("--seeds", type=_numbers, default=(), help="add trees of these seeds: 1,2")
            sub.add_argument("--rescore", default="", metavar="PPM", help="exchange the PPM values for this PPM's")
    evaluation = command(
        "eval", _eval, "measure one round (CONFIG.yaml --round N), or any models on any benchmarks", EVAL_EXAMPLES,
        config=False,
    )  # fmt: skip
    evaluation.add_argument("targets", nargs="+", metavar="MODEL|CONFIG.yaml|key=value")
    evaluation.add_argument("--round", type=int, default=1, dest="number", help="round of CONFIG.yaml (default 1)")
    evaluation.add_argument(
        "--benchmarks", default="", help="names and files: gsm8k,math500,mine.jsonl,gsm8k=copy.json"
    )
    evaluation.add_argument("--methods", default="", help="of greedy,sample,maj,bon,beam,dvts,mcts")
    evaluation.add_argument("--trajectories", default="1,4,16,64", help="numbers of samples or searches (%(default)s)")
    evaluation.add_argument("--ppm", action="append", default=[], metavar="FOLDER", help="one, or one for each model")
    evaluation.add_argument("--orm", action="append", default=[], metavar="FOLDER", help="one, or one for each model")
    evaluation.add_argument(
        "--limit", type=int, default=0, help="only the first N problems of each benchmark, or trees"
    )
    evaluation.add_argument("--config", default="", help="a recipe's YAML file whose model, engine, ... settings hold")
    evaluation.add_argument("--out", default="runs/eval", help="folder of the results (default %(default)s)")
    evaluation.add_argument(
        "--ppm-quality", default="", metavar="TREES|STEPS.jsonl",
        help="measure the PPM given as MODEL by itself, on graded trees or on step-labelled solutions",
    )  # fmt: skip
    evaluation.set_defaults(overrides=[])
    train = command(
        "train", _train, "train one round's policy or PPM (CONFIG.yaml --round N), or one from rows or trees",
        TRAIN_EXAMPLES, config=False,
    )  # fmt: skip
    train.add_argument("what", choices=("policy", "ppm", "verifier"))
    train.add_argument("source", metavar="CONFIG.yaml|ROWS.jsonl|TREES", help="a round's config, or rows, or a folder")
    train.add_argument("overrides", nargs="*", default=[], help="key=value settings", metavar="key=value")
    train.add_argument("--round", type=int, default=1, dest="number", help="round of CONFIG.yaml (default 1)")
    train.add_argument("--model", default="", help="of rows or trees: what is trained, a folder, hub id or smollm2")
    train.add_argument("--out", default="", help="of rows or trees: folder of the checkpoint")
    train.add_argument("--config", default="", help="of rows or trees: a YAML file whose sft, ppm and extract hold")

    show = command(
        "show",
        _show,
        "print the search trees of a problem",
        "rstar show runs/quickstart --problem chain_sum-0003",
        config=False,
    )
    show.add_argument("run", help="a run's folder")
    show.add_argument("--problem", default="", help="problem id; without it the ids are listed")
    show.add_argument("--round", type=int, default=None, dest="number", help="only this round")
    show.add_argument("--width", type=int, default=100, help="columns (default 100)")
    report = command(
        "report", _report, "write report.html and print the table", "rstar report runs/quickstart", config=False
    )
    report.add_argument("run", help="a run's folder")
    report.add_argument("--unsolved", type=int, default=20, metavar="N", help="list so many unsolved (default 20)")
    command(
        "config", _config, "print the resolved settings", "rstar config configs/rstar_math/quickstart.yaml search.c=1"
    )
    command(
        "doctor",
        _doctor,
        "check this machine: versions, cores, memory, sandbox, model packages",
        "rstar doctor",
        config=False,
    )
    stage = commands.add_parser("stage")  # what `evolve` starts for each stage; holds no lock of its own
    stage.add_argument("number", type=int)
    stage.add_argument("stage")
    stage.add_argument("config")
    stage.add_argument("overrides", nargs="*", default=[])
    stage.set_defaults(act=_one_stage)
    return parser


# -- rounds ------------------------------------------------------------------------------------------------------------


def _evolve(options: argparse.Namespace) -> int:
    module, config = _load(options)
    if options.dry_run:
        from rstar.recipes.plan import plan

        print(plan(module, config))
        return 0
    run = module.run_dir(config)
    if options.fresh and run.path.exists():
        import shutil

        run.acquire()
        shutil.rmtree(run.path)
        run.release()
    return _drive(options, module, config, range(config.run.rounds + 1))


def _round(options: argparse.Namespace) -> int:
    module, config = _load(options)
    return _drive(options, module, config, [options.number])


def _drive(options: argparse.Namespace, module: ModuleType, config: Any, numbers: Sequence[int]) -> int:
    """Run the rounds' unfinished stages, each in a process of its own, and refresh the report after each round."""
    from rstar.cluster import ray_session
    from rstar.stopping import stop_on_signals

    stop_on_signals()
    run, begun, ran = module.run_dir(config), time.monotonic(), 0
    run.acquire()
    try:
        problems = module.check(config)
        print(f"{run.path}: {len(problems.train)} training problems, {len(problems.heldout)} held out")
        waiting = [s for number in numbers for s in module.stages(config, number)]
        while waiting and waiting[0].finished() is not None:  # a missing earlier stage is found before Ray starts
            waiting.pop(0)
        if waiting:
            with ray_session(config.cluster):
                for stage in waiting:
                    if stage.finished() is None:
                        _run_process(options, stage.round.number, stage.name)
                        ran += 1
                    if stage.name == "eval":
                        _refresh(run.path)
        table = _refresh(run.path)
    finally:
        run.release()
    print(("all done" if not ran else f"finished in {(time.monotonic() - begun) / 60:.1f} minutes") + "\n")
    print(table)
    print(f"\nreport: {run.path / 'report.html'}")
    return 0


def _run_process(options: argparse.Namespace, number: int, stage: str) -> None:
    command = [sys.executable, "-m", "rstar", "stage", str(number), stage, options.config, *options.overrides]
    from rstar.stopping import run_stage

    code = run_stage(command)
    if code:
        raise UserError(
            f"stage {stage} of round {number} ended with exit code {code}", how="mend it; the same command resumes"
        )


def _refresh(run: Path) -> str:
    from rstar.report.html import write_report
    from rstar.report.results import results, results_table

    write_report(run)
    return results_table(results(run))


def _one_stage(options: argparse.Namespace) -> int:
    from rstar.stopping import stop_with_driver

    stop_with_driver()
    module, config = _load(options)
    for stage in module.stages(config, options.number):
        if stage.name == options.stage:
            stage.execute()
            return 0
    names = ", ".join(stage.name for stage in module.stages(config, options.number))
    raise UserError(f"round {options.number} has no stage {options.stage}", need=f"one of {names}")


def _stage(options: argparse.Namespace) -> int:
    from rstar.stopping import stop_on_signals

    stop_on_signals()
    module, config = _load(options)
    run = module.run_dir(config)
    run.acquire()
    try:
        module.check(config)
        from rstar.cluster import ray_session

        for stage in module.stages(config, options.number):
            if stage.name not in options.stages:
                continue
            if stage.finished() is not None:
                print(f"{stage.round.path}: {stage.name} is done")
                continue
            with ray_session(config.cluster):
                _run_process(options, options.number, stage.name)
    finally:
        run.release()
    return 0


def _search(options: argparse.Namespace) -> int:
    from rstar.recipes.regrow import Change, take_up

    change = Change(options.rollouts, options.unsolved, options.seeds, options.rescore)
    if change == Change():
        return _stage(options)
    module, config = _load(options)
    run = module.run_dir(config)
    run.acquire()
    try:
        module.check(config)
        options.overrides = [
            *options.overrides,
            *take_up(module, config, (options.config, options.overrides), options.number, change),
        ]
    finally:
        run.release()
    _stage(options)
    print("these trees are described by, and `rstar evolve` goes on with:")
    print(shlex.join(["rstar", "evolve", options.config, *options.overrides]))
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, need numbers: 1,2") from None


def _eval(options: argparse.Namespace) -> int:
    first, *rest = options.targets
    if first.endswith((".yaml", ".yml")):
        options.config, options.overrides, options.stages = first, [*rest, *options.overrides], ("eval",)
        return _stage(options)
    from rstar.comparison.command import evaluate_models

    texts = [*options.targets, *options.overrides]
    settings = [text for text in texts if "=" in text and not Path(text).exists()]
    print(evaluate_models([text for text in texts if text not in settings], settings, options))
    return 0


def _train(options: argparse.Namespace) -> int:
    if options.source.endswith((".yaml", ".yml")):
        options.config, options.stages = options.source, (options.what,)
        return _stage(options)
    from rstar.recipes.training import train_from_files

    print(train_from_files(options))
    return 0


def _load(options: argparse.Namespace) -> tuple[ModuleType, Any]:
    from rstar.recipes import load_config

    return load_config(options.config, options.overrides)


# -- looking -----------------------------------------------------------------------------------------------------------


def _show(options: argparse.Namespace) -> int:
    from rstar.report.show import find_trees, problem_ids, show_tree

    if not options.problem:
        print("\n".join(problem_ids(Path(options.run))))
        return 0
    for tree in find_trees(Path(options.run), options.problem, options.number):
        print(show_tree(tree, width=options.width))
    return 0


def _report(options: argparse.Namespace) -> int:
    from rstar.report.unsolved import unsolved_text

    print(_refresh(Path(options.run)))
    if unsolved := unsolved_text(Path(options.run), limit=options.unsolved):
        print(f"\n{unsolved}")
    print(f"\nreport: {Path(options.run) / 'report.html'}")
    return 0


def _config(options: argparse.Namespace) -> int:
    from rstar.config import to_yaml

    print(to_yaml(_load(options)[1]), end="")
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from rstar.doctor import examine

    checks = examine()
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'} {check.name:<{width}}  {check.detail}")
    return 0 if all(check.ok for check in checks) else 1
