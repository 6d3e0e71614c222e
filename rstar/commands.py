"""What each command of `rstar` does. Heavy imports happen inside, so that `--help` is instant."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rstar.types import UserError

if TYPE_CHECKING:
    from rstar.run import Recipe, Stage

# -- rounds ------------------------------------------------------------------------------------------------------------


def evolve(options: argparse.Namespace) -> int:
    recipe, config = load_options(options)
    if options.dry_run:
        from rstar.recipes.plan import plan

        print(plan(recipe, config))
        return 0
    from rstar.manifest import run_dir

    run = run_dir(config.run)
    if options.fresh and run.path.exists():
        recipe.check(config)  # a mistake must not cost the old run
        run.acquire()
        run.clear()
        run.release()
    return _run(options, recipe, config, lambda stage: True)


def one_round(options: argparse.Namespace) -> int:
    recipe, config = _with_its_round(options)
    return _run(options, recipe, config, lambda stage: stage.round.number == options.number)


def one_stage(options: argparse.Namespace) -> int:
    """Of one round, the stage that `options.stages` names."""
    recipe, config = _with_its_round(options)
    stages = [stage.name for stage in recipe.stages(config, options.number)]
    if not set(stages) & set(options.stages):
        raise UserError(
            f"round {options.number} has no stage {' or '.join(options.stages)}",
            need=f"one that has; this one has {', '.join(stages)}",
        )
    return _run(
        options, recipe, config, lambda stage: stage.round.number == options.number and stage.name in options.stages
    )


def _run(options: argparse.Namespace, recipe: Recipe[Any], config: Any, only: Callable[[Stage], bool]) -> int:
    from rstar.run import evolve

    evolve(recipe, config, options.command, only=only, repair=getattr(options, "repair", False))
    return 0


def _with_its_round(options: argparse.Namespace) -> tuple[Recipe[Any], Any]:
    """Recipe and config; refuses a round that the config does not have."""
    recipe, config = load_options(options)
    if not 0 <= options.number <= config.run.rounds:
        raise UserError(
            f"round {options.number}",
            need=f"0 to run.rounds={config.run.rounds}",
            how=f"set run.rounds={options.number}",
        )
    return recipe, config


def stage_process(options: argparse.Namespace) -> int:
    from rstar.run import execute_file

    execute_file(Path(options.call))
    return 0


def search(options: argparse.Namespace) -> int:
    from rstar.manifest import run_dir
    from rstar.recipes.continue_search import Change, take_up

    change = Change(options.rollouts, options.unsolved, options.seeds, options.rescore)
    if change == Change():
        return one_stage(options)
    recipe, config = load_options(options)
    run = run_dir(config.run)
    run.acquire()
    try:
        recipe.check(config)
        options.overrides = [
            *options.overrides,
            *take_up(recipe, config, (options.config, options.overrides), options.number, change),
        ]
    finally:
        run.release()
    one_stage(options)
    print("these trees are described by, and `rstar evolve` goes on with:")
    print(shlex.join(["rstar", "evolve", options.config, *options.overrides]))
    return 0


_ROUNDS_ONLY = {
    "eval.methods": "--methods", "eval.samples": "--trajectories", "eval.trajectories": "--trajectories",
    "eval.problems": "--limit", "eval.search_problems": "--limit",
}  # fmt: skip


def evaluate(options: argparse.Namespace) -> int:
    first, *rest = options.targets
    if first.endswith((".yaml", ".yml")):
        for name in ("benchmarks", "methods", "trajectories", "limit", "ppm", "orm", "ppm_quality", "config", "out"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')} with {first}", need="models: rstar eval MODEL...")
        options.config, options.overrides, options.stages = first, [*rest, *options.overrides], ("eval",)
        return one_stage(options)
    from rstar.comparison.command import evaluate_models

    texts = [*options.targets, *options.overrides]
    settings = [text for text in texts if "=" in text and not Path(text).exists()]
    for key, flag in _ROUNDS_ONLY.items():
        if any(text.startswith(f"{key}=") for text in settings):
            raise UserError(f"{key} is of a round's evaluation", need=f"{flag}, for models that are compared")
    print(evaluate_models([text for text in texts if text not in settings], settings, options))
    return 0


def train(options: argparse.Namespace) -> int:
    if options.source.endswith((".yaml", ".yml")):
        for name in ("model", "out", "config"):
            if getattr(options, name):
                raise UserError(f"--{name} with {options.source}", need="rows or trees: rstar train policy ROWS|TREES")
        options.config, options.stages = options.source, (options.what,)
        return one_stage(options)
    from rstar.recipes.train_from_files import train_from_files

    print(train_from_files(options))
    return 0


def load_options(options: argparse.Namespace) -> tuple[Recipe[Any], Any]:
    from rstar.recipes import load_config

    return load_config(options.config, options.overrides)


# -- looking -----------------------------------------------------------------------------------------------------------


def status(options: argparse.Namespace) -> int:
    from rstar.status import status, status_text

    with redirect_stdout(sys.stderr):  # warnings about damaged files
        found = status(Path(options.run))
    print(json.dumps(asdict(found)) if options.json else status_text(found))
    return 0


def show(options: argparse.Namespace) -> int:
    from rstar.report.show import find_trees, problem_ids, show_tree

    if not options.problem:
        print("\n".join(problem_ids(Path(options.run))))
        return 0
    for tree in find_trees(Path(options.run), options.problem, options.number):
        print(show_tree(tree, width=options.width))
    return 0


def report(options: argparse.Namespace) -> int:
    from rstar.report.unsolved import unsolved_text
    from rstar.run import refresh_report

    print(refresh_report(Path(options.run), options.trees))
    if unsolved := unsolved_text(Path(options.run), limit=options.unsolved):
        print(f"\n{unsolved}")
    print(f"\nreport: {Path(options.run) / 'report.html'}")
    return 0


def init(options: argparse.Namespace) -> int:
    from rstar.init import write_project

    config, problems = write_project(Path(options.folder))
    print(f"{problems}: three problems; put yours there")
    print(f"{config}: all settings with their meaning; put your model there, then:")
    print(shlex.join(["rstar", "evolve", str(config), "--dry-run"]))
    return 0


def config(options: argparse.Namespace) -> int:
    from rstar.config import to_yaml

    print(to_yaml(load_options(options)[1]), end="")
    return 0


def doctor(options: argparse.Namespace) -> int:
    from rstar.doctor import examine

    well = True
    for check in examine(options.config, options.overrides):
        print(check, flush=True)
        well = well and check.ok
    return 0 if well else 1
