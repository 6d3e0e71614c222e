"""The published systems, each as (searcher, extractors, trainers) in one file."""

from __future__ import annotations

import difflib
from types import ModuleType
from typing import Any

from rstar.config import load
from rstar.types import UserError

NAMES = ("rstar_math", "outcome_verifier", "flow_dpo", "orca2")


def recipe(name: str) -> ModuleType:
    """The module of a recipe; each has Config, check_settings, check and stages."""
    match name:
        case "rstar_math":
            from rstar.recipes import rstar_math

            return rstar_math
        case "outcome_verifier":
            from rstar.recipes import outcome_verifier

            return outcome_verifier
        case "flow_dpo":
            from rstar.recipes import flow_dpo

            return flow_dpo
        case "orca2":
            from rstar.recipes import orca2

            return orca2
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)
    raise UserError(f"unknown recipe {name!r}", need=f"one of {', '.join(NAMES)}", how=f"the nearest is {near[0]}")


def load_config(path: str, overrides: list[str]) -> tuple[ModuleType, Any]:
    """The recipe that a config file names, and the file read into that recipe's schema."""
    from rstar.config import recipe_name

    module = recipe(recipe_name(path))
    return module, load(module.Config, path, overrides)
