"""Nothing is lost: the fault cases of tests/benchmarks/faults.py. What each does is said there."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rstar.config import EngineSection
from rstar.types import UserError
from tests.benchmarks.faults import CASES, SLOW, Damage, load, undisturbed, write_cases


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed run."""
    folder = tmp_path_factory.mktemp("faults")
    undisturbed(folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_case_ends_as_an_undisturbed_run(base: Path, name: str) -> None:
    assert CASES[name](base) == Damage()


def test_run_is_resumable_from_every_kind_of_write(base: Path) -> None:
    """kill -9 and a full disk at one step of each kind of write; tests.benchmarks.faults takes every single one."""
    for name, case in write_cases(base, every=False).items():
        assert case(base) == Damage(), name


def test_some_hundred_problems_with_random_faults_end_once(base: Path) -> None:
    assert load(base, 300) == Damage()


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_slow_case_ends_as_an_undisturbed_run(base: Path, name: str) -> None:
    assert SLOW[name](base) == Damage()


def test_gpu_that_is_not_there_is_named(tiny_model: Path) -> None:
    from rstar.engines.build import build_policy

    with pytest.raises(UserError, match=r"engine.device=cuda:64, and torch sees \d+ GPUs here"):
        build_policy(EngineSection(kind="hf", device="cuda:64"), str(tiny_model))


TRAINING = """
import dataclasses, os, signal, sys
from pathlib import Path
from rstar import store
from rstar.config import TrainSection
from rstar.training.sft import train_policy
from tests.training_rows import sft_rows

model, out, killed_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
count = 0

def reached(point, path):
    global count
    count += 1
    if count == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)

store.reached = reached
section = TrainSection(epochs=1, batch_size=4, micro_batch_tokens=512, learning_rate=1e-3, save_steps=1)
train_policy(sft_rows(trees=4), model, out, section, seed=1)
print(count)
"""


def train(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TRAINING, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)


@pytest.mark.slow
def test_training_killed_in_its_writes_ends_with_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    whole = train(tiny_model, tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    steps = int(whole.stdout.split()[-1])
    assert steps >= 9, "metrics and checkpoint are written in so many steps"
    for number in range(2, steps + 1, 3):
        out = tmp_path / f"killed-{number}"
        assert train(tiny_model, out, number).returncode == -signal.SIGKILL
        assert train(tiny_model, out, 0).returncode == 0
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (number, name)
