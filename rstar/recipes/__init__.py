"""The published systems, each a function that calls its stages in order."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from rstar.config import load, recipe_name
from rstar.types import UserError

if TYPE_CHECKING:
    from rstar.run import Recipe

NAMES = ("rstar_math", "outcome_verifier", "flow_dpo", "orca2")


def recipe(name: str) -> Recipe[Any]:
    """The recipe of a name; its module is rstar.recipes.NAME. Raises UserError for an unknown one."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)
        raise UserError(f"unknown recipe {name!r}", need=f"one of {', '.join(NAMES)}", how=f"the nearest is {near[0]}")
    found: Recipe[Any] = importlib.import_module(f"rstar.recipes.{name}").RECIPE
    return found


def load_config(path: str, overrides: list[str]) -> tuple[Recipe[Any], Any]:
    """The recipe that a config file names, and the file read into that recipe's schema."""
    found = recipe(recipe_name(path))
    return found, load(found.schema, path, overrides)
