"""Run folders: manifests written last, stages skipped when complete, refused when made from other settings, locked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rstar.rounds import RoundDir, RunDir, Stage, StageResult, input_digest
from rstar.types import UserError


def stage(
    here: RoundDir, calls: list[str], *, name: str = "extract", settings: dict | None = None, inputs: dict | None = None
) -> Stage:
    def work() -> StageResult:
        calls.append(name)
        here.sft.write_text(f"row {len(calls)}\n")
        return StageResult((here.sft,), {"rows": 1})

    return Stage(here, name, settings or {"top": 2}, lambda: inputs or {"trees": "abc"}, work)


def test_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    calls: list[str] = []
    here = RunDir(tmp_path).round(1)
    first = stage(here, calls).execute()
    again = stage(here, calls).execute()
    assert calls == ["extract"] and again == first
    assert first.outputs["sft.jsonl"] and first.counts == {"rows": 1}


def test_stage_without_its_record_or_its_output_is_run_again(tmp_path: Path) -> None:
    calls: list[str] = []
    here = RunDir(tmp_path).round(1)
    stage(here, calls).execute()
    here.sft.unlink()
    stage(here, calls).execute()
    here.manifest.unlink()
    stage(here, calls).execute()
    assert len(calls) == 3


@pytest.mark.parametrize("damage", ["", "{", '{"stages": {"extract": {"nonsense": 1}}}'])
def test_damaged_manifest_counts_as_not_done_and_says_so(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    here = RunDir(tmp_path).round(1)
    stage(here, calls).execute()
    here.manifest.write_text(damage)
    stage(here, calls).execute()
    assert len(calls) == 2 and "damaged" in capsys.readouterr().out


def test_stage_made_from_other_settings_is_refused_with_the_difference(tmp_path: Path) -> None:
    here = RunDir(tmp_path).round(1)
    stage(here, [], settings={"extract": {"top": 2}}).execute()
    with pytest.raises(UserError, match=r"extract\.top: 2 -> 3"):
        stage(here, [], settings={"extract": {"top": 3}}).execute()
    with pytest.raises(UserError, match="trees: abc -> new"):
        stage(here, [], settings={"extract": {"top": 2}}, inputs={"trees": "new"}).execute()


def test_stage_that_resumes_in_its_middle_is_not_continued_from_other_settings(tmp_path: Path) -> None:
    here = RunDir(tmp_path).round(1)

    def interrupted() -> StageResult:
        raise KeyboardInterrupt

    def search(rollouts: int, work) -> Stage:
        return Stage(here, "search", {"search": {"rollouts": rollouts}}, dict, work, resumes=True)

    with pytest.raises(KeyboardInterrupt):
        search(8, interrupted).execute()
    with pytest.raises(UserError, match=r"search\.rollouts: 8 -> 16"):
        search(16, interrupted).finished()
    assert search(8, interrupted).finished() is None
    search(8, lambda: StageResult((), {})).execute()
    assert not list(here.path.glob(".*started*"))


def test_failure_in_a_stage_leaves_no_record(tmp_path: Path) -> None:
    here = RunDir(tmp_path).round(1)

    def broken() -> StageResult:
        here.sft.write_text("half")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        Stage(here, "extract", {}, dict, broken).execute()
    assert here.record("extract") is None


def test_digest_of_a_stage_changes_with_its_output_and_a_missing_stage_is_named(tmp_path: Path) -> None:
    here = RunDir(tmp_path).round(1)
    with pytest.raises(UserError, match="no finished stage extract"):
        input_digest(here, "extract")
    calls: list[str] = []
    stage(here, calls).execute()
    before = input_digest(here, "extract")
    here.sft.unlink()
    stage(here, calls).execute()  # writes another row
    assert input_digest(here, "extract") != before


def test_one_driver_per_run_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.acquire()
    code = f"from rstar.rounds import RunDir; from pathlib import Path; RunDir(Path({str(run.path)!r})).acquire()"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode and "is in use by" in other.stderr and "pid" in other.stderr
    run.release()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unwritable_run_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RunDir(tmp_path / "file" / "run").acquire()


def test_manifest_is_readable_by_people(tmp_path: Path) -> None:
    here = RunDir(tmp_path).round(2)
    stage(here, []).execute()
    record = json.loads(here.manifest.read_text())
    assert record["round"] == 2 and record["stages"]["extract"]["settings"] == {"top": 2}
