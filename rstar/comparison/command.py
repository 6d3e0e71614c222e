"""`rstar eval MODEL...` from its command line to its files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rstar.comparison.ppm_quality import ppm_quality
from rstar.comparison.run import (
    DEFAULT_METHODS,
    DEFAULT_TRAJECTORIES,
    compare,
    contenders,
    load_questions,
    read_settings,
    usable,
)
from rstar.comparison.write import write_comparison
from rstar.manifest import RunDir
from rstar.types import UserError


def evaluate_models(models: Sequence[str], overrides: Sequence[str], options: argparse.Namespace) -> str:
    """Do what the options say; returns the text to print. Raises UserError before any model is loaded."""
    if not models:
        raise UserError("no model", need="a folder or a hub id")
    settings, out = read_settings(models[0], options.config, overrides), Path(options.out or "runs/eval")
    held = RunDir(out)
    held.acquire()
    try:
        if options.ppm_quality:
            if len(models) > 1:
                raise UserError(f"--ppm-quality with {len(models)} models", need="one PPM")
            return ppm_quality(models[0], Path(options.ppm_quality), settings, out, limit=options.limit)
        if not options.benchmarks:
            raise UserError("no benchmarks", need="--benchmarks gsm8k,math500,FILE.jsonl")
        try:
            trajectories = [int(text) for text in (options.trajectories or DEFAULT_TRAJECTORIES).split(",")]
        except ValueError as error:
            raise UserError(f"--trajectories {options.trajectories}", need="numbers such as 1,4,16") from error
        if options.limit < 0:
            raise UserError(f"--limit {options.limit}", need="0 (all) or more")
        sets = load_questions(options.benchmarks, settings.problems, options.limit)
        some = contenders(models, options.ppm, options.orm, settings, out)
        methods = usable(
            options.methods.split(",") if options.methods else DEFAULT_METHODS, some, asked=bool(options.methods)
        )
        found = compare(some, sets, methods, trajectories, settings, out)
        return f"{write_comparison(found, settings, out)}\n\nresults: {out / 'results.md'}"
    finally:
        held.release()
