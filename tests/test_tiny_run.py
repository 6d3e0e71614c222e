"""The whole recipe on a toy model: two rounds by the command line, killed in the middle, resumed, refused, shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rstar import cli
from rstar.store import index, read_trees

CONFIG = "configs/rstar_math/tiny.yaml"
ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rstar", *arguments]


def rstar(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run whose driver was killed with its stage in the middle of round 1's search."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    arguments = command("evolve", CONFIG, "cluster=inline", f"run.dir={folder}")
    first = subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 1200
    while not (folder.exists() and index(folder / "round_01") and len(index(folder / "round_01")) >= 3):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = {tid: ref for tid, ref in index(folder / "round_01").items() if ref.complete}
    out = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout + out.stderr
    kept = index(folder / "round_01")
    assert all(kept[tid] == ref for tid, ref in done.items()), "a finished problem was searched twice"
    assert "report:" in out.stdout and (folder / "report.html").stat().st_size > 10_000
    return folder


def record(run: Path, number: int) -> dict:
    return json.loads((run / f"round_{number:02d}" / "manifest.json").read_text())["stages"]


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_rows_pairs_and_executed_code_came_out_of_the_trees(run: Path) -> None:
    counts = record(run, 1)["extract"]["counts"]
    assert counts["sft_rows"] >= 1 and counts["pairs"] >= 1
    trees = list(read_trees(run / "round_01"))
    assert len(trees) == 20 and any(node.stdout.strip() for tree in trees for node in tree.nodes)


def test_training_changed_the_parameters_and_every_round_starts_from_the_base(run: Path) -> None:
    base, policy = weights(run / "round_00" / "policy"), weights(run / "round_01" / "policy")
    assert any(not base[name].equal(policy[name]) for name in base)
    ppm = weights(run / "round_01" / "ppm")
    assert "score.weight" in ppm and any(not policy[n].equal(ppm[n]) for n in policy if n in ppm)
    for number in (1, 2):
        inputs = record(run, number)["policy"]["inputs"]
        assert inputs["base"] == record(run, 1)["policy"]["inputs"]["base"]


def test_round_two_searched_with_round_ones_checkpoints(run: Path) -> None:
    trees = list(read_trees(run / "round_02"))
    assert {tree.policy for tree in trees} == {str((run / "round_01" / "policy").resolve())}
    assert {tree.ppm for tree in trees} == {str((run / "round_01" / "ppm").resolve())}
    scored = [n.ppm_value for tree in trees for n in tree.nodes if n.ppm_value is not None]
    assert scored and all(-1 <= value <= 1 for value in scored)


def test_round_two_has_two_seeds_more_rollouts_for_the_unsolved_and_a_second_pass(run: Path) -> None:
    trees = list(read_trees(run / "round_02"))
    by_seed = {seed: [tree for tree in trees if tree.seed == seed] for seed in (0, 1, 2)}
    assert len(by_seed[0]) == len(by_seed[1]) == 20
    solved = {tree.problem.id for tree in trees if tree.solved and tree.seed < 2}
    assert {tree.problem.id for tree in by_seed[2]} == {tree.problem.id for tree in trees} - solved
    assert all(tree.rollouts_done <= (2 if tree.seed == 2 else 8) for tree in trees)
    rows = [json.loads(line) for line in (run / "round_02" / "sft.jsonl").read_text().splitlines()]
    nodes = {tree.tree_id: tree.nodes for tree in trees}
    assert all(nodes[row["tree_id"]][row["node_ids"][-1]].reward == 1.0 for row in rows)


def test_finished_run_says_that_all_is_done(run: Path) -> None:
    before = (run / "round_02" / "manifest.json").read_bytes()
    out = rstar("evolve", CONFIG, "cluster=inline", f"run.dir={run}")
    assert out.returncode == 0 and "all done" in out.stdout
    assert (run / "round_02" / "manifest.json").read_bytes() == before


def test_other_settings_are_refused_and_settings_a_stage_does_not_read_are_free(run: Path) -> None:
    out = rstar("evolve", CONFIG, "cluster=inline", f"run.dir={run}", "search.rollouts=9")
    assert out.returncode == 2 and "search.rollouts: 6 -> 9" in out.stderr and "Traceback" not in out.stderr
    out = rstar(
        "evolve", CONFIG, "cluster=inline", f"run.dir={run}", "rounds.r3.search.rollouts=9", "engine.max_batch=7"
    )
    assert out.returncode == 0 and "all done" in out.stdout


def test_show_prints_a_tree_with_its_figures(run: Path) -> None:
    ids = rstar("show", str(run)).stdout.split()
    solved = next(tree for tree in read_trees(run / "round_02") if tree.solved)
    assert solved.problem.id in ids
    out = rstar("show", str(run), "--problem", solved.problem.id, "--round", "2").stdout
    for word in ("N", "Q", "PPM", "+1", "print(", "boxed"):
        assert word in out
    near = rstar("show", str(run), "--problem", solved.problem.id + "x")
    assert near.returncode == 2 and solved.problem.id in near.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evolve", "configs/none.yaml"], "no config file"),
        (["evolve", CONFIG, "serch.c=1"], "nearest key is search"),
        (["evolve", CONFIG, "problems=gsm8k", "problems.path=none.jsonl"], "none.jsonl"),
        (["evolve", CONFIG, "problems=gsm9k"], "gsm8k"),
        (["evolve", CONFIG, "model=./no-such-folder"], "no-such-folder"),
        (["show", "no-such-run"], "no-such-run"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "evolve":
        arguments = [*arguments, f"run.dir={tmp_path / 'run'}"]
    assert cli.run(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "Traceback" not in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["round", "7", CONFIG], "round"), (["search", CONFIG, "--round", "2"], "no finished stage")],
)
def test_mistake_of_a_stage_is_told_once_by_its_process(arguments: list[str], words: str, tmp_path: Path) -> None:
    out = rstar(*arguments, f"run.dir={tmp_path / 'run'}")
    assert out.returncode == 2 and words in out.stderr
    assert "Traceback" not in out.stderr and len(out.stderr.strip().splitlines()) == 1
