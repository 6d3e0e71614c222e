"""`rstar status RUN`: where a run is, from its files alone, beside its driver or from another machine of a cluster."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from rstar.manifest import RoundDir, RunDir
from rstar.report.progress import duration, line
from rstar.store import index, read_json
from rstar.types import UserError


@dataclass(frozen=True)
class StageStatus:
    """One stage of one round."""

    round: int
    stage: str
    state: str  # done; begun (it runs, or was stopped in its middle); to do
    seconds: float | None  # wall-clock, of a finished one
    solved: tuple[int, int] | None  # training problems with a correct answer, all; of a finished search


@dataclass(frozen=True)
class Status:
    """A run as it is at this moment."""

    run: str
    state: str  # running; held (by another machine, where we cannot look); idle; finished: all that `command` was to do
    holder: str  # host, pid and begin of the driver that holds the lock; empty: none
    stages: tuple[StageStatus, ...]
    progress: dict[str, Any] | None  # the latest state of the stage that is "begun" (report/progress.py)
    trees: int | None  # complete ones on disk, of the round of that stage
    eta_seconds: float | None  # of that stage
    rest_seconds: float | None  # of all stages, if they take as long as in the last round that has them
    command: str  # that began it, and resumes it; empty: not known


def status(path: Path) -> Status:
    """Read the state of the run in `path`. Raises UserError where there is none."""
    run = RunDir(path)
    if not ((path / "lock").exists() or run.rounds()):
        raise UserError(f"{path} holds no run", need="the folder of a run", how="for example runs/quickstart")
    driver = _read(path / "driver.json")
    kept = _read(path / "progress.json")
    begun = (kept.get("round"), kept.get("stage"))
    planned = [(number, name) for number, name in driver.get("stages", [])]
    holder, state = _holder(path)
    stages = list(_stages(run, planned, begun))
    waiting = [one for one in stages if one.state == "to do"]
    if holder and waiting and all(one.state != "begun" for one in stages):  # the next one is being loaded
        stages[stages.index(waiting[0])] = replace(waiting[0], state="begun")
    if not holder and planned and all(one.state == "done" for one in stages):
        state = "finished"
    now = next((one for one in stages if one.state == "begun"), None)
    current = kept if now is not None and begun == (now.round, now.stage) else None
    eta = current["eta_seconds"] if current is not None and holder else None
    if current is not None and eta is not None:
        eta = max(0.0, eta - (time.time() - current["updated"]))
    return Status(
        run=str(path), state=state, holder=holder, stages=tuple(stages),
        progress=current,
        trees=_trees(run.round(now.round)) if now is not None else None,
        eta_seconds=eta, rest_seconds=_rest(stages, eta), command=driver.get("command", ""),
    )  # fmt: skip


def status_text(found: Status) -> str:
    """As `rstar status` prints it."""
    by = f" by {found.holder}" if found.holder else ""
    lines = [f"{found.run}: {found.state}{by}"]
    for number, stages in groupby(found.stages, key=lambda one: one.round):
        lines.append(f"round {number}   " + ", ".join(_stage_text(one) for one in stages))
    if found.progress is not None:
        ago = duration(max(0.0, time.time() - found.progress["updated"]))
        lines += ["", f"{line(found.progress)}  ({ago} ago)"]
    if found.trees:
        lines.append(f"{found.trees:,} finished trees of this round on disk")
    if found.rest_seconds:
        lines.append(f"about {duration(found.rest_seconds)} left in all, if stages take as long as a round before")
    if found.command and found.state in ("idle", "finished"):
        lines.append(f"{'goes on with' if found.state == 'idle' else 'done is all of'}: {found.command}")
    return "\n".join(lines)


def _stage_text(one: StageStatus) -> str:
    solved = f" (solved {one.solved[0]} of {one.solved[1]})" if one.solved else ""
    return f"{one.stage} {one.state if one.seconds is None else duration(one.seconds)}{solved}"


def _stages(run: RunDir, planned: list[tuple[int, str]], begun: tuple[Any, Any]) -> Iterator[StageStatus]:
    records = {here.number: here.records() for here in run.rounds()}
    finished = [(number, name) for number, found in records.items() for name in found]
    known = dict.fromkeys([*finished, *planned, *([begun] if begun[1] else [])])
    for number, name in sorted(known, key=lambda one: one[0]):  # stable: stages stay in the order they run
        record = records.get(number, {}).get(name)
        if record is None:
            yield StageStatus(number, name, "begun" if (number, name) == begun else "to do", None, None)
        else:
            yield StageStatus(number, name, "done", record.seconds, record.counts.get("solved_by_level", {}).get("all"))


def _rest(stages: list[StageStatus], eta: float | None) -> float | None:
    """Seconds until everything is done; None where nothing is left, or a stage has not been seen yet."""
    took = {one.stage: one.seconds for one in stages if one.seconds is not None}
    left = [
        eta if one.state == "begun" and eta is not None else took.get(one.stage)
        for one in stages
        if one.state != "done"
    ]
    known = [seconds for seconds in left if seconds is not None]
    return sum(known) if known and len(known) == len(left) else None


def _trees(here: RoundDir) -> int:
    folders = {shard.parent for shard in here.path.rglob("trees-*.jsonl.zst")}
    return sum(ref.complete for folder in folders for ref in index(folder).values())


def _holder(path: Path) -> tuple[str, str]:
    """(who holds the lock, "running", "held" or "idle"). The lock itself is not touched: to try it, be it for a
    moment, would turn a driver away that starts just then."""
    lock = path / "lock"
    text = lock.read_text(encoding="utf-8").strip() if lock.exists() else ""
    host, _, rest = text.partition(" pid ")
    pid, _, since = rest.partition(" since ")
    if not since:
        return "", "idle"
    if host != socket.gethostname():
        return text, "held"
    try:
        began = psutil.Process(int(pid)).create_time()
    except psutil.NoSuchProcess:
        return "", "idle"
    locked = time.mktime(time.strptime(since, "%Y-%m-%d %H:%M:%S"))
    return (text, "running") if began <= locked + 1 else ("", "idle")  # else the number is another process's now


def _read(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.exists() else {}
