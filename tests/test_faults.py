"""Nothing is lost: the fault cases of tests/benchmarks/faults.py. What each does is said there."""

from __future__ import annotations

from pathlib import Path

import pytest

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
