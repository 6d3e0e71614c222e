"""A run on disk: the folders of its rounds, the manifests that say what is finished, the lock of its driver.

A run is a folder with one folder per round. A stage writes its outputs under temporary names, renames them, and its
record into the round's manifest last: a stage whose record is there is complete. The record keeps the settings that the
stage was called with, the digests of the files and artifacts that it read, and those of what it wrote, so that a stage
made from other settings is refused, and a change of settings that it does not read is free.

Digests are computed once, when a stage ends. Later its files are known again by size and modification time; where only
the time differs (a copy) the digest is computed once more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rstar.config import RunSection, digest
from rstar.machine import software, this_machine
from rstar.store import TEMPORARY, FileState, file_state, read_json, repair, room_for, write_json
from rstar.types import UserError

SCHEMA = 2
"""Of manifest.json. 1 (no number) had digests in place of file states; it is still read."""


@dataclass(frozen=True)
class StageRecord:
    """What the manifest keeps of a finished stage."""

    stage: str
    settings: dict[str, Any]  # the arguments of its call that are no artifacts, by parameter name
    inputs: dict[str, str]  # parameter, or setting that names a file -> digest of the contents
    outputs: dict[str, FileState]  # path relative to the round's folder, the main one first
    counts: dict[str, Any]
    seconds: float
    version: str = ""  # of rstar and its libraries; those that a resumed stage began with stand before them
    machine: str = ""  # where it ran, in one line
    function: str = ""  # that was called: module:name

    @property
    def digest(self) -> str:
        """Identity of what the stage has made, by content, for the stages behind it."""
        return digest({name: state.sha256 for name, state in self.outputs.items()})


class RoundDir:
    """One round's folder: `round_01/{manifest.json, trees-*, sft.jsonl, pairs.jsonl, policy/, ppm/, eval.json}`."""

    def __init__(self, root: Path, number: int) -> None:
        self.root, self.number = root, number
        self.path = root / f"round_{number:02d}"
        self.trees = self.path  # shards trees-<worker>.jsonl.zst lie beside the manifest
        self.sft = self.path / "sft.jsonl"
        self.pairs = self.path / "pairs.jsonl"
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
            return {name: _record(one) for name, one in stages.items()}
        except (UserError, KeyError, TypeError, AttributeError):
            print(f"warning: {self.manifest} is damaged; its stages are done again", flush=True)
            return {}

    def record(self, stage: str) -> StageRecord | None:
        """The record of a stage; None where it is not finished."""
        return self.records().get(stage)

    def write(self, records: Mapping[str, StageRecord]) -> None:
        """Replace the manifest."""
        stages = {name: asdict(record) for name, record in records.items()}
        write_json(self.manifest, {"schema": SCHEMA, "round": self.number, "stages": stages})

    def changed(self, stage: str, *, verify: bool = False) -> list[str]:
        """Files and folders of a finished stage that are missing, or not what it wrote.

        Contents are read where the modification time differs from the record, everywhere with `verify`.
        """
        record = self.record(stage)
        outputs = record.outputs if record is not None else {}
        return [str(self.path / name) for name, was in outputs.items() if not _same(self.path / name, was, verify)]

    def refresh(self, stage: str) -> None:
        """Take the files' present times into the record of a stage whose files have not changed."""
        records = self.records()
        record = records[stage]
        now = {name: file_state(self.path / name, sha256=was.sha256) for name, was in record.outputs.items()}
        if now != record.outputs:
            self.write(records | {stage: StageRecord(**{**vars(record), "outputs": now})})

    def drop(self, stage: str) -> list[str]:
        """Forget that `stage` and the stages behind it are finished; returns those. Their files stay where they are.

        The call file of `stage` is kept: what it has made counts where settings and inputs are still the same. Those of
        the stages behind it go.
        """
        records = self.records()
        names = list(records)
        dropped = names[names.index(stage) :] if stage in names else []
        self.write({name: record for name, record in records.items() if name not in dropped})
        kept = {self.call_file(name) for name in (*names, stage) if name not in dropped or name == stage}
        for path in self.path.glob(".*-call.json"):
            if path not in kept:
                path.unlink()
        if (note := self.note(stage)) and not note.get("notes"):
            write_json(self.call_file(stage), note | {"dropped": True})
        return dropped

    def call_file(self, stage: str) -> Path:
        """Where a stage's call is written before it starts (rstar.call), with the notes that it is to be resumed by."""
        return self.path / f".{stage}-call.json"

    def note(self, stage: str) -> dict[str, Any]:
        """What `call_file` holds; empty where there is none."""
        path = self.call_file(stage)
        return dict(read_json(path)) if path.exists() else {}

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
        note, version = self.note(stage), software()
        begun_by = note.get("version", "")
        record = StageRecord(
            stage=stage,
            settings=dict(settings),
            inputs=dict(inputs),
            outputs={str(path.relative_to(self.path)): file_state(path) for path in outputs},
            counts=dict(counts),
            seconds=round(seconds + note.get("seconds", 0.0), 2),
            version=f"{begun_by}; then {version}" if begun_by not in ("", version) else version,
            machine=this_machine(),
            function=note.get("function", ""),
        )
        self.write(self.records() | {stage: record})
        return record


def _record(fields: Mapping[str, Any]) -> StageRecord:
    def state(one: Any) -> FileState:
        return FileState(**one) if isinstance(one, Mapping) else FileState(one, -1, -1)

    return StageRecord(**{**fields, "outputs": {name: state(one) for name, one in fields["outputs"].items()}})


def _same(path: Path, was: FileState, verify: bool) -> bool:
    if not path.exists():
        return False
    now = file_state(path, sha256="")
    if (now.size, now.mtime_ns) == (was.size, was.mtime_ns) and not verify:
        return True
    return was.size in (-1, now.size) and file_state(path).sha256 == was.sha256


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
        """Remove files that a killed driver left half written."""
        for path in [*self.path.glob(f"*{TEMPORARY}"), *self.path.glob(f"round_*/**/*{TEMPORARY}")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def repair(self) -> list[str]:
        """Take damaged frames out of all shards, and the records of stages whose files are damaged or missing out of
        the manifests, so that these are made again. Reads every file. Returns what it did; the files of later rounds
        are left alone."""
        done = []
        for path in sorted(self.path.glob("round_*/**/trees-*.jsonl.zst")):
            if lost := repair(path):
                done.append(f"{path}: {lost} bytes of damaged frames taken out")
        for here in self.rounds():
            for stage in here.records():
                if changed := here.changed(stage, verify=True):
                    dropped = ", ".join(here.drop(stage))
                    done.append(f"{', '.join(changed)}: not as written; to be made again: {dropped}")
                    break
        return done

    def clear(self) -> None:
        """Remove what a run has made, and nothing else: the folder may hold other files of its user."""
        for path in [*(here.path for here in self.rounds()), self.path / "tiny_model"]:
            shutil.rmtree(path, ignore_errors=not path.exists())
        for name in ("driver.json", "progress.json", "report.html"):
            (self.path / name).unlink(missing_ok=True)

    def other_versions(self) -> str:
        """A warning where another version made, or began, the newest of the run's stages; else empty."""
        made = [(name, record.version) for here in self.rounds() for name, record in here.records().items()]
        begun = [
            (path.name.removeprefix(".").removesuffix("-call.json"), read_json(path).get("version", ""))
            for here in self.rounds()
            for path in sorted(here.path.glob(".*-call.json"))
            if path.name.removeprefix(".").removesuffix("-call.json") not in here.records()
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
