"""What the results of a run depend on beside its sections: its seed, and what the files that they name hold."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from rstar.config import ModelSection, ProblemsSection, RunSection
from rstar.store import file_digest


def seed_of(run: RunSection) -> dict[str, int]:
    """The part of the run section that a training reads, for its stage's settings."""
    return {"seed": run.seed}


def files_read(problems: ProblemsSection, model: ModelSection) -> dict[str, str]:
    """Digests of the files of problems (a line more would move the held-out set) and of worked examples in the prompt.

    {} where none are named.
    """
    named = {"problems.path": problems.path, "problems.heldout_path": problems.heldout_path}
    named["model.few_shot"] = model.few_shot
    files = {key: Path(path).expanduser() for key, path in named.items() if path}
    return {key: _digest(file, file.stat().st_mtime_ns) for key, file in files.items() if file.is_file()}


@lru_cache
def _digest(file: Path, changed: int) -> str:
    return file_digest(file)
