"""Finished trees that are continued: grown further, joined by trees of other seeds, or re-scored with another PPM.

A change is a set of overrides of the round's search settings, so a run whose trees have changed is described by a
config as before, and `rstar evolve` goes on from there with those overrides. The stages behind the search were made
from other trees: their records are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rstar.config import SearchSection, for_round
from rstar.recipes import load_config
from rstar.recipes.rows import own_prompt
from rstar.run import Recipe, Stage, override
from rstar.store import index, read_trees
from rstar.types import UserError


@dataclass(frozen=True)
class Change:
    """What is asked for; a field left empty changes nothing."""

    rollouts: int = 0  # grow every tree to so many
    unsolved: bool = False  # only those of problems without a correct answer
    seeds: tuple[int, ...] = ()  # add trees of these seeds
    ppm: str = ""  # exchange all PPM values for those of this PPM; a folder


def overrides(search: SearchSection, number: int, change: Change) -> list[str]:
    """The settings that describe round `number` after the change, as command-line overrides.

    Raises UserError where they would not change anything, or could not.
    """
    settings: dict[str, Any] = {}
    if change.unsolved and not change.rollouts:
        raise UserError("--unsolved by itself", need="--continue ROLLOUTS, which it limits to unsolved problems")
    if change.rollouts:
        reached = search.rollouts + max(search.escalate, default=0) if change.unsolved else search.rollouts
        if search.method != "mcts":
            raise UserError(f"trees of search.method={search.method} do not grow", need="trees of mcts")
        if change.rollouts <= reached:
            raise UserError(f"--continue {change.rollouts}", need=f"more than the {reached} rollouts they have")
        more = change.rollouts - search.rollouts
        if change.unsolved:
            settings["escalate"] = [*search.escalate, more]
        else:
            settings["rollouts"] = change.rollouts
            if search.escalate:  # what unsolved problems have got stays what it was, counted from the new rollouts
                settings["escalate"] = [count - more for count in search.escalate if count > more]
            if search.second_pass:
                settings["second_pass"] = change.rollouts
    if change.seeds:
        new = [seed for seed in dict.fromkeys(change.seeds) if seed not in search.seeds]
        if not new:
            raise UserError(f"--seeds {','.join(map(str, change.seeds))}", need=f"others than {search.seeds}")
        settings["seeds"] = [*search.seeds, *new]
    if change.ppm:
        if not (Path(change.ppm) / "config.json").exists():
            raise UserError(f"{change.ppm} is no checkpoint", need="a PPM's folder", how="runs/NAME/round_02/ppm")
        settings |= {"use_ppm": True, "ppm": str(Path(change.ppm).resolve())}
    return [override(number, f"search.{key}", value) for key, value in settings.items()]


def take_up(recipe: Recipe[Any], config: Any, source: tuple[str, list[str]], number: int, change: Change) -> list[str]:
    """Make round `number`'s search stage ready to be run again with the change; returns its overrides.

    `source` is the config's file and overrides. A change that was interrupted is resumed, one that is finished is left
    alone. Raises UserError where the round's search is not finished, or was made from other settings than `config`.
    """
    added = overrides(for_round(config, number).search, number, change)
    path, given = source
    before = _search(recipe, config, number)
    after = _search(recipe, load_config(path, [*given, *added])[1], number)
    here = after.round
    if change.ppm:
        own_prompt(list(islice(read_trees(here.trees), 1)))  # a PPM reads the prompt that it was trained on
    for later in (folder for folder in here.root.glob("round_*") if folder.name >= here.path.name):
        if change.ppm and Path(change.ppm).resolve().is_relative_to(later.resolve()):
            raise UserError(
                f"{change.ppm} comes from the trees that it would score, and is trained again after that",
                need="a PPM that stays as it is",
                how=f"copy it: cp -r {change.ppm} {here.root / 'ppm_kept'}",
            )
    record, note = here.record("search"), here.note("search")
    if record is not None and not after.changes(record):
        return added
    begun = record is None and note.get("notes") and not after.changes(note)
    if not begun:
        old_ppm = ("ppm", "search.ppm") if change.ppm else ()  # does not matter any more, and may be gone
        changed = record is not None and any(key not in old_ppm for key, *_ in before.changes(record))
        if record is None or ((changed or not old_ppm) and before.finished() is None):
            raise UserError(
                f"{here.path} has no finished search", how=f"run it first: rstar search {path} --round {number}"
            )
        revision = 1 + max((ref.revision for ref in index(here.trees).values()), default=0)
        after.start(revision=revision, rescore=bool(change.ppm), unsolved=change.unsolved)
    dropped = [name for name in here.drop("search") if name != "search"]
    if dropped:
        print(f"{here.path}: to be made again from the new trees: {', '.join(dropped)}", flush=True)
    if made := sorted(folder.name for folder in here.root.glob("round_*") if folder.name > here.path.name):
        print(f"made from the models of the old trees, remove them to make them again: {', '.join(made)}", flush=True)
    return added


def _search(recipe: Recipe[Any], config: Any, number: int) -> Stage:
    for stage in recipe.stages(config, number):
        if stage.name == "search":
            return stage
    raise UserError(f"round {number} has no stage search", need="a round that searches")
