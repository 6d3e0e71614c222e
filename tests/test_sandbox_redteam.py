"""The hostile programs as a whole: with the locks on nothing unexpected happens, with the locks off they escape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rstar.sandbox import probe

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT.parent / "shared" / "data" / "redteam_steps.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not probe().seccomp or not probe().landlock_abi, reason=f"no locks here: {probe().problem}"),
]


def redteam(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.redteam", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_own_attacks_are_denied_with_locks_and_escape_without() -> None:
    output = redteam("--control", "--level", "A")
    assert output.splitlines()[-1] == "36 programs, 0 unexpected", output


@pytest.mark.skipif(not PROGRAMS.exists(), reason="the shared list of hostile programs is not beside this checkout")
def test_no_program_of_the_shared_list_does_anything_unexpected() -> None:
    output = redteam(str(PROGRAMS), "--level", "A")
    assert output.splitlines()[-1].endswith("programs, 0 unexpected"), output
