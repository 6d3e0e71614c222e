"""Runs on disk: paths, stages, manifests, locks, resume.

A run is a folder with one folder per round. A stage writes its outputs under temporary names, renames them, and its
record into the round's manifest last; a stage whose record is there is complete and is skipped. The record keeps the
settings the stage read and the digests of its inputs, so that a stage made from other settings is refused, and changes
to settings that it does not read are free.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rstar import config
from rstar.config import RunSection, digest, to_dict
from rstar.machine import software, this_machine
from rstar.store import TEMPORARY, path_digest, read_json, repair, room_for, write_json
from rstar.types import UserError

SECTIONS: Mapping[str, Callable[[], Any]] = {
    "engine": config.EngineSection,
    "eval": config.EvalSection,
    "extract": config.ExtractSection,
    "model": config.ModelSection,
    "ppm": config.PpmSection,
    "problems": config.ProblemsSection,
    "run": config.RunSection,
    "search": config.SearchSection,
    "sft": config.TrainSection,
    "warmup": config.WarmupSection,
}
"""The shared sections as stages record them, for the defaults of keys that are younger than a record."""


@dataclass(frozen=True)
class StageRecord:
    """What the manifest keeps of a finished stage."""

    stage: str
    settings: dict[str, Any]  # the config keys this stage reads
    inputs: dict[str, str]  # name -> digest of what it read
    outputs: dict[str, str]  # path relative to the round's folder -> sha256
    counts: dict[str, Any]
    seconds: float
    version: str = ""  # of rstar and its libraries; those that a resumed stage began with stand before them
    machine: str = ""  # where it ran, in one line

    @property
    def digest(self) -> str:
        """Identity of this stage's result for the stages behind it."""
        return digest({"settings": self.settings, "inputs": self.inputs, "outputs": self.outputs})


class RoundDir:
    """One round's folder: `round_01/{manifest.json, trees-*, sft.jsonl, pairs.jsonl, policy/, ppm/, eval.json}`."""

    def __init__(self, root: Path, number: int) -> None:
        self.root, self.number = root, number
        self.path = root / f"round_{number:02d}"
        self.trees = self.path  # shards trees-<worker>.jsonl.zst lie beside the manifest
        self.sft = self.path / "sft.jsonl"
        self.pairs = self.path / "pairs.jsonl"
        self.orm = self.path / "orm.jsonl"  # labelled solutions, where ppm.loss=bce asks for them
        self.pqm = self.path / "pqm.jsonl"  # steps with their Q, where ppm.loss=mse asks for them
        self.policy = self.path / "policy"
        self.ppm = self.path / "ppm"
        self.eval = self.path / "eval"  # trees of the evaluation, a folder per method
        self.eval_json = self.path / "eval.json"
        self.manifest = self.path / "manifest.json"

    def records(self) -> dict[str, StageRecord]:
        """Records of the finished stages. A manifest that cannot be read counts as none: its stages are done again."""
        if not self.manifest.exists():
            return {}
        try:
            stages = read_json(self.manifest)["stages"]
            return {name: StageRecord(**record) for name, record in stages.items()}
        except (UserError, KeyError, TypeError, AttributeError):
            print(f"warning: {self.manifest} is damaged; its stages are done again", flush=True)
            return {}

    def record(self, stage: str) -> StageRecord | None:
        return self.records().get(stage)

    def changed(self, stage: str) -> list[str]:
        """Files and folders of a finished stage that are missing, or not what it wrote."""
        record = self.record(stage)
        made = {self.path / name: sha for name, sha in record.outputs.items()} if record is not None else {}
        return [str(path) for path, sha in made.items() if not path.exists() or path_digest(path) != sha]

    def finished(self, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> StageRecord | None:
        """The record of `stage` if it is complete and its outputs are there; None if it has to be run.

        Raises UserError, naming the keys, where the stage was made from other settings or inputs.
        """
        record = self.record(stage)
        if record is None or not all((self.path / name).exists() for name in record.outputs):
            started = self.started_note(stage)
            if started.exists():
                self._refuse_changes(stage, read_json(started), {"settings": settings, "inputs": inputs}, started)
            return None
        made, wanted = {"settings": record.settings, "inputs": record.inputs}, {"settings": settings, "inputs": inputs}
        self._refuse_changes(stage, made, wanted, *(self.path / name for name in record.outputs))
        return record

    def start(self, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str], **notes: Any) -> None:
        """Note what a stage that resumes in its middle is made from: it is never continued from other settings.

        `notes` are for the stage's work, until it is finished.
        """
        note = {"settings": settings, "inputs": inputs, "version": software(), "notes": notes}
        write_json(self.started_note(stage), note)

    def started(self, stage: str) -> dict[str, Any]:
        """What `start` has noted of a stage that is not finished; empty where there is nothing."""
        path = self.started_note(stage)
        return dict(read_json(path)) if path.exists() else {}

    def stopped(self, stage: str, seconds: float) -> None:
        """Note how long a stage took that is to be resumed, for its record."""
        if note := self.started(stage):
            write_json(self.started_note(stage), note | {"seconds": note.get("seconds", 0.0) + seconds})

    def drop(self, stage: str) -> list[str]:
        """Forget that `stage` and the stages behind it are finished; returns those. Their files stay where they are."""
        names = list(records := self.records())
        dropped = names[names.index(stage) :] if stage in names else []
        stages = {name: asdict(record) for name, record in records.items() if name not in dropped}
        write_json(self.manifest, {"round": self.number, "stages": stages})
        for note in self.path.glob(".*-started.json"):  # of stages behind it that were stopped in their middle
            if note != self.started_note(stage):
                note.unlink()
        return dropped

    def started_note(self, stage: str) -> Path:
        """Where `start` writes."""
        return self.path / f".{stage}-started.json"

    def _refuse_changes(self, stage: str, old: Mapping[str, Any], new: Mapping[str, Any], *files: Path) -> None:
        settings, inputs = _changes(old["settings"], new["settings"]), _changes(old["inputs"], new["inputs"])
        if settings or inputs:
            changed = "; ".join(f"{key}: {before} -> {after}" for key, before, after in settings + inputs)
            back = shlex.join(override(self.number, key, before) for key, before, _ in settings if before is not None)
            raise UserError(
                f"{self.path / stage} was made from other settings: {changed}",
                need="the settings it was made from",
                how=f"set them back{back and f' ({back})'}, choose another run.dir, or remove "
                + (f"{files[0]} to evaluate again" if stage == "eval" else f"{self.path} to make this round again"),
            )

    def finish(
        self,
        stage: str,
        *,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        outputs: Sequence[Path],
        counts: Mapping[str, Any],
        seconds: float,
    ) -> StageRecord:
        """Write the record of a stage whose outputs are in place; the last act of a stage.

        `seconds` are added to those of earlier attempts that were stopped (lost where one was killed).
        """
        version, begun = software(), self.started(stage)
        begun_by = begun.get("version", "")
        record = StageRecord(
            stage=stage,
            settings=dict(settings),
            inputs=dict(inputs),
            outputs={str(p.relative_to(self.path)): path_digest(p) for p in outputs},
            counts=dict(counts),
            seconds=round(seconds + begun.get("seconds", 0.0), 2),
            version=f"{begun_by}; then {version}" if begun_by not in ("", version) else version,
            machine=this_machine(),
        )
        stages = {name: asdict(r) for name, r in self.records().items()}
        stages[stage] = asdict(record)
        write_json(self.manifest, {"round": self.number, "stages": stages})
        self.started_note(stage).unlink(missing_ok=True)
        return record


@dataclass
class RunDir:
    """A run's folder, held by one driver at a time."""

    path: Path
    _lock: TextIO | None = field(default=None, repr=False)

    def round(self, number: int) -> RoundDir:
        """Round `number`; 0 holds the base (warm-up) and its evaluation."""
        return RoundDir(self.path, number)

    def acquire(self) -> None:
        """Take the lock of this run, and remove what a killed driver left half written.

        The lock ends with its process. Raises UserError that names the holder when another driver has it.
        """
        lock = self.path / "lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock.open("a+")
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}", need="a writable folder", how="set run.dir=PATH"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            self._lock = None
            raise UserError(
                f"{self.path} is in use by {holder}",
                need="one driver per run folder",
                how=f"wait, or set run.dir=PATH; if that machine is dead, remove {lock}",
            ) from None
        except OSError as error:  # some network file systems have none
            print(f"warning: no locks on {self.path} ({error.strerror}): start one driver only", flush=True)
        with room_for(lock):
            self._lock.seek(0)
            self._lock.truncate()
            self._lock.write(f"{socket.gethostname()} pid {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            self._lock.flush()
        self._tidy()

    def _tidy(self) -> None:
        """Remove what a killed driver left: files half written, and the start notes of stages it had just recorded."""
        for path in [*self.path.glob(f"*{TEMPORARY}"), *self.path.glob(f"round_*/**/*{TEMPORARY}")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for here in self.rounds():
            for stage in here.records():
                here.started_note(stage).unlink(missing_ok=True)

    def repair(self) -> list[str]:
        """Take damaged frames out of all shards, and the records of stages whose files are damaged or missing out of
        the manifests, so that these are made again. Says what it did; the files of later rounds are left alone."""
        told = []
        for path in sorted(self.path.glob("round_*/**/trees-*.jsonl.zst")):
            if lost := repair(path):
                told.append(f"{path}: {lost} bytes of damaged frames taken out")
        for here in self.rounds():
            for stage in here.records():
                if changed := here.changed(stage):
                    dropped = ", ".join(here.drop(stage))
                    told.append(f"{', '.join(changed)}: not as written; to be made again: {dropped}")
                    break
        return told

    def clear(self) -> None:
        """Remove what a run has made, and nothing else: the folder may be somebody's own."""
        for path in [*(here.path for here in self.rounds()), self.path / "tiny_model"]:
            shutil.rmtree(path, ignore_errors=not path.exists())
        for name in ("driver.json", "progress.json", "report.html"):
            (self.path / name).unlink(missing_ok=True)

    def other_versions(self) -> str:
        """A warning where another version made, or began, the newest of the run's stages; else empty."""
        made = [(name, record.version) for here in self.rounds() for name, record in here.records().items()]
        begun = [
            (note.name.removeprefix(".").removesuffix("-started.json"), read_json(note).get("version", ""))
            for note in sorted(self.path.glob("round_*/.*-started.json"))
        ]
        stage, version = [("", ""), *made, *begun][-1]
        if version.rpartition("; then ")[2] in ("", software()):
            return ""
        return f"warning: stage {stage} was made by {version}; this is {software()}. The records keep both"

    def rounds(self) -> list[RoundDir]:
        """The rounds that have a folder, in order."""
        names = sorted(path.name.removeprefix("round_") for path in self.path.glob("round_*"))
        return [self.round(int(name)) for name in names if name.isdigit()]

    def release(self) -> None:
        """Give the lock back; its file names no holder then. Idempotent."""
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None


def run_dir(section: RunSection) -> RunDir:
    """The run's folder: run.dir, or runs/<name>."""
    return RunDir(Path(section.dir) if section.dir else Path("runs") / section.name)


def override(number: int, key: str, value: Any) -> str:
    """The command-line setting that gives round `number` a value: rounds.r2.search.seeds=[0,1]."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    shared = key.split(".")[0] in ("run", "problems", "model", "warmup")  # of all rounds or of none
    return f"{key}={text}" if shared else f"rounds.r{number}.{key}={text}"


def same_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a record of a stage (its `settings` and `inputs`) is one of these."""
    return not (_changes(old["settings"], new["settings"]) or _changes(old["inputs"], new["inputs"]))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Differences as (dotted key, old, new).

    A run outlives the version that began it: a config key that its record does not know counts as its default, one that
    is not read any more does not count.
    """
    found: list[tuple[str, Any, Any]] = []
    section = SECTIONS.get(prefix.removesuffix("."))
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if section is not None and key not in new:
            continue
        if section is not None and key not in old:
            before = to_dict(section()).get(key)
        elif key in SECTIONS and not prefix:
            before, after = before or {}, after or {}
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found.extend(_changes(before, after, f"{prefix}{key}."))
        elif before != after:
            found.append((prefix + key, before, after))
    return found


def _keep_or_clear(folder: Path, made_from: str) -> None:
    """Remove a folder of trees that other models have grown: those of the models before a repair, say."""
    note = folder / "made_from"
    if not note.exists() or note.read_text(encoding="utf-8") != made_from:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        note.write_text(made_from, encoding="utf-8")


@dataclass(frozen=True)
class StageResult:
    """What a stage's work hands back for its record."""

    outputs: tuple[Path, ...]
    counts: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage of one round, as a recipe declares it. `inputs` is asked when the stages before it are done."""

    round: RoundDir
    name: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, str]]
    run: Callable[[], StageResult]
    resumes: bool = False  # what it has written counts when it is run again (search, evaluation)
    trees: tuple[Path, ...] = ()  # folders of it whose trees count only while settings and inputs are the same

    def finished(self) -> StageRecord | None:
        """Its record if it is complete, None if it has to be run; UserError if it was made from other settings."""
        return self.round.finished(self.name, self.settings, self.inputs())

    def execute(self) -> StageRecord:
        """Run it, unless it is complete, and write its record."""
        record = self.finished()
        if record is not None:
            return record
        self.round.path.mkdir(parents=True, exist_ok=True)
        inputs, begun = self.inputs(), time.monotonic()
        self._check_inputs(inputs)
        for folder in self.trees:
            _keep_or_clear(folder, digest({"settings": self.settings, "inputs": inputs}))
        if self.resumes and not self.round.started(self.name):
            self.round.start(self.name, self.settings, inputs)
        try:
            result = self.run()
        except BaseException:
            self.round.stopped(self.name, time.monotonic() - begun)
            raise
        return self.round.finish(
            self.name,
            settings=self.settings,
            inputs=inputs,
            outputs=result.outputs,
            counts=result.counts,
            seconds=time.monotonic() - begun,
        )

    def _check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Raise UserError where a file of the stages before is not what they wrote: nothing is made from damage."""
        for here in RunDir(self.round.root).rounds():
            for name, record in here.records().items():
                if record.digest in inputs.values() and (changed := here.changed(name)):
                    raise UserError(
                        f"{', '.join(changed)} is not what stage {name} wrote",
                        need="files as their record in manifest.json has them",
                        how="restore it, or run `rstar evolve CONFIG --repair`, which makes it again",
                    )


def input_digest(round_dir: RoundDir, stage: str) -> str:
    """Digest of an earlier stage's result. Raises UserError where that stage has not been run."""
    record = round_dir.record(stage)
    if record is None:
        raise UserError(
            f"{round_dir.path} has no finished stage {stage}",
            need="the stages before this one",
            how="run `rstar evolve`, or the earlier rounds and stages first",
        )
    return record.digest
