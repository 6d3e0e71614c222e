"""Running a recipe: `run.stage(function, *arguments)` calls a function once and keeps what it made.

A recipe is a function of a Run and a config that calls stages in order. A stage is a module-level function
`function(here, *arguments) -> counts`, which gets all that it reads as arguments: sections of the config, single
values, artifacts of earlier stages, None, and tuples of these. They are recorded under the names of its parameters; a
single value's parameter is called SECTION_key, so that a refusal can name the setting. The settings of a round are
compared with those that its stage was made from; settings marked `HOW` (rstar.config) are passed and not compared, and
settings marked `INPUT` are compared by the contents of the file that they name.

Control flow of a recipe depends on its config, never on what is in an artifact. So the same function can be executed
(`evolve`), recorded without doing anything (`planned`), or executed in part (`only`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from rstar.call import Call, call_of, read_call
from rstar.config import ClusterSection, RunSection, digest, for_round, load, named_file, to_json
from rstar.machine import software
from rstar.manifest import RoundDir, StageRecord, run_dir
from rstar.problems import ProblemSet
from rstar.report.html import write_report
from rstar.report.progress import keep_in
from rstar.report.results import results, results_table
from rstar.stopping import run_stage, stop_on_signals, stop_with_driver
from rstar.store import input_digest, write_json
from rstar.types import UserError
from rstar.workers import ray_session


class Configured(Protocol):
    """What every recipe's config has."""

    @property
    def run(self) -> RunSection: ...
    @property
    def cluster(self) -> ClusterSection: ...


C = TypeVar("C", bound=Configured)


@dataclass(frozen=True)
class Artifact:
    """What a stage has made, or will make: an argument of the stages behind it. Two are the same by their contents."""

    name: str  # for messages: "round 2 policy"
    folder: Path  # the round's folder
    path: Path  # the stage's first output: the checkpoint's folder, the file of rows
    digest: str = ""  # of the contents; empty while the stage is not finished


Counts = Mapping[str, Any]
"""What a stage's function returns: figures for the manifest, plain JSON."""


class Here:
    """Where a stage works: its round's folder, its outputs, and what an earlier attempt has left."""

    def __init__(self, round: RoundDir, stage: str) -> None:
        self.round, self.stage = round, stage
        self.title = f"round {round.number} {stage}"  # for progress
        self.outputs: list[Path] = []

    @property
    def notes(self) -> dict[str, Any]:
        """What this search is to do beside its settings (rstar.recipes.continue_search)."""
        return dict(self.round.note(self.stage).get("notes", {}))

    def output(self, name: str) -> Path:
        """Path of an output of this stage, in the round's folder; the first one is the stage's artifact."""
        self.outputs.append(self.round.path / name)
        return self.outputs[-1]

    def resume(self, *owned: Path) -> None:
        """From here on what the stage writes counts when it is called again with the same settings and inputs.

        `owned` are folders of trees (a round's own folder: the shards in it). Where another call has filled them, or
        none is known to have, they are emptied.
        """
        note, folder = self.round.note(self.stage), self.round.path
        if note.get("resumes"):
            return
        for path in owned:
            if path == folder:
                for shard in path.glob("trees-*.jsonl.zst"):
                    shard.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)
        write_json(self.round.call_file(self.stage), note | {"resumes": True})


@dataclass(frozen=True)
class Stage:
    """One stage of one round: the call that makes it."""

    round: RoundDir
    name: str
    call: Call
    config: Any = None  # of the round, for the settings that a refusal names

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that are no artifacts, as they are recorded."""
        return {name: to_json(value) for name, value in self.call.arguments.items() if not _artifacts(value)}

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Digests of the artifacts and of the files that the arguments name."""
        found: dict[str, str] = {}
        for name, value in self.call.arguments.items():
            if artifacts := _artifacts(value):
                found[name] = artifacts[0].digest if len(artifacts) == 1 else digest([one.digest for one in artifacts])
            else:
                found |= {key: input_digest(path) for key, path in _files(name, value)}
        return found

    def finished(self) -> StageRecord | None:
        """Its record if it is complete, None if it has to be run.

        Raises UserError where a stage before it is not finished, where it was made, or begun, from other settings or
        inputs (naming the keys), and where its files are not what it wrote.
        """
        for artifact in (one for value in self.call.arguments.values() for one in _artifacts(value)):
            if not artifact.digest:
                raise UserError(
                    f"{artifact.folder} has no finished stage {artifact.name.rpartition(' ')[2]}",
                    need="the stages before this one",
                    how="run `rstar evolve`, or the earlier rounds and stages first",
                )
        record = self.round.record(self.name)
        if record is None:
            note = self.round.note(self.name)
            if note.get("resumes") and not note.get("dropped"):
                self._compare(note, self.round.call_file(self.name))
            return None
        outputs = [self.round.path / name for name in record.outputs]
        missing = [path for path in outputs if not path.exists()]
        if missing and missing[0] == outputs[0] and not outputs[0].name.startswith("trees-"):
            return None  # removed by the user, as the refusal below says: to be made again, with other settings too
        self._compare(record, *outputs)
        if missing:
            return None
        if changed := self.round.changed(self.name):
            raise UserError(
                f"{', '.join(changed)} is not what stage {self.name} wrote",
                need="files as their record in manifest.json has them",
                how="restore it, or run `rstar evolve CONFIG --repair`, which makes it again",
            )
        self.round.refresh(self.name)
        return record

    def changes(self, made: StageRecord | Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Differences to a record, or to what a call file holds, as (dotted key, recorded, now); settings that name
        files count by their contents."""
        settings, inputs = (
            (made.settings, made.inputs) if isinstance(made, StageRecord) else (made["settings"], made["inputs"])
        )
        now = self.inputs
        found = [(key, inputs.get(key), now.get(key)) for key in sorted({*inputs, *now})]
        changes = [(_dotted(key), old, new) for key, old, new in found if old != new]
        by_content = {_dotted(key) for key in {*inputs} & {*now}}
        for name, value in self.call.arguments.items():
            if not _artifacts(value) and (key := _dotted(name, value)) not in by_content:
                changes += [one for one in _differences(key, settings.get(name), value) if one[0] not in by_content]
        return changes

    def _compare(self, made: StageRecord | Mapping[str, Any], *files: Path) -> None:
        changes = self.changes(made)
        if not changes:
            return
        back = shlex.join(
            override(self.round.number, key, old) for key, old, new in changes if self._sets(key, old, new)
        )
        raise UserError(
            f"{self.round.path / self.name} was made from other settings: "
            + "; ".join(f"{key}: {old} -> {new}" for key, old, new in changes),
            need="the settings it was made from",
            how=f"set them back{back and f' ({back})'}, choose another run.dir, or remove "
            + (
                f"{files[0]} to evaluate again" if self.name == "eval"
                else f"{self.round.path} to make this round again"
            ),
        )  # fmt: skip

    def _sets(self, key: str, old: Any, new: Any) -> bool:
        """Whether the config's setting `key` is what brought `new` about, and could bring back `old`."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        return old is not None and value is not None and to_json(value) == new

    def artifact(self) -> Artifact:
        """What the stage has made, as far as its record says."""
        record = self.round.record(self.name)
        outputs = list(record.outputs) if record is not None else []
        path = self.round.path / outputs[0] if outputs else self.round.path
        name = f"round {self.round.number} {self.name}"
        return Artifact(name, self.round.path.resolve(), path.resolve(), record.digest if record else "")

    def start(self, **notes: Any) -> Path:
        """Write the call file, in which an earlier attempt's time and notes are kept; returns its path."""
        self.round.path.mkdir(parents=True, exist_ok=True)
        path, settings, inputs = self.round.call_file(self.name), self.settings, self.inputs
        note = self.round.note(self.name)
        if not note or notes or self.changes(note):
            note = {"version": software(), **({"resumes": True, "notes": notes} if notes else {})}
        kept = {key: note[key] for key in ("version", "resumes", "notes", "seconds") if key in note}
        self.call.write(path, settings=settings, inputs=inputs, **kept)
        return path

    def execute(self) -> StageRecord:
        """Run the stage in this process, unless it is complete, and write its record."""
        record = self.finished()
        if record is not None:
            return record
        self.start()
        return execute(self.round, self.name, self.call)


def execute(round: RoundDir, stage: str, call: Call) -> StageRecord:
    """Make the call of a stage whose call file is written, and record what it has made."""
    here, begun = Here(round, stage), time.monotonic()
    try:
        counts = call(here)
    except BaseException:
        note = round.note(stage)
        seconds = note.get("seconds", 0.0) + time.monotonic() - begun
        write_json(round.call_file(stage), note | {"seconds": seconds})
        raise
    note = round.note(stage)
    return round.finish(
        stage,
        settings=note["settings"],
        inputs=note["inputs"],
        outputs=here.outputs,
        counts=counts,
        seconds=time.monotonic() - begun,
    )


def execute_file(path: Path) -> None:
    """What the process of a stage does: make the call in a file that its driver has written."""
    stop_with_driver()
    number, stage = int(path.parent.name.removeprefix("round_")), path.name[1:].removesuffix("-call.json")
    root = path.parent.parent
    keep_in(root / "progress.json", number=number, stage=stage)
    execute(RoundDir(root, number), stage, read_call(path))


@dataclass
class Run:
    """What a recipe calls its stages on. `act` decides what a stage's call comes to."""

    root: Path
    act: Callable[[Stage], Artifact]

    def round(self, number: int, config: Any = None) -> Round:
        """Round `number`; 0 is the base and its evaluation. `config`: of that round, for messages."""
        return Round(self, RoundDir(self.root, number), config)

    def rounds(self, config: C) -> Iterator[tuple[Round, C]]:
        """Rounds 1 to run.rounds, each with its own settings (overlays `rounds.rN`)."""
        for number in range(1, config.run.rounds + 1):
            own = for_round(config, number)
            yield self.round(number, own), own


@dataclass(frozen=True)
class Round:
    """One round of a run."""

    run: Run
    dir: RoundDir
    config: Any

    @property
    def number(self) -> int:
        return self.dir.number

    def stage(self, function: Callable[..., Counts], *arguments: Any, name: str = "") -> Artifact:
        """Call `function(here, *arguments)` unless its result is there; returns what it has made.

        `name` is that of the stage, where the function's own will not do. Raises UserError where the result that is
        there was made from other settings or inputs.
        """
        call = call_of(function, arguments, skip=1)
        return self.run.act(Stage(self.dir, name or function.__name__, call, self.config))


@dataclass(frozen=True)
class Recipe(Generic[C]):
    """A recipe and the schema of its config."""

    function: Callable[[Run, C], None]
    schema: type[C]
    check: Callable[[C], ProblemSet | None] = field(default=lambda config: None)  # raises UserError for a mistake
    check_settings: Callable[[C], None] = field(default=lambda config: None)  # of `check` what needs no file

    def planned(self, config: C) -> list[Stage]:
        """All stages of a run in order, without doing anything."""
        found: list[Stage] = []

        def record(stage: Stage) -> Artifact:
            found.append(stage)
            return stage.artifact()

        self.function(Run(run_dir(config.run).path, record), config)
        return found

    def stages(self, config: C, number: int) -> list[Stage]:
        """The stages of one round."""
        return [stage for stage in self.planned(config) if stage.round.number == number]


def evolve(
    recipe: Recipe[C],
    config: C,
    command: str,
    *,
    only: Callable[[Stage], bool] = lambda stage: True,
    repair: bool = False,
    in_process: bool = False,
) -> None:
    """Run the unfinished stages, each in a process of its own, and refresh the report after each.

    Args:
        recipe: What to run.
        config: Its settings.
        command: That the user can give again to resume.
        only: Stages to run; the artifacts of the others are taken as they are.
        repair: First take damaged files and the records of their stages out.
        in_process: Run stages in this process (engines keep their memory until it ends).
    """
    stop_on_signals()
    run, begun, ran, table = run_dir(config.run), time.monotonic(), 0, ""
    run.acquire()
    try:
        if repair:
            print("\n".join(run.repair()) or f"{run.path}: nothing is damaged", flush=True)
        if warning := run.other_versions():
            print(warning, flush=True)
        if problems := recipe.check(config):
            counted = f"{run.path}: {len(problems.train)} training problems, {len(problems.heldout)} held out"
            print("\n".join([counted, *problems.left_out()]), flush=True)
        plan = [(stage.round.number, stage.name) for stage in recipe.planned(config) if only(stage)]
        write_json(run.path / "driver.json", {"command": command, "stages": plan})
        with ExitStack() as session:

            def act(stage: Stage) -> Artifact:
                nonlocal ran, table
                if only(stage) and stage.finished() is None:
                    if not ran:
                        session.enter_context(ray_session(config.cluster))
                    if in_process:
                        stage.execute()
                    else:
                        run_process(stage)
                    ran += 1
                    table = refresh_report(run.path)
                return stage.artifact()

            recipe.function(Run(run.path, act), config)
        table = table or refresh_report(run.path)
    finally:
        run.release()
    print(("all done" if not ran else f"finished in {(time.monotonic() - begun) / 60:.1f} minutes") + "\n")
    print(table)
    print(f"\nreport: {run.path / 'report.html'}")


def run_process(stage: Stage) -> None:
    """Run a stage in a process of its own, which gives engines' memory back for sure."""
    path = stage.start()
    code = run_stage([sys.executable, "-m", "rstar", "stage", str(path)])
    if code:
        raise UserError(
            f"stage {stage.name} of round {stage.round.number} ended with exit code {code}",
            how="mend it; the same command resumes",
        )


def refresh_report(run: Path, trees: Sequence[str] = ()) -> str:
    """Write report.html; returns the table of the rounds."""
    write_report(run, ids=trees)
    return results_table(results(run))


def main(
    function: Callable[[Run, C], None],
    schema: type[C],
    *,
    check: Callable[[C], ProblemSet | None] = lambda config: None,
    arguments: Sequence[str] | None = None,
) -> int:
    """The command line of a recipe outside this package: `python my_recipe.py CONFIG.yaml [key=value ...]`.

    Runs what is left of its stages and returns the exit code; a user's mistake is printed in one line.
    """
    parser = argparse.ArgumentParser(description=function.__doc__)
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings laid over the file")
    parser.add_argument("--repair", action="store_true", help="first take damaged files out, to make them again")
    options = parser.parse_args(arguments)
    try:
        config = load(schema, options.config, options.overrides)
        command = shlex.join([sys.executable, *sys.argv])
        evolve(Recipe(function, schema, check), config, command, repair=options.repair)
        return 0
    except UserError as error:
        print(f"{error}", file=sys.stderr)
        return 2


def override(number: int, key: str, value: Any) -> str:
    """The command-line setting that gives round `number` a value: rounds.r2.search.seeds=[0,1]."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    shared = key.split(".")[0] in ("run", "problems", "model", "warmup")  # of all rounds or of none
    return f"{key}={text}" if shared or not number else f"rounds.r{number}.{key}={text}"


def _artifacts(value: Any) -> list[Artifact]:
    if isinstance(value, Artifact):
        return [value]
    return [value for value in value if isinstance(value, Artifact)] if isinstance(value, tuple) else []


def _dotted(name: str, value: Any = "") -> str:
    """The setting that a parameter stands for: a section's own name, or SECTION_key."""
    return name if dataclasses.is_dataclass(value) or "." in name else name.replace("_", ".", 1)


def _files(name: str, value: Any) -> Iterator[tuple[str, Path]]:
    """(dotted key, path) of the settings in an argument that name files or folders which are there."""
    if not dataclasses.is_dataclass(value):
        return
    for one in dataclasses.fields(value):
        key, found = f"{name}.{one.name}", getattr(value, one.name)
        if not one.metadata.get("input"):
            yield from _files(key, found)
            continue
        for name_below, text in _by_name(found).items() if isinstance(found, (list, dict)) else [("", found)]:
            if (path := named_file(one, text)) is not None:
                yield f"{key}.{name_below}".rstrip("."), path


def _by_name(value: Any) -> dict[str, Any]:
    """A list's items by their place, a mapping as it is: so that one file of several has a key of its own."""
    return dict(value) if isinstance(value, Mapping) else {str(place): one for place, one in enumerate(value or ())}


def _differences(prefix: str, old: Any, new: Any) -> Iterable[tuple[str, Any, Any]]:
    """Differences of a recorded value and a present one, as (dotted key, recorded, now).

    A run outlives the version that began it: a key that a recorded section does not have counts as its default, one
    that is not known any more does not count.
    """
    if dataclasses.is_dataclass(new) and not isinstance(new, type):
        was = old if isinstance(old, Mapping) else {}
        compared = getattr(new, "compared", None)
        for one in dataclasses.fields(new):
            if one.metadata.get("shapes", True) and (compared is None or one.name in compared):
                before, now = was.get(one.name, to_json(_default(one))), getattr(new, one.name)
                if one.metadata.get("input") and isinstance(now, list):
                    before, now = _by_name(before), _by_name(now)
                yield from _differences(f"{prefix}.{one.name}", before, now)
    elif isinstance(new, Mapping) and isinstance(old, Mapping):
        for key in sorted({*old, *new}):
            yield from _differences(f"{prefix}.{key}", old.get(key), new.get(key))
    elif old != (plain := to_json(new)):
        yield prefix, old, plain


def _default(one: dataclasses.Field[Any]) -> Any:
    if one.default_factory is not dataclasses.MISSING:
        return one.default_factory()
    return None if one.default is dataclasses.MISSING else one.default
