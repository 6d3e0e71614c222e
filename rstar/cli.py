"""The `rstar` command. A user's mistake is printed in one line without a traceback, exit code 2."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rstar import commands
from rstar.types import UserError

EXAMPLES = """examples:
  rstar evolve configs/rstar_math/quickstart.yaml            run all rounds; the same command resumes
  rstar evolve configs/rstar_math/quickstart.yaml run.dir=runs/mine rounds.r3.search.rollouts=8
  rstar status runs/quickstart                               from another shell: stage, figures, time left
  rstar show runs/quickstart --problem long_sums/train/4     print a problem's search trees
  rstar init mine                                            begin with own problems and an own model
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
    if getattr(options, "unsafe_local_exec", False):
        options.overrides = [*options.overrides, "sandbox.unsafe_local_exec=true"]
    again = [word for word in arguments if word not in ("--fresh", "--repair")]  # which are for the first start only
    options.command = shlex.join(["rstar", *again])
    if options.print_completion:
        print(completion(parser, options.print_completion))
        return 0
    if not hasattr(options, "act"):
        parser.print_help()
        return 0
    try:
        code = int(options.act(options) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        looks = (commands.show, commands.status, commands.config, commands.doctor, commands.report)
        if options.act not in looks and not getattr(options, "dry_run", False):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `rstar show RUN | head` has seen enough
        return 0
    except UserError as error:
        print(f"rstar: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if options.act is not commands.stage_process:  # its driver says it
            by = f" by {stop}" if stop.args else ""
            print(f"\nstopped{by}; the same command resumes: {options.command}", file=sys.stderr)
        return _stop_code(stop)


def _stop_code(stop: KeyboardInterrupt) -> int:
    from rstar.stopping import REQUEUE

    return REQUEUE if stop.args else 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="rstar",
        description="Self-evolving math reasoning: tree search, executed steps, Q-values, SFT, preference model.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument(
        "--print-completion", choices=("bash", "zsh"), default="",
        help='completion of a shell: eval "$(rstar --print-completion bash)" in ~/.bashrc',
    )  # fmt: skip
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")

    def with_config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", help="a YAML file, see configs/")
        text = "key=value settings laid over the file"
        sub.add_argument("overrides", nargs="*", default=[], help=text, metavar="key=value")

    def command(name: str, act: Any, text: str, example: str, *, config: bool = True) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
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
        "evolve",
        commands.evolve,
        "run all rounds, or what is left of them",
        "rstar evolve configs/rstar_math/quickstart.yaml",
    )
    evolve.add_argument("--dry-run", action="store_true", help="print the plan of all rounds and what it may cost")
    evolve.add_argument("--fresh", action="store_true", help="remove what the run has made first and start over")
    one = command(
        "round",
        commands.one_round,
        "run one round",
        "rstar round 2 configs/rstar_math/quickstart.yaml search.c=1",
        config=False,
    )
    one.add_argument("number", type=int, help="round number, 0 for the base")
    with_config(one)
    for sub in (evolve, one):
        sub.add_argument("--repair", action="store_true", help="first take damaged files out, to make them again")
    for name, act, text, example in (
        ("search", commands.search, "grow one round's trees, or take the finished ones up again", SEARCH_EXAMPLES),
        (
            "extract",
            commands.one_stage,
            "take one round's training rows from its trees",
            "rstar extract CONFIG.yaml --round 1",
        ),
    ):
        sub = command(name, act, text, example)
        sub.add_argument("--round", type=int, default=1, dest="number", help="round number (default 1)")
        sub.set_defaults(stages=(name,))
        if name == "search":
            searching = sub
            sub.add_argument("--continue", type=int, default=0, dest="rollouts", metavar="ROLLOUTS",
                             help="grow the finished trees to so many rollouts")  # fmt: skip
            sub.add_argument("--unsolved", action="store_true", help="only those of problems without a correct answer")
            sub.add_argument("--seeds", type=_numbers, default=(), help="add trees of these seeds: 1,2")
            sub.add_argument("--rescore", default="", metavar="PPM", help="exchange the PPM values for this PPM's")
    evaluation = command(
        "eval",
        commands.evaluate,
        "measure one round (CONFIG.yaml --round N), or any models on any benchmarks",
        EVAL_EXAMPLES,
        config=False,
    )
    evaluation.add_argument("targets", nargs="+", metavar="MODEL|CONFIG.yaml|key=value")
    evaluation.add_argument("--round", type=int, default=1, dest="number", help="round of CONFIG.yaml (default 1)")
    evaluation.add_argument(
        "--benchmarks", default="", help="names and files: gsm8k,math500,mine.jsonl,gsm8k=copy.json"
    )
    evaluation.add_argument("--methods", default="", help="of greedy,sample,maj,bon,beam,dvts,mcts")
    evaluation.add_argument("--trajectories", default="", help="numbers of samples or searches (1,4,16,64)")
    evaluation.add_argument("--ppm", action="append", default=[], metavar="FOLDER", help="one, or one for each model")
    evaluation.add_argument("--orm", action="append", default=[], metavar="FOLDER", help="one, or one for each model")
    evaluation.add_argument(
        "--limit", type=int, default=0, help="only the first N problems of each benchmark, or of trees"
    )
    evaluation.add_argument("--config", default="", help="a recipe's YAML file whose model, engine, ... settings hold")
    evaluation.add_argument("--out", default="", help="folder of the results (default runs/eval)")
    evaluation.add_argument(
        "--ppm-quality", default="", metavar="TREES|STEPS.jsonl",
        help="measure the PPM given as MODEL by itself, on graded trees or on step-labelled solutions",
    )  # fmt: skip
    evaluation.set_defaults(overrides=[])
    for sub in (evolve, one, searching, evaluation):
        sub.add_argument("--unsafe-local-exec", action="store_true",
                         help="where a host has no locks, run steps without: says what is lost")  # fmt: skip
    train = command(
        "train", commands.train,
        "train a round's policy, PPM or verifier (CONFIG.yaml --round N), or a policy or PPM from files",
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
        commands.show,
        "print the search trees of a problem",
        "rstar show runs/quickstart --problem long_sums/train/4",
        config=False,
    )
    show.add_argument("run", help="a run's folder")
    show.add_argument("--problem", default="", help="problem id; without it the ids are listed")
    show.add_argument("--round", type=int, default=None, dest="number", help="only this round")
    show.add_argument("--width", type=int, default=100, help="columns (default 100)")
    state = command(
        "status", commands.status, "say where a run is, from any shell that sees its folder",
        "rstar status runs/quickstart", config=False,
    )  # fmt: skip
    state.add_argument("run", help="a run's folder")
    state.add_argument("--json", action="store_true", help="all of it, for programs")
    report = command(
        "report", commands.report, "write report.html and print the table", "rstar report runs/quickstart", config=False
    )
    report.add_argument("run", help="a run's folder")
    report.add_argument("--trees", nargs="+", default=(), metavar="ID", help="show these trees or problems too")
    report.add_argument("--unsolved", type=int, default=20, metavar="N", help="list so many unsolved (default 20)")
    begin = command(
        "init", commands.init, "write a commented config for own problems and an own model, and three sample problems",
        "rstar init mine", config=False,
    )  # fmt: skip
    begin.add_argument("folder", help="a new folder")
    command(
        "config",
        commands.config,
        "print the resolved settings",
        "rstar config configs/rstar_math/quickstart.yaml search.c=1",
    )
    examined = command(
        "doctor", commands.doctor, "check this machine, and a config's problems, model and tokenizer",
        "rstar doctor\n  rstar doctor mine/config.yaml model.base=path/to/model", config=False,
    )  # fmt: skip
    examined.add_argument("config", nargs="?", default="", help="a YAML file")
    examined.add_argument("overrides", nargs="*", default=[], help="key=value settings", metavar="key=value")
    stage = subparsers.add_parser("stage")  # what `evolve` starts for each stage; holds no lock of its own
    stage.add_argument("call")
    stage.set_defaults(act=commands.stage_process)
    return parser


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that completes commands, options and file names in `shell`."""
    import shtab

    for sub in next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices.values():
        for action in sub._actions:
            if action.nargs != 0 and action.type is None and action.choices is None:
                action.complete = shtab.FILE
    return str(shtab.complete(parser, shell))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, need numbers: 1,2") from None
