"""The launchers of rounds/ with a fake srun, scontrol, ray and rstar on PATH: what is run, how it resumes, is requeued,
and stops; and that the real driver stops at a safe point when a scheduler says so."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rstar.store import index
from tests.benchmarks.faults import running

ROOT = Path(__file__).parent.parent
CONFIG = "configs/rstar_math/quickstart.yaml"

AWKWARD = "model.template=<|user|> & \"{question}\" $HOME `id` 'x' \\\\"
LOG = 'echo "$(basename "$0") $*" >>"$LOG"\n'
FAKES = {
    "srun": LOG + 'while [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n',
    "scontrol": LOG + 'if [ "$1" = show ]; then printf "node1\\nnode2\\nnode3\\n"; fi\n',
    "ray": LOG + 'case "$*" in *--block*) exec sleep 60 ;; esac\n'
    'if [ "$1" = job ]; then while [ "$1" != -- ]; do shift; done; shift\n'  # as Ray does: one line, for a shell
    'sh -c "$(python3 -c \'import subprocess, sys; print(subprocess.list2cmdline(sys.argv[1:]))\' "$@")"; fi\n',
    "rstar": '[ "$1" != config ] || { shift; echo "$*" >"$STATE/asked"; echo "$SECTIONS"; exit; }\n'
    + LOG
    + 'until [ "$(grep -c "^ray start" "$LOG")" -ge "${RAYS:-0}" ]; do sleep 0.05; done\n'
    '[ -e "$STATE/wait" ] || exit "${RSTAR_CODE:-0}"\n'
    'trap "rm $STATE/wait; exit 75" USR1 TERM\ntouch "$STATE/running"\nwhile true; do sleep 0.05; done\n',
}


@pytest.fixture
def fakes(tmp_path: Path) -> dict[str, str]:
    """An environment in which every cluster command is a script that writes down how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKES.items():
        (folder / name).write_text("#!/usr/bin/env bash\n" + text)
        (folder / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "RSTAR": "rstar",
        "LOG": str(tmp_path / "log"),
        "STATE": str(tmp_path),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def launch(script: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", f"rounds/{script}", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def calls(env: dict[str, str], name: str = "") -> list[str]:
    lines = Path(env["LOG"]).read_text().splitlines() if Path(env["LOG"]).exists() else []
    return [line for line in lines if line.startswith(name)]


def wait_for(condition: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


LAUNCHERS = sorted(
    str(p.relative_to(ROOT / "rounds"))
    for p in (ROOT / "rounds").rglob("*")
    if p.suffix in (".sh", ".sbatch") and p.name not in ("launch.sh", "environment.sh")
)


@pytest.mark.parametrize("script", LAUNCHERS)
def test_every_launcher_explains_itself_and_runs_nothing_for_help(script: str, fakes: dict[str, str]) -> None:
    out = launch(script, "--help", env=fakes)
    assert out.returncode == 0 and f"rounds/{script}" in out.stdout and "SBATCH" not in out.stdout
    assert len(out.stdout.splitlines()) < 20 and not calls(fakes)


def test_rounds_are_the_recipes_own_and_round_one_brings_the_base_along(fakes: dict[str, str]) -> None:
    assert launch("all.sh", CONFIG, "search.c=1", env=fakes).returncode == 0
    for number in (1, 2, 3, 4):
        assert launch(f"round{number}.sh", CONFIG, "search.c=1", env=fakes).returncode == 0
    rounds = [f"rstar round {number} {CONFIG} search.c=1" for number in (0, 1, 2, 3, 4)]
    assert calls(fakes) == [f"rstar evolve {CONFIG} search.c=1", *rounds]
    assert launch("round2.sh", env=fakes).returncode == 2


@pytest.mark.parametrize("script", ["all.sh", "round2.sh"])
def test_paths_are_the_caller_s_whatever_folder_he_is_in(script: str, fakes: dict[str, str], tmp_path: Path) -> None:
    env = fakes | {"RSTAR": "pwd", "CDPATH": str(ROOT)}  # says where it was started; its arguments do not matter to it
    out = subprocess.run(
        ["bash", ROOT / "rounds" / script, "x.yaml"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert out.stdout == f"{tmp_path}\n", out.stderr


def test_slurm_job_starts_head_then_workers_then_one_driver(fakes: dict[str, str]) -> None:
    env = fakes | {"SLURM_GPUS_ON_NODE": "4", "RAYS": "2", "SECTIONS": "sft:\n  processes: 8\nppm:"}
    out = launch("slurm/rounds.sbatch", "round", "2", CONFIG, "--fresh", "cluster.workers=5", env=env)
    assert out.returncode == 0, out.stderr
    head, others = [line for line in calls(env, "srun") if "ray start" in line]
    assert "--nodelist=node1 ray start --head --node-ip-address=node1 --port=6379" in head
    assert "--nodes=2" in others and "--exclude=node1 ray start --address=node1:6379 --block" in others
    (driver,) = calls(env, "rstar")
    assert driver == (
        f"rstar round 2 {CONFIG} cluster.address=node1:6379 cluster.workers=12 cluster.gpus_per_worker=1"
        " sft.processes=4 ppm.processes=4 --fresh cluster.workers=5"
    )
    assert (Path(env["STATE"]) / "asked").read_text() == f"{CONFIG} cluster.workers=5\n"
    assert not calls(env, "scontrol requeue"), "a finished job came back"


@pytest.mark.parametrize(("gpus", "sections"), [("0", "sft:\nppm:"), ("4", "sft:\nsearch:")])
def test_slurm_job_sets_no_training_that_has_no_gpu_or_that_the_recipe_does_not_know(
    gpus: str, sections: str, fakes: dict[str, str]
) -> None:
    env = fakes | {"SLURM_GPUS_ON_NODE": gpus, "SECTIONS": sections}
    assert launch("slurm/rounds.sbatch", "evolve", CONFIG, env=env).returncode == 0
    (driver,) = calls(env, "rstar")
    assert "processes" not in driver


def slurm_job(env: dict[str, str], number: int) -> int:
    """Run the job until its driver is up, send it a signal as Slurm does (to the batch shell alone)."""
    (Path(env["STATE"]) / "wait").touch()
    job = subprocess.Popen(["bash", "rounds/slurm/rounds.sbatch", "evolve", CONFIG], cwd=ROOT, env=env)
    wait_for((Path(env["STATE"]) / "running").exists)
    job.send_signal(number)
    return job.wait(timeout=60)


def test_slurm_job_requeues_itself_before_the_time_limit_and_resumes(fakes: dict[str, str]) -> None:
    assert slurm_job(fakes, signal.SIGUSR1) == 75
    assert calls(fakes, "scontrol requeue") == ["scontrol requeue 77"]
    assert launch("slurm/rounds.sbatch", "evolve", CONFIG, env=fakes).returncode == 0
    first, second = calls(fakes, "rstar")
    assert first == second, "a requeued job must run the same command"


def test_a_requeued_slurm_job_does_not_begin_afresh(fakes: dict[str, str]) -> None:
    job = ("slurm/rounds.sbatch", "evolve", CONFIG, "search.c=1", "--fresh")
    assert launch(*job, env=fakes).returncode == 0
    assert launch(*job, env=fakes | {"SLURM_RESTART_COUNT": "1"}).returncode == 0
    first, second = calls(fakes, "rstar")
    assert "--fresh" in first and second.split() == [word for word in first.split() if word != "--fresh"]


def test_cancelled_slurm_job_does_not_come_back(fakes: dict[str, str]) -> None:
    assert slurm_job(fakes, signal.SIGTERM) == 75
    assert not calls(fakes, "scontrol requeue")


def test_failed_driver_fails_the_slurm_job(fakes: dict[str, str]) -> None:
    assert launch("slurm/rounds.sbatch", "evolve", CONFIG, env=fakes | {"RSTAR_CODE": "2"}).returncode == 2
    assert not calls(fakes, "scontrol requeue")


def test_slurm_workers_join_a_running_head(fakes: dict[str, str]) -> None:
    job = subprocess.Popen(["bash", "rounds/slurm/workers.sbatch", "node1:6379"], cwd=ROOT, env=fakes)
    wait_for(lambda: calls(fakes, "ray"))
    job.kill()
    job.wait()
    assert calls(fakes, "ray") == ["ray start --address=node1:6379 --block"]


def test_ray_head_worker_and_submission(fakes: dict[str, str]) -> None:
    assert launch("ray/head.sh", "--num-cpus=3", env=fakes).returncode == 0
    assert calls(fakes)[-1] == "ray start --head --port=6379 --dashboard-host=127.0.0.1 --num-cpus=3"
    out = launch("ray/submit.sh", "--rounds", "1 2", CONFIG, "run.dir=/shared/my runs", AWKWARD, env=fakes)
    assert out.returncode == 0, out.stderr
    assert calls(fakes, "rstar") == [
        f"rstar round {number} {CONFIG} cluster.address=auto run.dir=/shared/my runs {AWKWARD}" for number in (1, 2)
    ]
    assert all("--address http://127.0.0.1:8265" in line for line in calls(fakes, "ray job"))


def test_ray_submission_stops_at_the_round_that_failed(fakes: dict[str, str]) -> None:
    out = launch("ray/submit.sh", CONFIG, env=fakes | {"RSTAR_CODE": "75"})
    assert out.returncode == 1 and "the same command resumes" in out.stderr
    assert len(calls(fakes, "rstar")) == 1


# -- the real driver ---------------------------------------------------------------------------------------------------


def evolve(folder: Path, *more: str) -> list[str]:
    """A run without a model, whose search takes half a minute: the driver, its stages and their children are real."""
    problems = folder.parent / "problems.jsonl"
    sums = [{"question": f"What is {i} + {i + 3} + 4?", "answer": str(2 * i + 7)} for i in range(20)]
    problems.write_text("".join(json.dumps(one) + "\n" for one in sums))
    settings = [f"run.dir={folder}", "run.rounds=1", "model=none", "model.step_tokens=false", "cluster=inline"]
    settings += ["problems=file", f"problems.path={problems}", "problems.heldout=0", "warmup.enabled=false"]
    settings += ["engine=simulated", "engine.tokens_per_second=600", "search.trees_in_flight=2", "eval.methods=[]"]
    return ["evolve", "configs/rstar_math/tiny.yaml", *settings, *more]


def descendants(pid: int) -> set[int]:
    import psutil

    return {one.pid for one in psutil.Process(pid).children(recursive=True)}


def finished(folder: Path) -> set[str]:
    return {tid for tid, ref in index(folder / "round_01").items() if ref.complete} if folder.exists() else set()


@pytest.mark.parametrize(
    ("numbers", "code"),
    [((signal.SIGUSR1,), 75), ((signal.SIGINT,), 130), ((signal.SIGINT, signal.SIGINT), 130)],
    ids=["SIGUSR1", "SIGINT", "SIGINT twice"],
)
def test_driver_stops_at_a_safe_point_without_leaving_a_process(
    numbers: tuple[signal.Signals, ...], code: int, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    driver = subprocess.Popen(
        [sys.executable, "-m", "rstar", *evolve(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )
    wait_for(lambda: finished(folder) or driver.poll() is not None, 300)
    assert driver.poll() is None, driver.communicate()
    children = descendants(driver.pid)
    assert len(children) >= 2, "no stage with a sandbox"
    for number in numbers:
        driver.send_signal(number)
        time.sleep(0.02)  # two of a kind at once are one
    _, said = driver.communicate(timeout=180)
    assert driver.returncode == code, said
    assert shlex.join(["rstar", *evolve(folder)]) in said and "Traceback" not in said
    wait_for(lambda: not any(map(running, children)), 30)
    kept = finished(folder)
    assert 0 < len(kept) < 20 and not (folder / "round_01" / "manifest.json").exists()
    assert json.loads((folder / "round_00" / "manifest.json").read_text())["stages"].keys() == {"base", "eval"}
