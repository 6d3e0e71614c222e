"""Live progress, and `rstar status`: what another shell sees of a run."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rstar import cli
from rstar.manifest import RunDir
from rstar.report import progress
from rstar.report.progress import Progress, SearchProgress, TrainingProgress, line
from rstar.search.utilisation import Utilisation
from rstar.search.worker import ProblemSummary
from rstar.status import status, status_text
from rstar.store import TreeWriter, write_json
from rstar.tree import Tree
from rstar.types import Problem, TrainProgress, UserError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def summary(problem: int, *, solved: bool, level: str = "1", test_time: bool = False) -> ProblemSummary:
    return ProblemSummary(
        pass_index=0, problem_id=f"p{problem}", level=level, solved=solved, test_time=test_time, trees=1, rollouts=8,
        tokens=1000, engine_calls=4, seconds=1.0, outcomes={"live": 6, "answer": 3, "code_error": 1},
        worker=f"w{problem % 2}", up=10.0 + problem, busy=0.4 + 0.2 * (problem % 2),
    )  # fmt: skip


def test_search_progress_says_all_that_a_person_waits_for() -> None:
    stream = io.StringIO()
    with SearchProgress("round 2 search", total=6, already=2, stream=stream) as shown:
        for number, (solved, level) in enumerate([(True, "1"), (True, "1"), (False, "2")]):
            shown(summary(number, solved=solved, level=level))
        state = shown.state()
    assert state["figures"]["solved"] == {"1": [2, 2], "2": [0, 1], "all": [2, 3]}
    assert state["figures"]["outcomes"] == {"live": 18, "answer": 9, "code_error": 3}
    assert (state["done"], state["figures"]["rollouts"], state["figures"]["tokens"]) == (5, 24, 3000)
    assert state["eta_seconds"] == pytest.approx(12 / 3, abs=0.5)  # one is left; the first worker is up for 12 s
    assert state["figures"]["tokens_per_second"] == pytest.approx(3000 / 12, rel=0.1)
    first, last = stream.getvalue().splitlines()
    assert first == "round 2 search: 6 problems, 2 already done"
    for words in (
        "round 2 search: 5/6 ", "solved 67% (level 1 100%, 2 0%)", "24 rollouts", " tok/s",
        "engine 50% busy", "30 steps: 60% live, 30% answer, 10% code_error", "left",
    ):  # fmt: skip
        assert words in last
    assert "answered 100%" in line(shown_of([summary(0, solved=True, test_time=True)]).state())


def shown_of(summaries: list[ProblemSummary]) -> SearchProgress:
    shown = SearchProgress("round 1 evaluation", total=9, already=0, stream=io.StringIO())
    for one in summaries:
        shown(one)
    return shown


def test_plain_lines_come_every_few_seconds_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with TrainingProgress("round 1 policy", stream=stream) as shown:
        for step in range(1, 31):
            now += 1
            shown(TrainProgress(step=step, steps=40, loss=1 / step, tokens=500, seconds=1.0))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 + 3 + 1 and "loading" in lines[0] and "30/40" in lines[-1]
    assert "loss 0.033  500 tok/s" in lines[-1] and "10 s left" in lines[-1]


def test_a_terminal_shows_a_bar_that_is_redrawn() -> None:
    stream = Terminal()
    with SearchProgress("round 1 search", total=2, already=0, stream=stream) as shown:
        shown(summary(0, solved=True, level="[bold]"))
    drawn = stream.getvalue()
    assert "\x1b[?25l" in drawn and drawn.rstrip().endswith("\x1b[?25h")  # the cursor comes back
    assert "━" in drawn and "1/2" in drawn and "level [bold] 100%" in drawn


def test_the_latest_state_is_in_the_run_s_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_kept", None)
    progress.keep_in(tmp_path / "run" / "progress.json", number=3, stage="ppm")
    with pytest.raises(RuntimeError), Progress("round 3 PPM", total=9, stream=io.StringIO()) as shown:
        shown.update(4, loss=0.5)
        raise RuntimeError
    kept = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert (kept["round"], kept["stage"], kept["done"], kept["figures"]) == (3, "ppm", 4, {"loss": 0.5})
    assert time.time() - kept["updated"] < 60


def test_busy_is_the_share_of_the_time_with_at_least_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    busy = Utilisation()
    now = 2.0
    with busy:
        now = 3.0
        with busy:  # a second call at the same time does not count twice
            now = 4.0
        now = 5.0
        assert busy.share == pytest.approx(3 / 5)
    now = 10.0
    assert busy.share == pytest.approx(3 / 10)


# -- rstar status ------------------------------------------------------------------------------------------------------

PLAN = [(0, "base"), (0, "eval"), (1, "search"), (1, "extract"), (1, "eval")]


def begun(folder: Path) -> RunDir:
    """A run whose round 0 is finished, in the middle of round 1's search."""
    run = RunDir(folder)
    for name, seconds in (("base", 100.0), ("eval", 30.0)):
        run.round(0).path.mkdir(parents=True, exist_ok=True)
        run.round(0).finish(name, settings={}, inputs={}, outputs=[], counts={}, seconds=seconds)
    write_json(folder / "driver.json", {"command": "rstar evolve x.yaml", "stages": PLAN})
    state = {"round": 1, "stage": "search", "updated": time.time() - 5, "eta_seconds": 60.0, "title": "round 1 search",
             "done": 1, "total": 4, "already": 0, "seconds": 20.0, "figures": {"rollouts": 8}}  # fmt: skip
    write_json(folder / "progress.json", state)
    with TreeWriter(run.round(1).path / "trees-w0.jsonl.zst") as writer:
        for number in range(3):
            tree = Tree(f"p{number}#0", Problem(f"p{number}", "q", "1"), ("q",))
            tree.complete = number < 2
            writer.append(tree)
    return run


def test_status_of_a_running_run_tells_stage_figures_holder_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(tmp_path)
    run.acquire()
    assert cli.run(["status", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for words in (
        f"running by {socket.gethostname()} pid {os.getpid()} since", "round 0   base 2 min, eval 30 s",
        "round 1   search begun, extract to do, eval to do", "round 1 search: 1/4  8 rollouts", " s ago)",
        "2 finished trees",
    ):  # fmt: skip
        assert words in said
    assert "left in all" not in said  # no extraction has been seen yet
    run.round(0).finish("extract", settings={}, inputs={}, outputs=[], counts={}, seconds=1.0)
    assert cli.run(["status", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["eta_seconds"]) == ("running", pytest.approx(55, abs=30))  # 60 s, some time ago
    assert found["rest_seconds"] == pytest.approx(found["eta_seconds"] + 1 + 30)
    assert found["stages"][3] == {"round": 1, "stage": "search", "state": "begun", "seconds": None, "solved": None}


def test_status_knows_who_is_gone_and_who_cannot_be_seen(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.acquire()
    run.release()
    assert status(tmp_path).state == "idle" and status(tmp_path).holder == ""
    assert "goes on with: rstar evolve x.yaml" in status_text(status(tmp_path))
    since = "since 2020-01-01 00:00:00"
    for holder, state in [(f"{socket.gethostname()} pid 999999999 {since}", "idle"), (f"node7 pid 1 {since}", "held"),
                          (f"{socket.gethostname()} pid {os.getpid()} {since}", "idle")]:  # fmt: skip
        (tmp_path / "lock").write_text(holder)
        assert status(tmp_path).state == state
    with pytest.raises(UserError, match="holds no run"):
        status(tmp_path / "round_00")


def test_a_driver_that_is_turned_away_leaves_the_holder_s_name(tmp_path: Path) -> None:
    run, other = RunDir(tmp_path), RunDir(tmp_path)
    run.acquire()
    with pytest.raises(UserError, match=f"pid {os.getpid()}"):
        other.acquire()
    other.release()
    assert status(tmp_path).state == "running"


def test_status_of_a_finished_run(tmp_path: Path) -> None:
    run = begun(tmp_path)
    for name in ("search", "extract", "eval"):
        counts = {"solved_by_level": {"1": [2, 3], "all": [2, 3]}} if name == "search" else {}
        run.round(1).finish(name, settings={}, inputs={}, outputs=[], counts=counts, seconds=5.0)
    found = status(tmp_path)
    assert (found.state, found.progress, found.rest_seconds) == ("finished", None, None)
    assert "search 5 s (solved 2 of 3)" in status_text(found)
    assert "done is all of: rstar evolve x.yaml" in status_text(found)  # which may be one round only


def test_status_is_light(tmp_path: Path) -> None:
    begun(tmp_path)
    code = f"import sys\nfrom rstar.cli import run\nrun(['status', {str(tmp_path)!r}])\n"
    code += "print([m for m in ('torch', 'numpy', 'transformers', 'ray', 'rstar.sandbox') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("[]")
