"""What each command of `rstar` does. Heavy imports happen inside, so that `--help` is instant."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from rstar.types import UserError

# -- rounds ------------------------------------------------------------------------------------------------------------


def evolve(options: argparse.Namespace) -> int:
    module, config = load_options(options)
    if options.dry_run:
        from rstar.recipes.plan import plan

        print(plan(module, config))
        return 0
    from rstar.rounds import run_dir

    run = run_dir(config.run)
    if options.fresh and run.path.exists():
        module.check(config)  # a mistake must not cost the old run
        run.acquire()
        run.clear()
        run.release()
    return _drive(options, module, config, range(config.run.rounds + 1))


def one_round(options: argparse.Namespace) -> int:
    module, config = _with_its_round(options)
    return _drive(options, module, config, [options.number])


def _with_its_round(options: argparse.Namespace) -> tuple[ModuleType, Any]:
    """Recipe and config; refuses a round that the config does not have."""
    module, config = load_options(options)
    if not 0 <= options.number <= config.run.rounds:
        raise UserError(
            f"round {options.number}",
            need=f"0 to run.rounds={config.run.rounds}",
            how=f"set run.rounds={options.number}",
        )
    return module, config


def _drive(options: argparse.Namespace, module: ModuleType, config: Any, numbers: Sequence[int]) -> int:
    """Run the rounds' unfinished stages, each in a process of its own, and refresh the report after each."""
    from rstar.cluster import ray_session
    from rstar.rounds import run_dir
    from rstar.stopping import stop_on_signals
    from rstar.store import write_json

    stop_on_signals()
    run, begun, ran, table = run_dir(config.run), time.monotonic(), 0, ""
    run.acquire()
    try:
        if options.repair:
            print("\n".join(run.repair()) or f"{run.path}: nothing is damaged", flush=True)
        if warning := run.other_versions():
            print(warning, flush=True)
        problems = module.check(config)
        counted = f"{run.path}: {len(problems.train)} training problems, {len(problems.heldout)} held out"
        print("\n".join([counted, *problems.left_out()]), flush=True)
        waiting = [s for number in numbers for s in module.stages(config, number)]
        plan = [(stage.round.number, stage.name) for stage in waiting]
        write_json(run.path / "driver.json", {"command": options.command, "stages": plan})
        while waiting and waiting[0].finished() is not None:  # a missing earlier stage is found before Ray starts
            waiting.pop(0)
        if waiting:
            with ray_session(config.cluster):
                for stage in waiting:
                    if stage.finished() is None:
                        _run_process(options, stage.round.number, stage.name)
                        ran += 1
                        table = _refresh(run.path)
        table = table or _refresh(run.path)
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


def _refresh(run: Path, trees: Sequence[str] = ()) -> str:
    from rstar.report.html import write_report
    from rstar.report.results import results, results_table

    write_report(run, ids=trees)
    return results_table(results(run))


def one_stage(options: argparse.Namespace) -> int:
    from rstar.report.progress import keep_in
    from rstar.rounds import run_dir
    from rstar.stopping import stop_with_driver

    stop_with_driver()
    module, config = load_options(options)
    keep_in(run_dir(config.run).path / "progress.json", number=options.number, stage=options.stage)
    for stage in module.stages(config, options.number):
        if stage.name == options.stage:
            stage.execute()
            return 0
    names = ", ".join(stage.name for stage in module.stages(config, options.number))
    raise UserError(f"round {options.number} has no stage {options.stage}", need=f"one of {names}")


def stage(options: argparse.Namespace) -> int:
    from rstar.rounds import run_dir
    from rstar.stopping import stop_on_signals

    stop_on_signals()
    module, config = _with_its_round(options)
    run = run_dir(config.run)
    run.acquire()
    try:
        module.check(config)
        from rstar.cluster import ray_session

        stages = module.stages(config, options.number)
        if not {stage.name for stage in stages} & set(options.stages):
            raise UserError(
                f"round {options.number} has no stage {' or '.join(options.stages)}",
                need=f"one that has; this one has {', '.join(stage.name for stage in stages)}",
            )
        for stage in stages:
            if stage.name not in options.stages:
                continue
            if stage.finished() is not None:
                print(f"{stage.round.path}: {stage.name} is done")
                continue
            with ray_session(config.cluster):
                _run_process(options, options.number, stage.name)
        if "eval" in options.stages:
            print(_refresh(run.path))
    finally:
        run.release()
    return 0


def search(options: argparse.Namespace) -> int:
    from rstar.recipes.regrow import Change, take_up
    from rstar.rounds import run_dir

    change = Change(options.rollouts, options.unsolved, options.seeds, options.rescore)
    if change == Change():
        return stage(options)
    module, config = load_options(options)
    run = run_dir(config.run)
    run.acquire()
    try:
        module.check(config)
        options.overrides = [
            *options.overrides,
            *take_up(module, config, (options.config, options.overrides), options.number, change),
        ]
    finally:
        run.release()
    stage(options)
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
        return stage(options)
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
        return stage(options)
    from rstar.recipes.training import train_from_files

    print(train_from_files(options))
    return 0


def load_options(options: argparse.Namespace) -> tuple[ModuleType, Any]:
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

    print(_refresh(Path(options.run), options.trees))
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
